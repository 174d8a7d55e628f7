"""Fold factors per input channel exactly: divide the module before a group of Linears, multiply their columns.

A divided norm weight or bias is rounded to the stored dtype first, and the factor is recomputed from the stored value.
The float function therefore stays the same in bfloat16 too. Under GQA, the query heads that read one key-value head
share its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..models import LinearGroup
from .work import FEWEST_EXPERT_TOKENS, LayerWork


def reason_to_skip(work: LayerWork, group: LinearGroup, enabled: Sequence[str], linears: frozenset[str]) -> str | None:
    """None if the group can be scaled, "" if the recipe does not select it, else the reason why it cannot be scaled."""
    selected = [linear for linear in group.linears if linear in linears]
    if group.subgraph not in enabled or not selected:
        return ""
    if len(selected) < len(group.linears):
        return "the recipe selects only some Linears of the group"
    if work.input_stats(group) is None:
        return f"fewer than {FEWEST_EXPERT_TOKENS} tokens reached this expert"
    floats = [linear for linear in group.linears if linear not in work.schemes]
    return f"{', '.join(floats)} stays float, and scaling would round it" if floats else None


def max_over_query_heads(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the maximum over the query heads that read one key-value head."""
    return per_input.view(-1, group.repeat, group.head_dim).amax(dim=1).flatten()


def mean_over_query_heads(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the mean over the query heads that read one key-value head."""
    return per_input.view(-1, group.repeat, group.head_dim).mean(dim=1).flatten()


def repeat_for_query_heads(factors: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """[channels of previous] -> [in]: the factors of each key-value head for every query head that reads it."""
    return factors.view(-1, 1, group.head_dim).expand(-1, group.repeat, -1).flatten()


def exact_factors(
    work: LayerWork, group: LinearGroup, factors: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Adjust the factors so that they fold exactly. Also return the divided norm weight or bias by name.

    A vector v is stored as v' = round(v / s); the factor is then v / v' exactly. The factors of a previous Linear that
    stays float become powers of two, because dividing by these needs no rounding in any dtype.
    """
    if group.subgraph == "norm-linear":
        name = f"{group.previous}.weight"
        s, divided = _divide_rounded(work.weights[name], factors)
        # A channel whose norm weight is zero is always zero; it needs no factor.
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
    """(s, v') such that v' = v / s exactly in float32 and v' is representable in the dtype of v.

    Zero entries keep their factor (0 / s = 0). Entries that would underflow or overflow stay undivided.
    """
    exact = vector.to(torch.float32)
    divided = (exact / factors).to(vector.dtype)
    fits = torch.isfinite(divided) & ((divided != 0) | (exact == 0))
    divided = torch.where(fits, divided, vector)
    s = torch.where(exact != 0, exact / divided.to(torch.float32), factors)
    return torch.where(fits, s, torch.ones_like(s)), divided


def fold_factors(work: LayerWork, group: LinearGroup, factors: torch.Tensor) -> LayerWork:
    """The layer with the columns of the group multiplied by the factors and the previous module divided by them."""
    factors, new = exact_factors(work, group, factors)
    columns = repeat_for_query_heads(factors, group)
    folds = {linear: work.fold(linear).multiply_columns(columns) for linear in group.linears}
    if group.subgraph != "norm-linear":
        name = f"{group.previous}.weight"  # its rows are divided
        if group.previous in work.schemes:
            folds[group.previous] = work.fold(group.previous).divide_rows(factors)
        else:
            new[name] = (work.weights[name].to(torch.float32) / factors[:, None]).to(work.weights[name].dtype)
    assert work.stats is not None
    stats = {**work.stats, group.name: work.stats[group.name].divided(columns)}
    cholesky_factors = {**work.cholesky_factors}
    if group.name in cholesky_factors:
        cholesky_factors[group.name] = cholesky_factors[group.name].rescaled(columns)
    return replace(work.with_folds(new, folds), stats=stats, cholesky_factors=cholesky_factors)
