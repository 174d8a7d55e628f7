"""Factors per input channel, folded exactly: what precedes a group of Linears is divided, their columns multiplied.

What is folded into a norm or bias is rounded to the stored dtype first and the factor recomputed from what was
stored, so that the float function stays the same in bfloat16 too. Under GQA the heads that read one key-value head
share its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..models import LinearGroup
from .work import LayerWork


def refusal(work: LayerWork, group: LinearGroup, enabled: Sequence[str], linears: frozenset[str]) -> str | None:
    """None: this group can be scaled. Empty: not asked for. Otherwise the reason why it cannot be done."""
    selected = [linear for linear in group.linears if linear in linears]
    if group.subgraph not in enabled or not selected:
        return ""
    if len(selected) < len(group.linears):
        return "the recipe selects only some Linears of the group"
    floats = [linear for linear in group.linears if linear not in work.schemes]
    return f"{', '.join(floats)} stays float and would be rounded by it" if floats else None


def shared_peak(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the largest over the heads that repeat one key-value head."""
    return per_input.view(-1, group.repeat, group.head_dim).amax(dim=1).flatten()


def shared_mean(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the mean over the heads that repeat one key-value head."""
    return per_input.view(-1, group.repeat, group.head_dim).mean(dim=1).flatten()


def repeated(factors: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[channels of previous] -> [in]: each key-value head's factors for every query head that reads it."""
    return factors.view(-1, 1, group.head_dim).expand(-1, group.repeat, -1).flatten()


def storable(
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


def folded(work: LayerWork, group: LinearGroup, factors: torch.Tensor) -> LayerWork:
    """The layer with the group's columns multiplied by the factors and what precedes divided by them."""
    factors, new = storable(work, group, factors)
    columns = repeated(factors, group)
    folds = {linear: work.fold(linear).multiplied(columns) for linear in group.linears}
    if group.subgraph != "norm-linear":
        name = f"{group.previous}.weight"  # whose rows are divided
        if group.previous in work.schemes:
            folds[group.previous] = work.fold(group.previous).divided(factors)
        else:
            new[name] = (work.weights[name].to(torch.float32) / factors[:, None]).to(work.weights[name].dtype)
    assert work.stats is not None
    stats = {**work.stats, group.name: work.stats[group.name].divided(columns)}
    triangles = {**work.triangles}
    if group.name in triangles:
        triangles[group.name] = triangles[group.name].rescaled(columns)
    return replace(work.with_folds(new, folds), stats=stats, triangles=triangles)
