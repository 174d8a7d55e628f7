"""Qwen2.5-Omni's media: messages with decoded pictures, sounds and clips -> the thinker's inputs.

By the library's own processor and qwen_omni_utils; the one place that knows how `use_audio_in_video` and size limits
must be handed to each version of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError
from .spec import MediaLimits, ModelInputs
from .torchvision_shim import ensure_torchvision_imports

# Pixels below which the library enlarges a video frame.
_SMALLEST_FRAME = 128 * 28 * 28


def open_media_processor(path: Path, limits: MediaLimits, trust_remote_code: bool) -> OmniMediaProcessor:
    return OmniMediaProcessor(path, limits, trust_remote_code)


class OmniMediaProcessor:
    """Messages with decoded media -> the thinker's inputs, by the real processor and qwen_omni_utils."""

    def __init__(self, path: Path, limits: MediaLimits, trust_remote_code: bool) -> None:
        ensure_torchvision_imports()
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Qwen2_5OmniProcessor

        try:
            self._processor: Any = Qwen2_5OmniProcessor.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
            raise QuantError(
                f"{path}: the processor (tokenizer, preprocessor_config.json, chat template) cannot be loaded: {error}",
                "fetch the checkpoint's other files too; a data-free recipe (`_minmax`) does without them",
            ) from error
        self._limits = limits
        self._names_video_sounds = _names_video_sounds(type(self._processor))

    def prepare(self, messages: list[dict[str, Any]], use_audio_in_video: bool) -> ModelInputs:
        """One sample. Audio parts hold float32 arrays at 16 kHz; video parts hold a path and, with their sound used,
        the array under `sound`. All three places that must know `use_audio_in_video` (loading, processor, model)
        are served from here; forgetting one raises nothing and gives wrong positions.
        """
        import torch
        from qwen_omni_utils import process_vision_info

        prompt, answer, closing = self._rendered(messages)
        visual_messages = [self._with_visual_limits(message) for message in messages]
        images, videos, video_options = process_vision_info(visual_messages, return_video_kwargs=True)
        audio = list(_sounds(messages, use_audio_in_video))
        encoded = self._processor(
            text=prompt,
            images=images,
            videos=videos,
            audio=[sound for sound, _ in audio] or None,
            return_tensors="pt",
            padding=True,
            **self._options(video_options.get("fps") or [], audio, use_audio_in_video),
        )
        tensors = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
        if "video_second_per_grid" in encoded and not isinstance(encoded["video_second_per_grid"], torch.Tensor):
            tensors["video_second_per_grid"] = torch.tensor(encoded["video_second_per_grid"])
        span = self._append_answer(tensors, answer, closing)
        ids = tensors["input_ids"][0]
        if len(ids) > self._limits.max_tokens:
            raise QuantError(
                f"the sample has {len(ids)} tokens, more than max_tokens {self._limits.max_tokens}",
                "shorten it, lower max_pixels or video_fps, or raise max_tokens",
            )
        return ModelInputs(tensors, use_audio_in_video, self._modality(ids), span)

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[str, str, str]:
        """The prompt as text, the answer that the last turn may hold, and what closes that turn.

        The two are told apart where the whole conversation is the prompt to generate from, the answer's text and an
        end; else all is prompt.
        """

        def rendered(turns: list[dict[str, Any]], to_answer: bool) -> str:
            text: str = self._processor.apply_chat_template(turns, add_generation_prompt=to_answer, tokenize=False)
            return text

        if messages[-1]["role"] != "assistant":
            return rendered(messages, True), "", ""
        whole, prompt = rendered(messages, False), rendered(messages[:-1], True)
        answer = _text_alone(messages[-1]["content"])
        closing = whole.removeprefix(prompt + answer)
        if not answer or closing in ("", whole):
            return whole, "", ""
        return prompt, answer, closing

    def _append_answer(self, tensors: dict[str, Any], answer: str, closing: str) -> tuple[int, int] | None:
        """Add the answer's tokens to those of its prompt; returns where they stand, with the one that ends the turn.

        Apart, as generation makes them: tokens of the whole text may span the border where an answer begins with a
        line break.
        """
        import torch

        if not answer:
            return None
        said, closed = (
            self._processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, closing)
        )
        first = tensors["input_ids"].shape[1]
        more = torch.tensor([[*said, *closed]], dtype=tensors["input_ids"].dtype)
        tensors["input_ids"] = torch.cat([tensors["input_ids"], more], dim=1)
        tensors["attention_mask"] = torch.cat([tensors["attention_mask"], torch.ones_like(more)], dim=1)
        return first, first + len(said) + 1

    def _with_visual_limits(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append({**part, **self._pixel_limits("max_pixels")})
            elif part["type"] == "video":
                limits = self._pixel_limits("min_pixels", "max_pixels")
                parts.append({**part, **limits, "fps": self._limits.video_fps})
        return {**message, "content": parts}

    def _pixel_limits(self, *names: str) -> dict[str, int]:
        """The asked for bounds under the names the caller's library uses: (smallest,) largest; {} without a limit."""
        largest = self._limits.max_pixels
        if largest is None:
            return {}
        # Half at most: equal bounds leave no multiple of the patch size between them, and the library exceeds both.
        bounds = (min(_SMALLEST_FRAME, largest // 2), largest)
        return dict(zip(names, bounds[-len(names) :], strict=True))

    def _options(
        self, fps: list[float], audio: list[tuple[np.ndarray, int | None]], use_audio_in_video: bool
    ) -> dict[str, Any]:
        """Keyword arguments that differ between transformers 4 and 5.

        A fresh dict each time: the processor empties what it is given. fps is one value a call; the size must be
        given here too, since the processor's own default would enlarge what was fetched smaller.
        """
        videos: dict[str, Any] = {"do_sample_frames": False}
        if fps:
            videos["fps"] = fps[0]
        if size := self._pixel_limits("shortest_edge", "longest_edge"):
            videos["size"] = size
        if not self._names_video_sounds:
            return {"videos_kwargs": {**videos, "use_audio_in_video": use_audio_in_video}}
        options: dict[str, Any] = {"videos_kwargs": videos}
        if use_audio_in_video:
            options |= {
                "load_audio_from_video": True,
                "audio_from_video_indices": [video for _, video in audio],
            }
        return options

    def _modality(self, ids: Any) -> Any:
        import torch

        tokenizer = self._processor.tokenizer
        modality = torch.zeros(len(ids), dtype=torch.int8)
        for index, token in enumerate((tokenizer.image_token, tokenizer.audio_token, tokenizer.video_token), 1):
            modality[ids == tokenizer.convert_tokens_to_ids(token)] = index
        return modality


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
