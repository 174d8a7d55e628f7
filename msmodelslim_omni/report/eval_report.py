"""The evaluation report as JSON for programs and Markdown for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import write_atomically
from ..formats import write_json
from ..models import MODALITIES
from ..storage import load_json_object
from .fidelity import (
    EvalReport,
    Fidelity,
    Interval,
    LayerDrift,
    SpokenPair,
)
from .report import human_bytes, markdown_table

JSON_NAME, PAGE_NAME = "eval_report.json", "eval_report.md"

_INTERVALS = ("kl_mean", "top1", "top5", "perplexity_float", "perplexity_quant")
_FEW_SPOKEN = 10
_EXACT = ("exact_float", "exact_quant", "exact_change")


def write_eval_report(report: EvalReport, folder: Path) -> None:
    """Write eval_report.json and eval_report.md atomically, replacing an existing report."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JSON_NAME, asdict(report))
        write_atomically(folder / PAGE_NAME, as_markdown(report))
    except OSError as error:
        raise QuantError(
            f"the report cannot be written to {str(folder)!r}: {error.strerror or error}", "give another --save_path"
        ) from error


def check_fewer_samples(folder: Path, samples: int, *, overwrite: bool) -> None:
    """Raise QuantError if the folder holds an evaluation of more samples, unless overwrite is set."""
    if overwrite or not (folder / JSON_NAME).is_file():
        return
    try:
        stored = load_json_object(folder / JSON_NAME).get("samples")
    except QuantError:
        return  # a damaged report is replaced
    if isinstance(stored, int) and stored > samples:
        raise QuantError(
            f"{folder / JSON_NAME} holds an evaluation of {stored} samples; this one has {samples}",
            "give another --save_path, or pass --overwrite to replace it",
        )


def read_eval_report(folder: Path) -> EvalReport:
    """Read eval_report.json of a folder. Raises QuantError if it is not an evaluation report."""
    stored = load_json_object(folder / JSON_NAME)
    try:
        return EvalReport(
            **{
                **stored,
                "overall": _read_fidelity(stored["overall"]),
                "by_modality": {name: _read_fidelity(part) for name, part in stored["by_modality"].items()},
                "layers": tuple(LayerDrift(**layer) for layer in stored["layers"]),
                "warnings": tuple(stored["warnings"]),
                "speech": tuple(SpokenPair(**pair) for pair in stored.get("speech", ())),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise QuantError(
            f"{folder / JSON_NAME}: not an evaluation report: {error}", "run `msmodelslim eval` again"
        ) from error


def _read_fidelity(stored: dict[str, Any]) -> Fidelity:
    intervals = {name: Interval(**stored[name]) for name in _INTERVALS}
    exact = {name: None if stored[name] is None else Interval(**stored[name]) for name in _EXACT}
    return Fidelity(**{**stored, **intervals, **exact})


# --- Markdown ------------------------------------------------------------------------------------------------


def figure_rows(
    report: EvalReport, *, all_intervals: bool = True, separator: str = " "
) -> tuple[list[str], list[list[str]]]:
    """Columns (overall, then each modality) and rows of the figures, as text for the terminal and Markdown tables.

    all_intervals: False prints intervals only in the column `overall`. separator: text between figure and interval.
    """
    columns = ["", "overall", *report.by_modality]
    parts = [report.overall, *report.by_modality.values()]
    separators = [separator, *(separator if all_intervals else None for _ in report.by_modality)]

    # One sample alone has no interval.
    separators = [s if part.samples > 1 else None for s, part in zip(separators, parts, strict=True)]

    def row(name: str, figure: str, spec: str) -> list[str]:
        values = [getattr(part, figure) for part in parts]
        return [name, *(_format_cell(v, spec, s) for v, s in zip(values, separators, strict=True))]

    rows = [
        row("samples", "samples", "d"),
        row("positions", "positions", "d"),
        row("KL mean, nats", "kl_mean", ".3g"),
        row("KL p99, nats", "kl_p99", ".3g"),
        row("top-1 agreement", "top1", ".1%"),
        row("top-5 overlap", "top5", ".1%"),
        row("perplexity, float", "perplexity_float", ".4g"),
        row("perplexity, quant", "perplexity_quant", ".4g"),
    ]
    if report.overall.answered:
        rows += [
            row("answered samples", "answered", "d"),
            row("exact, float", "exact_float", ".1%"),
            row("exact, quant", "exact_quant", ".1%"),
            row("exact, change", "exact_change", "+.1%"),
        ]
    rows += [
        row("hidden error", "hidden_error", ".3g"),
        row("hidden cosine", "hidden_cosine", ".5f"),
    ]
    if any(part.embedding_differs for part in parts):  # else 0 and 1 in every column
        rows += [
            row("embedding error", "embedding_error", ".3g"),
            row("embedding cosine", "embedding_cosine", ".5f"),
        ]
    return columns, rows


def _format_cell(value: Interval | float | None, spec: str, separator: str | None) -> str:
    """Format a figure with the format spec `spec`. separator: text before the interval; None omits the interval."""
    if value is None:
        return ""
    if not isinstance(value, Interval):
        return f"{value:{spec}}"
    return f"{value.value:{spec}}" + (f"{separator}[{value.low:{spec}}, {value.high:{spec}}]" if separator else "")


FIGURES_NOTE = (
    "KL(float || quant) of next-token distributions; brackets hold 95 % bootstrap intervals over samples. Column text:"
    " text-only samples. Other columns: samples that contain this modality; a sample with several counts in each."
    " Top-1: positions where both models find the same token most likely. Top-5: how many of their five most likely"
    " tokens both share, in any order; the last of the five are nearly equally likely, so it may be below top-1."
    " Exact: greedy answers that equal the expected answer. Hidden: thinker states that the talker reads; a modality's"
    " column has those of its own tokens. Embeddings have rows only if they differ."
)


def judgement(report: EvalReport) -> str:
    """One or two sentences: what became of the answers, and whether the samples can tell a change from chance."""
    overall = report.overall
    if overall.exact_change is None or overall.exact_float is None or overall.exact_quant is None:
        return (
            f"The most likely next token is the same at {overall.top1.value:.1%} of {overall.positions} positions; the"
            f" samples have no answers to compare."
        )
    sentence = (
        f"Exact answers to {overall.answered} questions: {overall.exact_float.value:.1%} by the float model,"
        f" {overall.exact_quant.value:.1%} by the quantized model; {_describe_change(overall)}."
    )
    changes = {name: part.exact_change for name, part in report.by_modality.items() if part.exact_change is not None}
    told = {
        name: c for name, c in changes.items() if not c.low <= 0 <= c.high and report.by_modality[name].answered > 1
    }
    listed = ", ".join(f"{name} {100 * change.value:+.1f} points" for name, change in told.items())
    return f"{sentence} By modality, these samples show a change for: {listed}." if listed else sentence


def _describe_change(overall: Fidelity) -> str:
    change = overall.exact_change
    assert change is not None
    if overall.answered < 2:
        return "one question cannot tell more"
    span = f"{100 * change.low:+.1f} to {100 * change.high:+.1f} points"
    if change.low <= 0 <= change.high:
        return f"a change of {span} is possible, so these questions cannot tell it from no change"
    return f"a change of {100 * change.value:+.1f} points ({span})"


def as_markdown(report: EvalReport) -> str:
    """Return the text of eval_report.md."""
    schemes = ", ".join(f"{count} Linears {name}" for name, count in report.linears_by_scheme.items())
    tokens = ", ".join(f"{name} {count}" for name, count in report.tokens_by_modality.items())
    columns, rows = figure_rows(report)
    lines = [
        f"# Evaluation report: {Path(report.quant_path).name}, {report.quant_format}",
        "",
        f"- float: `{report.float_path}`, {human_bytes(report.float_bytes)}",
        f"- quantized: `{report.quant_path}`, {human_bytes(report.quant_bytes)}; {schemes or 'float'}",
        f"- dataset: `{report.dataset}`, {report.samples} samples; tokens: {tokens}",
        f"- scored: {report.scored}",
        f"- device {report.device}; seed {report.seed};"
        f" {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"- time {report.seconds:.1f} s; peak memory {human_bytes(report.peak_rss_bytes)}"
        + (f", on the device {human_bytes(report.peak_device_bytes)}" if report.peak_device_bytes else ""),
        "",
        judgement(report),
        "",
        *markdown_table(columns, rows),
        "",
        FIGURES_NOTE,
        "",
        *_speech_lines(report),
        "## Drift of the hidden states after each layer",
        "",
        "Relative error |quantized - float| / |float|, over all tokens and by token modality."
        + (
            " `ordinary`: without the tokens with massive activations, which alone decide the other figures."
            if any(layer.massive for layer in report.layers)
            else ""
        ),
        "",
        *markdown_table(*layer_rows(report)),
        "",
        "## Time",
        "",
        *markdown_table(["phase", "seconds"], [[n, f"{s:.2f}"] for n, s in report.seconds_by_phase.items()]),
    ]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def _speech_lines(report: EvalReport) -> list[str]:
    if not report.speech:
        return []
    columns, rows = speech_rows(report.speech)
    listed = [
        f"- {pair.question or 'media alone'}: float `{pair.float_text}`, quantized `{pair.quant_text}`"
        for pair in report.speech
    ]
    return ["## Speech", "", judge_speech(report.speech), "", *markdown_table(columns, rows), "", *listed, ""]


def speech_rows(speech: Sequence[SpokenPair]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the figures of spoken answers, one row per answer."""
    columns = [
        "answer",
        "codes",
        "same",
        "same text, dB",
        "own text, dB",
        "two float takes, dB",
        "float, s",
        "quant, s",
    ]
    rows = [
        [
            f"{number}",
            f"{pair.codes}",
            f"{pair.code_agreement:.1%}",
            *(f"{distance:.1f}" for distance in (pair.mel_same_text, pair.mel_free, pair.mel_takes)),
            f"{pair.float_seconds:.1f}",
            f"{pair.quant_seconds:.1f}",
        ]
        for number, pair in enumerate(speech, 1)
    ]
    return columns, rows


def judge_speech(speech: Sequence[SpokenPair]) -> str:
    """Two sentences about the spoken answers: agreement of the codes, and the distance beside that of two takes."""
    steps = sum(pair.codes for pair in speech)
    agreement = sum(pair.code_agreement * pair.codes for pair in speech) / max(1, steps)
    shares = [pair.code_agreement for pair in speech]
    same = sum(pair.mel_same_text for pair in speech) / len(speech)
    takes = sum(pair.mel_takes for pair in speech) / len(speech)
    answers = "answer" if len(speech) == 1 else "answers"
    span = f", {min(shares):.1%} to {max(shares):.1%} by answer" if len(speech) > 1 else ""
    compared = "not more than" if same <= takes else "more than"
    return (
        f"Speech, {len(speech)} {answers}: the talker's most likely code is the same at {agreement:.1%} of {steps}"
        f" steps{span}. With the same text the sound lies {same:.1f} dB from the float model's, {compared} two takes of"
        f" the float model from each other ({takes:.1f} dB)."
        + (" So few answers are an impression, not a measurement." if len(speech) < _FEW_SPOKEN else "")
    )


def layer_rows(report: EvalReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the drift table: one row per layer, the error overall and by modality."""
    modalities = [name for name in MODALITIES if any(name in layer.error_by_modality for layer in report.layers)]
    has_massive = any(layer.massive for layer in report.layers)
    rows = []
    for layer in report.layers:
        figures = [layer.error, *([layer.error_ordinary] if has_massive else [])]
        figures += [layer.error_by_modality.get(name) for name in modalities]
        rows.append([f"{layer.index}", *("" if figure is None else f"{figure:.4g}" for figure in figures)])
    return ["layer", "all", *(["ordinary"] if has_massive else []), *modalities], rows
