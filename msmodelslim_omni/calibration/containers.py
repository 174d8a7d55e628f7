"""Open sound and video files with PyAV, whose FFmpeg contains the codecs.

Datasets are untrusted input, so the limits below are checked before and during decoding. Left out on purpose: formats
that read further files or open connections, such as playlists, and formats without a mark of their own in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import QuantError

MAX_PIXELS = 64_000_000  # of a picture or frame
MAX_SECONDS = 600.0
MAX_FRAMES = 100_000  # 600 s at 166 frames/s; frames may have no timestamp

# FFmpeg's names of the formats, recognized by content.
_FORMATS = (
    "wav", "w64", "aiff", "au", "caf", "mp3", "flac", "aac", "ac3", "eac3", "ogg", "amr", "ape", "tta", "wv",
    "mov", "matroska", "avi", "asf", "flv", "mpeg", "mpegts", "mpegvideo", "m4v", "gif",
)  # fmt: skip
_OPTIONS = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}


class UnreadableMedia(QuantError):
    """A file that is not of the kind it is given as: damaged, of an unknown format, or of another kind."""


@contextmanager
def open_container(kind: str, path: Path) -> Iterator[Any]:
    """Open a PyAV container. FFmpeg errors in the body of the `with` become UnreadableMedia that names the file."""
    import av

    try:
        with av.open(str(path), metadata_errors="ignore", options=_OPTIONS) as container:
            yield container
    except (av.error.FFmpegError, ValueError, OSError, EOFError, ArithmeticError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableMedia(f"{kind} {str(path)!r} cannot be decoded: {reason}") from error


def video_streams(container: Any) -> list[Any]:
    """The video streams, without the cover pictures of sound files."""
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise QuantError for a frame of too many pixels."""
    if width * height > MAX_PIXELS:
        raise QuantError(f"video {str(path)!r} has {width} x {height} pixels; the limit is {MAX_PIXELS}")
