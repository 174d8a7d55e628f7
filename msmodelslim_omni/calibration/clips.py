"""Video clips: frames are decoded one after the other, and each is made smaller before the next is decoded.

A clip of any length takes the memory of one full frame and of its small frames. Not here: which frames a model sees,
and how large; the model's processor decides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QuantError
from ..models import ClipSize, FrameChoice
from . import containers
from .containers import check_pixels, open_container, video_streams

if TYPE_CHECKING:
    import torch


class VideoClip:
    """A video file; see models.Clip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return repr(str(self.path))

    def frames(self, choose: Callable[[ClipSize], FrameChoice]) -> tuple[ClipSize, torch.Tensor]:
        """See models.Clip.

        The number of frames is known only after decoding. It is nearly always that of the file's packets, with which
        one pass suffices.
        """
        size = _promised_size(self.path)
        while True:
            choice = choose(size)
            count, chosen = _decode(self.path, size, choice)
            if chosen is not None and count == size.frames:
                return size, chosen
            if count in (0, size.frames):
                raise QuantError(f"video {self} could not be decoded to the end")
            size = ClipSize(count, size.rate, size.height, size.width)


def sample_frames(path: Path, count: int) -> torch.Tensor:
    """At most `count` frames of a video, from its first to its last: uint8 [frames, 3, height, width]."""
    import torch

    def choose(size: ClipSize) -> FrameChoice:
        indices = torch.linspace(0, size.frames - 1, min(count, size.frames)).round().long().tolist()
        return FrameChoice(indices, lambda frame: frame)

    return VideoClip(path).frames(choose)[1]


def _promised_size(path: Path) -> ClipSize:
    """The clip's size by its packets and its first frame. Headers of webm and mkv have no frame count."""
    with open_container("video", path) as container:
        stream = _stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        frame = next(container.decode(stream), None)
    if not rate or frame is None:
        raise QuantError(f"video {str(path)!r} has no frame rate or no frames")
    check_pixels(path, frame.width, frame.height)  # the header's size may be wrong
    with open_container("video", path) as container:
        packets = sum(bool(packet.size) for packet in container.demux(_stream(container, path)))
    return ClipSize(max(packets, 1), rate, frame.height, frame.width)


def _stream(container: Any, path: Path) -> Any:
    streams = video_streams(container)
    if not streams:
        raise QuantError(f"video {str(path)!r} has no video stream")
    return streams[0]


def _decode(path: Path, size: ClipSize, choice: FrameChoice) -> tuple[int, torch.Tensor | None]:
    """The true number of frames, and the chosen ones; None if the clip ends before the last of them."""
    import torch

    total, filled, chosen = 0, 0, None
    indices = choice.indices
    with open_container("video", path) as container:
        for frame in container.decode(_stream(container, path)):
            check_pixels(path, frame.width, frame.height)
            if filled < len(indices) and indices[filled] == total:
                if (frame.height, frame.width) != (size.height, size.width):
                    raise QuantError(f"video {str(path)!r} changes its frame size")
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                small = choice.change(pixels.permute(2, 0, 1)[None])
                if chosen is None:
                    chosen = torch.empty((len(indices), *small.shape[1:]), dtype=small.dtype)
                while filled < len(indices) and indices[filled] == total:
                    chosen[filled] = small[0]
                    filled += 1
            total += 1
            if total > containers.MAX_FRAMES or (frame.time is not None and frame.time > containers.MAX_SECONDS):
                limits = f"{containers.MAX_SECONDS:.0f} s or {containers.MAX_FRAMES} frames"
                raise QuantError(f"video {str(path)!r} is longer than {limits}")
    return total, chosen if filled == len(indices) else None
