"""95 % bootstrap intervals over samples, since the tokens of one sample depend on each other. No torch."""

from __future__ import annotations

import numpy as np

from ..report import Interval

RESAMPLES = 1000


class Bootstrap:
    """The same 1000 resamples, with replacement, of some samples for every figure, so that figures can be paired.

    times: [resamples, samples], how often a resample has each sample. Percentile method: the interval is that between
    the 2.5th and the 97.5th percentile of the figure over the resamples (Efron 1979).
    """

    def __init__(self, samples: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._times = random.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(np.float64)

    def ratio(self, sums: np.ndarray, counts: np.ndarray, *, exponential: bool = False) -> Interval:
        """Of sum(sums) / sum(counts), or exp of it; sums and counts: [samples], every count above 0."""
        values = (self._times @ sums) / (self._times @ counts)
        value = sums.sum() / counts.sum()
        if exponential:  # beyond that float64 ends
            values, value = np.exp(np.minimum(values, 700.0)), np.exp(min(value, 700.0))
        low, high = np.percentile(values, [2.5, 97.5])
        return Interval(float(value), float(low), float(high))
