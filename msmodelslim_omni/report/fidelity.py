"""What an evaluation found: figures with their intervals, as data; how they are computed is in figures.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """How close a quantized model is to its float model on some samples.

    positions: next-token distributions compared. kl_mean, kl_p99: of KL(float || quant) over them, in nats. top1: share
    of positions whose likeliest token is the same; top5: mean share of the five likeliest tokens that both have.
    perplexity_*: of the tokens that follow. answered: samples with an answer; exact_*: share of them whose greedy
    answer is that answer, its end included; exact_change: quant - float, paired. hidden_*, embedding_*: of what the
    talker reads, |quant - float| / |float| over all tokens, and the mean cosine of the two. hidden_* of one modality
    are of its own tokens; embedding_* are of text alone, since the talker gets zeros in place of media.
    """

    samples: int
    positions: int
    kl_mean: Interval
    kl_p99: float
    top1: Interval
    top5: Interval
    perplexity_float: Interval
    perplexity_quant: Interval
    answered: int
    exact_float: Interval | None
    exact_quant: Interval | None
    exact_change: Interval | None
    hidden_error: float
    hidden_cosine: float
    embedding_error: float
    embedding_cosine: float


@dataclass(frozen=True)
class LayerDrift:
    """|quant - float| / |float| of the hidden states after one decoder layer, over all tokens and by their modality."""

    index: int
    error: float
    error_by_modality: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """Everything eval_report.json holds.

    scored: which positions count, in words. by_modality: `text` is of the samples of text alone, the others of the
    samples that have an image, audio or video; a sample that has several counts in each of these.
    """

    model_type: str
    float_path: str
    quant_path: str
    quant_format: str
    linears_by_scheme: dict[str, int]
    dataset: str
    scored: str
    samples: int
    tokens_by_modality: dict[str, int]
    overall: Fidelity
    by_modality: dict[str, Fidelity]
    layers: tuple[LayerDrift, ...]
    float_bytes: int
    quant_bytes: int
    device: str
    seed: int
    versions: dict[str, str]
    seconds: float
    seconds_by_phase: dict[str, float]
    peak_rss_bytes: int
    peak_device_bytes: int
    warnings: tuple[str, ...] = ()
