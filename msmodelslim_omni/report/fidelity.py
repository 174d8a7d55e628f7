"""Results of an evaluation as data: figures and their intervals. No torch.

evaluation/figures.py computes them.
"""

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
    """How close a quantized model is to its float model on a set of samples.

    positions: number of next-token distributions compared. kl_mean, kl_p99: mean and 99th percentile of
    KL(float || quant) over the positions, in nats. top1: share of positions with the same most likely token; top5: mean
    share of the five most likely tokens that both models have in common, in any order, so it may be below top1.
    perplexity_*: of the actual next tokens.
    answered: number of samples with an answer; exact_*: share of them whose greedy answer equals the answer, its end
    token included; exact_change: quant - float, paired. hidden_*, embedding_*: states that the talker reads,
    |quant - float| / |float| over all tokens, and mean cosine similarity. hidden_* of one modality cover its own
    tokens; embedding_* cover text tokens only, since the talker gets zeros in place of media.
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

    @property
    def embedding_differs(self) -> bool:
        """Whether the embeddings changed; no recipe of this package changes them."""
        return self.embedding_error != 0


@dataclass(frozen=True)
class LayerDrift:
    """|quant - float| / |float| of the hidden states after one decoder layer, over all tokens and by token modality.

    error_ordinary: without the `massive` tokens, whose hidden states are more than 10 times as long as the median of
    their sample and modality. The defaults are for reports from earlier versions.
    """

    index: int
    error: float
    error_by_modality: dict[str, float] = field(default_factory=dict)
    error_ordinary: float | None = None
    massive: int = 0


@dataclass(frozen=True)
class AnswerPair:
    """What both models answer to one sample that has an answer.

    question: the text of the last question. media: (kind, path) of its media. *_text: the greedy answer up to the first
    token that differs from the expected answer, which is where the measurement ends; *_exact: whether no token differs.
    kl: mean KL(float || quant) over the tokens of the answer and its end, in nats.
    """

    where: str
    question: str
    media: tuple[tuple[str, str], ...]
    expected: str
    float_text: str
    float_exact: bool
    quant_text: str
    quant_exact: bool
    kl: float


@dataclass(frozen=True)
class SpokenPair:
    """What both models answer aloud to one sample.

    media: (kind, path) of its media. codes: number of the talker's steps that are compared. code_agreement: share of
    the steps at which its most likely code is the same, on the text and the codes of the float model. mel_*: mean
    distance of the log-mel spectrograms in dB from the float model's speech: of the quantized model with the same text,
    of the quantized model's own answer, and of a second take of the float model with another seed. *_file: WAV files,
    relative to the folder of the evaluation; empty if none were written.
    """

    where: str
    question: str
    media: tuple[tuple[str, str], ...]
    float_text: str
    quant_text: str
    codes: int
    code_agreement: float
    mel_same_text: float
    mel_free: float
    mel_takes: float
    float_seconds: float
    quant_seconds: float
    float_file: str
    quant_file: str


@dataclass(frozen=True)
class Preview:
    """A small picture (`image`) or sound (`audio`) of a sample, as a data URI. text: a name, for screen readers."""

    kind: str
    uri: str
    text: str


@dataclass(frozen=True)
class ShownAnswer:
    """An answer pair with previews of its media, for the page."""

    pair: AnswerPair
    previews: tuple[Preview, ...]


@dataclass(frozen=True)
class ShownSpeech:
    """A spoken pair for the page: previews of its media, and the sounds of both models; None without their files."""

    pair: SpokenPair
    previews: tuple[Preview, ...]
    before: Preview | None
    after: Preview | None


@dataclass(frozen=True)
class EvalReport:
    """The contents of eval_report.json.

    scored: description of the positions that count. by_modality: `text` covers text-only samples, the other modalities
    cover samples that contain them; a sample that contains several counts in each. dataset_digest: the SHA-256 of the
    index; empty in reports from earlier versions. speech: answers that both models spoke, with --speech.
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
    dataset_digest: str = ""
    speech: tuple[SpokenPair, ...] = ()
