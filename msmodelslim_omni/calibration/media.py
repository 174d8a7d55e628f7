"""Pictures, sound and video from local files: probing, and decoding by PyAV and Pillow.

No ffmpeg program is needed: PyAV brings the codecs. Limits are stated below and checked before anything is decoded,
since a dataset is untrusted input. Nothing here opens a URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp"),
    "audio": (".wav", ".mp3", ".flac", ".m4a"),
    "video": (".mp4", ".mkv", ".mov", ".webm"),
}
MAX_FILE_BYTES = 1 << 30
MAX_PIXELS = 64_000_000
MAX_SECONDS = 600.0
MAX_SAMPLING_RATE = 384_000
MAX_FRAMES = 100_000  # 600 s at 166 a second; frames may come without a time
MAX_CLIP_PIXELS = 400_000_000  # of all frames that are taken from one clip
SAMPLING_RATE = 16_000

# What the suffixes stand for, whatever a file holds: others of the libraries' readers run programs (EPS), read further
# files or open connections (playlists, SDP) that the file names.
_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_CONTAINERS = {"format_whitelist": "wav,mp3,flac,mov,matroska", "protocol_whitelist": "file"}


def probe(kind: str, path: Path) -> bool:
    """Check that a file is a readable medium of its kind, decoding as little as shows it.

    Returns whether a video has a sound track (False for the others). Raises QuantError with the reason.
    """
    if path.suffix.lower() not in SUFFIXES[kind]:
        raise QuantError(f"{kind} {str(path)!r}: unsupported suffix; allowed: {' '.join(SUFFIXES[kind])}")
    if not path.is_file():
        raise QuantError(f"{kind} {str(path)!r} does not exist")
    if not path.stat().st_size:  # as of files under /proc, some of which never end
        raise QuantError(f"{kind} {str(path)!r} is empty")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise QuantError(f"{kind} {str(path)!r} is larger than {MAX_FILE_BYTES} bytes")
    if kind == "image":
        _probe_image(path)
        return False
    with _opened(kind, path) as container:
        streams = container.streams.video if kind == "video" else container.streams.audio
        if not streams:
            raise QuantError(f"{kind} {str(path)!r} holds no {kind} stream")
        if container.duration and container.duration / 1e6 > MAX_SECONDS:
            raise QuantError(f"{kind} {str(path)!r} is longer than {MAX_SECONDS:.0f} s")
        if kind == "video":
            # Before a frame of that size is made; a stream of a codec that is not known has no size.
            _refuse_pixels(path, getattr(streams[0], "width", 0), getattr(streams[0], "height", 0))
        frame = next(container.decode(streams[0]), None)
        if frame is None:
            raise QuantError(f"{kind} {str(path)!r} holds no frame")
        if kind == "video":
            _refuse_pixels(path, frame.width, frame.height)
        return kind == "video" and bool(container.streams.audio)


def _refuse_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise QuantError(f"video {str(path)!r} has {width} x {height} pixels; at most {MAX_PIXELS}")


def _probe_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=_PICTURE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise QuantError(f"image {str(path)!r} has {image.width} x {image.height} pixels; at most {MAX_PIXELS}")
            if max(image.size) > 200 * min(image.size):
                raise QuantError(f"image {str(path)!r} is more than 200 times as long as it is wide")
            image.convert("RGB")
    except QuantError:
        raise
    except Exception as error:  # what Pillow's readers raise over a damaged file has no common class
        raise QuantError(f"image {str(path)!r} cannot be decoded: {error}") from error


@contextmanager
def _opened(kind: str, path: Path) -> Iterator[Any]:
    """A PyAV container; what it raises becomes a QuantError that names the file."""
    import av

    try:
        with av.open(str(path), metadata_errors="ignore", options=_CONTAINERS) as container:
            yield container
    except (av.error.FFmpegError, ValueError, OSError, EOFError, ArithmeticError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuantError(f"{kind} {str(path)!r} cannot be decoded: {reason}") from error


def load_sound(path: Path) -> np.ndarray:
    """The first sound track of an audio or video file: float32 [samples], mono, 16 kHz.

    Channels are averaged and the rate is changed by soxr's HQ filter, as librosa.load does it.
    """
    import soxr

    chunks: list[np.ndarray] = []
    rate, length = 0, 0
    with _opened("sound", path) as container:
        if not container.streams.audio:
            raise QuantError(f"{str(path)!r} has no sound track")
        resampler = None
        for frame in container.decode(container.streams.audio[0]):
            if resampler is None:
                rate, resampler = frame.sample_rate, _to_planar_float()
                if not 0 < rate <= MAX_SAMPLING_RATE:
                    raise QuantError(f"{str(path)!r} has {rate} samples a second; at most {MAX_SAMPLING_RATE}")
            chunks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(frame)]
            length += frame.samples
            if length > MAX_SECONDS * rate:  # a header's duration may lie
                raise QuantError(f"{str(path)!r} is longer than {MAX_SECONDS:.0f} s")
        if resampler is not None:
            chunks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(None)]
    samples = np.concatenate(chunks).astype(np.float32) if chunks else np.zeros(0, np.float32)
    if len(samples) == 0:
        raise QuantError(f"{str(path)!r} holds no sound")
    if rate == SAMPLING_RATE:
        return samples
    resampled = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ").astype(np.float32)
    wanted = math.ceil(len(samples) * SAMPLING_RATE / rate)
    return np.pad(resampled[:wanted], (0, max(0, wanted - len(resampled))))


def _to_planar_float() -> Any:
    import av

    return av.AudioResampler(format="fltp")


def load_image(path: Path) -> Any:
    """A decoded picture; its mode is kept, since the processor itself lays transparency on white."""
    from PIL import Image

    try:
        with Image.open(path, formats=_PICTURE_FORMATS) as image:
            image.load()
            return image.convert("RGBA") if image.mode in ("P", "LA") else image.copy()
    except Exception as error:  # see _probe_image
        raise QuantError(f"image {str(path)!r} cannot be decoded: {error}") from error


def ensure_video_reader() -> None:
    """Give qwen_omni_utils a video reader where it has none that works.

    Its reader of last resort calls torchvision.io.read_video, which newer torchvision no longer has; its other two
    need decord or torchcodec, which lack wheels for many machines. Only that broken entry is replaced.
    """
    import torchvision
    from qwen_omni_utils.v2_5 import vision_process

    if not hasattr(torchvision.io, "read_video"):
        vision_process.VIDEO_READER_BACKENDS["torchvision"] = _read_video


def _read_video(element: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
    """Frames of a clip at about `fps`, as qwen_omni_utils' readers return them.

    Returns uint8 [frames, 3, height, width], the metadata dict, and the frame rate after sampling.
    """
    import torch
    from qwen_omni_utils.v2_5.vision_process import smart_nframes

    path = Path(element["video"])
    total, pixels, fps = 0, 0, 0.0
    with _opened("video", path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        for frame in container.decode(stream):  # headers of webm and mkv do not tell how many
            total += 1
            pixels = max(pixels, frame.width * frame.height)  # the header's size may lie
            _refuse_pixels(path, frame.width, frame.height)
            if total > MAX_FRAMES or (frame.time is not None and frame.time > MAX_SECONDS):
                raise QuantError(f"video {str(path)!r} is longer than {MAX_SECONDS:.0f} s or {MAX_FRAMES} frames")
    if not fps or not total:
        raise QuantError(f"video {str(path)!r} tells no frame rate or holds no frame")
    count = smart_nframes(element, total_frames=total, video_fps=fps)
    if count * pixels > MAX_CLIP_PIXELS:
        raise QuantError(f"video {str(path)!r}: {count} frames of {pixels} pixels; at most {MAX_CLIP_PIXELS} in all")
    wanted = torch.linspace(0, total - 1, count).round().long().tolist()
    video = _frames(path, wanted)
    metadata = {"fps": fps, "frames_indices": wanted, "total_num_frames": total, "video_backend": "pyav"}
    return video, metadata, count / total * fps


def _frames(path: Path, wanted: list[int]) -> Any:
    """The frames of the given numbers, rising, as one uint8 tensor [frames, 3, height, width]."""
    import torch

    video, filled = None, 0
    with _opened("video", path) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            while filled < len(wanted) and wanted[filled] == index:
                picture = frame.to_ndarray(format="rgb24")
                if video is None:
                    video = np.empty((len(wanted), *picture.shape), dtype=np.uint8)
                if picture.shape != video.shape[1:]:
                    raise QuantError(f"video {str(path)!r} changes its size within")
                video[filled] = picture
                filled += 1
    if video is None or filled < len(wanted):
        raise QuantError(f"video {str(path)!r} could not be decoded to its end")
    return torch.from_numpy(video).permute(0, 3, 1, 2)
