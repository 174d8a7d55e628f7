"""evaluate(): compare a quantized model with its float model, layer by layer in bounded memory.

Both models see the same inputs, made by the float model's processor. In memory are the current sample and, one after
another, the towers, one decoder layer in float32 with the next layer as stored, and one block of lm_head.
Weights are those that a runtime multiplies. With int8 activations these are the integers, and activations are rounded
per token as in arithmetic.quantized_matmul; else the dequantized weights. Values are float32, sums float64.

The talker's inputs follow Qwen2_5OmniForConditionalGeneration.generate: for each token of the prompt and the answer
except its end token, the talker reads the sum of the thinker's hidden_states[-1], after the final norm, and
hidden_states[0], the embeddings before the first layer with zeros in place of media. Both are measured.

Omitted on purpose: quantized towers, embeddings and lm_head, and the accuracy loss of a quantized talker.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..calibration import CalibSet, load_calib_set, missing_modality_warnings
from ..errors import QuantError
from ..files import file_sha256, scratch_folder
from ..models import MODALITIES, MediaLimits, MediaProcessor
from ..quantized import Source, identify, is_quantized, open_source
from ..report import (
    EvalReport,
    Fidelity,
    LayerDrift,
    SpokenPair,
    check_fewer_samples,
    stored_report,
    write_eval_report,
    write_evaluation,
)
from ..run import versions
from ..runtime import (
    Clock,
    Device,
    Progress,
    out_of_memory_as_error,
    peak_device_memory,
    peak_rss,
    resolve_device,
)
from ..storage import load_json_object
from .answers import answer_pairs, write_answers
from .figures import compute_fidelity, fidelity_by_modality
from .layer_walk import LayerWalk
from .logits import score
from .previews import shown_answers, shown_speech
from .same_model import check_same_model
from .speech import DEFAULT_SPEAKER, check_speech_of, speak_both
from .stem_pair import Sample, StemPair

Positions = Literal["auto", "answer", "text"]

# The question for media samples without a text; the default of the recipes.
DEFAULT_TEXT = "Describe this image in detail."

_FEW_SAMPLES = 10
_PIXELS_PER_TOKEN = 784


@dataclass(frozen=True)
class _Options:
    """How to evaluate; see evaluate()."""

    limits: MediaLimits
    max_samples: int | None
    positions: str
    exact_match: bool
    on_bad_sample: Literal["fail", "skip"]
    trust_remote_code: bool
    seed: int


def evaluate(
    float_path: str | Path,
    quant_path: str | Path,
    dataset: str,
    *,
    device: str = "auto",
    max_samples: int | None = None,
    max_tokens: int = 8192,
    max_pixels: int | None = 200704,
    video_fps: float = 2.0,
    exact_match: bool = False,
    positions: Positions = "auto",
    seed: int = 0,
    save_path: str | Path | None = None,
    trust_remote_code: bool = False,
    on_bad_sample: Literal["fail", "skip"] = "fail",
    update_card: bool = False,
    overwrite: bool = False,
    answers_file: str | Path | None = None,
    speech: int = 0,
    speaker: str = DEFAULT_SPEAKER,
    progress: Progress | None = None,
) -> EvalReport:
    """Compare next-token distributions, answers and hidden states of two checkpoints on a dataset.

    quant_path: a checkpoint in any supported format, from any tool, or another float checkpoint.
    positions: the next-token distributions to score. `answer`: those that predict the answer and its end; samples
        without an answer are skipped. `text`: those that predict a text token instead of a media token. `auto`: as
        `answer` for samples with an answer, else as `text`.
    exact_match: refuse a dataset without answers. If there are answers, exact match is always reported.
    save_path: a folder for eval_report.json, .md and .html. None: write nothing.
    update_card: write the figures into the model card of the output. overwrite: replace an evaluation of more samples.
    answers_file: JSON Lines of what both models answer; see AnswerPair.
    speech: number of samples that both models answer aloud, as complete models in memory; see speech.py. speaker: its
        voice.

    Greedy decoding gives exactly the expected answer if, at each of its positions and its end, the likeliest token
    after the expected prefix is the expected token. One forward pass is therefore enough.

    Raises QuantError for every fault that the user can fix, if possible before anything is computed.
    """
    progress, clock = progress or Progress(), Clock()
    limits = MediaLimits(max_tokens, max_pixels, video_fps)
    options = _Options(limits, max_samples, positions, exact_match, on_bad_sample, trust_remote_code, seed)
    _check_options(options)
    chosen = resolve_device(device)
    progress.say(f"device {chosen.name} ({chosen.reason})")
    pair = _Pair(open_source(float_path), open_source(quant_path))
    with clock("check"):
        model_warnings = check_same_model(pair.float_source, pair.quant_source)
        calib = _load_samples(dataset, pair, options)
        if speech:
            check_speech_of((pair.float_source, pair.quant_source), speaker, chosen)
    _check_answers(calib, options)
    if save_path is not None:
        check_fewer_samples(Path(save_path), len(calib.samples), overwrite=overwrite)
    with _resource_faults_as_errors(chosen), _work_folder(save_path) as folder:
        source = pair.float_source
        processor = source.model.family.open_media_processor(source.path, limits, trust_remote_code)
        spoken: tuple[SpokenPair, ...] = ()
        if speech:  # first, because it needs the most memory
            with clock("speech"):
                spoken = speak_both(
                    pair.float_source, pair.quant_source, calib.samples, speech, processor, speaker=speaker, seed=seed,
                    folder=None if save_path is None else Path(save_path), device=chosen, progress=progress,
                )  # fmt: skip
        with clock("towers"):
            stems = _run_stems(pair, calib, options, processor, folder, chosen.torch, progress)
            walk = LayerWalk(pair.float_source, pair.quant_source, stems, folder, chosen.torch)
        layers = tuple(walk.layers(clock, progress))
        with clock("logits"):
            measurements = score(pair.float_source, pair.quant_source, stems, walk, positions, chosen.torch, progress)
    with clock("figures"):
        overall = compute_fidelity(measurements, range(len(stems.samples)), None, seed)
        by_modality = fidelity_by_modality(measurements, seed)
    warnings = (*_data_warnings(pair, calib), *_collect_warnings(model_warnings, calib, stems, options))
    results = _Results(stems.samples, layers, overall, by_modality, warnings, spoken)
    report = _make_report(pair, calib, options, results, chosen, clock)
    pairs = answer_pairs(measurements, calib.samples, processor)
    if answers_file is not None:
        write_answers(pairs, Path(answers_file))
        progress.say(f"{len(pairs)} answers: {answers_file}")
    if save_path is not None:
        shown, heard = shown_answers(pairs), shown_speech(spoken, Path(save_path))
        write_eval_report(report, Path(save_path))
        write_evaluation(
            report, shown, Path(save_path), progress, speech=heard, update_card=update_card, overwrite=overwrite
        )
    return report


def default_save_path(quant_path: Path) -> Path | None:
    """The folder `eval` inside a quantized checkpoint. None for a float checkpoint, which may be a shared download."""
    file = quant_path / "config.json"
    if file.is_file() and is_quantized(quant_path, load_json_object(file)):
        return quant_path / "eval"
    return None


# --- checks before anything is computed ----------------------------------------------------------------------


def _check_options(options: _Options) -> None:
    if options.max_samples is not None and options.max_samples < 1:
        raise QuantError(f"max_samples is {options.max_samples}", "give at least 1")
    for name, value, known in (
        ("positions", options.positions, ("auto", "answer", "text")),
        ("on_bad_sample", options.on_bad_sample, ("fail", "skip")),
    ):
        if value not in known:
            raise QuantError(f"{name} is {value!r}", f"use one of {', '.join(known)}")
    _check_limits(options.limits)


def _check_limits(limits: MediaLimits) -> None:
    if limits.max_tokens < 1:
        raise QuantError(f"max_tokens is {limits.max_tokens}", "give at least 1")
    if limits.max_pixels is not None and limits.max_pixels < _PIXELS_PER_TOKEN:
        raise QuantError(f"max_pixels is {limits.max_pixels}", f"give at least {_PIXELS_PER_TOKEN}, one visual token")
    if not 0 < limits.video_fps < float("inf"):
        raise QuantError(f"video_fps is {limits.video_fps}", "give frames per second, e.g. 2.0")


def _check_answers(calib: CalibSet, options: _Options) -> None:
    if any(sample.has_answer for sample in calib.samples):
        return
    if options.exact_match or options.positions == "answer":
        flag = "--exact_match" if options.exact_match else "--positions answer"
        raise QuantError(
            f"{flag} needs answers, but none of the {len(calib.samples)} samples of {calib.index} has one",
            f'give samples an "answer", or omit {flag}',
        )


# --- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    float_source: Source
    quant_source: Source


def _load_samples(dataset: str, pair: _Pair, options: _Options) -> CalibSet:
    return load_calib_set(
        dataset,
        DEFAULT_TEXT,
        pair.float_source.model,
        max_samples=options.max_samples,
        seed=options.seed,
        on_bad_sample=options.on_bad_sample,
    )


def _run_stems(
    pair: _Pair,
    calib: CalibSet,
    options: _Options,
    processor: MediaProcessor,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> StemPair:
    """Run processor, towers and embedding of both models on all samples."""
    needs_answer = options.positions == "answer"
    stems = StemPair(pair.float_source, pair.quant_source, folder, device)
    stems.prepare(
        [sample for sample in calib.samples if sample.has_answer or not needs_answer],
        processor,
        skip_bad=options.on_bad_sample == "skip",
        needs_answer=needs_answer,
        progress=progress,
    )
    if options.exact_match and not any(sample.answer for sample in stems.samples):
        raise QuantError(
            "--exact_match needs answers, but no usable sample has one",
            'give samples an "answer" that is text only, or omit --exact_match',
        )
    return stems


@contextmanager
def _work_folder(save_path: str | Path | None) -> Iterator[Path]:
    """A temporary folder for hidden states, removed in any case; after a kill, by the next evaluation.

    It is inside save_path, so that an unwritable save_path is found before anything is computed, and gigabytes of
    hidden states do not fill a /tmp that is in memory.
    """
    if save_path is None:
        with scratch_folder(Path(tempfile.gettempdir()), "msmodelslim_eval_") as folder:
            yield folder
        return
    target = Path(save_path)
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        stack = ExitStack()
        folder = stack.enter_context(scratch_folder(target, ".eval_work_"))
    except OSError as error:
        raise QuantError(
            f"save_path {str(save_path)!r} cannot be written: {error.strerror or error}",
            "give another folder with --save_path",
        ) from error
    try:
        with stack:
            yield folder
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: another process wrote into the folder
                target.rmdir()
        raise


@contextmanager
def _resource_faults_as_errors(device: Device) -> Iterator[None]:
    """Raise QuantError if memory or disk space runs out."""
    try:
        with out_of_memory_as_error(device, "lower max_tokens or max_pixels, or use --device cpu"):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QuantError(
                f"the disk is full while writing hidden states to {error.filename or 'the work folder'}",
                "free some space, use fewer samples, or give a --save_path on another disk",
            ) from error
        raise


# --- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Results:
    samples: list[Sample]
    layers: tuple[LayerDrift, ...]
    overall: Fidelity
    by_modality: dict[str, Fidelity]
    warnings: tuple[str, ...]
    speech: tuple[SpokenPair, ...]


def _make_report(
    pair: _Pair, calib: CalibSet, options: _Options, results: _Results, device: Device, clock: Clock
) -> EvalReport:
    return EvalReport(
        model_type=pair.float_source.model.model_type,
        float_path=str(pair.float_source.path),
        quant_path=str(pair.quant_source.path),
        quant_format=_format_of(pair.quant_source),
        linears_by_scheme=_linears_by_scheme(pair.quant_source),
        dataset=str(calib.index),
        scored=_describe_scored(results.samples, options.positions),
        samples=len(results.samples),
        tokens_by_modality=_tokens_by_modality(results.samples),
        overall=results.overall,
        by_modality=results.by_modality,
        layers=results.layers,
        float_bytes=sum(pair.float_source.disk_bytes.values()),
        quant_bytes=sum(pair.quant_source.disk_bytes.values()),
        device=device.name,
        seed=options.seed,
        versions=versions(),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_device_memory(device.torch),
        warnings=results.warnings,
        dataset_digest=file_sha256(calib.index),
        speech=results.speech,
    )


def _collect_warnings(
    model_warnings: list[str], calib: CalibSet, stems: StemPair, options: _Options
) -> tuple[str, ...]:
    warnings = list(model_warnings)
    if len(stems.samples) < _FEW_SAMPLES:
        warnings.append(f"{len(stems.samples)} samples: the intervals are rough")
    warnings += calib.warnings
    unanswered = sum(not sample.has_answer for sample in calib.samples)
    if options.positions == "answer" and unanswered:
        warnings.append(f"{unanswered} samples without an answer skipped")
    return (*warnings, *stems.warnings)


def _data_warnings(pair: _Pair, calib: CalibSet) -> list[str]:
    """Warnings where the evaluation says little: on the samples of the calibration, or without a modality."""
    warnings = []
    report = stored_report(pair.quant_source.path) if pair.quant_source.linears else None
    if report is not None and report.dataset_digest and report.dataset_digest == file_sha256(calib.index):
        warnings.append(f"{calib.name} is the calibration data of this model; samples that it has not seen say more")
    modalities = pair.float_source.model.modalities
    return [*warnings, *missing_modality_warnings(calib.samples, modalities, "the figures say nothing about them")]


def _format_of(source: Source) -> str:
    return identify(source.path, load_json_object(source.path / "config.json"))[0] if source.linears else "float"


def _linears_by_scheme(source: Source) -> dict[str, int]:
    names = [linear.scheme.name for linear in source.linears.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def _describe_scored(samples: list[Sample], positions: str) -> str:
    answered = sum(sample.answer is not None for sample in samples) if positions != "text" else 0
    parts = [f"the answer and its end of {answered} samples"] * bool(answered)
    parts += [f"every text token of {len(samples) - answered} samples"] * (answered < len(samples))
    return " and ".join(parts)


def _tokens_by_modality(samples: list[Sample]) -> dict[str, int]:
    counts = torch.cat([sample.modality for sample in samples]).bincount(minlength=len(MODALITIES)).tolist()
    return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}
