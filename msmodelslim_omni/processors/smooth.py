"""smooth_quant and iter_smooth: move outlier channels from activations to weights, exactly.

For a group of Linears that read one input X [tokens, in], each channel c gets a factor
    s_c = A_c^alpha / W_c^(1 - alpha)                        (SmoothQuant, arXiv 2211.10438, eq. 4)
with A the largest |activation| and W the largest |weight| of the channel. The previous norm or Linear then outputs
X / s, and the columns W * s compensate for it. Differences from the paper:
- A is computed per modality, and the score of a candidate is that of its worst modality, so that many video tokens
  cannot outvote a few audio tokens. A candidate that is worse than plain rounding for any modality is rejected.
- With alpha "auto", the best grid point is only the start: its factors are then refined channel by channel on the
  expected rounding error (expected_error.py). The better of both is taken, by the measured error.
- The folds are exact in the stored dtype; see fold.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..models import LinearGroup, Subgraph
from ..numerics import (
    QuantScheme,
    WeightChecks,
    quantize_weight,
    quantized_matmul,
    row_blocks,
)
from ..recipe import IterSmoothConfig, SmoothQuantConfig
from ..runtime import to_floats
from ..statistics import InputStats, merge_stats, relative_weights
from .expected_error import ExpectedErrors, refine
from .fold import (
    exact_factors,
    fold_factors,
    known_groups,
    max_over_query_heads,
    reason_to_skip,
    repeat_for_query_heads,
)
from .work import Fold, LayerWork, SmoothingRecord

ALPHA_GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))

# Output rows of a finalist that are measured at once; several processes share these pieces.
_PIECE_ROWS = 1024

SmoothConfig = SmoothQuantConfig | IterSmoothConfig


def needs(config: SmoothConfig) -> Literal["inputs"]:
    return "inputs"


def apply(work: LayerWork, config: SmoothConfig, linears: frozenset[str]) -> LayerWork:
    """Smooth every subgraph that the recipe selects. One that no candidate improves is recorded and unchanged."""
    for part in work.spec.subgraphs:
        enabled = config.enable_subgraph_type if isinstance(config, IterSmoothConfig) else ("norm-linear",)
        reason = reason_to_skip(work, part, enabled, linears)
        if reason is None:
            work = _smooth(work, part, config)
        elif reason:
            work = work.with_record(SmoothingRecord(part.name, None, 1.0, reason))
    return work


# --- search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    alpha: float
    source: str  # how A combines the modalities
    factors: torch.Tensor  # [channels of `previous`]


def _smooth(work: LayerWork, part: Subgraph, config: SmoothConfig) -> LayerWork:
    assert work.stats is not None  # the plan runs calibration for this processor
    groups = known_groups(work, part)
    inputs = [work.stats[group.name] for group in groups]
    scheme = work.schemes[part.linears[0]]
    alphas = ALPHA_GRID if config.alpha == "auto" else (config.alpha,)
    scale_min = config.scale_min if isinstance(config, IterSmoothConfig) else 1e-5

    weights = [[work.weight(linear) for linear in group.linears] for group in groups]
    expected = ExpectedErrors.of_tokens(list(zip(inputs, weights, strict=True)), scheme)
    candidates = [
        replace(c, factors=exact_factors(work, part, c.factors)[0])
        for c in _candidates(merge_stats(inputs), _column_peaks(work, part), part, alphas, scale_min)
    ]
    ratios = to_floats(
        work.team.map(lambda c: expected.worst_ratio(repeat_for_query_heads(c.factors, part)), candidates)
    )
    best = candidates[min(range(len(candidates)), key=lambda i: (ratios[i], i))]
    finalists = [best]
    if config.alpha == "auto":
        finalists.append(_refined(work, part, expected, best, scale_min))
    full_ratio, best = min(
        zip(_worst_ratios_of_all_rows(work, groups, part, finalists), finalists, strict=True), key=lambda pair: pair[0]
    )
    if not full_ratio < 1.0:
        reason = f"the best candidate (alpha {best.alpha}) has {full_ratio:.3f}x the error of plain rounding; unchanged"
        return work.with_record(SmoothingRecord(part.name, None, 1.0, reason))
    record = SmoothingRecord(part.name, best.alpha, full_ratio, f"A: {best.source}")
    return fold_factors(work, part, best.factors).with_record(record)


def _refined(
    work: LayerWork, part: Subgraph, expected: ExpectedErrors, start: _Candidate, scale_min: float
) -> _Candidate:
    """The candidate with factors refined from `start`. One process computes them for all."""

    def search(candidate: _Candidate) -> torch.Tensor:
        return refine(expected, candidate.factors, lambda s: repeat_for_query_heads(s, part)).clamp_min(scale_min)

    (factors,) = work.team.map(search, [start])
    exact = exact_factors(work, part, factors.to(start.factors.device))[0]
    return replace(start, source=f"{start.source}, then refined", factors=exact)


def _candidates(
    stats: InputStats,
    column_peaks: torch.Tensor,
    part: Subgraph,
    alphas: tuple[float, ...],
    scale_min: float,
) -> Iterator[_Candidate]:
    """Yield factors for each alpha, with A as the maximum over the modalities and, if there are several, balanced.

    stats: of all groups together. column_peaks: [in], the largest |weight| of each input over all Linears.
    """
    w = max_over_query_heads(column_peaks, part)  # [channels]
    per_modality = stats.absmax[stats.present()]  # [present, in]
    sources = {"peak over modalities": per_modality.amax(dim=0)}
    if len(per_modality) > 1:
        mean = per_modality.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        sources["peak over modalities, each scaled to the same mean"] = (per_modality / mean).amax(dim=0)
    for source, absmax in sources.items():
        a = max_over_query_heads(absmax, part)
        alive = (a > 0) & (w > 0)
        for alpha in alphas:
            s = (a.clamp_min(1e-30).pow(alpha) / w.clamp_min(1e-30).pow(1 - alpha)).clamp_min(scale_min)
            log_mean = torch.where(alive, s.log(), torch.zeros_like(s)).sum() / alive.sum().clamp_min(1)
            s = (s / log_mean.exp()).clamp(2.0**-14, 2.0**14)  # a common factor has no effect; keep norms in range
            yield _Candidate(alpha, source, torch.where(alive, s, torch.ones_like(s)))


def _column_peaks(work: LayerWork, part: Subgraph) -> torch.Tensor:
    """The largest |weight| of each input over the Linears: [in] float32."""
    peaks = []
    for linear in part.linears:
        stored = work.weights[f"{linear}.weight"]
        peaks += [work.weight(linear, rows).to(torch.float32).abs().amax(dim=0) for rows in row_blocks(stored)]
    return torch.stack(peaks).amax(dim=0)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a Linear. place: its place in its group, whose counterparts in other experts are added to it."""

    linear: str
    place: int
    input: InputStats
    rows: slice


def _worst_ratios_of_all_rows(
    work: LayerWork, groups: Sequence[LinearGroup], part: Subgraph, finalists: list[_Candidate]
) -> list[float]:
    """The _worst_ratio of each candidate on all rows of the weights of these groups.

    The team shares pieces whose bounds do not depend on its size.
    """
    assert work.stats is not None
    scheme = work.schemes[part.linears[0]]
    all_factors = [repeat_for_query_heads(candidate.factors, part) for candidate in finalists]
    counts = {linear: len(work.weights[f"{linear}.weight"]) for linear in part.linears}
    pieces = [
        _Piece(linear, place, work.stats[group.name], slice(first, min(first + _PIECE_ROWS, counts[linear])))
        for group in groups
        for place, linear in enumerate(group.linears)
        for first in range(0, counts[linear], _PIECE_ROWS)
    ]
    checks = WeightChecks()

    def errors(piece: _Piece) -> torch.Tensor:
        weight = work.weight(piece.linear, piece.rows).to(torch.float32)
        return output_errors(piece.input.rows, weight, scheme, all_factors, checks)

    piece_errors = work.team.map(errors, pieces, [float(piece.rows.stop - piece.rows.start) for piece in pieces])
    sampled = sorted({m for piece in pieces for m in piece.input.sampled()})
    totals = [torch.zeros(2 + len(finalists), len(sampled), dtype=torch.float64) for _ in groups[0].linears]
    for piece, of_rows in zip(pieces, checks.checked(piece_errors), strict=True):
        members = [piece.input.row_modality == m for m in sampled]
        totals[piece.place] += sums_by_modality(of_rows, members)
    return [worst_ratio([total[[2 + i, 1, 0]] for total in totals]) for i in range(len(finalists))]


def worst_ratio(sums: list[torch.Tensor]) -> float:
    """The maximum over the modalities of error / error of plain rounding. Below 1, no modality is worse.

    sums: for each Linear, float64 [3, modalities]: sums of the error, of the error of plain rounding and of the output,
    see output_errors.
    """
    errors, plain = torch.stack([s[:2] / s[2].clamp_min(1e-300) for s in sums]).sum(dim=0)
    ratio = torch.where(plain > 0, errors / plain, torch.where(errors > 0, torch.inf, 1.0))
    return float(ratio.max().nan_to_num(nan=torch.inf).sqrt())


def output_errors(
    x: torch.Tensor,
    weight: torch.Tensor,
    scheme: QuantScheme,
    all_factors: list[torch.Tensor],
    checks: WeightChecks,
) -> torch.Tensor:
    """By token x [rows, in]: its weight, the squared length of its output, and the squared errors of plain rounding and
    of rounding with each of `all_factors`, float32 [3 + factors, rows].

    weight: [out, in] of a Linear, or some of its rows; float32. The weight of a token is that of relative_weights.
    """
    exact = x @ weight.T  # [rows, out]
    results = [relative_weights(exact), exact.square().sum(dim=1)]
    for factors in (None, *all_factors):
        linear = quantize_weight(Fold(factors).apply_to(weight), scheme, checks=checks)
        output = quantized_matmul(x if factors is None else x / factors, linear)
        results.append(output.sub_(exact).square_().sum(dim=1))
    return torch.stack(results)


def sums_by_modality(errors: torch.Tensor, members: list[torch.Tensor]) -> torch.Tensor:
    """The weighted sums of output_errors over the tokens of each modality, float64 [2 + factors, modalities].

    members: masks of the tokens of each modality.
    """
    token_weights, *squares = errors.to(torch.float64)
    return torch.stack([torch.stack([(s * token_weights)[of].sum() for of in members]) for s in squares])
