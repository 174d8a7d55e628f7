"""Pictures and clips as Qwen's processors take them: the rules of qwen_omni_utils, applied to one frame at a time.

qwen_omni_utils decodes a complete clip and then resizes all its frames, which takes gigabytes. The frames here are the
same, bit for bit. Left out on purpose: decoding, which a Clip does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import QuantError
from .inputs import Clip, ClipSize, FrameChoice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SampledClip:
    """Frames of a clip, float32 [frames, 3, height, width] of 0 to 255. rate: frames per second of these frames.

    metadata: what processors of Qwen3 take to compute the time of a frame.
    """

    frames: torch.Tensor
    rate: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class FrameRules:
    """fps: frames per second to sample. side: of a visual token in pixels. bounds: smallest and largest number of
    pixels of a frame; None for those of qwen_omni_utils. max_tokens: of all frames of a clip."""

    fps: float
    side: int
    bounds: tuple[int, int] | None
    max_tokens: int


def load_picture(part: dict[str, Any], patch_size: int) -> Any:
    """Decode and resize the picture of a part, whose `image` is a function that decodes it."""
    from qwen_omni_utils import process_vision_info

    message = {"role": "user", "content": [{**part, "image": part["image"]()}]}
    return process_vision_info([message], image_patch_size=patch_size)[0][0]


def load_clip(clip: Clip, rules: FrameRules) -> SampledClip:
    """Sample a clip. Raises QuantError, before the clip is decoded, if it makes too many tokens."""
    chosen: list[int] = []

    def choose(size: ClipSize) -> FrameChoice:
        chosen[:] = frame_indices(size, rules.fps)
        height, width = frame_size(len(chosen), size, rules)
        tokens = len(chosen) // 2 * (height * width // rules.side**2)
        if tokens > rules.max_tokens:
            raise QuantError(
                f"the sample has more than max_tokens {rules.max_tokens} tokens: {len(chosen)} frames of {width} x"
                f" {height} pixels of clip {clip} make {tokens}",
                "shorten the sample, lower max_pixels or video_fps, or raise max_tokens",
            )
        return FrameChoice(list(chosen), lambda frame: _resized(frame, height, width))

    size, frames = clip.frames(choose)
    metadata = {
        "fps": size.rate,
        "frames_indices": chosen,
        "total_num_frames": size.frames,
        "video_backend": "pyav",
    }
    distinct = len(set(chosen))
    return SampledClip(frames.float(), distinct / size.frames * size.rate, metadata)


def frame_indices(size: ClipSize, fps: float) -> list[int]:
    """Indices of the sampled frames, evenly spaced from the first to the last. The only frame of a clip is repeated,
    because models take frames in pairs."""
    import torch
    from qwen_omni_utils.v2_5.vision_process import smart_nframes

    if size.frames == 1:
        return [0, 0]
    count = smart_nframes({"fps": fps}, total_frames=size.frames, video_fps=size.rate)
    indices: list[int] = torch.linspace(0, size.frames - 1, count).round().long().tolist()
    return indices


def frame_size(count: int, size: ClipSize, rules: FrameRules) -> tuple[int, int]:
    """Height and width of the resized frames, multiples of the side of a visual token.

    count: sampled frames, which share qwen_omni_utils' limit for a clip, nine tenths of the longest sequence.
    """
    from qwen_omni_utils.v2_5 import vision_process as library

    token = rules.side**2
    smallest, largest = rules.bounds or (library.VIDEO_MIN_TOKEN_NUM * token, library.VIDEO_MAX_TOKEN_NUM * token)
    share = library.MODEL_SEQ_LEN * rules.side * rules.side * 0.9 / count * library.FRAME_FACTOR
    most = max(min(library.VIDEO_MAX_TOKEN_NUM * token, share), int(smallest * 1.05))
    height, width = library.smart_resize(
        size.height, size.width, factor=rules.side, min_pixels=smallest, max_pixels=min(largest, most)
    )
    if not height * width:
        raise QuantError(
            f"max_pixels {largest} is too small for frames of {size.width} x {size.height} pixels",
            f"raise max_pixels; a token is {token} pixels",
        )
    return int(height), int(width)


def _resized(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One frame, uint8 [1, 3, height, width], resized as qwen_omni_utils resizes all."""
    from torchvision.transforms import InterpolationMode, functional

    resized: torch.Tensor = functional.resize(
        frame, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return resized
