"""The results of an evaluation as sections of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..eval_report import judge_speech, judgement, speech_rows
from ..fidelity import EvalReport, Fidelity, Interval, ShownAnswer, ShownSpeech
from ..report import human_bytes
from . import charts
from .quantization import resource_charts
from .sections import (
    Answer,
    Article,
    Chart,
    Heard,
    Row,
    Section,
    Table,
    Tile,
    all_keys,
    format_percent,
    format_seconds,
    to_percent,
)


def evaluation_article(
    report: EvalReport, answers: Sequence[ShownAnswer] = (), speech: Sequence[ShownSpeech] = ()
) -> Article:
    """Return the contents of eval_report.json as an article. answers, speech: those to show."""
    groups = {"all samples": report.overall, **report.by_modality}
    sections = [_agreement(groups)]
    if answers:
        sections.insert(0, _shown_answers(answers))
    if report.speech:
        sections.insert(0, _speech(report, speech))
    if any(group.answered for group in groups.values()):
        sections.append(_answers(groups))
    sections.append(_drift(report, groups))
    sections.append(_measurement(report))
    text = (
        f"{judgement(report)} The quantized model was compared with its float model on {report.samples} samples under"
        f" the same conditions. Scored: {report.scored}."
    )
    return Article(
        f"Evaluation: {Path(report.quant_path).name}, {report.quant_format}", text, _tiles(report), tuple(sections)
    )


def _shown_answers(answers: Sequence[ShownAnswer]) -> Section:
    text = (
        "First the samples that one model alone answers exactly, then those whose answers lie farthest apart by KL"
        " divergence. Both models were run on the expected answer; a greedy answer is known up to the first token that"
        " differs from it, marked by an ellipsis."
    )
    shown = tuple(
        Answer(
            question=answer.pair.question,
            previews=answer.previews,
            expected=answer.pair.expected,
            before=answer.pair.float_text + ("" if answer.pair.float_exact else " …"),
            before_exact=answer.pair.float_exact,
            after=answer.pair.quant_text + ("" if answer.pair.quant_exact else " …"),
            after_exact=answer.pair.quant_exact,
            note=f"KL {answer.pair.kl:.3g} nats per token; {answer.pair.where}",
        )
        for answer in answers
    )
    return Section("Answers, side by side", text, answers=shown)


def _speech(report: EvalReport, speech: Sequence[ShownSpeech]) -> Section:
    text = (
        f"{judge_speech(report.speech)} Both models answer aloud through the same talker, which is not quantized. A"
        " code is a piece of sound of a fraction of a second. Codes are compared on the text and the codes of the float"
        " model; distances are mean differences of log-mel spectrograms."
    )
    heard = tuple(
        Heard(
            question=shown.pair.question,
            previews=shown.previews,
            before=shown.pair.float_text,
            before_sound=shown.before,
            after=shown.pair.quant_text,
            after_sound=shown.after,
            note=f"Answer {number}, {shown.pair.where}",
        )
        for number, shown in enumerate(speech, 1)
    )
    columns, rows = speech_rows(report.speech)
    table = Table("Spoken answers in figures", tuple(columns), tuple(tuple(row) for row in rows), wide=True)
    return Section("Speech, side by side", text, tables=(table,), heard=heard)


def _tiles(report: EvalReport) -> tuple[Tile, ...]:
    overall = report.overall
    tiles = [
        Tile("same next token", format_percent(overall.top1.value), "of the positions"),
        Tile("KL divergence", f"{overall.kl_mean.value:.3g}", "nats per token; 0: identical"),
        Tile("perplexity", f"{overall.perplexity_quant.value:.4g}", f"float: {overall.perplexity_float.value:.4g}"),
    ]
    if overall.exact_quant is not None and overall.exact_float is not None:
        tiles.append(
            Tile(
                "exact answers",
                format_percent(overall.exact_quant.value),
                f"float: {format_percent(overall.exact_float.value)}",
            )
        )
    if report.by_modality:
        worst = max(report.by_modality, key=lambda name: report.by_modality[name].kl_mean.value)
        tiles.append(Tile("highest KL", worst, f"KL {report.by_modality[worst].kl_mean.value:.3g}"))
    tiles.append(Tile("size", human_bytes(report.quant_bytes), f"from {human_bytes(report.float_bytes)}"))
    return tuple(tiles)


def _agreement(groups: dict[str, Fidelity]) -> Section:
    names = list(groups)
    kls = [_span(group.kl_mean) for group in groups.values()]
    chart = Chart(
        "KL divergence by modality, nats",
        charts.interval_chart("kl", names, {"after": kls}, "nats per token, logarithmic", True),
        "Distance between the next-token distributions, with 95 % intervals over samples; lower is better. Values with"
        " overlapping intervals are not distinguishable. A single sample has no interval.",
        "; ".join(f"{name}: {group.kl_mean.value:.3g}" for name, group in groups.items()),
    )
    top1 = {"same token": [_span(g.top1) for g in groups.values()]}
    top1_chart = Chart(
        "Positions with the same most likely token, %",
        charts.interval_chart("top", names, _spans_in_percent(top1), "% of the positions"),
        "How often both models predict the same next token, with 95 % intervals; 100 means always.",
        "; ".join(f"{name}: {format_percent(group.top1.value)}" for name, group in groups.items()),
    )
    figures: list[Row] = [
        ("samples", *(f"{g.samples:,}" for g in groups.values())),
        ("positions", *(f"{g.positions:,}" for g in groups.values())),
        ("KL divergence, mean", *(_format_value(g.kl_mean) for g in groups.values())),
        ("KL divergence, 99th percentile", *(f"{g.kl_p99:.3g}" for g in groups.values())),
        ("same most likely token", *(_format_share(g.top1) for g in groups.values())),
        ("overlap of the 5 most likely tokens", *(_format_share(g.top5) for g in groups.values())),
        ("perplexity, float", *(_format_value(g.perplexity_float, ".4g") for g in groups.values())),
        ("perplexity, quantized", *(_format_value(g.perplexity_quant, ".4g") for g in groups.values())),
    ]
    if any(group.answered for group in groups.values()):
        figures += [
            ("samples with an answer", *(f"{g.answered:,}" for g in groups.values())),
            ("exact answers, float", *(_format_share(g.exact_float) for g in groups.values())),
            ("exact answers, quantized", *(_format_share(g.exact_quant) for g in groups.values())),
            ("change of exact answers", *(_format_change(g.exact_change) for g in groups.values())),
        ]
    table = Table("Figures, with 95 % intervals over samples", ("figure", *names), tuple(figures), wide=True)
    text = (
        "KL divergence is the information that the quantized model's next-token distribution loses relative to the"
        " float model's. Perplexity measures how well a model predicts the next token; it should be similar for both"
        " models. The overlap may be below the share of equal first tokens: the last of five tokens are nearly equally"
        " likely. The column text covers text-only samples; a sample with several modalities counts in each of them."
    )
    return Section("Agreement with the float model", text, (chart, top1_chart), (table,))


def _answers(groups: dict[str, Fidelity]) -> Section:
    answered = {name: group for name, group in groups.items() if group.exact_float and group.exact_quant}
    series = {
        "before": [_span(group.exact_float) for group in answered.values()],
        "after": [_span(group.exact_quant) for group in answered.values()],
    }
    chart = Chart(
        "Exact answers before and after, %",
        charts.interval_chart("answers", list(answered), _spans_in_percent(series), "% of the samples with an answer"),
        "How often the greedy answer equals the expected answer, with 95 % intervals, for the float model (before) and"
        " the quantized model (after).",
        "; ".join(
            f"{name}: {_format_share(g.exact_float)} before, {_format_share(g.exact_quant)} after".replace("\n", " ")
            for name, g in answered.items()
        ),
    )
    return Section("Answers", charts=(chart,))


def _drift(report: EvalReport, groups: dict[str, Fidelity]) -> Section:
    names = all_keys([layer.error_by_modality for layer in report.layers])
    layers = [layer.index for layer in report.layers]
    series = {n: to_percent([layer.error_by_modality.get(n) for layer in report.layers]) for n in names}
    series = series or {"all tokens": to_percent([layer.error for layer in report.layers])}
    chart = Chart(
        "Drift of the hidden states over the layers",
        charts.line_chart("drift", layers, series, "error, %"),
        "Accumulated error after each layer; a steep rise shows the layers that add most.",
        "; ".join(
            f"{n}: {format_percent(report.layers[-1].error_by_modality.get(n))} after the last layer" for n in names
        )
        if report.layers
        else "no layers",
    )
    rows: list[Row] = [
        ("hidden states, error", *(format_percent(g.hidden_error) for g in groups.values())),
        ("hidden states, cosine", *(f"{g.hidden_cosine:.5f}" for g in groups.values())),
    ]
    if any(group.embedding_differs for group in groups.values()):  # else 0 and 1 in every column
        rows += [
            ("embeddings, error", *(format_percent(g.embedding_error) for g in groups.values())),
            ("embeddings, cosine", *(f"{g.embedding_cosine:.5f}" for g in groups.values())),
        ]
    table = Table("States that the talker reads", ("figure", *groups), tuple(rows))
    text = (
        "The talker, which produces speech, is not quantized, but it reads these states. A cosine of 1 means no change."
    )
    return Section("Hidden states", text, (chart,) if report.layers else (), (table,))


def _measurement(report: EvalReport) -> Section:
    total = sum(report.tokens_by_modality.values()) or 1
    tokens = ", ".join(f"{n} {c:,} ({c / total:.1%})" for n, c in report.tokens_by_modality.items())
    rows: list[Row] = [
        ("float model", report.float_path),
        ("quantized model", report.quant_path),
        ("Linears", ", ".join(f"{n} {name}" for name, n in report.linears_by_scheme.items())),
        ("dataset", report.dataset),
        *([("SHA-256 of its index", report.dataset_digest)] if report.dataset_digest else []),
        ("tokens", tokens),
        ("device", report.device),
        ("seed", str(report.seed)),
        *((f"version of {name}", number) for name, number in report.versions.items()),
        ("time", format_seconds(report.seconds)),
        ("peak memory", human_bytes(report.peak_rss_bytes)),
    ]
    if report.peak_device_bytes:
        rows.append(("peak memory on the device", human_bytes(report.peak_device_bytes)))
    table = Table("How it was measured", ("item", "value"), tuple(rows), text_columns=2)
    time_charts = resource_charts(report.seconds_by_phase, {})
    return Section("How it was measured", charts=time_charts, tables=(table,), notes=report.warnings)


# --- figures as text -----------------------------------------------------------------------------------------


def _span(interval: Interval | None) -> charts.Span | None:
    return None if interval is None else (interval.value, interval.low, interval.high)


def _spans_in_percent(series: dict[str, list[charts.Span | None]]) -> dict[str, list[charts.Span | None]]:
    return {
        key: [None if span is None else (100 * span[0], 100 * span[1], 100 * span[2]) for span in spans]
        for key, spans in series.items()
    }


def _format_value(interval: Interval, spec: str = ".3g") -> str:
    return f"{interval.value:{spec}}\n({interval.low:{spec}} to {interval.high:{spec}})"


def _format_share(interval: Interval | None) -> str:
    if interval is None:
        return "n/a"
    return f"{100 * interval.value:.1f} %\n({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _format_change(interval: Interval | None) -> str:
    if interval is None:
        return "n/a"
    return f"{100 * interval.value:+.1f} points\n({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
