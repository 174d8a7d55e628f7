"""What an evaluation found, as sections of the page."""

from __future__ import annotations

from ..fidelity import EvalReport, Fidelity, Interval
from ..report import human_bytes
from . import charts
from .quantization import resource_charts
from .sections import (
    Chart,
    Row,
    Section,
    Story,
    Table,
    Tile,
    in_percent,
    percent,
    present,
    seconds,
)


def evaluation_story(report: EvalReport) -> Story:
    """All that eval_report.json holds, for people."""
    groups = {"all samples": report.overall, **report.by_modality}
    shown = [_closeness(report, groups)]
    if any(group.answered for group in groups.values()):
        shown.append(_answers(groups))
    shown.append(_drift(report, groups))
    shown.append(_how(report))
    text = (
        f"The quantized model beside its float model on {report.samples} samples, all else the same."
        f" Counted: {report.scored}."
    )
    return Story(f"Evaluation: {report.model_type}, {report.quant_format}", text, _tiles(report), tuple(shown))


def _tiles(report: EvalReport) -> tuple[Tile, ...]:
    overall = report.overall
    tiles = [
        Tile("same next token", percent(overall.top1.value), "of the positions"),
        Tile("KL divergence", f"{overall.kl_mean.value:.3g}", "nats a token; 0: the same"),
        Tile("perplexity", f"{overall.perplexity_quant.value:.4g}", f"float: {overall.perplexity_float.value:.4g}"),
    ]
    if overall.exact_quant is not None and overall.exact_float is not None:
        tiles.append(
            Tile("exact answers", percent(overall.exact_quant.value), f"float: {percent(overall.exact_float.value)}")
        )
    if report.by_modality:
        worst = max(report.by_modality, key=lambda name: report.by_modality[name].kl_mean.value)
        tiles.append(Tile("farthest off", worst, f"KL {report.by_modality[worst].kl_mean.value:.3g}"))
    tiles.append(Tile("size", human_bytes(report.quant_bytes), f"from {human_bytes(report.float_bytes)}"))
    return tuple(tiles)


def _closeness(report: EvalReport, groups: dict[str, Fidelity]) -> Section:
    names = list(groups)
    kls = [_span(group.kl_mean) for group in groups.values()]
    chart = Chart(
        "KL divergence by modality, nats",
        charts.spans("kl", names, {"after": kls}, "nats a token, logarithmic", True),
        "How far the next-token distributions lie apart, with 95 % intervals over samples: further left is closer, and"
        " intervals that overlap do not tell two apart; one sample alone has none.",
        "; ".join(f"{name}: {group.kl_mean.value:.3g}" for name, group in groups.items()),
    )
    tops = {"same first choice": [_span(g.top1) for g in groups.values()]}
    top = Chart(
        "Positions with the same likeliest token, %",
        charts.spans("top", names, _times_hundred(tops), "% of the positions"),
        "How often both models would say the same next word, with 95 % intervals: 100 is the same.",
        "; ".join(f"{name}: {percent(group.top1.value)}" for name, group in groups.items()),
    )
    figures: list[Row] = [
        ("samples", *(f"{g.samples:,}" for g in groups.values())),
        ("positions", *(f"{g.positions:,}" for g in groups.values())),
        ("KL divergence, mean", *(_plain(g.kl_mean) for g in groups.values())),
        ("KL divergence, 99th percentile", *(f"{g.kl_p99:.3g}" for g in groups.values())),
        ("same likeliest token", *(_share(g.top1) for g in groups.values())),
        ("shared among the five likeliest", *(_share(g.top5) for g in groups.values())),
        ("perplexity, float", *(_plain(g.perplexity_float, ".4g") for g in groups.values())),
        ("perplexity, quantized", *(_plain(g.perplexity_quant, ".4g") for g in groups.values())),
    ]
    if any(group.answered for group in groups.values()):
        figures += [
            ("samples with an answer", *(f"{g.answered:,}" for g in groups.values())),
            ("exact answers, float", *(_share(g.exact_float) for g in groups.values())),
            ("exact answers, quantized", *(_share(g.exact_quant) for g in groups.values())),
            ("change of exact answers", *(_change(g.exact_change) for g in groups.values())),
        ]
    table = Table("Figures, with 95 % intervals over samples", ("figure", *names), tuple(figures), wide=True)
    text = (
        "KL divergence is what the quantized model's next-token distribution loses against the float one's; perplexity"
        " says how surprised a model is by what follows, so the two should be alike. Under text are samples of"
        " text alone; a sample with several media counts under each of them."
    )
    return Section("How close it is", text, (chart, top), (table,))


def _answers(groups: dict[str, Fidelity]) -> Section:
    answered = {name: group for name, group in groups.items() if group.exact_float and group.exact_quant}
    series = {
        "before": [_span(group.exact_float) for group in answered.values()],
        "after": [_span(group.exact_quant) for group in answered.values()],
    }
    chart = Chart(
        "Exact answers before and after, %",
        charts.spans("answers", list(answered), _times_hundred(series), "% of the samples with an answer"),
        "How often the greedy answer is exactly the expected one, with 95 % intervals, by the float model (before) and"
        " the quantized one (after).",
        "; ".join(
            f"{name}: {_share(g.exact_float)} before, {_share(g.exact_quant)} after".replace("\n", " ")
            for name, g in answered.items()
        ),
    )
    return Section("Answers", charts=(chart,))


def _drift(report: EvalReport, groups: dict[str, Fidelity]) -> Section:
    names = present([layer.error_by_modality for layer in report.layers])
    layers = [layer.index for layer in report.layers]
    series = {n: in_percent([layer.error_by_modality.get(n) for layer in report.layers]) for n in names}
    series = series or {"all tokens": in_percent([layer.error for layer in report.layers])}
    chart = Chart(
        "Drift of the hidden states over the layers",
        charts.lines("drift", layers, series, "error, %"),
        "The errors of all layers so far: a line that rises steeply shows the layers that add most.",
        "; ".join(f"{n}: {percent(report.layers[-1].error_by_modality.get(n))} after the last layer" for n in names)
        if report.layers
        else "no layer",
    )
    rows: list[Row] = [
        ("hidden states, error", *(percent(g.hidden_error) for g in groups.values())),
        ("hidden states, cosine", *(f"{g.hidden_cosine:.5f}" for g in groups.values())),
        ("with the embeddings, error", *(percent(g.embedding_error) for g in groups.values())),
        ("with the embeddings, cosine", *(f"{g.embedding_cosine:.5f}" for g in groups.values())),
    ]
    table = Table("What the talker reads", ("figure", *groups), tuple(rows))
    text = "The talker, which makes speech, was not quantized, but it reads these states: a cosine of 1 is no change."
    return Section("Hidden states", text, (chart,) if report.layers else (), (table,))


def _how(report: EvalReport) -> Section:
    total = sum(report.tokens_by_modality.values()) or 1
    tokens = ", ".join(f"{n} {c:,} ({c / total:.1%})" for n, c in report.tokens_by_modality.items())
    rows: list[Row] = [
        ("float model", report.float_path),
        ("quantized model", report.quant_path),
        ("Linears", ", ".join(f"{n} {name}" for name, n in report.linears_by_scheme.items())),
        ("dataset", report.dataset),
        ("tokens", tokens),
        ("device", report.device),
        ("seed", str(report.seed)),
        *((f"version of {name}", number) for name, number in report.versions.items()),
        ("time", seconds(report.seconds)),
        ("peak memory", human_bytes(report.peak_rss_bytes)),
    ]
    if report.peak_device_bytes:
        rows.append(("peak memory on the device", human_bytes(report.peak_device_bytes)))
    table = Table("How it was measured", ("what", "value"), tuple(rows), texts=2)
    shown = resource_charts(report.seconds_by_phase, {})
    return Section("How it was measured", charts=shown, tables=(table,), notes=report.warnings)


# --- figures as text -----------------------------------------------------------------------------------------


def _span(interval: Interval | None) -> charts.Span | None:
    return None if interval is None else (interval.value, interval.low, interval.high)


def _times_hundred(series: dict[str, list[charts.Span | None]]) -> dict[str, list[charts.Span | None]]:
    return {
        key: [None if span is None else (100 * span[0], 100 * span[1], 100 * span[2]) for span in spans]
        for key, spans in series.items()
    }


def _plain(interval: Interval, form: str = ".3g") -> str:
    return f"{interval.value:{form}}\n({interval.low:{form}} to {interval.high:{form}})"


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "n/a"
    return f"{100 * interval.value:.1f} %\n({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _change(interval: Interval | None) -> str:
    if interval is None:
        return "n/a"
    return f"{100 * interval.value:+.1f} points\n({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
