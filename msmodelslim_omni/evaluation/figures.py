"""What was measured at each position and of each sample -> Fidelity of all samples and of those with one modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..models import MODALITIES
from ..report import Fidelity, Interval
from .bootstrap import Bootstrap
from .scoring import Scores, drift_figures
from .side_by_side import Sample


@dataclass(frozen=True)
class Measured:
    """Scores of P positions of S samples, and the drift of each sample.

    sample: int64 [P], an index into samples. targets: int64 [P], the tokens that follow. in_answer: bool [P].
    hidden: float64 [S, modalities, 4] behind the final norm; embedding: float64 [S, 4]; both sums as scoring.drift has
    them, of what the talker reads.
    """

    samples: Sequence[Sample]
    scores: Scores
    sample: torch.Tensor
    targets: torch.Tensor
    in_answer: torch.Tensor
    hidden: torch.Tensor
    embedding: torch.Tensor


def fidelity(measured: Measured, chosen: Sequence[int], modality: int | None, seed: int) -> Fidelity:
    """Of the samples with these indices, which must be in rising order.

    modality: hidden states count of its tokens alone; None: of all.
    """
    scores = measured.scores
    here = torch.isin(measured.sample, torch.tensor(chosen))
    bootstrap = Bootstrap(len(chosen), seed)

    def summed(values: torch.Tensor) -> np.ndarray:
        """[P] -> [chosen], summed over each sample's positions."""
        by_sample = torch.zeros(len(measured.samples), dtype=torch.float64)
        return by_sample.index_add_(0, measured.sample, values.to(torch.float64))[list(chosen)].numpy()

    counts = summed(torch.ones_like(scores.kl))
    hidden = measured.hidden[list(chosen)].sum(dim=0)  # [modalities, 4]
    hidden_error, hidden_cosine = drift_figures(hidden.sum(dim=0) if modality is None else hidden[modality])
    embedding_error, embedding_cosine = drift_figures(measured.embedding[list(chosen)].sum(dim=0))
    answered = [number for number in chosen if measured.samples[number].answer is not None]
    exact_float, exact_quant = (
        _exact_answers(measured, likeliest)[answered] for likeliest in (scores.likeliest_float, scores.likeliest_quant)
    )
    of_answered = Bootstrap(len(answered), seed) if answered else None

    def share(values: np.ndarray) -> Interval | None:
        return None if of_answered is None else of_answered.ratio(values, np.ones(len(answered)))

    return Fidelity(
        samples=len(chosen),
        positions=int(here.sum()),
        kl_mean=bootstrap.ratio(summed(scores.kl), counts),
        kl_p99=float(np.quantile(scores.kl[here].numpy(), 0.99)),
        top1=bootstrap.ratio(summed(scores.likeliest_float == scores.likeliest_quant), counts),
        top5=bootstrap.ratio(summed(scores.shared_top), counts),
        perplexity_float=bootstrap.ratio(summed(scores.nll_float), counts, exponential=True),
        perplexity_quant=bootstrap.ratio(summed(scores.nll_quant), counts, exponential=True),
        answered=len(answered),
        exact_float=share(exact_float),
        exact_quant=share(exact_quant),
        exact_change=share(exact_quant - exact_float),
        hidden_error=hidden_error,
        hidden_cosine=hidden_cosine,
        embedding_error=embedding_error,
        embedding_cosine=embedding_cosine,
    )


def _exact_answers(measured: Measured, likeliest: torch.Tensor) -> np.ndarray:
    """1 for each sample whose answer has no position that is wrong, else 0; float64 [S], meaningless without answer."""
    wrong = torch.zeros(len(measured.samples), dtype=torch.float64)
    wrong.index_add_(0, measured.sample, (measured.in_answer & (likeliest != measured.targets)).to(torch.float64))
    return (wrong == 0).to(torch.float64).numpy()


def by_modality(measured: Measured, seed: int) -> dict[str, Fidelity]:
    """`text`: of the samples of text alone; the others: of those that have tokens of that modality."""
    present = torch.stack([s.modality.bincount(minlength=len(MODALITIES)) for s in measured.samples]) > 0
    found = {}
    for index, name in enumerate(MODALITIES):
        belongs = ~present[:, 1:].any(dim=1) if index == 0 else present[:, index]
        if bool(belongs.any()):
            found[name] = fidelity(measured, torch.nonzero(belongs).flatten().tolist(), index, seed)
    return found
