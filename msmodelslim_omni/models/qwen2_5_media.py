"""Media of Qwen2.5: converts messages with decoded pictures and clips to model inputs, and locates the answer.

Uses the processor of transformers and qwen_omni_utils. Only this module knows how each of their versions takes size
limits. Processor arguments other than pictures and frames are defined in the model's own module.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import call_with_timeout
from .frames import FrameRules, SampledClip, load_clip, load_picture
from .inputs import MODALITIES, MediaLimits, ModelInputs
from .qwen2_5 import load_transformers

Messages = list[dict[str, Any]]

_TEMPLATE_SECONDS = 30  # the template is code of the checkpoint; its sandbox limits each loop, but not nested loops

# qwen_omni_utils enlarges video frames that have fewer visual tokens.
_SMALLEST_FRAME_TOKENS = 128


def open_processor(class_name: str, path: Path, trust_remote_code: bool) -> Any:
    """Load the transformers processor. Raises QuantError if its files are missing or damaged."""
    try:
        return getattr(load_transformers(), class_name).from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # damaged files make the libraries raise exceptions of any type
        raise QuantError(
            f"{path}: the processor (tokenizer, preprocessor_config.json, chat template) cannot be loaded: {error}",
            "download the checkpoint's other files too, or use a data-free recipe (`_minmax`)",
        ) from error


class VisionProcessor:
    """Converts messages with pictures and clips to model inputs, with transformers' processor and qwen_omni_utils.

    patch_size: side of the vision tower's patches in pixels; a visual token is 2 x 2 patches.
    """

    patch_size = 14

    def __init__(self, processor: Any, limits: MediaLimits) -> None:
        self._processor = processor
        self._limits = limits

    # --- specific to the model ---

    def options(self, messages: Messages, clips: list[SampledClip], use_audio_in_video: bool) -> dict[str, Any]:
        """Keyword arguments of the processor, except text, pictures and frames.

        Must return a new dict on each call, because the processor removes its entries.
        """
        raise NotImplementedError

    def placeholders(self) -> dict[str, str]:
        """The placeholder token of one feature, by modality."""
        return {"image": self._processor.image_token, "video": self._processor.video_token}

    # --- shared by all models ---

    def text_tokens(self) -> list[int]:
        tokenizer = self._processor.tokenizer
        return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))

    def decode(self, tokens: list[int]) -> str:
        return str(self._processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def prepare(self, messages: Messages, use_audio_in_video: bool) -> ModelInputs:
        """Convert one sample; see inputs.MediaProcessor."""
        import torch

        self._refuse_special_tokens(messages)
        prompt, answer, closing = self._render(messages)
        clips = [self._load_clip(part) for part in _parts(messages, "video")]
        encoded = self._processor(
            text=prompt,
            images=[self._load_picture(part) for part in _parts(messages, "image")] or None,
            videos=[clip.frames for clip in clips] or None,
            return_tensors="pt",
            padding=True,
            **self.options(messages, clips, use_audio_in_video),
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
                "shorten the sample, lower max_pixels or video_fps, or raise max_tokens",
            )
        return ModelInputs(tensors, use_audio_in_video, self._modality(ids), span)

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, str, str]:
        """Render the chat template. Returns the prompt, the answer in the last turn, and the text that ends that turn.

        The answer is separated only if the rendered conversation equals generation prompt + answer + closing text.
        Otherwise all text is returned as the prompt.
        """

        def render(turns: list[dict[str, Any]], add_prompt: bool) -> str:
            call = partial(self._processor.apply_chat_template, turns, add_generation_prompt=add_prompt, tokenize=False)
            try:
                text: str = call_with_timeout(call, _TEMPLATE_SECONDS)
            except TimeoutError as error:
                raise QuantError(
                    f"the checkpoint's chat template takes more than {_TEMPLATE_SECONDS} s",
                    "download chat_template.json again",
                ) from error
            return text

        if messages[-1]["role"] != "assistant":
            return render(messages, True), "", ""
        conversation, prompt = render(messages, False), render(messages[:-1], True)
        answer = _text_only(messages[-1]["content"])
        closing = conversation.removeprefix(prompt + answer)
        if not answer or closing in ("", conversation):
            return conversation, "", ""
        return prompt, answer, closing

    def _append_answer(self, tensors: dict[str, Any], answer: str, closing: str) -> tuple[int, int] | None:
        """Append the answer's tokens to the prompt. Returns their positions, including the token that ends the turn.

        The answer is tokenized separately, as in generation: in the complete text, a token may span the end of the
        prompt and an answer that starts with a line break.
        """
        import torch

        if not answer:
            return None
        answer_ids, closing_ids = (
            self._processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, closing)
        )
        first = tensors["input_ids"].shape[1]
        added = torch.tensor([[*answer_ids, *closing_ids]], dtype=tensors["input_ids"].dtype)
        tensors["input_ids"] = torch.cat([tensors["input_ids"], added], dim=1)
        tensors["attention_mask"] = torch.cat([tensors["attention_mask"], torch.ones_like(added)], dim=1)
        if (types := tensors.get("mm_token_type_ids")) is not None:  # transformers 5: 0 is text
            tensors["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(added, dtype=types.dtype)], dim=1)
        return first, first + len(answer_ids) + 1

    def _refuse_special_tokens(self, messages: Messages) -> None:
        """Raise QuantError for text that the tokenizer would take for placeholders of media or for ends of turns."""
        special = {*self._processor.tokenizer.all_special_tokens, *self.placeholders().values()}
        texts = [message["content"] for message in messages if isinstance(message["content"], str)]
        for text in [*texts, *(part["text"] for part in _parts(messages, "text"))]:
            if found := sorted(token for token in special if token in text):
                raise QuantError(
                    f"a text holds {', '.join(found[:3])}, which the tokenizer does not take as text",
                    "remove it; name media files under image, audio or video, and write turns as messages",
                )

    def _load_picture(self, part: dict[str, Any]) -> Any:
        return load_picture({**part, **self.pixel_limits("max_pixels")}, self.patch_size)

    def _load_clip(self, part: dict[str, Any]) -> SampledClip:
        limits = self.pixel_limits("min_pixels", "max_pixels")
        bounds = (limits["min_pixels"], limits["max_pixels"]) if limits else None
        rules = FrameRules(self._limits.video_fps, 2 * self.patch_size, bounds, self._limits.max_tokens)
        return load_clip(part["video"], rules)

    def pixel_limits(self, *names: str) -> dict[str, int]:
        """Pixel limits under the given names, (smallest,) largest; {} if there is no limit."""
        largest = self._limits.max_pixels
        if largest is None:
            return {}
        # At most half: between equal bounds there may be no multiple of the patch size, and the result exceeds both.
        smallest = _SMALLEST_FRAME_TOKENS * (2 * self.patch_size) ** 2
        bounds = (min(smallest, largest // 2), largest)
        return dict(zip(names, bounds[-len(names) :], strict=True))

    def _modality(self, ids: Any) -> Any:
        import torch

        modality = torch.zeros(len(ids), dtype=torch.int8)
        for name, token in self.placeholders().items():
            modality[ids == self._processor.tokenizer.convert_tokens_to_ids(token)] = MODALITIES.index(name)
        return modality


def _parts(messages: Messages, kind: str) -> list[dict[str, Any]]:
    """The parts of a kind of media, in order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] == kind]


def _text_only(content: Any) -> str:
    """The text of a turn; empty if the turn contains media."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else ""
