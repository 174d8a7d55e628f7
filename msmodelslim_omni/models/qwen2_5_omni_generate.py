"""Qwen2.5-Omni as a whole: the library's model without memory for its weights, and its answers in text and speech.

The text is greedy. The talker samples, as the library has it, from a fixed seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import load_json_object
from ..errors import QuantError
from .qwen2_5_omni import _disk_name, _library, _parameters_on_meta, _refuse_depth
from .spec import ModelInputs

SPEECH_PREFIXES: tuple[str, ...] = ("talker.", "token2wav.")
FLOAT32_PREFIXES: tuple[str, ...] = ("token2wav.",)
SPEECH_RATE = 24_000

# The talker makes 50 codes a second; a token of text is seldom spoken for longer than half of one.
_CODES_PER_TOKEN = 24
_MOST_CODES = 4096
_SEED = 0


def speaks(config: dict[str, Any]) -> bool:
    return config.get("enable_audio_output", True) is True


def without_speech(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "enable_audio_output": False}


def speakers(path: Path) -> list[str]:
    holder = _SpeakerHolder()
    _load_speakers(holder, path)
    return sorted(holder.speaker_map)


class _SpeakerHolder:
    """What the library's load_speakers wants of a model."""

    def __init__(self) -> None:
        self.speaker_map: dict[str, Any] = {}


def _load_speakers(model: Any, path: Path) -> None:
    """By the library's own reader, which loads tensors and plain values only."""
    file = path / "spk_dict.pt"
    if not file.is_file():
        raise QuantError(f"{path} holds no spk_dict.pt, the voices", "copy it from the float checkpoint")
    try:
        _library().Qwen2_5OmniForConditionalGeneration.load_speakers(model, str(file))
        known = model.speaker_map.values()
        whole = bool(known) and all(
            isinstance(voice, dict) and {"bos_token", "cond", "ref_mel"} <= set(voice) for voice in known
        )
    except Exception as error:  # a pickle of whatever content, read by torch's safe loader
        raise QuantError(f"{file}: cannot be read: {error}", "copy it from the float checkpoint") from error
    if not whole:
        raise QuantError(f"{file}: does not hold voices of bos_token, cond and ref_mel")


def open_model(config: dict[str, Any], speech: bool) -> OmniModel:
    return OmniModel(config, speech)


class OmniModel:
    """See running.RunnableModel."""

    def __init__(self, config: dict[str, Any], speech: bool) -> None:
        _refuse_depth(config)
        library = _library()
        wanted = copy.deepcopy(config)  # transformers 5 writes into what it is given
        wanted["enable_audio_output"] = speech
        try:
            built = library.Qwen2_5OmniConfig.from_dict(wanted)
            with _parameters_on_meta():
                self.module: Any = library.Qwen2_5OmniForConditionalGeneration(built).eval()
        except Exception as error:  # whatever a config.json of another shape makes the library raise
            raise QuantError(f"config.json: transformers cannot build this model: {error}") from error
        self._config = built

    def slots(self) -> dict[str, str]:
        return {name: _disk_name(name) for name in self.module.state_dict()}

    def answer(self, inputs: ModelInputs, path: Path, max_new_tokens: int, on_text: Callable[[str], None]) -> list[int]:
        tokenizer = _tokenizer(path)
        sequences = self.module.thinker.generate(
            **inputs.tensors,
            use_audio_in_video=inputs.use_audio_in_video,
            max_new_tokens=max_new_tokens,
            **_greedy(tokenizer, path),
            streamer=_streamer(tokenizer, on_text),
        )
        return _new_tokens(sequences, inputs)

    def speak(
        self, inputs: ModelInputs, path: Path, speaker: str, max_new_tokens: int, on_text: Callable[[str], None]
    ) -> tuple[list[int], Any]:
        import torch

        tokenizer = _tokenizer(path)
        _load_speakers(self.module, path)
        talker = self._config.talker_config
        torch.manual_seed(_SEED)
        sequences, wave = self.module.generate(
            **inputs.tensors,
            use_audio_in_video=inputs.use_audio_in_video,
            speaker=speaker,
            thinker_max_new_tokens=max_new_tokens,
            thinker_min_new_tokens=2,  # of a single one the library has no hidden states to speak from
            **{f"thinker_{name}": value for name, value in _greedy(tokenizer, path).items()},
            thinker_streamer=_streamer(tokenizer, on_text),
            talker_max_new_tokens=min(_MOST_CODES, _CODES_PER_TOKEN * (max_new_tokens + 1)),
            talker_eos_token_id=[talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id],
        )
        return _new_tokens(sequences, inputs), wave.reshape(-1).float().cpu()


def _new_tokens(sequences: Any, inputs: ModelInputs) -> list[int]:
    ids = getattr(sequences, "sequences", sequences)[0]
    new: list[int] = ids[inputs.tensors["input_ids"].shape[1] :].tolist()
    return new


def _tokenizer(path: Path) -> Any:
    try:
        return _library().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise QuantError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def _greedy(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Arguments of the thinker's generate: no sampling, and what ends an answer."""
    file = path / "generation_config.json"
    said = load_json_object(file).get("eos_token_id") if file.is_file() else None
    ends = tokenizer.eos_token_id if said is None else said
    return {"do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
