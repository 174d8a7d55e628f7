"""Fold factors per input channel exactly: divide a module, multiply the columns of all Linears that read its output.

A divided norm weight or bias is rounded to the stored dtype first, and the factor is recomputed from the stored value.
The float function therefore stays the same in bfloat16 too. Under GQA, the query heads that read one key-value head
share its factors. If a Linear that stays float reads the output too, as a router does, the factors are powers of two,
and its output stays the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..models import LinearGroup, Subgraph
from .work import FEWEST_EXPERT_TOKENS, LayerWork


def reason_to_skip(work: LayerWork, part: Subgraph, enabled: Sequence[str], linears: frozenset[str]) -> str | None:
    """None if it can be scaled, "" if the recipe does not select it, else the reason why it cannot be scaled."""
    selected = [linear for linear in part.linears if linear in linears]
    if part.type not in enabled or not selected:
        return ""
    if len(selected) < len(part.linears):
        return "the recipe selects only some Linears of the group"
    if not known_groups(work, part):
        experts = "this expert" if len(part.groups) == 1 else "any expert"
        return f"fewer than {FEWEST_EXPERT_TOKENS} tokens reached {experts}"
    floats = [linear for linear in part.linears if linear not in work.schemes]
    named = ", ".join(floats) if len(part.groups) == 1 else part.name
    return f"{named} stays float, and scaling would round it" if floats else None


def known_groups(work: LayerWork, part: Subgraph) -> list[LinearGroup]:
    """The groups whose inputs are known: not those of experts that too few tokens reached."""
    return [group for group in part.groups if work.input_stats(group) is not None]


def max_over_query_heads(per_input: torch.Tensor, part: Subgraph) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the maximum over the query heads that read one key-value head."""
    return per_input.view(-1, part.groups[0].repeat, part.groups[0].head_dim).amax(dim=1).flatten()


def mean_over_query_heads(per_input: torch.Tensor, part: Subgraph) -> torch.Tensor:
    """[in] -> [channels of previous]: under GQA the mean over the query heads that read one key-value head."""
    return per_input.view(-1, part.groups[0].repeat, part.groups[0].head_dim).mean(dim=1).flatten()


def repeat_for_query_heads(factors: torch.Tensor, part: Subgraph) -> torch.Tensor:
    """[channels of previous] -> [in]: the factors of each key-value head for every query head that reads it."""
    return factors.view(-1, 1, part.groups[0].head_dim).expand(-1, part.groups[0].repeat, -1).flatten()


def exact_factors(
    work: LayerWork, part: Subgraph, factors: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Adjust the factors so that they fold exactly. Also return the divided norm weight or bias by name.

    A vector v is stored as v' = round(v / s); the factor is then v / v' exactly. The factors of a previous Linear that
    stays float become powers of two, because dividing by these needs no rounding in any dtype; so do those of a norm
    whose output a float Linear reads.
    """
    if part.type == "norm-linear":
        name = f"{part.previous}.weight"
        if part.float_readers:
            factors = _exact_powers(
                factors, work.weights[name], [work.weights[f"{n}.weight"] for n in part.float_readers]
            )
        s, divided = _divide_rounded(work.weights[name], factors)
        # A channel whose norm weight is zero is always zero; it needs no factor.
        s = torch.where(divided == 0, torch.ones_like(s), s)
        return s, {name: divided}
    if part.previous not in work.schemes:
        factors = _nearest_powers(factors)
    bias = work.bias(part.previous)
    if bias is None:
        return factors, {}
    s, divided = _divide_rounded(bias, factors)
    return s, {f"{part.previous}.bias": divided}


def _nearest_powers(factors: torch.Tensor) -> torch.Tensor:
    return torch.exp2(factors.log2().round())


def _exact_powers(factors: torch.Tensor, norm: torch.Tensor, readers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The nearest powers of two; 1 for a channel in which a norm or a reader would leave the range of its dtype.

    A common factor has no effect, so that of the median channel is 1.
    """
    powers = _nearest_powers(factors / factors.median())
    exact = _is_exact(norm, 1 / powers)
    for weight in readers:
        exact &= _is_exact(weight, powers).all(dim=0)
    return torch.where(exact, powers, torch.ones_like(powers))


def _is_exact(stored: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Whether numbers [..., channels] times powers of two can be stored in their dtype."""
    product = stored.to(torch.float32) * factors
    return product.to(stored.dtype).to(torch.float32) == product


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


def fold_factors(work: LayerWork, part: Subgraph, factors: torch.Tensor) -> LayerWork:
    """The layer with the columns of all readers multiplied by the factors and the previous module divided by them."""
    factors, new = exact_factors(work, part, factors)
    columns = repeat_for_query_heads(factors, part)
    folds = {linear: work.fold(linear).multiply_columns(columns) for linear in part.linears}
    if part.type != "norm-linear":
        name = f"{part.previous}.weight"  # its rows are divided
        if part.previous in work.schemes:
            folds[part.previous] = work.fold(part.previous).divide_rows(factors)
        else:
            new[name] = (work.weights[name].to(torch.float32) / factors[:, None]).to(work.weights[name].dtype)
    for name in (f"{reader}.weight" for reader in part.float_readers):
        new[name] = (work.weights[name].to(torch.float32) * columns).to(work.weights[name].dtype)
    assert work.stats is not None
    names = [group.name for group in part.groups if group.name in work.stats]
    stats = {**work.stats, **{name: work.stats[name].divided(columns) for name in names}}
    cholesky_factors = {**work.cholesky_factors}
    for name in cholesky_factors.keys() & set(names):
        cholesky_factors[name] = cholesky_factors[name].rescaled(columns)
    return replace(work.with_folds(new, folds), stats=stats, cholesky_factors=cholesky_factors)
