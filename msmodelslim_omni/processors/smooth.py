"""smooth_quant and iter_smooth: move outlier channels from activations into weights, exactly.

For a group of Linears that read the same input X [tokens, in], each channel c gets a factor
    s_c = A_c^alpha / W_c^(1 - alpha)                        (SmoothQuant, arXiv 2211.10438, eq. 4)
with A the largest |activation| and W the largest |weight| of the channel; X / s is what the previous norm or Linear
then yields, and the columns W * s undo it. Two things differ from the paper:
- A is taken per modality and a candidate is judged by its worst modality, so that many video tokens cannot decide
  for a few audio tokens; a candidate that is worse than plain rounding for any modality is not taken.
- What is folded into a norm or bias is rounded to the stored dtype first and s recomputed from what was stored, so
  the float function stays exact in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..arithmetic import quantize_weight, quantized_matmul, row_squares
from ..capture import InputStats
from ..models.spec import LinearGroup
from ..recipe import IterSmoothConfig, SmoothQuantConfig
from ..scheme import QuantScheme
from .work import LayerWork, SmoothingRecord

ALPHA_GRID = tuple(round(0.1 * i, 1) for i in range(1, 10))

# The search looks at this many output rows of each Linear; the winner is judged on all of them.
_SEARCH_ROWS = 512

SmoothConfig = SmoothQuantConfig | IterSmoothConfig


def needs_calibration(config: SmoothConfig) -> bool:
    return True


def apply(work: LayerWork, config: SmoothConfig, linears: frozenset[str]) -> LayerWork:
    """Smooth every group that the recipe selects; a group no candidate improves is left as it is, with the reason."""
    for group in work.spec.groups:
        why_not = _why_not(work, group, config, linears)
        if why_not is None:
            work = _smooth_group(work, group, config)
        elif why_not:
            work = _recorded(work, SmoothingRecord(group.name, None, 1.0, why_not))
    return work


def _why_not(work: LayerWork, group: LinearGroup, config: SmoothConfig, linears: frozenset[str]) -> str | None:
    """None: smooth this group. Empty: not asked for. Otherwise the reason why it cannot be done."""
    enabled = config.enable_subgraph_type if isinstance(config, IterSmoothConfig) else ("norm-linear",)
    selected = [linear for linear in group.linears if linear in linears]
    if group.subgraph not in enabled or not selected:
        return ""
    if len(selected) < len(group.linears):
        return "the recipe selects only some Linears of the group"
    floats = [linear for linear in group.linears if linear not in work.schemes]
    return f"{', '.join(floats)} stays float and would be rounded by it" if floats else None


def _recorded(work: LayerWork, record: SmoothingRecord) -> LayerWork:
    return replace(work, smoothing=(*work.smoothing, record))


# --- search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    alpha: float
    source: str  # how A was taken over the modalities
    factors: torch.Tensor  # [channels of `previous`]


def _smooth_group(work: LayerWork, group: LinearGroup, config: SmoothConfig) -> LayerWork:
    assert work.stats is not None  # the plan runs calibration for this processor
    stats = work.stats[group.name]
    weights = [work.weights[f"{linear}.weight"].to(torch.float32) for linear in group.linears]
    scheme = work.schemes[group.linears[0]]
    alphas = ALPHA_GRID if config.alpha == "auto" else (config.alpha,)
    scale_min = config.scale_min if isinstance(config, IterSmoothConfig) else 1e-5

    judge = _Judge(stats, [_spread_rows(weight) for weight in weights], replace(scheme, weight_method="minmax"))
    candidates = [_stored(work, group, c) for c in _candidates(stats, weights, group, alphas, scale_min)]
    searched = [(judge.worst_ratio(repeated(c.factors, group)), i) for i, c in enumerate(candidates)]
    best = candidates[min(searched)[1]]
    full = _Judge(stats, weights, scheme).worst_ratio(repeated(best.factors, group))
    if not full < 1.0:
        reason = f"best candidate (alpha {best.alpha}) would be {full:.3f}x plain rounding; left alone"
        return _recorded(work, SmoothingRecord(group.name, None, 1.0, reason))
    record = SmoothingRecord(group.name, best.alpha, full, f"A: {best.source}")
    return _recorded(_folded(work, group, best.factors), record)


def _candidates(
    stats: InputStats,
    weights: list[torch.Tensor],
    group: LinearGroup,
    alphas: tuple[float, ...],
    scale_min: float,
) -> Iterator[_Candidate]:
    """Factors for each alpha, with A as the plain maximum over modalities and, if it differs, balanced."""
    w = _shared(torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0), group)  # [channels]
    per_modality = stats.absmax[stats.present()]  # [present, in]
    sources = {"peak over modalities": per_modality.amax(dim=0)}
    if len(per_modality) > 1:
        mean = per_modality.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        sources["peak over modalities, each scaled to the same mean"] = (per_modality / mean).amax(dim=0)
    for source, absmax in sources.items():
        a = _shared(absmax, group)
        alive = (a > 0) & (w > 0)
        for alpha in alphas:
            s = (a.clamp_min(1e-30).pow(alpha) / w.clamp_min(1e-30).pow(1 - alpha)).clamp_min(scale_min)
            log_mean = s[alive].log().mean() if alive.any() else s.new_zeros(())
            s = (s / log_mean.exp()).clamp(2.0**-14, 2.0**14)  # a common factor changes nothing; keep norms in range
            yield _Candidate(alpha, source, torch.where(alive, s, torch.ones_like(s)))


def _shared(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the largest over the heads that repeat one key-value head."""
    return per_input.view(-1, group.repeat, group.head_dim).amax(dim=1).flatten()


def repeated(factors: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[channels of previous] -> [in]: each key-value head's factors for every query head that reads it."""
    return factors.view(-1, 1, group.head_dim).expand(-1, group.repeat, -1).flatten()


def _spread_rows(weight: torch.Tensor) -> torch.Tensor:
    """At most _SEARCH_ROWS rows, evenly spread."""
    if weight.shape[0] <= _SEARCH_ROWS:
        return weight
    return weight[torch.linspace(0, weight.shape[0] - 1, _SEARCH_ROWS, device=weight.device).round().long()]


class _Judge:
    """Relative output error of a group under quantization, per modality, against that of plain rounding."""

    def __init__(self, stats: InputStats, weights: list[torch.Tensor], scheme: QuantScheme) -> None:
        self._x = stats.rows
        self._members = [stats.row_modality == m for m in stats.present()]
        self._weights = weights
        self._scheme = scheme
        self._exact = [self._x @ weight.T for weight in weights]  # [rows, out] each
        self._plain = self._errors(None)

    def worst_ratio(self, factors: torch.Tensor) -> float:
        """The largest over the modalities of error(factors) / error(plain); below 1 no modality is worse."""
        errors = self._errors(factors)
        ratio = torch.where(self._plain > 0, errors / self._plain, torch.where(errors > 0, torch.inf, 1.0))
        return float(ratio.max().nan_to_num(nan=torch.inf).sqrt())

    def _errors(self, factors: torch.Tensor | None) -> torch.Tensor:
        """Sum over the Linears of the relative squared output error, float64 [modalities present]."""
        x = self._x if factors is None else self._x / factors
        total = torch.zeros(len(self._members), dtype=torch.float64)
        for weight, exact in zip(self._weights, self._exact, strict=True):
            linear = quantize_weight(weight if factors is None else weight * factors, self._scheme)
            error, signal = row_squares(quantized_matmul(x, linear) - exact), row_squares(exact)  # [rows] each
            total += torch.stack([error[m].sum() / signal[m].sum().clamp_min(1e-300) for m in self._members])
        return total


# --- exact folds ---------------------------------------------------------------------------------------------


def _stored(work: LayerWork, group: LinearGroup, candidate: _Candidate) -> _Candidate:
    """The candidate with the factors that storage will really give it."""
    return replace(candidate, factors=_storable(work, group, candidate.factors)[0])


def _storable(
    work: LayerWork, group: LinearGroup, factors: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Factors that fold exactly, and the stored vectors (norm weight or bias) that hold them.

    A vector v is stored as v' = round(v / s); the factor is then v / v' exactly. A Linear that stays float is
    divided by powers of two, which no dtype rounds.
    """
    if group.subgraph == "norm-linear":
        name = f"{group.previous}.weight"
        s, divided = _divide_rounded(work.weights[name], factors)
        # A channel whose norm weight is zero carries nothing; leave it alone.
        s = torch.where(divided == 0, torch.ones_like(s), s)
        return s, {name: divided}
    if group.previous not in work.schemes:
        factors = torch.exp2(factors.log2().round())
    bias = work.bias(group.previous)
    if bias is None:
        return factors, {}
    s, divided = _divide_rounded(bias, factors)
    return s, {f"{group.previous}.bias": divided}


def _divide_rounded(vector: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, v') with v' = v / s exactly in float32 terms and v' representable in v's dtype.

    Entries that are zero keep their factor (0 / s = 0); those that would underflow or overflow are left undivided.
    """
    exact = vector.to(torch.float32)
    divided = (exact / factors).to(vector.dtype)
    fits = torch.isfinite(divided) & ((divided != 0) | (exact == 0))
    divided = torch.where(fits, divided, vector)
    s = torch.where(exact != 0, exact / divided.to(torch.float32), factors)
    return torch.where(fits, s, torch.ones_like(s)), divided


def _folded(work: LayerWork, group: LinearGroup, factors: torch.Tensor) -> LayerWork:
    """The layer with the group's columns multiplied by the factors and what precedes divided by them."""
    factors, new = _storable(work, group, factors)
    columns = repeated(factors, group)
    for linear in group.linears:
        name = f"{linear}.weight"
        new[name] = work.weights[name].to(torch.float32) * columns  # [out, in] * [in]
    if group.subgraph != "norm-linear":
        name = f"{group.previous}.weight"
        divided = work.weights[name].to(torch.float32) / factors[:, None]  # rows of the previous Linear
        new[name] = divided if group.previous in work.schemes else divided.to(work.weights[name].dtype)
    assert work.stats is not None
    before = work.stats[group.name]
    after = replace(before, absmax=before.absmax / columns, rows=before.rows / columns)
    return replace(work.with_weights(new), stats={**work.stats, group.name: after})
