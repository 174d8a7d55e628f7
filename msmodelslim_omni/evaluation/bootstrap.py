"""95 % bootstrap intervals over samples, because the tokens of one sample are not independent. No torch."""

from __future__ import annotations

import numpy as np

from ..report import Interval

RESAMPLES = 1000


class Bootstrap:
    """1000 resamples of the samples, drawn with replacement. All figures use the same resamples, so they are paired.

    _counts: [resamples, samples], how often a resample contains each sample. The interval spans the 2.5th to the 97.5th
    percentile of the figure over the resamples (percentile method, Efron 1979).
    """

    def __init__(self, samples: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._counts = random.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES).astype(np.float64)

    def ratio(self, sums: np.ndarray, counts: np.ndarray, *, exponential: bool = False) -> Interval:
        """The figure sum(sums) / sum(counts), or its exp, with its interval. sums, counts: [samples].

        Resamples whose counts are all 0 have no figure and are left out.
        """
        of_resamples = self._counts @ counts
        values = (self._counts @ sums)[of_resamples > 0] / of_resamples[of_resamples > 0]
        value = sums.sum() / counts.sum()
        if exponential:  # exp overflows float64 above 709
            values, value = np.exp(np.minimum(values, 700.0)), np.exp(min(value, 700.0))
        low, high = np.percentile(values, [2.5, 97.5])
        return Interval(float(value), float(low), float(high))
