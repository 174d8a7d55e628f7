"""Media of Qwen2.5: messages with decoded pictures and clips -> the model's inputs, answers told apart from prompts.

By the library's own processor and qwen_omni_utils; the one place that knows how size limits must be handed to each
version of them. What a processor takes besides pictures and frames is its model's own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import within_seconds
from .inputs import MODALITIES, MediaLimits, ModelInputs
from .qwen2_5 import library

Messages = list[dict[str, Any]]

_TEMPLATE_SECONDS = 30  # a program of the checkpoint's, in a sandbox that bounds each loop but not loops in loops

# Pixels below which the library enlarges a video frame.
_SMALLEST_FRAME = 128 * 28 * 28


def open_processor(class_name: str, path: Path, trust_remote_code: bool) -> Any:
    """The library's processor. Raises QuantError where a checkpoint lacks its files, or they are damaged."""
    try:
        return getattr(library(), class_name).from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # what the libraries raise over damaged files has no common class
        raise QuantError(
            f"{path}: the processor (tokenizer, preprocessor_config.json, chat template) cannot be loaded: {error}",
            "fetch the checkpoint's other files too; a data-free recipe (`_minmax`) does without them",
        ) from error


class VisionProcessor:
    """Messages with pictures and clips -> the model's inputs, by the real processor and qwen_omni_utils."""

    def __init__(self, processor: Any, limits: MediaLimits) -> None:
        self._processor = processor
        self._limits = limits

    # --- what a model has of its own ---

    def options(self, messages: Messages, fps: list[float], use_audio_in_video: bool) -> dict[str, Any]:
        """Keyword arguments of the processor besides text, pictures and frames. fps: of each clip, as it was sampled.

        A fresh dict each time: the processor empties what it is given.
        """
        raise NotImplementedError

    def placeholders(self) -> dict[str, str]:
        """The token that stands for one feature of each medium."""
        return {"image": self._processor.image_token, "video": self._processor.video_token}

    # --- what all have in common ---

    def prepare(self, messages: Messages, use_audio_in_video: bool) -> ModelInputs:
        """One sample. Video parts hold a path, audio parts float32 arrays at 16 kHz."""
        import torch
        from qwen_omni_utils import process_vision_info

        prompt, answer, closing = self._rendered(messages)
        visual_messages = [self._with_visual_limits(message) for message in messages]
        images, videos, video_options = process_vision_info(visual_messages, return_video_kwargs=True)
        encoded = self._processor(
            text=prompt,
            images=images,
            videos=videos,
            return_tensors="pt",
            padding=True,
            **self.options(messages, video_options.get("fps") or [], use_audio_in_video),
        )
        tensors = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
        for name in ("video_second_per_grid", "second_per_grid_ts"):
            if name in encoded and not isinstance(encoded[name], torch.Tensor):
                tensors[name] = torch.tensor(encoded[name])
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
            call = partial(self._processor.apply_chat_template, turns, add_generation_prompt=to_answer, tokenize=False)
            try:
                text: str = within_seconds(call, _TEMPLATE_SECONDS)
            except TimeoutError as error:
                raise QuantError(
                    f"the checkpoint's chat template takes more than {_TEMPLATE_SECONDS} s",
                    "fetch chat_template.json again",
                ) from error
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
        if (types := tensors.get("mm_token_type_ids")) is not None:  # transformers 5: 0 is text
            tensors["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(more, dtype=types.dtype)], dim=1)
        return first, first + len(said) + 1

    def _with_visual_limits(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append({**part, **self.pixel_limits("max_pixels")})
            elif part["type"] == "video":
                limits = self.pixel_limits("min_pixels", "max_pixels")
                parts.append({**part, **limits, "fps": self._limits.video_fps})
        return {**message, "content": parts}

    def pixel_limits(self, *names: str) -> dict[str, int]:
        """The asked for bounds under the names the caller's library uses: (smallest,) largest; {} without a limit."""
        largest = self._limits.max_pixels
        if largest is None:
            return {}
        # Half at most: equal bounds leave no multiple of the patch size between them, and the library exceeds both.
        bounds = (min(_SMALLEST_FRAME, largest // 2), largest)
        return dict(zip(names, bounds[-len(names) :], strict=True))

    def _modality(self, ids: Any) -> Any:
        import torch

        modality = torch.zeros(len(ids), dtype=torch.int8)
        for name, token in self.placeholders().items():
            modality[ids == self._processor.tokenizer.convert_tokens_to_ids(token)] = MODALITIES.index(name)
        return modality


def _text_alone(content: Any) -> str:
    """The text of a turn; empty where the turn has media."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else ""
