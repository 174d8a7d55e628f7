"""Media of Qwen2.5-Omni: converts messages with decoded pictures, sounds and clips to inputs of the thinker.

Only this module knows how each version of the processor takes sounds and `use_audio_in_video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .frames import SampledClip
from .inputs import MediaLimits
from .qwen2_5_media import Messages, VisionProcessor, open_processor


def open_media_processor(path: Path, limits: MediaLimits, trust_remote_code: bool) -> OmniMediaProcessor:
    return OmniMediaProcessor(open_processor("Qwen2_5OmniProcessor", path, trust_remote_code), limits)


class OmniMediaProcessor(VisionProcessor):
    """Media processor with audio. With `use_audio_in_video`, video parts hold their audio track under `sound`.

    Loading, processor and model must agree on `use_audio_in_video`, or positions are silently wrong. This class passes
    the flag to all three.
    """

    def options(self, messages: Messages, clips: list[SampledClip], use_audio_in_video: bool) -> dict[str, Any]:
        """Audio and video arguments. The processor takes one fps per call.

        Without an explicit size, the processor's default would enlarge the downscaled frames.
        """
        sounds = list(_sounds(messages, use_audio_in_video))
        videos: dict[str, Any] = {"do_sample_frames": False}
        if clips:
            videos["fps"] = clips[0].rate
        if size := self.pixel_limits("shortest_edge", "longest_edge"):
            videos["size"] = size
        options: dict[str, Any] = {"audio": [sound for sound, _ in sounds] or None, "videos_kwargs": videos}
        if not _takes_video_sound_indices(type(self._processor)):
            videos["use_audio_in_video"] = use_audio_in_video
        elif use_audio_in_video:
            options |= {"load_audio_from_video": True, "audio_from_video_indices": [video for _, video in sounds]}
        return options

    def placeholders(self) -> dict[str, str]:
        return {**super().placeholders(), "audio": self._processor.audio_token}


def _takes_video_sound_indices(processor_class: type) -> bool:
    """Whether the processor takes the video index of each sound (transformers 5), according to its typed arguments."""
    arguments = getattr(processor_class, "valid_processor_kwargs", None)
    return "load_audio_from_video" in getattr(arguments, "__annotations__", {})


def _sounds(messages: list[dict[str, Any]], use_audio_in_video: bool) -> Iterator[tuple[np.ndarray, int | None]]:
    """Sounds in the order of their tokens, each with the index of its video, or None for a separate sound."""
    video = -1
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            video += part["type"] == "video"
            if part["type"] == "audio":
                yield part["audio"], None
            elif part["type"] == "video" and use_audio_in_video:
                yield part["sound"], video
