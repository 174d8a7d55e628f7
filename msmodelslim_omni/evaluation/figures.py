"""Fidelity of all samples, or of the samples with one modality, from scores per position and drift per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..models import MODALITIES
from ..report import Fidelity, Interval
from .bootstrap import Bootstrap
from .scoring import Scores, drift_figures
from .stem_pair import Sample


@dataclass(frozen=True)
class Measurements:
    """Scores of P positions of S samples, and the drift of each sample.

    sample: int64 [P], an index into samples. targets: int64 [P], the next tokens. in_answer: bool [P].
    hidden: float64 [S, modalities, 7], after the final norm. embedding: float64 [S, 7]. Both are sums as returned by
    scoring.drift_sums, over the states that the talker reads.
    """

    samples: Sequence[Sample]
    scores: Scores
    sample: torch.Tensor
    targets: torch.Tensor
    in_answer: torch.Tensor
    hidden: torch.Tensor
    embedding: torch.Tensor


def compute_fidelity(measurements: Measurements, chosen: Sequence[int], modality: int | None, seed: int) -> Fidelity:
    """Fidelity over the samples with the indices `chosen`, which must be in ascending order.

    modality: only hidden states of its tokens count. None: all hidden states count.
    """
    scores = measurements.scores
    is_chosen = torch.isin(measurements.sample, torch.tensor(chosen))
    bootstrap = Bootstrap(len(chosen), seed)

    def sum_by_sample(values: torch.Tensor) -> np.ndarray:
        """Sum values [P] over the positions of each chosen sample: [chosen]."""
        by_sample = torch.zeros(len(measurements.samples), dtype=torch.float64)
        return by_sample.index_add_(0, measurements.sample, values.to(torch.float64))[list(chosen)].numpy()

    counts = sum_by_sample(torch.ones_like(scores.kl))
    hidden = measurements.hidden[list(chosen)].sum(dim=0)  # [modalities, 7]
    hidden_error, hidden_cosine = drift_figures(hidden.sum(dim=0) if modality is None else hidden[modality])
    embedding_error, embedding_cosine = drift_figures(measurements.embedding[list(chosen)].sum(dim=0))
    answered = [number for number in chosen if measurements.samples[number].answer is not None]
    exact_float, exact_quant = (
        _has_exact_answer(measurements, likeliest)[answered]
        for likeliest in (scores.likeliest_float, scores.likeliest_quant)
    )
    answer_bootstrap = Bootstrap(len(answered), seed) if answered else None

    def mean_of_answered(values: np.ndarray) -> Interval | None:
        return None if answer_bootstrap is None else answer_bootstrap.ratio(values, np.ones(len(answered)))

    return Fidelity(
        samples=len(chosen),
        positions=int(is_chosen.sum()),
        kl_mean=bootstrap.ratio(sum_by_sample(scores.kl), counts),
        kl_p99=float(np.quantile(scores.kl[is_chosen].numpy(), 0.99)),
        top1=bootstrap.ratio(sum_by_sample(scores.likeliest_float == scores.likeliest_quant), counts),
        top5=bootstrap.ratio(sum_by_sample(scores.shared_top), counts),
        perplexity_float=bootstrap.ratio(sum_by_sample(scores.nll_float), counts, exponential=True),
        perplexity_quant=bootstrap.ratio(sum_by_sample(scores.nll_quant), counts, exponential=True),
        answered=len(answered),
        exact_float=mean_of_answered(exact_float),
        exact_quant=mean_of_answered(exact_quant),
        exact_change=mean_of_answered(exact_quant - exact_float),
        hidden_error=hidden_error,
        hidden_cosine=hidden_cosine,
        embedding_error=embedding_error,
        embedding_cosine=embedding_cosine,
    )


def _has_exact_answer(measurements: Measurements, likeliest: torch.Tensor) -> np.ndarray:
    """1 for each sample whose answer positions are all right, else 0: float64 [S]. Ignore samples without an answer."""
    is_wrong = measurements.in_answer & (likeliest != measurements.targets)
    wrong = torch.zeros(len(measurements.samples), dtype=torch.float64)
    wrong.index_add_(0, measurements.sample, is_wrong.to(torch.float64))
    return (wrong == 0).to(torch.float64).numpy()


def fidelity_by_modality(measurements: Measurements, seed: int) -> dict[str, Fidelity]:
    """Fidelity of the text-only samples as `text`, and of the samples with tokens of each other modality."""
    present = torch.stack([s.modality.bincount(minlength=len(MODALITIES)) for s in measurements.samples]) > 0
    fidelities = {}
    for index, name in enumerate(MODALITIES):
        belongs = ~present[:, 1:].any(dim=1) if index == 0 else present[:, index]
        if bool(belongs.any()):
            samples = torch.nonzero(belongs).flatten().tolist()
            fidelities[name] = compute_fidelity(measurements, samples, index, seed)
    return fidelities
