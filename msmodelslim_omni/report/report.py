"""The quantization report as JSON for programs and Markdown for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..formats import write_json
from ..models import MODALITIES
from ..storage import load_json_object
from .kept import KEPT_COLUMNS, KeptUnit, kept_rows, kept_text
from .run_memory import RunMemory

# The scheme of a part that an export omits.
LEFT_OUT = "left out"


@dataclass(frozen=True)
class PartSize:
    """One part of the model: its bytes before and after quantization, and its scheme."""

    name: str
    tensors: int
    bytes_before: int
    bytes_after: int
    scheme: str


@dataclass(frozen=True)
class LinearRecord:
    """One Linear. weight_error: |W - Ŵ| / |W|; output_error: |Y - Ŷ| / |Y| on calibration tokens, also by modality.

    Errors are those of this Linear only, on the inputs that it gets in the quantized model. output_error is None in
    data-free runs, which have no inputs.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    weight_error: float | None = None
    output_error: float | None = None
    output_error_by_modality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRecord:
    """One decoder layer: its Linears, the chosen smoothing, and the error of its output against the float layer.

    error_over_plain: measured output error divided by the error of plain rounding, or None if they were not compared;
    1 if the layer fell back to plain rounding. expert_tokens: calibration tokens of each expert, by modality; empty
    without experts and in data-free runs. output_error_ordinary: output_error without the `massive_tokens`, to which
    the layer adds more than 10 times what it adds to the median token of their sample and modality.
    """

    index: int
    linears: tuple[LinearRecord, ...]
    smoothing: tuple[dict[str, Any], ...] = ()
    output_error: float | None = None
    output_error_by_modality: dict[str, float] = field(default_factory=dict)
    error_over_plain: float | None = None
    notes: tuple[str, ...] = ()
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    output_error_ordinary: float | None = None
    massive_tokens: int = 0


@dataclass(frozen=True)
class TuningRecord:
    """Tuning of the whole model after rounding, for `--effort best`.

    kl: mean KL(float || quantized) per position of the samples kept out of it, in nats, before tuning and after each
    epoch. epoch: the one that was taken; 0 for none. samples, held_out: samples that it was tuned and judged on.
    """

    kl: tuple[float, ...]
    epoch: int
    samples: int
    held_out: int


@dataclass(frozen=True)
class Report:
    """The contents of quant_report.json.

    peak_rise_by_phase: increase of peak memory during each phase, in bytes. dataset, dataset_digest: the name of the
    calibration data and the SHA-256 of its index; max_samples: the limit that was set. commands: the words of the
    commands that made the output, with names in place of local folders. fingerprint: everything that the
    output depends on, most of it as digests. Fields with a default are missing in reports
    from earlier versions.
    """

    model_type: str
    model_path: str
    quant_type: str
    recipe: str
    savers: dict[str, str]
    versions: dict[str, str]
    device: str
    seed: int
    data_free: bool
    samples: int
    tokens_by_modality: dict[str, int]
    parts: tuple[PartSize, ...]
    output_bytes: dict[str, int]
    source_bytes: int
    bits_per_weight: float
    layers: tuple[LayerRecord, ...]
    seconds: float
    seconds_by_phase: dict[str, float]
    resumed_at_layer: int
    peak_rss_bytes: int
    peak_device_bytes: int
    warnings: tuple[str, ...]
    peak_rise_by_phase: dict[str, int] = field(default_factory=dict)
    run_memory: RunMemory | None = None
    fingerprint: dict[str, str] = field(default_factory=dict)
    dataset: str = ""
    dataset_digest: str = ""
    max_samples: int | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    distinct_media: dict[str, int] = field(default_factory=dict)  # files with different content, by kind
    own_texts: int = 0  # of the samples, those that the model has written itself
    tuning: TuningRecord | None = None
    expected_rss_bytes: int = 0  # as estimated from the plan and the measured tokens
    expected_device_bytes: int = 0
    compute_dtype: str = ""  # of products in the float model's forwards
    compute_dtype_reason: str = ""
    kv_cache: str = ""  # number format of the rounded KV cache; empty if the recipe does not round it
    kept: tuple[KeptUnit, ...] = ()  # left in a better precision by `keep`, in the order of the choice


def write_report(report: Report, folder: Path) -> None:
    """Write quant_report.json and quant_report.md."""
    write_json(folder / "quant_report.json", asdict(report))
    (folder / "quant_report.md").write_text(as_markdown(report), encoding="utf-8")


def read_report(folder: Path) -> Report:
    """Read quant_report.json of an output."""
    stored = load_json_object(folder / "quant_report.json")
    layers = tuple(layer_record(layer) for layer in stored["layers"])
    parts = tuple(PartSize(**part) for part in stored["parts"])
    memory = RunMemory(**stored["run_memory"]) if stored.get("run_memory") else None
    tuning = stored.get("tuning")
    return Report(
        **{
            **stored,
            "layers": layers,
            "parts": parts,
            "warnings": tuple(stored["warnings"]),
            "run_memory": memory,
            "tuning": tuning_record(tuning) if tuning else None,
            "commands": tuple(tuple(command) for command in stored.get("commands", ())),
            "kept": kept_units(stored.get("kept", ())),
        }
    )


def kept_units(stored: Iterable[dict[str, Any]]) -> tuple[KeptUnit, ...]:
    """Return the units stored in JSON."""
    return tuple(KeptUnit(**{**unit, "linears": tuple(unit["linears"])}) for unit in stored)


def tuning_record(stored: dict[str, Any]) -> TuningRecord:
    """Return the TuningRecord stored in JSON."""
    return TuningRecord(**{**stored, "kl": tuple(stored["kl"])})


def layer_record(stored: dict[str, Any]) -> LayerRecord:
    """Return the LayerRecord stored in the JSON of a part."""
    linears = tuple(LinearRecord(**{**entry, "shape": tuple(entry["shape"])}) for entry in stored["linears"])
    return LayerRecord(
        **{**stored, "linears": linears, "smoothing": tuple(stored["smoothing"]), "notes": tuple(stored["notes"])}
    )


def part_errors(report: Report) -> dict[str, float]:
    """Output error, else weight error, by kind of Linear (q_proj, ...): root mean square over the layers."""
    errors: dict[str, list[float]] = {}
    for layer in report.layers:
        for linear in layer.linears:
            error = linear.output_error if linear.output_error is not None else linear.weight_error
            if error is not None:
                errors.setdefault(linear.name.rsplit(".", 1)[-1], []).append(error)
    return {name: root_mean_square(values) for name, values in errors.items()}


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all columns except the first are aligned right."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, "|---|" + "--:|" * (len(columns) - 1), *body]


def human_bytes(count: float) -> str:
    """Format a number of bytes: 1536 -> `1.50 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def peak_text(measured: int, expected: int) -> str:
    """A measured peak with its estimate: `1.50 GiB (estimated: 1.60 GiB)`."""
    return human_bytes(measured) + (f" (estimated: {human_bytes(expected)})" if expected else "")


RUN_MEMORY_COLUMNS = ("memory for", "float", "now", "change")
RUN_MEMORY_NOTE = "Activations and memory that the runtime reserves for itself are not included."


def run_memory_rows(memory: RunMemory) -> list[list[str]]:
    """Rows of a table with RUN_MEMORY_COLUMNS."""

    def row(purpose: str, before: int, now: int) -> list[str]:
        return [purpose, human_bytes(before), human_bytes(now), f"{now / before - 1:+.0%}" if now != before else ""]

    rows = [row("weights for text output", memory.text_float, memory.text_now)]
    if memory.all_float > memory.text_float:
        rows.append(row("all weights, speech included", memory.all_float, memory.all_now))
    return [*rows, row("KV cache of 1000 tokens", memory.cache, memory.cache_now or memory.cache)]


def as_markdown(report: Report) -> str:
    """Return the text of quant_report.md."""
    lines = [
        f"# Quantization report: {report.model_type}, {report.quant_type}",
        "",
        f"- source: `{report.model_path}`, {human_bytes(report.source_bytes)}",
        *(f"- {saver}: {human_bytes(size)}" for saver, size in report.output_bytes.items()),
        f"- quantized Linears: {report.bits_per_weight:.3f} bits per weight, scales included",
        f"- recipe: `{report.recipe}`; device {report.device}; seed {report.seed}",
        *(f"- command: `{shlex.join(command)}`" for command in report.commands),
        f"- versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"- time {report.seconds:.1f} s; peak memory {peak_text(report.peak_rss_bytes, report.expected_rss_bytes)}"
        + (
            f", on the device {peak_text(report.peak_device_bytes, report.expected_device_bytes)}"
            if report.peak_device_bytes
            else ""
        ),
    ]
    if report.resumed_at_layer:
        lines.append(f"- resumed at layer {report.resumed_at_layer}; times cover only the last run")
    lines += ["", "## Parts", "", "| part | tensors | before | after | scheme |", "|---|--:|--:|--:|---|"]
    lines += [
        f"| {p.name} | {p.tensors} | {human_bytes(p.bytes_before)} | {human_bytes(p.bytes_after)} | {p.scheme} |"
        for p in report.parts
    ]
    if report.run_memory is not None:
        table = markdown_table(RUN_MEMORY_COLUMNS, run_memory_rows(report.run_memory))
        lines += ["", "## Estimated memory at run time", "", *table, "", RUN_MEMORY_NOTE]
    lines += ["", "## Calibration data", "", _calibration_text(report)]
    if report.kept:
        table = markdown_table(KEPT_COLUMNS, kept_rows(report.kept))
        lines += ["", "## Kept in a better precision", "", kept_text(report.kept), "", *table]
    lines += ["", "## Tuning", "", tuning_text(report.tuning, report.own_texts)] if report.tuning is not None else []
    lines += ["", "## Error by layer and Linear", "", _error_note(report), "", *_error_table(report)]
    lines += ["", "## Smoothing", "", *_smoothing_table(report)] if not report.data_free else []
    notes = [f"- layer {layer.index}: {note}" for layer in report.layers for note in layer.notes]
    lines += ["", "## Notes", "", *notes] if notes else []
    lines += ["", "## Time", "", "| phase | seconds |", "|---|--:|"]
    lines += [f"| {phase} | {seconds:.2f} |" for phase, seconds in report.seconds_by_phase.items()]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def count_samples(report: Report) -> tuple[str, str]:
    """The number of given samples, and of the model's own texts beside them: `16 samples` and ` and 58 texts...`."""
    own = report.own_texts
    return f"{report.samples - own} samples", f" and {own} texts of the model itself" if own else ""


def _calibration_text(report: Report) -> str:
    if report.data_free:
        return "None. The recipe is data-free: the run read no dataset and ran no tower."
    total = sum(report.tokens_by_modality.values())
    shares = ", ".join(f"{m} {n} ({n / total:.1%})" for m, n in report.tokens_by_modality.items())
    data = f" of {report.dataset}, index SHA-256 {report.dataset_digest[:16]}" if report.dataset else ""
    files = ", ".join(f"{count} {kind}" for kind, count in report.distinct_media.items())
    media = f" Distinct files: {files}." if files else ""
    given, own = count_samples(report)
    return f"{given}{data}{own}, {total} tokens: {shares}.{media}"


def tuning_text(tuning: TuningRecord, own_texts: int) -> str:
    """What tuning did, in two sentences."""
    own = f", {own_texts} of them texts that the float model wrote itself" if own_texts else ""
    epochs = ", ".join(f"{kl:.4g}" for kl in tuning.kl[1:])
    taken = f"epoch {tuning.epoch} was taken" if tuning.epoch else "none was better, so the model is as it was rounded"
    return (
        f"Scales, norms and biases were tuned on {tuning.samples} samples{own}. On {tuning.held_out} others, KL to the"
        f" float model per position was {tuning.kl[0]:.4g} before and {epochs} after the epochs; {taken}."
    )


def _error_note(report: Report) -> str:
    if report.data_free:
        return "Relative weight error |W - Ŵ| / |W|. Output errors are unknown without calibration data."
    when = " All of it before tuning." if report.tuning is not None else ""
    return (
        "Relative output error |Y - Ŷ| / |Y| of each Linear with its stored weights and run-time arithmetic, on"
        " calibration tokens. `layer`: error of what the layer adds to the residual stream, followed by the error per"
        " modality. `ordinary`, if a layer writes massive activations: its error without the tokens that get them,"
        " which alone decide the other figure. `vs. plain`: the layer's error divided by the error of plain rounding,"
        " each token weighted by 1 / |hidden state|, on samples held out from the search if there are enough." + when
    )


def _error_table(report: Report) -> list[str]:
    kinds = list(dict.fromkeys(linear.name.rsplit(".", 1)[-1] for layer in report.layers for linear in layer.linears))
    modalities = [m for m in MODALITIES if any(m in layer.output_error_by_modality for layer in report.layers)]
    has_comparison = any(layer.error_over_plain is not None for layer in report.layers)
    has_massive = any(layer.massive_tokens for layer in report.layers)
    ordinary = ["ordinary"] if has_massive else []
    columns = [
        *kinds,
        *(["layer", *ordinary, *modalities] if modalities else []),
        *(["vs. plain"] if has_comparison else []),
    ]
    rows = [f"| layer | {' | '.join(columns)} |", "|--:|" + "--:|" * len(columns)]
    for layer in report.layers:
        by_kind = {linear.name.rsplit(".", 1)[-1]: linear for linear in layer.linears}
        cells = [_error_cell(by_kind.get(kind)) for kind in kinds]
        if modalities:
            cells.append(_format_number(layer.output_error))
            cells += [_format_number(layer.output_error_ordinary)] if has_massive else []
            cells += [_format_number(layer.output_error_by_modality.get(m)) for m in modalities]
        if has_comparison:
            cells.append(_format_number(layer.error_over_plain))
        rows.append(f"| {layer.index} | {' | '.join(cells)} |")
    return rows


def _error_cell(linear: LinearRecord | None) -> str:
    if linear is None or linear.scheme == "FLOAT":
        return "float"
    return _format_number(linear.output_error if linear.output_error is not None else linear.weight_error)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _smoothing_table(report: Report) -> list[str]:
    rows = [
        "| layer | group | exponent | error vs. no scaling | reason |",
        "|--:|---|--:|--:|---|",
    ]
    for layer in report.layers:
        for entry in layer.smoothing:
            alpha = "none" if entry["alpha"] is None else f"{entry['alpha']:.2f}"
            rows.append(f"| {layer.index} | {entry['group']} | {alpha} | {entry['gain']:.3f} | {entry['reason']} |")
    return rows if len(rows) > 2 else ["No smoothing was requested."]
