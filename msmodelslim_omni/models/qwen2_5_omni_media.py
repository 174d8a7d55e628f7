"""Qwen2.5-Omni's media: messages with decoded pictures, sounds and clips -> the thinker's inputs.

The one place that knows how sounds and `use_audio_in_video` must be handed to each version of the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .inputs import MediaLimits
from .qwen2_5_media import Messages, VisionProcessor, open_processor


def open_media_processor(path: Path, limits: MediaLimits, trust_remote_code: bool) -> OmniMediaProcessor:
    return OmniMediaProcessor(open_processor("Qwen2_5OmniProcessor", path, trust_remote_code), limits)


class OmniMediaProcessor(VisionProcessor):
    """With their sound used, video parts hold it as an array under `sound`. All three places that must know
    `use_audio_in_video` (loading, processor, model) are served from here; forgetting one raises nothing and gives wrong
    positions.
    """

    def options(self, messages: Messages, fps: list[float], use_audio_in_video: bool) -> dict[str, Any]:
        """fps is one value a call; the size must be given here too, since the processor's own default would enlarge
        what was fetched smaller.
        """
        sounds = list(_sounds(messages, use_audio_in_video))
        videos: dict[str, Any] = {"do_sample_frames": False}
        if fps:
            videos["fps"] = fps[0]
        if size := self.pixel_limits("shortest_edge", "longest_edge"):
            videos["size"] = size
        options: dict[str, Any] = {"audio": [sound for sound, _ in sounds] or None, "videos_kwargs": videos}
        if not _names_video_sounds(type(self._processor)):
            videos["use_audio_in_video"] = use_audio_in_video
        elif use_audio_in_video:
            options |= {"load_audio_from_video": True, "audio_from_video_indices": [video for _, video in sounds]}
        return options

    def placeholders(self) -> dict[str, str]:
        return {**super().placeholders(), "audio": self._processor.audio_token}


def _text_alone(content: Any) -> str:
    """The text of a turn; empty where the turn has media."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else ""


def _names_video_sounds(processor_class: type) -> bool:
    """Whether the processor is told which sound belongs to which video (transformers 5), by its typed arguments."""
    arguments = getattr(processor_class, "valid_processor_kwargs", None)
    return "load_audio_from_video" in getattr(arguments, "__annotations__", {})


def _sounds(messages: list[dict[str, Any]], use_audio_in_video: bool) -> Iterator[tuple[np.ndarray, int | None]]:
    """Sounds in the order of their tokens, each with the index of the video it belongs to, or None."""
    video = -1
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            video += part["type"] == "video"
            if part["type"] == "audio":
                yield part["audio"], None
            elif part["type"] == "video" and use_audio_in_video:
                yield part["sound"], video
