"""The complete Qwen3-Omni: builds the transformers model on meta, and generates answers in text and speech.

Text is decoded greedily. The talker samples with the defaults of transformers and a fixed seed. Speech needs
transformers 4: version 5 fuses the talker's experts in memory, and this package fills one tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from ..errors import QuantError
from ..storage import load_json_object
from .inputs import ModelInputs
from .qwen2_5 import load_transformers
from .qwen2_5_generate import answer_tokens, build_model, greedy_options, new_tokens, open_tokenizer, text_streamer
from .qwen3_experts import NO_EXPERTS, sparse_mlp, thinker_text
from .qwen3_omni_names import disk_name
from .running import Spoken
from .speech_steps import as_list, watched_steps

FLOAT32_PREFIXES: tuple[str, ...] = ()
SPEECH_RATE = 24_000

# The talker generates 12.5 frames of codes per second. A text token rarely takes more than half a second of speech.
_FRAMES_PER_TOKEN = 7
_MAX_FRAMES = 2048


def has_speech(config: dict[str, Any]) -> bool:
    return config.get("enable_audio_output", True) is True


def without_speech(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "enable_audio_output": False}


def speakers(path: Path) -> list[str]:
    """The names in talker_config.speaker_id, with a capital: this model has no file of voices."""
    talker = load_json_object(path / "config.json").get("talker_config")
    named = talker.get("speaker_id") if isinstance(talker, dict) else None
    if not isinstance(named, dict) or not named:
        raise QuantError(
            f"{path}/config.json has no talker_config.speaker_id, the names of the voices",
            "copy config.json from the float checkpoint",
        )
    return sorted(str(name).capitalize() for name in named)


def mend_placeholder_masks(thinker: Any) -> None:
    """Let one thinker of transformers 4.57 take a picture and a clip in one sample.

    Its masks of media positions have the width of the hidden states. Where pictures and clips are joined, the library
    counts the mask's elements as tokens and fails. Masks of width one broadcast to the same positions everywhere else.
    """
    if hasattr(thinker.model, "language_model"):
        return  # transformers 5
    original = thinker.get_placeholder_mask

    def get_placeholder_mask(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(mask[..., :1] for mask in original(*args, **kwargs))

    thinker.get_placeholder_mask = MethodType(get_placeholder_mask, thinker)


def open_model(config: dict[str, Any], speech: bool) -> OmniModel:
    return OmniModel(config, speech)


class OmniModel:
    """See running.SpeakingModel."""

    def __init__(self, config: dict[str, Any], speech: bool) -> None:
        model_config = copy.deepcopy(config)  # transformers 5 modifies the dict that it gets
        model_config["enable_audio_output"] = speech
        text = thinker_text(config)
        model_config["thinker_config"]["text_config"] = {**text.values, **NO_EXPERTS}

        def build() -> Any:
            self._config = load_transformers().Qwen3OmniMoeConfig.from_dict(model_config)
            module = load_transformers().Qwen3OmniMoeForConditionalGeneration(self._config)
            for layer in _text_model(module.thinker).layers:
                layer.mlp = sparse_mlp(text)
            mend_placeholder_masks(module.thinker)
            return module

        self.module: Any = build_model(config, build)
        if speech and hasattr(self.module.thinker.model, "language_model"):
            raise QuantError(
                "speech of Qwen3-Omni needs transformers 4", "pip install 'transformers<5', or omit --speech"
            )

    def checkpoint_names(self) -> dict[str, str]:
        return {name: disk_name(name) for name in self.module.state_dict()}

    def answer(self, inputs: ModelInputs, path: Path, max_new_tokens: int, on_text: Callable[[str], None]) -> list[int]:
        options = {"use_audio_in_video": inputs.use_audio_in_video}
        return answer_tokens(self.module.thinker, inputs, path, max_new_tokens, on_text, options)

    def speak(
        self,
        inputs: ModelInputs,
        path: Path,
        speaker: str,
        max_new_tokens: int,
        on_text: Callable[[str], None],
        *,
        said: Sequence[int] | None = None,
        codes: Sequence[int] | None = None,
        seed: int = 0,
        on_code: Callable[[int], None] = lambda count: None,
    ) -> Spoken:
        import torch

        tokenizer = open_tokenizer(path)
        steps = watched_steps(codes, self._config.talker_config.codec_eos_token_id, on_code)
        torch.manual_seed(seed)
        options = {f"thinker_{name}": value for name, value in greedy_options(tokenizer, path).items()}
        result, wave = self.module.generate(
            **inputs.tensors,
            **options,
            use_audio_in_video=inputs.use_audio_in_video,
            speaker=speaker,
            thinker_max_new_tokens=max_new_tokens,
            thinker_min_new_tokens=2,  # with one token the talker has nothing to say
            thinker_streamer=text_streamer(tokenizer, on_text),
            talker_max_new_tokens=min(_MAX_FRAMES, _FRAMES_PER_TOKEN * (max_new_tokens + 1)),
            thinker_logits_processor=as_list(watched_steps(said)),
            talker_logits_processor=as_list(steps),
        )
        samples = wave.reshape(-1).float().cpu()
        return Spoken(new_tokens(result, inputs), samples, steps.chosen, steps.likeliest)


def _text_model(thinker: Any) -> Any:
    return getattr(thinker.model, "language_model", thinker.model)
