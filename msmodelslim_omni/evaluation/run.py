"""evaluate(): how close a quantized model is to its float model, layer by layer in bounded memory.

Both models see the same inputs, those of the float model's processor. In memory are, besides the sample under way, the
towers while they run, then one decoder layer in float32 and the next one as it is stored, then a block of lm_head.
Weights are those that a runtime multiplies: with int8 activations the integers, the activations rounded per token as
arithmetic.quantized_matmul does it; else what they dequantize to. All is computed in float32, sums in float64.

What the talker consumes was read from Qwen2_5OmniForConditionalGeneration.generate: at each token of the prompt and of
the answer, but not at the one that ends it, the sum of the thinker's hidden_states[-1], which lie behind the final
norm, and hidden_states[0], the embeddings before the first layer with zeros in place of media. Both are measured so.

Left out on purpose: towers, embedding and lm_head that are quantized, and what a quantized talker loses.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from ..calibration import CalibSet, load_calib_set
from ..errors import QuantError
from ..models import MODALITIES, MediaLimits
from ..quantized import Source, identify, is_quantized, open_source
from ..report import EvalReport, write_eval_report, write_evaluation
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
from .comparable import check_comparable
from .figures import by_modality, fidelity
from .logits import score
from .side_by_side import Sample, SideBySide

Positions = Literal["auto", "answer", "text"]

# What is asked about media that come without a text; the recipes' default.
DEFAULT_TEXT = "Describe this image in detail."

_FEW_SAMPLES = 10
_PIXELS_OF_A_TOKEN = 784


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
    progress: Progress | None = None,
) -> EvalReport:
    """Compare next-token distributions, answers and hidden states of two checkpoints on a dataset.

    quant_path: of any format that is read, whichever tool wrote it, or another float checkpoint.
    positions: the next-token distributions that count. `answer`: those that predict the answer and its end; samples
        without one are left out. `text`: those that predict a token that stands for no media. `auto`: the first where
        a sample has an answer, else the second.
    exact_match: refuse a dataset that has no answers. Where it has any, exact match is reported in any case.
    save_path: a folder for eval_report.json and .md; with None nothing is written.

    A greedy answer, token by token, is exactly the expected one if at every position of it, given what is expected
    before, the likeliest token is the expected next one, its end included; so one forward tells.

    Raises QuantError for whatever the user can mend, before anything is computed where that is possible.
    """
    progress = progress or Progress()
    clock = Clock()
    _check_settings(max_samples, positions, on_bad_sample)
    _check_limits(limits := MediaLimits(max_tokens, max_pixels, video_fps))
    chosen = resolve_device(device)
    progress.say(f"device {chosen.name} ({chosen.reason})")
    exact, other = open_source(float_path), open_source(quant_path)
    with clock("check"):
        warnings = check_comparable(exact, other)
        calib = load_calib_set(
            dataset, DEFAULT_TEXT, exact.model, max_samples=max_samples, seed=seed, on_bad_sample=on_bad_sample
        )
    _check_answers(calib, exact_match, positions)
    with _told_faults(chosen), _work_folder(save_path) as folder:
        pair = SideBySide(exact, other, folder, chosen.torch)
        with clock("towers"):
            pair.prepare(
                [sample for sample in calib.samples if sample.answered or positions != "answer"],
                exact.model.family.open_media_processor(exact.path, limits, trust_remote_code),
                skip_bad=on_bad_sample == "skip",
                needs_answer=positions == "answer",
                progress=progress,
            )
        if exact_match and not any(sample.answer for sample in pair.samples):
            raise QuantError("exact match is asked for, and no sample that could be used has an answer")
        layers = tuple(pair.layers(clock, progress))
        with clock("logits"):
            measured = score(exact, other, pair, positions, chosen.torch, progress)
    with clock("figures"):
        overall = fidelity(measured, range(len(pair.samples)), None, seed)
        groups = by_modality(measured, seed)
    if len(pair.samples) < _FEW_SAMPLES:
        warnings.append(f"{len(pair.samples)} samples: the intervals are rough")
    report = EvalReport(
        model_type=exact.model.model_type,
        float_path=str(exact.path),
        quant_path=str(other.path),
        quant_format=_format_of(other),
        linears_by_scheme=_linears_by_scheme(other),
        dataset=str(calib.index),
        scored=_scored(pair.samples, positions),
        samples=len(pair.samples),
        tokens_by_modality=_tokens_by_modality(pair.samples),
        overall=overall,
        by_modality=groups,
        layers=layers,
        float_bytes=sum(exact.disk_bytes.values()),
        quant_bytes=sum(other.disk_bytes.values()),
        device=chosen.name,
        seed=seed,
        versions=versions(),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_device_memory(chosen.torch),
        warnings=(*warnings, *calib.warnings, *_unanswered(calib, positions), *pair.warnings),
    )
    if save_path is not None:
        write_eval_report(report, Path(save_path))
        write_evaluation(report, Path(save_path), progress)
    return report


def default_save_path(quant_path: Path) -> Path | None:
    """`eval` inside a quantized checkpoint. None for any other, which may be a download that others share."""
    file = quant_path / "config.json"
    if file.is_file() and is_quantized(quant_path, load_json_object(file)):
        return quant_path / "eval"
    return None


# --- before anything is computed -----------------------------------------------------------------------------


def _check_settings(max_samples: int | None, positions: str, on_bad_sample: str) -> None:
    if max_samples is not None and max_samples < 1:
        raise QuantError(f"max_samples is {max_samples}", "give at least 1")
    for name, value, known in (
        ("positions", positions, ("auto", "answer", "text")),
        ("on_bad_sample", on_bad_sample, ("fail", "skip")),
    ):
        if value not in known:
            raise QuantError(f"{name} is {value!r}", f"use {', '.join(known)}")


def _check_limits(limits: MediaLimits) -> None:
    if limits.max_tokens < 1:
        raise QuantError(f"max_tokens is {limits.max_tokens}", "give at least 1")
    if limits.max_pixels is not None and limits.max_pixels < _PIXELS_OF_A_TOKEN:
        raise QuantError(f"max_pixels is {limits.max_pixels}", f"give at least {_PIXELS_OF_A_TOKEN}, one visual token")
    if not 0 < limits.video_fps < float("inf"):
        raise QuantError(f"video_fps is {limits.video_fps}", "give frames a second, e.g. 2.0")


def _check_answers(calib: CalibSet, exact_match: bool, positions: str) -> None:
    if any(sample.answered for sample in calib.samples):
        return
    if exact_match or positions == "answer":
        asked = "exact match is asked for" if exact_match else "--positions answer is asked for"
        raise QuantError(
            f"{asked}, and none of the {len(calib.samples)} samples of {calib.index} has an answer",
            'give samples an "answer", or leave that out',
        )


@contextmanager
def _work_folder(save_path: str | Path | None) -> Iterator[Path]:
    """A folder for what lies between layers, removed in any case.

    It is made inside save_path, so that one that cannot be written is found before anything is computed, and what may
    be gigabytes does not go to a /tmp that lies in memory.
    """
    if save_path is None:
        with tempfile.TemporaryDirectory(prefix="msmodelslim_eval_") as name:
            yield Path(name)
        return
    target = Path(save_path)
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".eval_work_", dir=target)
    except OSError as error:
        raise QuantError(
            f"save_path {str(save_path)!r} cannot be written: {error.strerror or error}",
            "give another folder with --save_path",
        ) from error
    try:
        with work as name:
            yield Path(name)
    except BaseException:
        if made:
            with suppress(OSError):  # something else was put there meanwhile
                target.rmdir()
        raise


@contextmanager
def _told_faults(device: Device) -> Iterator[None]:
    """What memory and disk do to a run, told as faults that the user can mend."""
    try:
        with out_of_memory_as_error(device, "lower max_tokens or max_pixels, or use --device cpu"):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QuantError(
                f"the disk is full while writing hidden states to {error.filename or 'the work folder'}",
                "free some space, take fewer samples, or give --save_path on another disk",
            ) from error
        raise


# --- what the report says of the pair ------------------------------------------------------------------------


def _format_of(source: Source) -> str:
    return identify(source.path, load_json_object(source.path / "config.json"))[0] if source.linears else "float"


def _linears_by_scheme(source: Source) -> dict[str, int]:
    names = [linear.scheme.name for linear in source.linears.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def _scored(samples: list[Sample], positions: str) -> str:
    answered = sum(sample.answer is not None for sample in samples) if positions != "text" else 0
    said = [f"the answer and its end of {answered} samples"] * bool(answered)
    said += [f"every text token of {len(samples) - answered} samples"] * (answered < len(samples))
    return " and ".join(said)


def _unanswered(calib: CalibSet, positions: str) -> list[str]:
    without = sum(not sample.answered for sample in calib.samples)
    return [f"{without} samples without an answer left out"] if positions == "answer" and without else []


def _tokens_by_modality(samples: list[Sample]) -> dict[str, int]:
    counts = torch.cat([sample.modality for sample in samples]).bincount(minlength=len(MODALITIES)).tolist()
    return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}
