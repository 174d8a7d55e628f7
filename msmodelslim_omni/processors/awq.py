"""awq: scale the channels of a Linear's input so that those that matter lose less to rounding.

For a group of Linears with input X [tokens, in] each channel c gets a factor
    s_c = x_c^r / w_c^(1 - r)    or, without duo scaling,    s_c = x_c^r                 (AWQ, arXiv 2306.00978, eq. 5)
with x the mean |activation| of the channel, w the mean over the output channels of |weight| relative to the largest
of its group, and s normalized by sqrt(max s * min s); X / s and W * s leave the product as it is. What differs:
- r runs over a grid in which the identity (no scaling) always stands.
- The error of a point needs no forward: it is Σ ΔW H ΔWᵀ (gram.py), or, where GPTQ is to round, what that leaves of
  it, Σ L_ii² ΔW_i² (gptq.py); on spread output channels where all would cost too much.
- Where an attention or an MLP stands between the Linears and the residual stream, the best points and the identity
  are rounded in earnest and judged by that block's true output on some samples.
- v -> o is scaled under GQA too, and all folds are exact in the stored dtype (fold.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..models import LinearGroup
from ..numerics import (
    QuantizedLinear,
    QuantScheme,
    dequantize,
    grouped_rounding_error,
    relative_error,
    row_blocks,
)
from ..recipe import AwqConfig
from ..runtime import SINGLE_PROCESS, Team
from ..statistics import Gram
from .fold import (
    folded,
    refusal,
    repeated,
    shared_mean,
    storable,
)
from .gptq import Triangle
from .rounding import round_group, triangle_for
from .work import LayerWork, SmoothingRecord

_FINALISTS = 2  # beside the identity

# Weights of each Linear that the search rounds at every point, but no fewer output channels than _LEAST_ROWS.
_SEARCH_WEIGHTS = 1 << 17
_LEAST_ROWS = 32


@dataclass(frozen=True)
class Candidate:
    """A point of the grid: `factors` [channels of `previous`], as storage will really give them."""

    ratio: float
    duo: bool
    factors: torch.Tensor

    @property
    def name(self) -> str:
        if self.ratio == 0.0 and not self.duo:
            return "identity"
        return f"ratio {self.ratio:g}" + (", duo" if self.duo else "")


def needs(config: AwqConfig) -> Literal["gram"]:
    return "gram"


def apply(work: LayerWork, config: AwqConfig, linears: frozenset[str]) -> LayerWork:
    """Scale every group that the recipe selects; one that the identity serves best is left as it is.

    From the last group to the first: those behind another Linear divide its rows, and are done before that one is.
    """
    for group in reversed(work.spec.groups):
        why_not = refusal(work, group, config.enable_subgraph_type, linears)
        if why_not is None:
            work = _scale_group(work, group, config)
        elif why_not:
            work = work.recorded(SmoothingRecord(group.name, None, 1.0, why_not))
    return work


def _scale_group(work: LayerWork, group: LinearGroup, config: AwqConfig) -> LayerWork:
    assert work.stats is not None  # the plan runs calibration for this processor
    gram = work.stats[group.name].gram(work.importance)
    triangle = triangle_for({linear: work.schemes[linear] for linear in group.linears}, gram)
    if triangle is not None:
        work = replace(work, triangles={**work.triangles, group.name: triangle})
    scheme = work.schemes[group.linears[0]]
    candidates = list(_grid(work, group, scheme, config.n_grid))
    losses = search_losses(candidates, group, _spread_rows(work, group), scheme, gram, triangle, work.team)
    ranked = sorted(range(len(candidates)), key=lambda i: (losses[i], i))
    best, how, ready = ranked[0], "the Linears", {}
    if work.probe is not None and group.subgraph == "norm-linear" and best != 0:
        finalists = list(dict.fromkeys([0, *ranked[:_FINALISTS]]))
        losses, best, how = {}, -1, group.block
        for i in finalists:  # the best one's integers are kept, no more at a time
            rounded = _rounded(work, group, gram, triangle, candidates[i])
            losses[i] = _block_error(work, group, rounded, candidates[i])
            if best < 0 or (losses[i], i) < (losses[best], best):
                best, ready = i, rounded
    if best == 0:
        record = SmoothingRecord(group.name, None, 1.0, f"the identity is best; H: {gram.kind}")
    else:
        chosen, gain = candidates[best], relative_error(losses[best], losses[0])
        note = f"{chosen.name}; judged by the output of {how}; H: {gram.kind}"
        record = SmoothingRecord(group.name, chosen.ratio, gain, note)
        work = folded(work, group, chosen.factors)
    return replace(work, rounded={**work.rounded, **ready}).recorded(record)


def _grid(work: LayerWork, group: LinearGroup, scheme: QuantScheme, n_grid: int) -> Iterator[Candidate]:
    """The identity first, then n_grid ratios up to 1 with and without duo scaling."""
    assert work.stats is not None
    x = shared_mean(work.stats[group.name].mean_abs(work.importance), group)
    w = shared_mean(_relative_magnitude(work, group, scheme), group)
    yield Candidate(0.0, False, torch.ones_like(x))
    for step in range(n_grid + 1):
        ratio = step / n_grid
        for duo in (True, False) if step else (True,):
            s = x.pow(ratio) / (w.pow(1 - ratio) + 1e-4) if duo else x.pow(ratio)
            s = s.clamp_min(1e-4)
            s = s / (s.max() * s.min()).sqrt()
            s = torch.where(torch.isfinite(s) & (x > 0), s, torch.ones_like(s))
            yield Candidate(ratio, duo, storable(work, group, s)[0])


def _relative_magnitude(work: LayerWork, group: LinearGroup, scheme: QuantScheme) -> torch.Tensor:
    """The mean over output channels of |w| over the largest |w| of its group: [in]."""
    assert scheme.group_size is not None
    sums, count = [], 0
    for linear in group.linears:
        stored = work.weights[f"{linear}.weight"]
        for rows in row_blocks(stored):
            magnitude = work.weight(linear, rows).to(torch.float32).abs()
            magnitude = magnitude.view(len(magnitude), -1, scheme.group_size)  # [rows, groups, g]
            sums.append((magnitude / (magnitude.amax(dim=2, keepdim=True) + 1e-6)).sum(dim=0).flatten())
        count += len(stored)
    return torch.stack(sums).sum(dim=0) / count


def search_losses(
    candidates: list[Candidate],
    group: LinearGroup,
    weights: list[torch.Tensor],
    scheme: QuantScheme,
    gram: Gram,
    triangle: Triangle | None,
    team: Team = SINGLE_PROCESS,
) -> dict[int, float]:
    """Each candidate's squared output error, each Linear's relative to its signal, summed over the Linears.

    By plain rounding, or with a triangle by what GPTQ leaves of it. weights: [rows, in] float32 of each Linear. The
    candidates are shared out over the team; what all of them take, the triangle above all, every process makes itself.
    """
    signals = [float(gram.output_error(weight).sum()) for weight in weights]
    pivots = triangle.pivots() if triangle is not None else None

    def loss(candidate: Candidate) -> float:
        factors, total = repeated(candidate.factors, group), 0.0
        for weight, signal in zip(weights, signals, strict=True):
            change = grouped_rounding_error(weight * factors, scheme).div_(factors)
            error = gram.output_error(change) if pivots is None else change.square() @ pivots
            total += float(error.sum()) / signal if signal > 0 else 0.0
        return total

    return dict(enumerate(team.map(loss, candidates)))


def _spread_rows(work: LayerWork, group: LinearGroup) -> list[torch.Tensor]:
    """Of each Linear's weight evenly spread rows, about _SEARCH_WEIGHTS numbers, in float32."""
    spread = []
    for linear in group.linears:
        out_features, in_features = work.weights[f"{linear}.weight"].shape
        count = min(out_features, max(_LEAST_ROWS, _SEARCH_WEIGHTS // in_features))
        rows = torch.linspace(0, out_features - 1, count).round().long()
        spread.append(work.weight(linear, rows).to(torch.float32))
    return spread


def _rounded(
    work: LayerWork, group: LinearGroup, gram: Gram, triangle: Triangle | None, candidate: Candidate
) -> dict[str, QuantizedLinear]:
    """The group rounded as linear_quant will do it after the candidate."""
    factors = repeated(candidate.factors, group)
    scaled = ((linear, work.scaled(linear, factors)) for linear in group.linears)
    schemes = {linear: work.schemes[linear] for linear in group.linears}
    if triangle is None:
        return round_group(scaled, schemes, gram.rescaled(factors), None, work.team)
    return round_group(scaled, schemes, None, triangle.rescaled(factors), work.team)


def _block_error(
    work: LayerWork, group: LinearGroup, rounded: dict[str, QuantizedLinear], candidate: Candidate
) -> float:
    """The squared error of the block's output with the group rounded after the candidate, all else float."""
    assert work.probe is not None
    factors = repeated(candidate.factors, group)
    # What was folded into the group's rows is undone by the columns of the next Linear: these as they are now, too.
    inside = [name for name in work.changed if name.startswith(f"{group.block}.")]
    weights = {n: work.tensor(n).to(torch.float32) for n in inside if n.removesuffix(".weight") not in rounded}
    weights |= {f"{linear}.weight": dequantize(quantized).div_(factors) for linear, quantized in rounded.items()}
    return work.probe.block_error(group.block, weights)
