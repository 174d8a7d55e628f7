"""Speech before and after: both models answer the same questions aloud, through the same talker.

The complete models run one after another, as in `generate`. The quantized model speaks twice: with the float model's
text, so that the sound differs only by the states that the talker reads, and freely. Two takes of the float model with
different seeds say how far two good renderings of one text lie apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from ..calibration import CalibSample, choose_by_modality, prepare_sample
from ..errors import QuantError
from ..models import MediaProcessor, ModelInputs, SpeakingModel, Spoken, log_mel
from ..quantized import Source, check_memory, check_speech, fill_model, on_device, open_model, write_wav
from ..report import SpokenPair
from ..runtime import Device, Progress, free_modules, out_of_memory_as_error
from .answers import last_question, media_of

DEFAULT_SPEAKER = "Chelsie"
FOLDER = "speech"
# Tokens of a spoken answer: about twenty seconds.
_MAX_NEW_TOKENS = 48
_TAKES = (0, 1)  # seeds


@dataclass(frozen=True)
class _Take:
    text: str
    spoken: Spoken


@dataclass(frozen=True)
class _Before:
    """The float model's answer, and the samples of a second take of its text."""

    first: _Take
    second: torch.Tensor


def check_speech_of(sources: Sequence[Source], speaker: str, device: Device) -> None:
    """Raise QuantError if a model has no speech parts, does not know the speaker, or does not fit into memory."""
    for source in sources:
        check_speech(source, speaker)
        check_memory(source, open_model(source, True), device)


def speak_both(
    float_source: Source,
    quant_source: Source,
    samples: Sequence[CalibSample],
    count: int,
    processor: MediaProcessor,
    *,
    speaker: str,
    seed: int,
    folder: Path | None,
    device: Device,
    progress: Progress,
) -> tuple[SpokenPair, ...]:
    """Let both models answer `count` of the samples aloud, chosen so that no modality is lost by chance.

    folder: for the WAV files, in its folder `speech`; None writes none.
    """
    chosen = choose_by_modality(samples, min(count, len(samples)), seed)
    prompts = [prepare_sample(_without_answer(sample), processor) for sample in chosen]
    rate = check_speech(float_source, speaker).SPEECH_RATE
    with out_of_memory_as_error(device, "omit --speech, or use --device cpu"), torch.inference_mode():
        before = _speak_float(float_source, prompts, processor, speaker, device, progress)
        after = _speak_quantized(quant_source, prompts, before, processor, speaker, device, progress)
    pairs = []
    for number, (sample, float_, (same_text, free, agreement)) in enumerate(zip(chosen, before, after, strict=True), 1):
        first = float_.first
        names = {"float": first.spoken.samples, "quant": free.spoken.samples}
        files = {kind: f"{FOLDER}/{number:02}_{kind}.wav" for kind in names} if folder is not None else {}
        for kind, name in files.items():
            assert folder is not None
            _write(folder / name, names[kind], rate)
        pairs.append(
            SpokenPair(
                where=sample.where,
                question=last_question(sample),
                media=media_of(sample),
                float_text=first.text,
                quant_text=free.text,
                codes=len(first.spoken.likeliest),
                code_agreement=agreement,
                mel_same_text=mel_distance(first.spoken.samples, same_text, rate),
                mel_free=mel_distance(first.spoken.samples, free.spoken.samples, rate),
                mel_takes=mel_distance(first.spoken.samples, float_.second, rate),
                float_seconds=len(first.spoken.samples) / rate,
                quant_seconds=len(free.spoken.samples) / rate,
                float_file=files.get("float", ""),
                quant_file=files.get("quant", ""),
            )
        )
    return tuple(pairs)


def _speak_float(
    source: Source,
    prompts: Sequence[ModelInputs],
    processor: MediaProcessor,
    speaker: str,
    device: Device,
    progress: Progress,
) -> list[_Before]:
    model = _open(source, device, progress)
    answers = []
    for done, prompt in enumerate(prompts, 1):
        inputs = on_device(prompt, device.torch)
        text = model.answer(inputs, source.path, _MAX_NEW_TOKENS, _ignore)
        first = _speak(model, source, inputs, processor, speaker, said=text)
        second = _speak(model, source, inputs, processor, speaker, said=first.spoken.tokens, seed=_TAKES[1])
        answers.append(_Before(first, second.spoken.samples))
        progress.step("speech of the float model", done, len(prompts), "answers")
    del model
    free_modules(device.torch)
    return answers


def _speak_quantized(
    source: Source,
    prompts: Sequence[ModelInputs],
    before: Sequence[_Before],
    processor: MediaProcessor,
    speaker: str,
    device: Device,
    progress: Progress,
) -> list[tuple[torch.Tensor, _Take, float]]:
    """For each prompt: the sound of the float model's text, the free answer, and the agreement of the codes."""
    model = _open(source, device, progress)
    answers = []
    for done, (prompt, float_) in enumerate(zip(prompts, before, strict=True), 1):
        inputs = on_device(prompt, device.torch)
        tokens, codes = float_.first.spoken.tokens, float_.first.spoken.codes
        forced = _speak(model, source, inputs, processor, speaker, said=tokens, codes=codes)
        same_text = _speak(model, source, inputs, processor, speaker, said=tokens)
        text = model.answer(inputs, source.path, _MAX_NEW_TOKENS, _ignore)
        free = same_text if text == tokens else _speak(model, source, inputs, processor, speaker, said=text)
        agreement = share_of_equal(float_.first.spoken.likeliest, forced.spoken.likeliest)
        answers.append((same_text.spoken.samples, free, agreement))
        progress.step("speech of the quantized model", done, len(prompts), "answers")
    del model
    free_modules(device.torch)
    return answers


def _open(source: Source, device: Device, progress: Progress) -> SpeakingModel:
    model = open_model(source, True)
    fill_model(model, source, device, progress)
    return cast(SpeakingModel, model)  # opened with speech


def _speak(
    model: SpeakingModel,
    source: Source,
    inputs: ModelInputs,
    processor: MediaProcessor,
    speaker: str,
    *,
    said: Sequence[int],
    codes: Sequence[int] | None = None,
    seed: int = _TAKES[0],
) -> _Take:
    """Speak a given text. The length of the text limits that of the speech, also for a talker that does not end."""
    pieces: list[str] = []
    length = max(2, len(said))
    spoken = model.speak(inputs, source.path, speaker, length, pieces.append, said=said, codes=codes, seed=seed)
    return _Take("".join(pieces), spoken)


def _ignore(piece: str) -> None:
    """Text is not streamed."""


def _without_answer(sample: CalibSample) -> CalibSample:
    return replace(sample, messages=sample.messages[:-1]) if sample.has_answer else sample


def share_of_equal(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of steps with the same most likely code, over the steps of `before`."""
    equal = sum(a == b for a, b in zip(before, after, strict=False))
    return equal / len(before) if before else 1.0


def mel_distance(a: torch.Tensor, b: torch.Tensor, rate: int) -> float:
    """Mean absolute difference of two log-mel spectrograms in dB, over the frames that both have, from the start."""
    first, second = (log_mel(samples.double().numpy(), rate) for samples in (a, b))
    frames = min(first.shape[1], second.shape[1])
    return float(abs(first[:, :frames] - second[:, :frames]).mean())


def _write(file: Path, samples: torch.Tensor, rate: int) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_wav(file, samples, rate)
    except OSError as error:
        raise QuantError(
            f"the speech cannot be written to {str(file)!r}: {error.strerror or error}", "give another --save_path"
        ) from error
