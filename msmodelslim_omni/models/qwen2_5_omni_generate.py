"""The complete Qwen2.5-Omni: builds the transformers model on meta, and generates answers in text and speech.

Text is decoded greedily. The talker samples with the defaults of transformers and a fixed seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import QuantError
from .inputs import ModelInputs
from .qwen2_5 import load_transformers
from .qwen2_5_generate import (
    answer_tokens,
    build_model,
    greedy_options,
    new_tokens,
    open_tokenizer,
    text_streamer,
)
from .qwen2_5_omni_names import disk_name
from .running import Spoken
from .speech_steps import as_list, watched_steps

FLOAT32_PREFIXES: tuple[str, ...] = ("token2wav.",)
SPEECH_RATE = 24_000

# The talker generates 50 codes per second. A text token rarely takes more than half a second of speech.
_CODES_PER_TOKEN = 24
_MAX_CODES = 4096
# With forced codes only the talker's choices matter, not the sound.
_COARSE_STEPS = 2


def has_speech(config: dict[str, Any]) -> bool:
    return config.get("enable_audio_output", True) is True


def without_speech(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "enable_audio_output": False}


def speakers(path: Path) -> list[str]:
    holder = _SpeakerHolder()
    _load_speakers(holder, path)
    return sorted(holder.speaker_map)


class _SpeakerHolder:
    """Stands in for the model in transformers' load_speakers, which only fills speaker_map."""

    def __init__(self) -> None:
        self.speaker_map: dict[str, Any] = {}


def _load_speakers(model: Any, path: Path) -> None:
    """Load spk_dict.pt with the reader of transformers, which accepts tensors and plain values only."""
    file = path / "spk_dict.pt"
    if not file.is_file():
        raise QuantError(f"{path} has no spk_dict.pt, the file with the voices", "copy it from the float checkpoint")
    try:
        load_transformers().Qwen2_5OmniForConditionalGeneration.load_speakers(model, str(file))
        voices = model.speaker_map.values()
        is_valid = bool(voices) and all(
            isinstance(voice, dict) and {"bos_token", "cond", "ref_mel"} <= set(voice) for voice in voices
        )
    except Exception as error:  # an arbitrary pickle makes torch's safe loader raise exceptions of any type
        raise QuantError(f"{file}: cannot be read: {error}", "copy it from the float checkpoint") from error
    if not is_valid:
        raise QuantError(f"{file}: has no voices with bos_token, cond and ref_mel", "copy it from the float checkpoint")


def open_model(config: dict[str, Any], speech: bool) -> OmniModel:
    return OmniModel(config, speech)


class OmniModel:
    """See running.SpeakingModel."""

    def __init__(self, config: dict[str, Any], speech: bool) -> None:
        model_config = copy.deepcopy(config)  # transformers 5 modifies the dict that it gets
        model_config["enable_audio_output"] = speech

        def build() -> Any:
            self._config = load_transformers().Qwen2_5OmniConfig.from_dict(model_config)
            return load_transformers().Qwen2_5OmniForConditionalGeneration(self._config)

        self.module: Any = build_model(config, build)

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
        _load_speakers(self.module, path)
        talker = self._config.talker_config
        steps = watched_steps(codes, talker.tts_codec_end_token_id, on_code)
        torch.manual_seed(seed)
        sequences, wave = self.module.generate(
            **inputs.tensors,
            use_audio_in_video=inputs.use_audio_in_video,
            speaker=speaker,
            thinker_max_new_tokens=max_new_tokens,
            thinker_min_new_tokens=2,  # with one token transformers has no hidden states for the talker
            **{f"thinker_{name}": value for name, value in greedy_options(tokenizer, path).items()},
            thinker_streamer=text_streamer(tokenizer, on_text),
            talker_max_new_tokens=min(_MAX_CODES, _CODES_PER_TOKEN * (max_new_tokens + 1)),
            talker_eos_token_id=[talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id],
            thinker_logits_processor=as_list(watched_steps(said)),
            talker_logits_processor=as_list(steps),
            **({} if codes is None else {"token2wav_num_steps": _COARSE_STEPS}),
        )
        samples = wave.reshape(-1).float().cpu()
        return Spoken(new_tokens(sequences, inputs), samples, steps.chosen, steps.likeliest)
