"""What a quantization did, as sections of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..report import (
    RUN_MEMORY_COLUMNS,
    RUN_MEMORY_NOTE,
    LayerRecord,
    LinearRecord,
    Report,
    human_bytes,
    run_memory_rows,
)
from . import charts
from .sections import (
    Chart,
    Row,
    Section,
    Story,
    Table,
    Tile,
    in_percent,
    mean_error,
    percent,
    present,
    seconds,
)


def quantization_story(report: Report, recipe_text: str) -> Story:
    """All that quant_report.json holds, for people."""
    sections = (
        _sizes(report),
        _calibration(report),
        _errors(report),
        _choices(report),
        _notes(report),
        _resources(report),
        _recipe(report, recipe_text),
    )
    text = (
        "Integers took the place of floats in the Linear layers of the decoder. This page says how much smaller the"
        " model became, how far its outputs moved, and how it was made."
    )
    shown = tuple(section for section in sections if section is not None)
    return Story(f"Quantization: {report.model_type}, {report.quant_type}", text, _tiles(report), shown)


def _tiles(report: Report) -> tuple[Tile, ...]:
    tiles = [
        Tile(f"size as {saver}", human_bytes(size), _ratio(report.source_bytes, size))
        for saver, size in report.output_bytes.items()
    ]
    if report.bits_per_weight:
        tiles.append(Tile("bits per quantized weight", f"{report.bits_per_weight:.2f}", "scales included"))
    by_modality = _layer_errors(report)
    if by_modality:
        worst = max(by_modality, key=by_modality.__getitem__)
        tiles.append(Tile("largest error", percent(by_modality[worst]), f"for {worst}, RMS over the layers"))
    elif (error := mean_error([_error(linear) for layer in report.layers for linear in layer.linears])) is not None:
        tiles.append(Tile("error of the weights", percent(error), "RMS over all Linears"))
    if report.seconds:
        tiles.append(Tile("time", seconds(report.seconds), f"on {report.device}"))
        tiles.append(Tile("peak memory", human_bytes(report.peak_rss_bytes), "of the run that quantized"))
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
        charts.bars("sizes", labels, {"before": before, "after": after}, texts),
        "Where the bytes are: a part whose two bars are alike was left as it was.",
        "; ".join(f"{label}: {text} {name}" for label, text in zip(labels, texts, strict=True)),
    )
    rows: list[Row] = [
        (p.name, p.scheme, human_bytes(p.bytes_before), human_bytes(p.bytes_after)) for p in report.parts
    ]
    total = sum(part.bytes_after for part in report.parts)
    rows.append(("total", "", human_bytes(report.source_bytes), human_bytes(total)))
    table = Table("Bytes by part", ("part", "what it is now", "before", "after"), tuple(rows), texts=2)
    tables = [table]
    if report.run_memory is not None:
        memory: list[Row] = [tuple(row) for row in run_memory_rows(report.run_memory)]
        tables.append(Table("Memory at run time, foretold", RUN_MEMORY_COLUMNS, tuple(memory)))
    return Section(
        "Size",
        "Weights take these bytes on the disk, and the same in memory where a runtime keeps them packed."
        f" {RUN_MEMORY_NOTE}",
        (chart,) if report.parts else (),
        tuple(tables),
    )


def _unit(sizes: Sequence[int]) -> tuple[int, str]:
    largest = max(sizes, default=0)
    return next((pair for pair in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if largest >= pair[0]), (1, "B"))


def _calibration(report: Report) -> Section:
    if report.data_free:
        return Section("Calibration data", "None: the recipe rounds the weights without looking at any sample.")
    total = sum(report.tokens_by_modality.values())
    if not total:
        return Section("Calibration data", "Unknown.")
    names, counts = list(report.tokens_by_modality), list(report.tokens_by_modality.values())
    texts = [f"{count / total:.1%}" for count in counts]
    chart = Chart(
        "Tokens by modality",
        charts.bars("tokens", names, {"tokens": [float(count) for count in counts]}, texts),
        "What the quantizer looked at: a modality with few tokens was seen little.",
        "; ".join(f"{n}: {c} tokens, {t}" for n, c, t in zip(names, counts, texts, strict=True)),
    )
    return Section("Calibration data", f"{report.samples} samples, {total:,} tokens.", (chart,))


# --- errors --------------------------------------------------------------------------------------------------


def _error(linear: LinearRecord) -> float | None:
    return linear.output_error if linear.output_error is not None else linear.weight_error


def _layer_errors(report: Report) -> dict[str, float]:
    """Root mean square over the layers of their output errors, by modality."""
    names = present([layer.output_error_by_modality for layer in report.layers])
    errors = {n: mean_error([layer.output_error_by_modality.get(n) for layer in report.layers]) for n in names}
    return {name: error for name, error in errors.items() if error is not None}


def _errors(report: Report) -> Section | None:
    if not report.layers:
        return None
    by_output = any(linear.output_error is not None for layer in report.layers for linear in layer.linears)
    by_modality = _layer_errors(report)
    shown = [_linear_errors(report, by_output)]
    if by_modality:
        shown = [_modality_bars(by_modality), _modality_lines(report, list(by_modality)), *shown]
    text = (
        "The error is |Y - Ŷ| / |Y|: how far the output of the quantized Linear lies from that of the float one, on the"
        " calibration samples, in percent of its size. A layer's error is that of what it adds to the hidden states;"
        " it is not an error of answers, which only an evaluation tells."
        if by_output
        else "The error is |W - Ŵ| / |W|, of the weights alone: a data-free run knows no inputs, so no outputs."
    )
    return Section("Error", text, tuple(shown), (_error_table(report, list(by_modality)),))


def _modality_bars(errors: dict[str, float]) -> Chart:
    texts = [percent(error) for error in errors.values()]
    return Chart(
        "Error of a layer's output, by modality",
        charts.bars("modalities", list(errors), {"error": list(errors.values())}, texts),
        "Root mean square over the layers: a longer bar means that tokens of this kind lose more.",
        "; ".join(f"{name}: {text}" for name, text in zip(errors, texts, strict=True)),
    )


def _modality_lines(report: Report, names: list[str]) -> Chart:
    layers = [layer.index for layer in report.layers]
    series = {n: in_percent([layer.output_error_by_modality.get(n) for layer in report.layers]) for n in names}
    words = []
    for name in names:
        known = [
            (e, layer.index) for layer in report.layers if (e := layer.output_error_by_modality.get(name)) is not None
        ]
        words.append(f"{name}: largest {percent(max(known)[0])} in layer {max(known)[1]}")
    return Chart(
        "Error of each layer's output",
        charts.lines("layers", layers, series, "error, %"),
        "Each layer by itself, on inputs that are not yet quantized or that are, as the recipe says: peaks show which"
        " layers are hard to quantize.",
        "; ".join(words),
    )


def _linear_errors(report: Report, by_output: bool) -> Chart:
    kinds = _kinds(report)
    values, hints, texts = [], [], []
    for layer in report.layers:
        by_kind = {_kind(linear): linear for linear in layer.linears}
        row = [by_kind.get(kind) for kind in kinds]
        values.append(in_percent([_error_of(linear) for linear in row]))
        hints.append([_linear_hint(layer, kind, linear) for kind, linear in zip(kinds, row, strict=True)])
        texts.append([_short(_error_of(linear)) for linear in row])
    what = "output error" if by_output else "weight error"
    rows = [str(layer.index) for layer in report.layers]
    columns = [kind.removesuffix("_proj") for kind in kinds]
    found = [
        (e, hint)
        for row, said in zip(values, hints, strict=True)
        for e, hint in zip(row, said, strict=True)
        if e is not None
    ]
    words = f"smallest {min(found)[1]}; largest {max(found)[1]}" if found else "no Linear was quantized"
    return Chart(
        f"{what.capitalize()} of each Linear, %",
        charts.heat_map("linears", rows, columns, values, hints, texts, f"{what}, %"),
        "A cell for each layer and Linear, the brighter the larger the error; what stayed float says so.",
        words,
        tall=True,
    )


def _linear_hint(layer: LayerRecord, kind: str, linear: LinearRecord | None) -> str:
    if linear is None or linear.scheme == "FLOAT":
        return f"layer {layer.index}, {kind}: float"
    by_modality = ", ".join(f"{name} {percent(error)}" for name, error in linear.output_error_by_modality.items())
    more = f" ({by_modality})" if by_modality else ""
    return f"layer {layer.index}, {kind}, {linear.scheme}: {percent(_error(linear))}{more}"


def _kind(linear: LinearRecord) -> str:
    return linear.name.rsplit(".", 1)[-1]


def _kinds(report: Report) -> list[str]:
    return list(dict.fromkeys(_kind(linear) for layer in report.layers for linear in layer.linears))


def _short(error: float | None) -> str:
    return "float" if error is None else f"{100 * error:.2g}"


def _error_table(report: Report, names: list[str]) -> Table:
    kinds = _kinds(report)
    rows = []
    for layer in report.layers:
        by_kind = {_kind(linear): linear for linear in layer.linears}
        cells = ["float" if (e := _error_of(by_kind.get(kind))) is None else percent(e) for kind in kinds]
        if names:
            cells += [percent(layer.output_error), *(percent(layer.output_error_by_modality.get(n)) for n in names)]
        rows.append((str(layer.index), *cells))
    columns = ("layer", *kinds, *(("whole layer", *names) if names else ()))
    return Table("Error by layer and Linear", columns, tuple(rows), folded=True)


def _error_of(linear: LinearRecord | None) -> float | None:
    return None if linear is None else _error(linear)


# --- what was chosen -----------------------------------------------------------------------------------------


def _choices(report: Report) -> Section | None:
    """How much better than plain rounding each layer is, and the scales that its groups of Linears have."""
    compared = [layer for layer in report.layers if layer.error_over_plain is not None]
    scales = [(layer.index, entry) for layer in report.layers for entry in layer.smoothing]
    drawn, tables, text = [], [], ""
    if compared:
        drawn.append(_gains(compared))
        fallen = [str(layer.index) for layer in compared if any("fell back" in note for note in layer.notes)]
        text = f"Fell back to plain rounding: layer {', '.join(fallen)}. " if fallen else "No layer had to fall back. "
    if scales:
        drawn.append(_scale_map(scales))
        tables.append(_scale_table(scales))
        scaled = sum(entry["alpha"] is not None for _, entry in scales)
        text += f"{scaled} of {len(scales)} groups of Linears are scaled; one that no scale improves is left as it is."
    return Section("What the search chose", text, tuple(drawn), tuple(tables)) if drawn else None


def _gains(layers: Sequence[LayerRecord]) -> Chart:
    ratios = [layer.error_over_plain for layer in layers]
    known = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
    level = (100.0, "plain rounding")
    return Chart(
        "Error of each layer over that of plain rounding, %",
        charts.lines("gains", [layer.index for layer in layers], {"this recipe": in_percent(ratios)}, "%", level),
        "Below the dashed line the search paid: at 50 % a layer's output is off by half as much.",
        f"between {percent(min(known, default=None))} and {percent(max(known, default=None))}",
    )


def _scale_map(scales: Sequence[tuple[int, dict[str, Any]]]) -> Chart:
    groups = list(dict.fromkeys(str(entry["group"]) for _, entry in scales))
    layers = list(dict.fromkeys(index for index, _ in scales))
    chosen = {(index, str(entry["group"])): entry for index, entry in scales}
    table = [[chosen.get((index, group)) for group in groups] for index in layers]
    values = [in_percent([entry["gain"] if entry else None for entry in row]) for row in table]
    texts = [[_alpha(entry) for entry in row] for row in table]
    hints = [
        [f"layer {index}, {group}: {_choice(entry)}" for group, entry in zip(groups, row, strict=True)]
        for index, row in zip(layers, table, strict=True)
    ]
    return Chart(
        "Error with the chosen scales over that without, %",
        charts.heat_map(
            "scales", [str(i) for i in layers], groups, values, hints, texts, "error over plain rounding, %"
        ),
        "Darker is better: there, scaling the inputs' channels before rounding helped most. Exponents are in the cells"
        " where there is room, and in the table.",
        f"{len(scales)} groups in {len(layers)} layers; the table below has the same figures",
    )


def _scale_table(scales: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    rows = tuple(
        (str(index), str(entry["group"]), _alpha(entry), percent(entry["gain"]), str(entry["reason"]))
        for index, entry in scales
    )
    columns = ("layer", "group", "exponent", "error over that without", "why")
    return Table("Scales by layer and group", columns, rows, texts=5, folded=True)


def _alpha(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else "none" if entry["alpha"] is None else f"{entry['alpha']:.2f}"


def _choice(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not looked at"
    exponent = (
        "no scale" if entry["alpha"] is None else f"exponent {_alpha(entry)}, {percent(entry['gain'])} of the error"
    )
    return f"{exponent}; {entry['reason']}"


def _notes(report: Report) -> Section | None:
    notes = [f"layer {layer.index}: {note}" for layer in report.layers for note in layer.notes]
    notes += [f"warning: {warning}" for warning in report.warnings]
    if not notes:
        return None
    return Section(
        "Fallbacks and warnings", "Where the run did something else than the recipe asks for.", notes=tuple(notes)
    )


# --- how it was made -----------------------------------------------------------------------------------------


def _resources(report: Report) -> Section:
    shown = resource_charts(report.seconds_by_phase, report.peak_rise_by_phase)
    rows: list[Row] = [("whole run", seconds(report.seconds)), ("peak memory", human_bytes(report.peak_rss_bytes))]
    if report.peak_rise_by_phase:
        before = report.peak_rss_bytes - sum(report.peak_rise_by_phase.values())
        rows.append(("of it before the first phase", human_bytes(max(0, before))))
    if report.peak_device_bytes:
        rows.append(("peak memory on the device", human_bytes(report.peak_device_bytes)))
    text = "The model is never in memory as a whole: one decoder layer at a time is loaded, quantized and written."
    if report.resumed_at_layer:
        text += f" The run was resumed at layer {report.resumed_at_layer}: times are of its last part."
    return Section("Time and memory", text, shown, (Table("Time and memory", ("what", "how much"), tuple(rows)),))


def resource_charts(by_phase: dict[str, float], rises: dict[str, int]) -> tuple[Chart, ...]:
    """Seconds of each phase, and by how much it raised the peak of memory."""
    shown = []
    if by_phase:
        texts = [seconds(value) for value in by_phase.values()]
        shown.append(
            Chart(
                "Time by phase",
                charts.bars("time", list(by_phase), {"seconds": list(by_phase.values())}, texts),
                "Summed over the layers; what runs beside another phase is counted in that one.",
                "; ".join(f"{name}: {text}" for name, text in zip(by_phase, texts, strict=True)),
            )
        )
    if any(rises.values()):
        texts = [human_bytes(value) for value in rises.values()]
        shown.append(
            Chart(
                "Rise of peak memory by phase",
                charts.bars("memory", list(rises), {"bytes": [float(v) for v in rises.values()]}, texts),
                "By how much the largest memory used so far grew while the phase ran; all of them, and what the"
                " program took before, make the peak.",
                "; ".join(f"{name}: {text}" for name, text in zip(rises, texts, strict=True)),
            )
        )
    return tuple(shown)


def _recipe(report: Report, recipe_text: str) -> Section:
    rows: list[Row] = [
        ("source", report.model_path),
        ("model type", report.model_type),
        ("quant type", report.quant_type),
        ("recipe", report.recipe),
        ("device", report.device),
        ("seed", str(report.seed)),
        *((f"written as {saver}", place) for saver, place in report.savers.items()),
        *((f"version of {name}", number) for name, number in report.versions.items()),
    ]
    table = Table("How it was made", ("what", "value"), tuple(rows), texts=2)
    return Section("The exact recipe", tables=(table,), code=recipe_text)
