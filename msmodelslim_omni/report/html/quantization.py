"""The results of a quantization as sections of the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from ..kept import KEPT_COLUMNS, kept_rows, kept_text
from ..report import (
    RUN_MEMORY_COLUMNS,
    RUN_MEMORY_NOTE,
    LayerRecord,
    LinearRecord,
    Report,
    count_samples,
    human_bytes,
    peak_text,
    run_memory_rows,
    tuning_text,
)
from . import charts
from .sections import (
    Article,
    Chart,
    Row,
    Section,
    Table,
    Tile,
    all_keys,
    format_percent,
    format_seconds,
    mean_error,
    to_percent,
)


def quantization_article(report: Report, recipe_text: str) -> Article:
    """Return the contents of quant_report.json as an article."""
    sections = (
        _sizes(report),
        _calibration(report),
        _kept(report),
        _tuning(report),
        _errors(report),
        _worst(report),
        _search(report),
        _notes(report),
        _resources(report),
        _recipe(report, recipe_text),
    )
    text = (
        "The Linear layers of the decoder are quantized. This page shows the reduction in size, the"
        " quantization errors, and how the model was made."
    )
    present = tuple(section for section in sections if section is not None)
    return Article(f"Quantization: {report.model_type}, {report.quant_type}", text, _tiles(report), present)


def _worst(report: Report) -> Section | None:
    """The Linears with the largest errors, and the lines of a recipe that keep them float."""
    errors: list[tuple[float, LinearRecord]] = []
    for layer in report.layers:
        for linear in layer.linears:
            error = linear.output_error if linear.output_error is not None else linear.weight_error
            if error is not None and math.isfinite(error) and linear.scheme != "FLOAT":
                errors.append((error, linear))
    if not errors:
        return None
    worst = sorted(errors, key=lambda pair: (-pair[0], pair[1].name))[:_WORST]
    rows = tuple((linear.name, linear.scheme, format_percent(error)) for error, linear in worst)
    kind = "weight" if report.data_free else "output"
    table = Table(f"Largest relative {kind} errors", ("Linear", "scheme", "error"), rows, text_columns=2)
    text = (
        "These lines in a linear_quant of the recipe keep the Linears float. q, k and v of a layer need one scheme, and"
        " so do gate and up: list all of a group."
    )
    names = "\n".join(f'  - "{linear.name}"' for _, linear in worst)
    return Section("The Linears that lose most", text, tables=(table,), code=f"exclude:\n{names}")


_WORST = 10


def _tiles(report: Report) -> tuple[Tile, ...]:
    tiles = [
        Tile(f"size, {saver}", human_bytes(size), _ratio(report.source_bytes, size))
        for saver, size in report.output_bytes.items()
    ]
    if report.bits_per_weight:
        tiles.append(Tile("bits per quantized weight", f"{report.bits_per_weight:.2f}", "scales included"))
    by_modality = _layer_errors(report)
    if by_modality:
        worst = max(by_modality, key=by_modality.__getitem__)
        tiles.append(Tile("largest error", format_percent(by_modality[worst]), f"for {worst}, RMS over the layers"))
    elif (error := mean_error([_error(linear) for layer in report.layers for linear in layer.linears])) is not None:
        tiles.append(Tile("weight error", format_percent(error), "RMS over all Linears"))
    if report.seconds:
        tiles.append(Tile("time", format_seconds(report.seconds), f"on {report.device}"))
        tiles.append(Tile("peak memory", human_bytes(report.peak_rss_bytes), "of the quantization run"))
    return tuple(tiles)


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.0%} of {human_bytes(before)}" if before else ""


# --- sizes and data ------------------------------------------------------------------------------------------


def _sizes(report: Report) -> Section:
    unit, name = _unit([part.bytes_before for part in report.parts])
    labels = [part.name for part in report.parts]
    before, after = [p.bytes_before / unit for p in report.parts], [p.bytes_after / unit for p in report.parts]
    texts = [f"{a:.2f}" if a == b else f"{b:.2f} → {a:.2f}" for b, a in zip(before, after, strict=True)]
    chart = Chart(
        f"Size by part, {name}",
        charts.bar_chart("sizes", labels, {"before": before, "after": after}, texts),
        "Parts with two equal bars are unchanged.",
        "; ".join(f"{label}: {text} {name}" for label, text in zip(labels, texts, strict=True)),
    )
    rows: list[Row] = [
        (p.name, p.scheme, human_bytes(p.bytes_before), human_bytes(p.bytes_after)) for p in report.parts
    ]
    total = sum(part.bytes_after for part in report.parts)
    rows.append(("total", "", human_bytes(report.source_bytes), human_bytes(total)))
    table = Table("Bytes by part", ("part", "scheme", "before", "after"), tuple(rows), text_columns=2)
    tables = [table]
    if report.run_memory is not None:
        memory: list[Row] = [tuple(row) for row in run_memory_rows(report.run_memory)]
        tables.append(Table("Estimated memory at run time", RUN_MEMORY_COLUMNS, tuple(memory)))
    return Section(
        "Size",
        f"Size of the weights on disk, and in the memory of a runtime that keeps them packed. {RUN_MEMORY_NOTE}",
        (chart,) if report.parts else (),
        tuple(tables),
    )


def _unit(sizes: Sequence[int]) -> tuple[int, str]:
    largest = max(sizes, default=0)
    return next((pair for pair in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if largest >= pair[0]), (1, "B"))


def _calibration(report: Report) -> Section:
    if report.data_free:
        return Section("Calibration data", "None. The recipe is data-free: it rounds the weights without samples.")
    total = sum(report.tokens_by_modality.values())
    if not total:
        return Section("Calibration data", "Unknown.")
    names, counts = list(report.tokens_by_modality), list(report.tokens_by_modality.values())
    texts = [f"{count / total:.1%}" for count in counts]
    chart = Chart(
        "Tokens by modality",
        charts.bar_chart("tokens", names, {"tokens": [float(count) for count in counts]}, texts),
        "Share of each modality in the calibration data.",
        "; ".join(f"{n}: {c} tokens, {t}" for n, c, t in zip(names, counts, texts, strict=True)),
    )
    return Section("Calibration data", f"{''.join(count_samples(report))}, {total:,} tokens.", (chart,))


# --- errors --------------------------------------------------------------------------------------------------


def _error(linear: LinearRecord) -> float | None:
    return linear.output_error if linear.output_error is not None else linear.weight_error


def _layer_errors(report: Report) -> dict[str, float]:
    """Root mean square over the layers of their output errors, by modality."""
    names = all_keys([layer.output_error_by_modality for layer in report.layers])
    errors = {n: mean_error([layer.output_error_by_modality.get(n) for layer in report.layers]) for n in names}
    return {name: error for name, error in errors.items() if error is not None}


def _errors(report: Report) -> Section | None:
    if not report.layers:
        return None
    by_output = any(linear.output_error is not None for layer in report.layers for linear in layer.linears)
    by_modality = _layer_errors(report)
    error_charts = [_linear_errors(report, by_output)]
    if by_modality:
        error_charts = [_modality_bars(by_modality), _modality_lines(report, list(by_modality)), *error_charts]
    text = (
        "The error is |Y - Ŷ| / |Y|, the difference between the outputs of the quantized and the float Linear on the"
        " calibration samples, in percent. A layer's error is that of its contribution to the hidden states. It does"
        " not measure the quality of answers; run an evaluation for that."
        if by_output
        else "The error is |W - Ŵ| / |W| of the weights. A data-free run has no inputs, so output errors are unknown."
    )
    return Section("Error", text, tuple(error_charts), (_error_table(report, list(by_modality)),))


def _modality_bars(errors: dict[str, float]) -> Chart:
    texts = [format_percent(error) for error in errors.values()]
    return Chart(
        "Error of a layer's output, by modality",
        charts.bar_chart("modalities", list(errors), {"error": list(errors.values())}, texts),
        "Root mean square over the layers: a longer bar means that tokens of this modality are less accurate.",
        "; ".join(f"{name}: {text}" for name, text in zip(errors, texts, strict=True)),
    )


def _modality_lines(report: Report, names: list[str]) -> Chart:
    layers = [layer.index for layer in report.layers]
    series = {n: to_percent([layer.output_error_by_modality.get(n) for layer in report.layers]) for n in names}
    maxima = []
    for name in names:
        known = [
            (e, layer.index) for layer in report.layers if (e := layer.output_error_by_modality.get(name)) is not None
        ]
        maxima.append(f"{name}: largest {format_percent(max(known)[0])} in layer {max(known)[1]}")
    return Chart(
        "Error of each layer's output",
        charts.line_chart("layers", layers, series, "error, %"),
        "Each layer on its own, with float or quantized inputs depending on the recipe. Peaks show the layers that are"
        " hard to quantize.",
        "; ".join(maxima),
    )


def _linear_errors(report: Report, by_output: bool) -> Chart:
    kinds = _kinds(report)
    values, hints, texts = [], [], []
    for layer in report.layers:
        by_kind = {_kind(linear): linear for linear in layer.linears}
        row = [by_kind.get(kind) for kind in kinds]
        values.append(to_percent([_error_of(linear) for linear in row]))
        hints.append([_linear_hint(layer, kind, linear) for kind, linear in zip(kinds, row, strict=True)])
        texts.append([_short_percent(_error_of(linear)) for linear in row])
    kind_of_error = "output error" if by_output else "weight error"
    rows = [str(layer.index) for layer in report.layers]
    columns = [kind.removesuffix("_proj") for kind in kinds]
    errors = [
        (error, hint)
        for row_errors, row_hints in zip(values, hints, strict=True)
        for error, hint in zip(row_errors, row_hints, strict=True)
        if error is not None
    ]
    alt_text = f"smallest {min(errors)[1]}; largest {max(errors)[1]}" if errors else "no Linear was quantized"
    return Chart(
        f"{kind_of_error.capitalize()} of each Linear, %",
        charts.heat_map("linears", rows, columns, values, hints, texts, f"{kind_of_error}, %"),
        "One cell per layer and Linear; brighter cells have larger errors. Linears kept in float are labelled.",
        alt_text,
        tall=True,
    )


def _linear_hint(layer: LayerRecord, kind: str, linear: LinearRecord | None) -> str:
    if linear is None or linear.scheme == "FLOAT":
        return f"layer {layer.index}, {kind}: float"
    by_modality = ", ".join(
        f"{name} {format_percent(error)}" for name, error in linear.output_error_by_modality.items()
    )
    more = f" ({by_modality})" if by_modality else ""
    return f"layer {layer.index}, {kind}, {linear.scheme}: {format_percent(_error(linear))}{more}"


def _kind(linear: LinearRecord) -> str:
    return linear.name.rsplit(".", 1)[-1]


def _kinds(report: Report) -> list[str]:
    return list(dict.fromkeys(_kind(linear) for layer in report.layers for linear in layer.linears))


def _short_percent(error: float | None) -> str:
    return "float" if error is None else f"{100 * error:.2g}"


def _error_table(report: Report, names: list[str]) -> Table:
    kinds = _kinds(report)
    rows = []
    has_massive = any(layer.massive_tokens for layer in report.layers)
    for layer in report.layers:
        by_kind = {_kind(linear): linear for linear in layer.linears}
        cells = ["float" if (e := _error_of(by_kind.get(kind))) is None else format_percent(e) for kind in kinds]
        if names:
            cells += [
                format_percent(layer.output_error),
                *([format_percent(layer.output_error_ordinary)] if has_massive else []),
                *(format_percent(layer.output_error_by_modality.get(n)) for n in names),
            ]
        rows.append((str(layer.index), *cells))
    whole = ("whole layer", "without massive tokens") if has_massive else ("whole layer",)
    columns = ("layer", *kinds, *((*whole, *names) if names else ()))
    return Table("Error by layer and Linear", columns, tuple(rows), folded=True)


def _error_of(linear: LinearRecord | None) -> float | None:
    return None if linear is None else _error(linear)


# --- the scale search ----------------------------------------------------------------------------------------


def _search(report: Report) -> Section | None:
    """Error of each layer relative to plain rounding, and the scales of its groups; None without a search."""
    compared = [layer for layer in report.layers if layer.error_over_plain is not None]
    scales = [(layer.index, entry) for layer in report.layers for entry in layer.smoothing]
    search_charts, tables, text = [], [], ""
    if compared:
        search_charts.append(_error_ratios(compared))
        fallbacks = [str(layer.index) for layer in compared if any("fell back" in note for note in layer.notes)]
        text = f"Fell back to plain rounding: layer {', '.join(fallbacks)}. " if fallbacks else "No layer fell back. "
    if scales:
        search_charts.append(_scale_map(scales))
        tables.append(_scale_table(scales))
        scaled = sum(entry["alpha"] is not None for _, entry in scales)
        text += f"{scaled} of {len(scales)} groups of Linears are scaled; no scale improves the other groups."
    return Section("Scale search", text, tuple(search_charts), tuple(tables)) if search_charts else None


def _error_ratios(layers: Sequence[LayerRecord]) -> Chart:
    ratios = [layer.error_over_plain for layer in layers]
    known = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
    reference = (100.0, "plain rounding")
    return Chart(
        "Error of each layer relative to plain rounding, %",
        charts.line_chart(
            "gains", [layer.index for layer in layers], {"this recipe": to_percent(ratios)}, "%", reference
        ),
        "Below the dashed line the recipe is better than plain rounding: 50 % means half the output error.",
        f"between {format_percent(min(known, default=None))} and {format_percent(max(known, default=None))}",
    )


def _scale_map(scales: Sequence[tuple[int, dict[str, Any]]]) -> Chart:
    groups = list(dict.fromkeys(str(entry["group"]) for _, entry in scales))
    layers = list(dict.fromkeys(index for index, _ in scales))
    entries = {(index, str(entry["group"])): entry for index, entry in scales}
    table = [[entries.get((index, group)) for group in groups] for index in layers]
    values = [to_percent([entry["gain"] if entry else None for entry in row]) for row in table]
    texts = [[_format_alpha(entry) for entry in row] for row in table]
    hints = [
        [f"layer {index}, {group}: {_describe_scale(entry)}" for group, entry in zip(groups, row, strict=True)]
        for index, row in zip(layers, table, strict=True)
    ]
    return Chart(
        "Error with the chosen scales relative to no scaling, %",
        charts.heat_map(
            "scales", [str(i) for i in layers], groups, values, hints, texts, "error relative to no scaling, %"
        ),
        "In darker cells, scaling the input channels before rounding helps more. The exponents are in the cells, if"
        " there is room, and in the table.",
        f"{len(scales)} groups in {len(layers)} layers; the table below has the same values",
    )


def _scale_table(scales: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    rows = tuple(
        (str(index), str(entry["group"]), _format_alpha(entry), format_percent(entry["gain"]), str(entry["reason"]))
        for index, entry in scales
    )
    columns = ("layer", "group", "exponent", "error vs. no scaling", "reason")
    return Table("Scales by layer and group", columns, rows, text_columns=5, folded=True)


def _format_alpha(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else "none" if entry["alpha"] is None else f"{entry['alpha']:.2f}"


def _describe_scale(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not searched"
    exponent = (
        "no scale"
        if entry["alpha"] is None
        else f"exponent {_format_alpha(entry)}, {format_percent(entry['gain'])} of the error"
    )
    return f"{exponent}; {entry['reason']}"


def _notes(report: Report) -> Section | None:
    notes = [f"layer {layer.index}: {note}" for layer in report.layers for note in layer.notes]
    notes += [f"warning: {warning}" for warning in report.warnings]
    if not notes:
        return None
    return Section("Fallbacks and warnings", "Places where the run deviates from the recipe.", notes=tuple(notes))


def _kept(report: Report) -> Section | None:
    if not report.kept:
        return None
    rows: tuple[Row, ...] = tuple(tuple(row) for row in kept_rows(report.kept))
    table = Table("Kept units, the first choice first", KEPT_COLUMNS, rows, text_columns=2)
    return Section("Kept in a better precision", kept_text(report.kept), tables=(table,))


def _tuning(report: Report) -> Section | None:
    return None if report.tuning is None else Section("Tuning", tuning_text(report.tuning, report.own_texts))


# --- how it was made -----------------------------------------------------------------------------------------


def _resources(report: Report) -> Section:
    phase_charts = resource_charts(report.seconds_by_phase, report.peak_rise_by_phase)
    rows: list[Row] = [
        ("total time", format_seconds(report.seconds)),
        ("peak memory", peak_text(report.peak_rss_bytes, report.expected_rss_bytes)),
    ]
    if report.peak_rise_by_phase:
        before = report.peak_rss_bytes - sum(report.peak_rise_by_phase.values())
        rows.append(("memory before the first phase", human_bytes(max(0, before))))
    if report.peak_device_bytes:
        on_device = peak_text(report.peak_device_bytes, report.expected_device_bytes)
        rows.append(("peak memory on the device", on_device))
    text = "The run loads, quantizes and writes one decoder layer at a time and never holds the whole model in memory."
    if report.resumed_at_layer:
        text += f" The run was resumed at layer {report.resumed_at_layer}; times cover only the last run."
    return Section("Time and memory", text, phase_charts, (Table("Time and memory", ("item", "value"), tuple(rows)),))


def resource_charts(by_phase: dict[str, float], rises: dict[str, int]) -> tuple[Chart, ...]:
    """Charts of the seconds of each phase and of its increase of peak memory; empty inputs have no chart."""
    phase_charts = []
    if by_phase:
        texts = [format_seconds(value) for value in by_phase.values()]
        phase_charts.append(
            Chart(
                "Time by phase",
                charts.bar_chart("time", list(by_phase), {"seconds": list(by_phase.values())}, texts),
                "Sums over the layers. Background work counts towards the phase that it overlaps with.",
                "; ".join(f"{name}: {text}" for name, text in zip(by_phase, texts, strict=True)),
            )
        )
    if any(rises.values()):
        texts = [human_bytes(value) for value in rises.values()]
        phase_charts.append(
            Chart(
                "Increase of peak memory by phase",
                charts.bar_chart("memory", list(rises), {"bytes": [float(v) for v in rises.values()]}, texts),
                "Growth of peak memory during each phase. The peak is the sum of these values and the memory before"
                " the first phase.",
                "; ".join(f"{name}: {text}" for name, text in zip(rises, texts, strict=True)),
            )
        )
    return tuple(phase_charts)


def _recipe(report: Report, recipe_text: str) -> Section:
    rows: list[Row] = [
        ("source", report.model_path),
        ("model type", report.model_type),
        ("quant type", report.quant_type),
        ("recipe", report.recipe),
        *(("command", shlex.join(command)) for command in report.commands),
        *([("dataset", report.dataset), ("SHA-256 of its index", report.dataset_digest)] if report.dataset else []),
        ("device", report.device),
        ("seed", str(report.seed)),
        *((f"output, {saver}", folder) for saver, folder in report.savers.items()),
        *((f"version of {name}", number) for name, number in report.versions.items()),
    ]
    table = Table("How it was made", ("item", "value"), tuple(rows), text_columns=2)
    return Section("Recipe", tables=(table,), code=recipe_text)
