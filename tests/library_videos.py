"""Videos for qwen_omni_utils, in tests that compare with it: torchvision no longer reads videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msmodelslim_omni.calibration.clips import VideoClip
from msmodelslim_omni.models.inputs import ClipSize, FrameChoice
from msmodelslim_omni.models.torchvision_shim import ensure_torchvision_imports


def read_video(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """All frames at their full size, then those that the library's rule chooses; a reader of qwen_omni_utils."""

    from qwen_omni_utils.v2_5 import vision_process

    def every_frame(size: ClipSize) -> FrameChoice:
        return FrameChoice(list(range(size.frames)), lambda frame: frame)

    size, frames = VideoClip(Path(element["video"])).frames(every_frame)
    count = vision_process.smart_nframes(element, total_frames=size.frames, video_fps=size.rate)
    indices = torch.linspace(0, size.frames - 1, count).round().long().tolist()
    metadata = {"fps": size.rate, "frames_indices": indices, "total_num_frames": size.frames, "video_backend": "pyav"}
    return frames[indices], metadata, count / size.frames * size.rate


def use_in_library() -> None:
    """Replace the reader of qwen_omni_utils that needs torchvision.io.read_video."""
    ensure_torchvision_imports()
    from qwen_omni_utils.v2_5 import vision_process

    vision_process.VIDEO_READER_BACKENDS["torchvision"] = read_video
