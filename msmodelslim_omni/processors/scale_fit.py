"""Fit the scales of groups to integers that GPTQ has chosen, round again with these scales, and fit once more.

GPTQ rounds to levels that were chosen before. Once the integers are known, the output error Δ H Δᵀ with Ŵ = s (q - z)
is a quadratic function of the scales s of a channel; its minimum has a closed form for each group given the others. H
is damped as for GPTQ. Zero points stay. Moving single integers further down the same error was tried and raises KL on
other tokens, see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..numerics import QuantizedLinear, storable_scales
from ..statistics import Gram
from .gptq import CholeskyFactor, round_in_order

_SWEEPS = 2  # over the groups of a channel, each given the newest scales of the others
_MOST_CHANGE = 2.0  # of a scale in one step; more happens only where almost no token uses the group
_ROWS = 8 << 20  # weights fitted at once, to save memory


def fit_and_round(
    weight: torch.Tensor, rounded: QuantizedLinear, gram: Gram, cholesky: CholeskyFactor
) -> QuantizedLinear:
    """`rounded` with scales fitted to its integers, after a second rounding by GPTQ to the fitted scales.

    weight: float32 [out, in]. rounded: its int4 groups, as GPTQ rounded them with `cholesky`, the factor of H + λ.
    """
    fitted = fit_scales(weight, rounded, gram, cholesky.damping)
    return fit_scales(weight, round_in_order(weight, fitted, cholesky), gram, cholesky.damping)


def fit_scales(weight: torch.Tensor, rounded: QuantizedLinear, gram: Gram, damping: torch.Tensor) -> QuantizedLinear:
    """Change the scales so that the output error Δ (H + λ) Δᵀ is least. damping: λ of each input, float32 [in].

    Scales are of storable numbers. A group that has only zeros keeps its scale.
    """
    step = max(1, _ROWS // weight.shape[1])
    scales = [
        _fitted(
            weight[first : first + step],
            rounded.qweight[first : first + step],
            rounded.scales[first : first + step],
            None if rounded.zeros is None else rounded.zeros[first : first + step],
            gram,
            damping,
        )
        for first in range(0, len(weight), step)
    ]
    return replace(rounded, scales=torch.cat(scales), squares=None)


def _fitted(
    weight: torch.Tensor,
    integers: torch.Tensor,
    stored: torch.Tensor,
    zeros: torch.Tensor | None,
    gram: Gram,
    damping: torch.Tensor,
) -> torch.Tensor:
    """The scales [rows, groups] of some output channels, in the dtype of `stored`."""
    count = stored.shape[1]
    size = weight.shape[1] // count
    groups = [slice(first, first + size) for first in range(0, weight.shape[1], size)]
    scales = stored.to(torch.float32).clone()

    def units(number: int) -> torch.Tensor:
        """q - z of one group, [rows, size]."""
        q = integers[:, groups[number]].to(torch.float32)
        return q if zeros is None else q - zeros[:, number, None].to(torch.float32)

    delta = torch.cat([units(k) * scales[:, k, None] for k in range(count)], dim=1).sub_(weight)
    pull, add = _error_products(gram, delta)
    del delta
    for _ in range(_SWEEPS):
        for k, group in enumerate(groups):
            u, own = units(k), damping[group]
            delta_k = u * scales[:, k, None] - weight[:, group]
            slope = (u * (pull(group) + own * delta_k)).sum(dim=1)
            curvature = ((u @ _block(gram, group)) * u).sum(dim=1) + u.square() @ own
            now = scales[:, k]
            wanted = storable_scales((now - slope / curvature).clamp_min(now / _MOST_CHANGE), None)
            fits = (curvature > 0) & (wanted <= _MOST_CHANGE * now)
            wanted = torch.where(fits, wanted, now)
            add((wanted - now)[:, None] * u, group)
            scales[:, k] = wanted
    return scales.to(stored.dtype)


def _block(gram: Gram, group: slice) -> torch.Tensor:
    """H of the inputs of one group, [size, size]."""
    if gram.matrix is not None:
        return gram.matrix[group, group]
    if gram.factor is not None:
        return gram.factor[:, group].T @ gram.factor[:, group]
    return gram.spilled_rows(group)[:, group]


def _error_products(
    gram: Gram, delta: torch.Tensor
) -> tuple[Callable[[slice], torch.Tensor], Callable[[torch.Tensor, slice], None]]:
    """Δ H while Δ [rows, in] changes: a function that returns it for the inputs of a group, [rows, size], and one that
    adds a change of Δ in a group."""
    if gram.factor is not None:
        factor = gram.factor
        outputs = factor @ delta.T  # [tokens, rows]

        def add_output(change: torch.Tensor, group: slice) -> None:
            outputs.addmm_(factor[:, group], change.T)

        return lambda group: outputs.T @ factor[:, group], add_output
    product = gram.times(delta)  # [rows, in]

    def add_product(change: torch.Tensor, group: slice) -> None:
        rows = gram.matrix[group] if gram.matrix is not None else gram.spilled_rows(group)
        product.addmm_(change, rows)

    return lambda group: product[:, group], add_product
