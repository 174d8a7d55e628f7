"""GPTQ: round a weight so that each rounding makes up for the errors of those before it.

With Δ = Ŵ - W and H = LLᵀ, L lower triangular, the output error Δ H Δᵀ is |Δ L|²: taking the inputs from the last to
the first, the error of input i is least where
    ŵ_i = nearest level to t_i = w_i - (Σ_{j>i} Δ_j L_ji) / L_ii,
and the output error in the end is Σ_i L_ii² (ŵ_i - t_i)²: what scales are searched for beforehand.
This is GPTQ (Frantar et al., arXiv 2210.17323) written as Babai's nearest plane (arXiv 2507.18553): the same integers,
with one factorization of H and no inverse. Inputs of the largest H_ii are rounded first, while the most others are
left to make up for them; scales and zero points are fixed beforehand, so the order shows nowhere in the result.

H + λ of a factor R [rows, in] (see gram.py) is factored without making H: with P = (I + Σ R_Bᵀ R_B / λ)^-1 over the
blocks B before, L below the diagonal is R_Jᵀ V_B with V_B = P R_B L_BB^-T. That costs in * rows^2 instead of in^3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..numerics import QuantizedLinear
from ..statistics import Gram

DAMPING = 0.02  # of the mean of diag(H), added to it; 0.003 fits few calibration tokens too closely
_BLOCK = 128
_STRIP = 32  # of a block, within which errors are handed on one by one; to the rest of it all at once
_PART = 40 << 20  # weights rounded at once, at most: an input's are too few to be worth their calls where they are cut
_SHARED = 16 << 20  # of more weights than these two processes share the work


@dataclass(frozen=True)
class Triangle:
    """L of H + λ, its inputs in the order of `order`; the last are rounded first.

    inner: the diagonal blocks of L, [size, size] each. below: for a matrix, what stands under each of them
    [in - end, size]; for a factor, V_B [rows, size], with `factor` R in the same order.
    """

    order: torch.Tensor
    inner: list[torch.Tensor]
    below: list[torch.Tensor]
    factor: torch.Tensor | None

    def pivots(self) -> torch.Tensor:
        """L_ii² of each input, [in] in its place: the output error that a rounding error of it leaves uncorrected."""
        diagonal = torch.cat([block.diagonal() for block in self.inner]).square()
        placed = torch.empty_like(diagonal)
        placed[self.order] = diagonal
        return placed

    def rescaled(self, factors: torch.Tensor) -> Triangle:
        """Of X / factors [in], the damping with it: D⁻¹ L."""
        ordered = factors[self.order]
        starts = range(0, len(ordered), _BLOCK)
        inner = [block / ordered[i : i + _BLOCK, None] for i, block in zip(starts, self.inner, strict=True)]
        if self.factor is not None:
            return replace(self, inner=inner, factor=self.factor / ordered)
        below = [block / ordered[i + _BLOCK :, None] for i, block in zip(starts, self.below, strict=True)]
        return replace(self, inner=inner, below=below)


def factorize(gram: Gram) -> Triangle:
    """The Cholesky factor of H + λ, inputs ordered by H_ii; one that no token reached counts as the damping alone."""
    diagonal = gram.diagonal()
    damping = float(DAMPING * diagonal.mean().clamp_min(1e-20))
    order = torch.argsort(diagonal, stable=True)
    if gram.matrix is None:
        assert gram.factor is not None
        return _of_factor(gram.factor[:, order].contiguous(), order, damping)
    h = gram.matrix[order][:, order]
    h.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(h)
    while int(failed) > 0:  # float32 lost the smallest eigenvalues
        damping *= 10
        h.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(h)
    starts = range(0, len(order), _BLOCK)
    inner = [lower[i : i + _BLOCK, i : i + _BLOCK] for i in starts]
    return Triangle(order, inner, [lower[i + _BLOCK :, i : i + _BLOCK] for i in starts], None)


def _of_factor(r: torch.Tensor, order: torch.Tensor, damping: float) -> Triangle:
    """r: [rows, in] in the order of `order`."""
    p = torch.eye(r.shape[0], dtype=torch.float32, device=r.device)
    inner, below = [], []
    for first in range(0, r.shape[1], _BLOCK):
        block = r[:, first : first + _BLOCK]  # [rows, size]
        passed = p @ block
        square = block.T @ passed
        square.diagonal().add_(damping)
        lower = torch.linalg.cholesky((square + square.T) / 2)
        v = torch.linalg.solve_triangular(lower, passed.T, upper=False).T  # P R_B L^-T, [rows, size]
        p.addmm_(v, v.T, alpha=-1.0)
        inner.append(lower)
        below.append(v)
    return Triangle(order, inner, below, r)


def parts(weight: torch.Tensor) -> list[slice]:
    """Output channels of [out, in] that are rounded at once, as many at a time: they do not depend on one another."""
    on_cpu = weight.device.type == "cpu"
    most = math.ceil(weight.numel() / (_PART if on_cpu else 4 * _PART))
    step = math.ceil(len(weight) / max(most, 2 if on_cpu and weight.numel() > _SHARED else 1))
    return [slice(first, first + step) for first in range(0, len(weight), step)]


def round_in_order(weight: torch.Tensor, grid: QuantizedLinear, triangle: Triangle) -> QuantizedLinear:
    """The weight [out, in] rounded to the levels of `grid`, whose own integers are not used."""
    order = triangle.order
    group_of = order // (weight.shape[1] // grid.scales.shape[1])  # of each input, in the order
    scales = grid.scales.T.to(torch.float32)  # [groups, out]
    zeros = None if grid.zeros is None else grid.zeros.T.to(torch.float32)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # Δ of all inputs, or, with a factor, of those of a block; R Δᵀ of what is rounded stands for the others.
    factor = triangle.factor
    kept = len(order) if factor is None else _BLOCK
    delta = torch.empty((kept, len(weight)), dtype=torch.float32, device=weight.device)
    carried = None if factor is None else delta.new_zeros((factor.shape[0], len(weight)))
    for number in reversed(range(len(triangle.inner))):
        first = number * _BLOCK
        inner, below = triangle.inner[number], triangle.below[number]
        block = slice(first, first + inner.shape[0])
        inputs, groups = order[block], group_of[block]
        errors = delta[block] if carried is None else delta[: inner.shape[0]]
        # Σ_j Δ_j L_ji over the inputs rounded in earlier blocks, [size, out]
        pull = below.T @ (delta[block.stop :] if carried is None else carried)
        steps = scales[groups]  # [size, out]
        levels = weight.T[inputs] / steps  # before rounding, and not yet pulled
        if zeros is not None:
            levels += zeros[groups]
        rounded = _round_block(levels, steps, inner, pull, errors, grid.scheme.weight_range)
        q.T[inputs] = rounded.to(torch.int8)
        if carried is not None and factor is not None:
            carried.addmm_(factor[:, block], errors)
    return replace(grid, qweight=q, error=None)


def _round_block(
    levels: torch.Tensor,
    steps: torch.Tensor,
    inner: torch.Tensor,
    pull: torch.Tensor,
    errors: torch.Tensor,
    weight_range: tuple[int, int],
) -> torch.Tensor:
    """The integers of a block as floats; Δ goes to `errors`, `pull` is used up. All [size, out], inner [size, size].

    An input's weights are few, so that the calls cost more than the arithmetic: six for each, in memory that is there.
    """
    rounded = torch.empty_like(levels)
    minus_inverse = (-1.0 / inner.diagonal()).tolist()
    given = [each.unbind() for each in (levels, steps, pull, rounded, errors)]
    for end in range(inner.shape[0], 0, -_STRIP):
        start = max(0, end - _STRIP)
        for i in reversed(range(start, end)):
            level, step, pulled, to, error = (rows[i] for rows in given)
            torch.addcdiv(level, pulled, step, value=minus_inverse[i], out=to)
            to.round_().clamp_(*weight_range)
            torch.sub(to, level, out=error).mul_(step)
            if i > start:
                pull[start:i].addr_(inner[i, start:i], error)
        pull[:start].addmm_(inner[start:end, :start].T, errors[start:end])
    return rounded
