"""awq: scale the input channels of a group of Linears so that rounding hurts the important channels less.

For a group of Linears with input X [tokens, in], each channel c gets a factor
    s_c = x_c^r / w_c^(1 - r)    or, without duo scaling,    s_c = x_c^r                 (AWQ, arXiv 2306.00978, eq. 5)
with x the mean |activation| of the channel, w the mean over the output channels of |weight| relative to the largest
|weight| of its quantization group, and s normalized by sqrt(max s * min s). X / s and W * s give the same product as X
and W. Differences from the paper:
- The grid of r always contains the identity (no scaling).
- The best grid point is refined channel by channel on the expected rounding error (expected_error.py).
- The error of a grid point needs no forward pass. It is Σ ΔW H ΔWᵀ (gram.py), or, if GPTQ rounds the weights, the part
  that GPTQ cannot correct, Σ L_ii² ΔW_i² (gptq.py). For large Linears the sum covers evenly spaced output channels.
- If attention or an MLP is between the Linears and the residual stream, the best grid points and the identity are
  rounded completely and compared by the true output of that block on some samples.
- v -> o is also scaled under GQA, and all folds are exact in the stored dtype (fold.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..models import LinearGroup, Subgraph
from ..numerics import (
    QuantizedLinear,
    QuantScheme,
    WeightChecks,
    dequantize,
    grouped_rounding_error,
    relative_error,
    row_blocks,
)
from ..recipe import AwqConfig
from ..runtime import SINGLE_PROCESS, Team
from ..statistics import Gram, evenly_spaced, merge_stats
from .expected_error import ExpectedErrors, refine
from .fold import (
    exact_factors,
    fold_factors,
    known_groups,
    mean_over_query_heads,
    reason_to_skip,
    repeat_for_query_heads,
)
from .gptq import CholeskyFactor
from .rounding import cholesky_for_gptq, round_group
from .work import LayerWork, SmoothingRecord

_FINALISTS = 2  # compared with the identity by the output of the block

# The search rounds about _SEARCH_WEIGHTS weights of each Linear per grid point, but at least _MIN_ROWS output channels.
_SEARCH_WEIGHTS, _SEARCH_WEIGHTS_OF_ALL = 1 << 17, 1 << 23
_MIN_ROWS = 32


@dataclass(frozen=True)
class Candidate:
    """A grid point. factors: [channels of `previous`], after rounding to what the stored dtype can represent."""

    ratio: float
    duo: bool
    factors: torch.Tensor
    refined: bool = False

    @property
    def name(self) -> str:
        if self.ratio == 0.0 and not self.duo:
            return "identity, refined" if self.refined else "identity"
        return f"ratio {self.ratio:g}" + (", duo" if self.duo else "") + (", refined" if self.refined else "")


def needs(config: AwqConfig) -> Literal["gram"]:
    return "gram"


def apply(work: LayerWork, config: AwqConfig, linears: frozenset[str]) -> LayerWork:
    """Scale every subgraph that the recipe selects. One stays unchanged if the identity has the least error.

    Runs from the last to the first: scaling what follows another Linear divides the rows of that Linear, so it must
    happen before that Linear is scaled itself.
    """
    for part in reversed(work.spec.subgraphs):
        reason = reason_to_skip(work, part, config.enable_subgraph_type, linears)
        if reason is None:
            work = _scale_shared(work, part, config) if len(part.groups) > 1 else _scale_group(work, part, config)
        elif reason:
            work = work.with_record(SmoothingRecord(part.name, None, 1.0, reason))
    return work


def _scale_shared(work: LayerWork, part: Subgraph, config: AwqConfig) -> LayerWork:
    """Scale what gate and up of all experts read. The factors are powers of two; see fold.py.

    The errors of all experts are added, each with diag(H) of its own tokens.
    """
    assert work.stats is not None
    scheme, checks = work.schemes[part.linears[0]], WeightChecks()
    sampled = []
    for group in known_groups(work, part):
        gram = work.stats[group.name].gram(work.importance)
        rows = _sample_rows(work, group, _SEARCH_WEIGHTS_OF_ALL // len(part.linears))
        sampled.append((gram.diagonal(), rows, squared_outputs(gram, rows)))
    signals = torch.stack([of_group for *_, of_group in sampled]).sum(dim=0)  # [Linears of a group]

    def errors(candidate: Candidate) -> torch.Tensor:
        factors, total = candidate.factors, torch.zeros_like(signals)
        for importance, weights, _ in sampled:
            changes = (grouped_rounding_error(weight * factors, scheme, checks).div_(factors) for weight in weights)
            total += torch.stack([(change.square() @ importance).sum() for change in changes])
        return total

    candidates = list(_grid(work, part, scheme, config.n_grid))
    *all_errors, on_cpu = checks.checked([*work.team.map(errors, candidates), signals])
    losses = [_sum_of_ratios(of_linears.tolist(), on_cpu.tolist()) for of_linears in all_errors]
    best = min(range(len(candidates)), key=lambda i: (losses[i], i))
    if best == 0:
        return work.with_record(SmoothingRecord(part.name, None, 1.0, "the identity is best"))
    chosen = candidates[best]
    note = f"{chosen.name}; measured on the Linears of all experts"
    record = SmoothingRecord(part.name, chosen.ratio, relative_error(losses[best], losses[0]), note)
    return fold_factors(work, part, chosen.factors).with_record(record)


def _scale_group(work: LayerWork, part: Subgraph, config: AwqConfig) -> LayerWork:
    assert work.stats is not None  # the plan runs calibration for this processor
    (group,) = part.groups
    gram = work.stats[group.name].gram(work.importance)
    cholesky = cholesky_for_gptq({linear: work.schemes[linear] for linear in group.linears}, gram)
    if cholesky is not None:
        work = replace(work, cholesky_factors={**work.cholesky_factors, group.name: cholesky})
    scheme = work.schemes[group.linears[0]]
    candidates = list(_grid(work, part, scheme, config.n_grid))
    sampled = _sample_rows(work, group)
    signals = squared_outputs(gram, sampled)
    losses = search_losses(candidates, part, sampled, signals, scheme, gram, cholesky, work.team)
    if scheme.codebook is None:
        start = candidates[min(losses, key=lambda i: (losses[i], i))]
        candidates.append(_refined(work, part, start, sampled, signals, scheme, gram, cholesky))
        last = search_losses(candidates[-1:], part, sampled, signals, scheme, gram, cholesky)
        (losses[len(losses)],) = last.values()
    ranked = sorted(range(len(candidates)), key=lambda i: (losses[i], i))
    best, compared_by, best_rounded = ranked[0], "the Linears", {}
    if work.probe is not None and group.subgraph == "norm-linear" and best != 0:
        finalists = list(dict.fromkeys([0, *ranked[:_FINALISTS]]))
        losses, best, compared_by, checks = {}, -1, group.block, WeightChecks()
        for i in finalists:  # only the integers of the best finalist so far stay in memory
            rounded = _round_candidate(work, part, gram, cholesky, candidates[i], checks)
            losses[i] = _block_error(work, part, rounded, candidates[i])
            if best < 0 or (losses[i], i) < (losses[best], best):
                best, best_rounded = i, rounded
        checks.raise_fault()
    if best == 0:
        record = SmoothingRecord(group.name, None, 1.0, f"the identity is best; H: {gram.kind}")
    else:
        chosen, gain = candidates[best], relative_error(losses[best], losses[0])
        note = f"{chosen.name}; measured on the output of {compared_by}; H: {gram.kind}"
        record = SmoothingRecord(group.name, chosen.ratio, gain, note)
        work = fold_factors(work, part, chosen.factors)
    return replace(work, rounded={**work.rounded, **best_rounded}).with_record(record)


def _refined(
    work: LayerWork,
    part: Subgraph,
    start: Candidate,
    weights: list[torch.Tensor],
    signals: torch.Tensor,
    scheme: QuantScheme,
    gram: Gram,
    cholesky: CholeskyFactor | None,
) -> Candidate:
    """The candidate with factors refined from `start`. One process computes them for all."""
    importance = gram.diagonal() if cholesky is None else cholesky.pivots()
    expected = ExpectedErrors.of_importance(importance, weights, signals, scheme)

    def search(candidate: Candidate) -> torch.Tensor:
        return refine(expected, candidate.factors, lambda s: repeat_for_query_heads(s, part))

    (factors,) = work.team.map(search, [start])
    exact = exact_factors(work, part, factors.to(start.factors.device))[0]
    return replace(start, factors=exact, refined=True)


def _grid(work: LayerWork, part: Subgraph, scheme: QuantScheme, n_grid: int) -> Iterator[Candidate]:
    """Yield the identity, then the ratios from 0 to 1 in n_grid steps with and without duo scaling."""
    assert work.stats is not None
    stats = merge_stats([work.stats[group.name] for group in known_groups(work, part)])
    x = mean_over_query_heads(stats.mean_abs(work.importance), part)
    w = mean_over_query_heads(_relative_magnitude(work, part, scheme), part)
    yield Candidate(0.0, False, torch.ones_like(x))
    for step in range(n_grid + 1):
        ratio = step / n_grid
        for duo in (True, False) if step else (True,):
            s = x.pow(ratio) / (w.pow(1 - ratio) + 1e-4) if duo else x.pow(ratio)
            s = s.clamp_min(1e-4)
            s = s / (s.max() * s.min()).sqrt()
            s = torch.where(torch.isfinite(s) & (x > 0), s, torch.ones_like(s))
            yield Candidate(ratio, duo, exact_factors(work, part, s)[0])


def _relative_magnitude(work: LayerWork, part: Subgraph, scheme: QuantScheme) -> torch.Tensor:
    """The mean over the output channels of |w| / (largest |w| of its quantization group): [in]."""
    assert scheme.group_size is not None
    sums, count = [], 0
    for linear in part.linears:
        stored = work.weights[f"{linear}.weight"]
        for rows in row_blocks(stored):
            magnitude = work.weight(linear, rows).to(torch.float32).abs()
            magnitude = magnitude.view(len(magnitude), -1, scheme.group_size)  # [rows, groups, g]
            sums.append((magnitude / (magnitude.amax(dim=2, keepdim=True) + 1e-6)).sum(dim=0).flatten())
        count += len(stored)
    return torch.stack(sums).sum(dim=0) / count


def squared_outputs(gram: Gram, weights: list[torch.Tensor]) -> torch.Tensor:
    """The squared output of each Linear, [Linears]. weights: [rows, in] float32 of each."""
    return torch.stack([gram.output_error(weight).sum() for weight in weights])


def search_losses(
    candidates: list[Candidate],
    part: Subgraph,
    weights: list[torch.Tensor],
    signals: torch.Tensor,
    scheme: QuantScheme,
    gram: Gram,
    cholesky: CholeskyFactor | None,
    team: Team = SINGLE_PROCESS,
) -> dict[int, float]:
    """The squared output error of each candidate by its index: relative to the signal of a Linear, summed over Linears.

    The error is that of plain rounding; with `cholesky`, only the part that GPTQ cannot correct. weights: [rows, in]
    float32 of each Linear; signals: their squared_outputs, [Linears]. The team splits the candidates; every process
    computes their common inputs itself, such as `cholesky`.
    """
    checks = WeightChecks()
    pivots = cholesky.pivots() if cholesky is not None else None

    def errors(candidate: Candidate) -> torch.Tensor:
        factors, of_linears = repeat_for_query_heads(candidate.factors, part), []
        for weight in weights:
            change = grouped_rounding_error(weight * factors, scheme, checks).div_(factors)
            error = gram.output_error(change) if pivots is None else change.square() @ pivots
            of_linears.append(error.sum())
        return torch.stack(of_linears)

    *all_errors, on_cpu = checks.checked([*team.map(errors, candidates), signals])
    return {i: _sum_of_ratios(of_linears.tolist(), on_cpu.tolist()) for i, of_linears in enumerate(all_errors)}


def _sum_of_ratios(errors: list[float], signals: list[float]) -> float:
    """Infinite if H is beyond float32: then the identity is taken."""
    total = sum(error / signal if signal > 0 else 0.0 for error, signal in zip(errors, signals, strict=True))
    return total if math.isfinite(total) else math.inf


def _sample_rows(work: LayerWork, group: LinearGroup, numbers: int = _SEARCH_WEIGHTS) -> list[torch.Tensor]:
    """Evenly spaced rows of the weight of each Linear, about `numbers` numbers each, in float32."""
    sampled = []
    for linear in group.linears:
        out_features, in_features = work.weights[f"{linear}.weight"].shape
        stored = work.weights[f"{linear}.weight"]
        rows = evenly_spaced(out_features, max(_MIN_ROWS, numbers // in_features)).to(stored.device)
        sampled.append(work.weight(linear, rows).to(torch.float32))
    return sampled


def _round_candidate(
    work: LayerWork,
    part: Subgraph,
    gram: Gram,
    cholesky: CholeskyFactor | None,
    candidate: Candidate,
    checks: WeightChecks,
) -> dict[str, QuantizedLinear]:
    """Scale the group by the candidate and round it as linear_quant does."""
    factors = repeat_for_query_heads(candidate.factors, part)
    scaled = ((linear, work.scaled_weight(linear, factors)) for linear in part.linears)
    schemes = {linear: work.schemes[linear] for linear in part.linears}
    if cholesky is None:
        return round_group(scaled, schemes, gram.rescaled(factors), None, work.team, checks)
    return round_group(scaled, schemes, None, cholesky.rescaled(factors), work.team, checks)


def _block_error(work: LayerWork, part: Subgraph, rounded: dict[str, QuantizedLinear], candidate: Candidate) -> float:
    """The squared error of the output of the block if the group is scaled and rounded and everything else is float."""
    assert work.probe is not None
    block = part.groups[0].block
    factors = repeat_for_query_heads(candidate.factors, part)
    # The columns of the next Linear undo factors folded into the rows of this group, so they need their current values.
    inside = [name for name in work.changed if name.startswith(f"{block}.")]
    weights = {n: work.tensor(n).to(torch.float32) for n in inside if n.removesuffix(".weight") not in rounded}
    weights |= {f"{linear}.weight": dequantize(quantized).div_(factors) for linear, quantized in rounded.items()}
    (error,) = work.probe.block_errors(block, [weights])
    return error
