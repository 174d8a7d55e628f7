"""smooth_quant and iter_smooth: move outlier channels from activations into weights, exactly.

For a group of Linears that read the same input X [tokens, in], each channel c gets a factor
    s_c = A_c^alpha / W_c^(1 - alpha)                        (SmoothQuant, arXiv 2211.10438, eq. 4)
with A the largest |activation| and W the largest |weight| of the channel; X / s is what the previous norm or Linear
then yields, and the columns W * s undo it. Two things differ from the paper:
- A is taken per modality and a candidate is judged by its worst modality, so that many video tokens cannot decide
  for a few audio tokens; a candidate that is worse than plain rounding for any modality is not taken.
- The folds are exact in the stored dtype; see fold.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..models import LinearGroup
from ..numerics import (
    QuantScheme,
    quantize_weight,
    quantized_matmul,
    row_blocks,
    row_squares,
)
from ..recipe import IterSmoothConfig, SmoothQuantConfig
from ..statistics import InputStats
from .fold import (
    folded,
    refusal,
    repeated,
    shared_peak,
    storable,
)
from .work import Fold, LayerWork, SmoothingRecord

ALPHA_GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))

# The search looks at this many output rows of each Linear; the winner is judged on all of them.
_SEARCH_ROWS = 512

# Output rows that the winner is judged on at once: what several processes share out.
_PIECE_ROWS = 1024

SmoothConfig = SmoothQuantConfig | IterSmoothConfig


def needs(config: SmoothConfig) -> Literal["inputs"]:
    return "inputs"


def apply(work: LayerWork, config: SmoothConfig, linears: frozenset[str]) -> LayerWork:
    """Smooth every group that the recipe selects; a group no candidate improves is left as it is, with the reason."""
    for group in work.spec.groups:
        enabled = config.enable_subgraph_type if isinstance(config, IterSmoothConfig) else ("norm-linear",)
        why_not = refusal(work, group, enabled, linears)
        if why_not is None:
            work = _smooth_group(work, group, config)
        elif why_not:
            work = work.recorded(SmoothingRecord(group.name, None, 1.0, why_not))
    return work


# --- search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    alpha: float
    source: str  # how A was taken over the modalities
    factors: torch.Tensor  # [channels of `previous`]


def _smooth_group(work: LayerWork, group: LinearGroup, config: SmoothConfig) -> LayerWork:
    assert work.stats is not None  # the plan runs calibration for this processor
    stats = work.stats[group.name]
    scheme = work.schemes[group.linears[0]]
    alphas = ALPHA_GRID if config.alpha == "auto" else (config.alpha,)
    scale_min = config.scale_min if isinstance(config, IterSmoothConfig) else 1e-5

    some = [_spread_rows(work, linear) for linear in group.linears]
    judge = _Judge(stats, some, replace(scheme, weight_method="minmax"))
    candidates = [
        replace(c, factors=storable(work, group, c.factors)[0])
        for c in _candidates(stats, _column_peaks(work, group), group, alphas, scale_min)
    ]
    searched = work.team.map(lambda c: judge.worst_ratio(repeated(c.factors, group)), candidates)
    best = candidates[min(range(len(candidates)), key=lambda i: (searched[i], i))]
    full = _ratio_of_all_rows(work, group, repeated(best.factors, group))
    if not full < 1.0:
        reason = f"best candidate (alpha {best.alpha}) would be {full:.3f}x plain rounding; left alone"
        return work.recorded(SmoothingRecord(group.name, None, 1.0, reason))
    record = SmoothingRecord(group.name, best.alpha, full, f"A: {best.source}")
    return folded(work, group, best.factors).recorded(record)


def _candidates(
    stats: InputStats,
    column_peaks: torch.Tensor,
    group: LinearGroup,
    alphas: tuple[float, ...],
    scale_min: float,
) -> Iterator[_Candidate]:
    """Factors for each alpha, with A as the plain maximum over modalities and, if it differs, balanced.

    column_peaks: [in], the largest |weight| of each input over the group's Linears.
    """
    w = shared_peak(column_peaks, group)  # [channels]
    per_modality = stats.absmax[stats.present()]  # [present, in]
    sources = {"peak over modalities": per_modality.amax(dim=0)}
    if len(per_modality) > 1:
        mean = per_modality.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        sources["peak over modalities, each scaled to the same mean"] = (per_modality / mean).amax(dim=0)
    for source, absmax in sources.items():
        a = shared_peak(absmax, group)
        alive = (a > 0) & (w > 0)
        for alpha in alphas:
            s = (a.clamp_min(1e-30).pow(alpha) / w.clamp_min(1e-30).pow(1 - alpha)).clamp_min(scale_min)
            log_mean = s[alive].log().mean() if alive.any() else s.new_zeros(())
            s = (s / log_mean.exp()).clamp(2.0**-14, 2.0**14)  # a common factor changes nothing; keep norms in range
            yield _Candidate(alpha, source, torch.where(alive, s, torch.ones_like(s)))


def _column_peaks(work: LayerWork, group: LinearGroup) -> torch.Tensor:
    """The largest |weight| of each input over the group's Linears: [in] float32."""
    peaks = []
    for linear in group.linears:
        stored = work.weights[f"{linear}.weight"]
        peaks += [work.weight(linear, rows).to(torch.float32).abs().amax(dim=0) for rows in row_blocks(stored)]
    return torch.stack(peaks).amax(dim=0)


def _spread_rows(work: LayerWork, linear: str) -> torch.Tensor:
    """At most _SEARCH_ROWS rows of a weight, evenly spread."""
    count = len(work.weights[f"{linear}.weight"])
    rows = torch.linspace(0, count - 1, min(count, _SEARCH_ROWS)).round().long()
    return work.weight(linear, rows).to(torch.float32)


def _ratio_of_all_rows(work: LayerWork, group: LinearGroup, factors: torch.Tensor) -> float:
    """_Judge.worst_ratio of the whole Linears, shared out over the team in pieces that do not depend on its size."""
    assert work.stats is not None
    stats, scheme = work.stats[group.name], work.schemes[group.linears[0]]
    counts = [len(work.weights[f"{linear}.weight"]) for linear in group.linears]
    pieces = [
        (number, slice(first, min(first + _PIECE_ROWS, count)))
        for number, count in enumerate(counts)
        for first in range(0, count, _PIECE_ROWS)
    ]

    def sums(piece: tuple[int, slice]) -> torch.Tensor:
        number, rows = piece
        weight = work.weight(group.linears[number], rows).to(torch.float32)
        return _Judge(stats, [weight], scheme).sums(factors)[0]

    totals = [torch.zeros(3, len(stats.present()), dtype=torch.float64) for _ in group.linears]
    found = work.team.map(sums, pieces, [float(rows.stop - rows.start) for _, rows in pieces])
    for (number, _), of_piece in zip(pieces, found, strict=True):
        totals[number] += of_piece
    return _worst_ratio(totals)


def _worst_ratio(sums: list[torch.Tensor]) -> float:
    """The largest over the modalities of error / error of plain rounding; below 1 no modality is worse.

    sums: of each Linear the squared sums of the error, of that error and of the output, float64 [3, modalities]; the
    errors count relative to the output.
    """
    errors, plain = torch.stack([s[:2] / s[2].clamp_min(1e-300) for s in sums]).sum(dim=0)
    ratio = torch.where(plain > 0, errors / plain, torch.where(errors > 0, torch.inf, 1.0))
    return float(ratio.max().nan_to_num(nan=torch.inf).sqrt())


class _Judge:
    """Relative output error of a group under quantization, per modality, against that of plain rounding."""

    def __init__(self, stats: InputStats, weights: list[torch.Tensor], scheme: QuantScheme) -> None:
        """weights: of each Linear [out, in], or some rows of it; float32."""
        self._x = stats.rows
        self._members = [stats.row_modality == m for m in stats.present()]
        self._weights = weights
        self._scheme = scheme
        self._exact = [self._x @ weight.T for weight in weights]  # [rows, out] each
        self._signals = [self._by_modality(row_squares(exact)) for exact in self._exact]
        self._plain = self._errors(None)

    def worst_ratio(self, factors: torch.Tensor) -> float:
        """The largest over the modalities of error(factors) / error(plain); below 1 no modality is worse."""
        return _worst_ratio(self.sums(factors))

    def sums(self, factors: torch.Tensor) -> list[torch.Tensor]:
        """Of each Linear, float64 [3, modalities present]: see _worst_ratio."""
        return [torch.stack(s) for s in zip(self._errors(factors), self._plain, self._signals, strict=True)]

    def _errors(self, factors: torch.Tensor | None) -> list[torch.Tensor]:
        """Of each Linear the squared error of its output, float64 [modalities present]."""
        x = self._x if factors is None else self._x / factors
        errors = []
        for weight, exact in zip(self._weights, self._exact, strict=True):
            linear = quantize_weight(Fold(factors).of(weight), self._scheme)
            errors.append(self._by_modality(row_squares(quantized_matmul(x, linear) - exact)))
        return errors

    def _by_modality(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] -> [modalities present], summed."""
        return torch.stack([of_rows[members].sum() for members in self._members])
