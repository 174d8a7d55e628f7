"""GPTQ: round a weight input by input so that each rounding compensates for the errors of the previous ones.

With Δ = Ŵ - W and H = LLᵀ, L lower triangular, the output error Δ H Δᵀ is |Δ L|². Rounding goes from the last input to
the first; the error of input i is smallest for
    ŵ_i = nearest level to t_i = w_i - (Σ_{j>i} Δ_j L_ji) / L_ii,
and the total output error is Σ_i L_ii² (ŵ_i - t_i)². The search for scales, which comes first, minimizes this sum.
This is GPTQ (Frantar et al., arXiv 2210.17323) written as Babai's nearest plane (arXiv 2507.18553): the same integers,
with one factorization of H and no inverse. The inputs with the largest H_ii are rounded first, when most other inputs
are still free to compensate. Scales and zero points are already fixed, so the result does not store the order.

H + λ of a factor R [rows, in] (see gram.py) is factorized without computing H: with P = (I + Σ R_Bᵀ R_B / λ)^-1 over
the preceding blocks B, L below the diagonal is R_Jᵀ V_B with V_B = P R_B L_BB^-T. This costs in * rows^2 instead of
in^3.

If H is on disk (spilled.py), Lᵀ is computed and stored there too, a strip of rows after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..numerics import QuantizedLinear
from ..runtime import record_graph
from ..statistics import Gram, SpilledMatrix

ENOUGH_TOKENS = 20  # per input: with fewer, part of H is chance, and the rounding is judged (judge.py)
_BLOCK = 128  # inputs
_SORTED_ROWS = 1024  # rows of H sorted at once, to save memory for a copy of H
_STRIP = 32  # inputs of a block; errors propagate one by one within a strip, and all at once to the rest of the block
_PART = 40 << 20  # maximum weights rounded at once; smaller parts spend more time on calls than on arithmetic
_MOST_DAMPING = 100.0  # times the mean of diag(H); with more, H would be a diagonal
_SHARED = 16 << 20  # a CPU weight with more elements has at least two parts, so that two processes can share them


class NotFactorizable(ArithmeticError):
    """H has no Cholesky factor in float32. The message is the reason, for the report."""


@dataclass(frozen=True)
class _BlocksOnDisk(Sequence[torch.Tensor]):
    """`below` of a CholeskyFactor whose Lᵀ is on disk, upper [in, in]. divisors: [in], of the rows of L."""

    upper: SpilledMatrix
    divisors: torch.Tensor | None = None

    def __len__(self) -> int:
        return math.ceil(self.upper.size / _BLOCK)

    def __getitem__(self, number: int) -> torch.Tensor:  # type: ignore[override]
        if number >= len(self):
            raise IndexError(number)
        rows = slice(number * _BLOCK, (number + 1) * _BLOCK)
        below = self.upper.read(rows, slice(rows.stop, None)).T
        return below if self.divisors is None else below / self.divisors[rows.stop :, None]

    def rescaled(self, ordered: torch.Tensor) -> _BlocksOnDisk:
        """The blocks for an input divided by `ordered` [in]."""
        return replace(self, divisors=ordered if self.divisors is None else self.divisors * ordered)


@dataclass(frozen=True)
class CholeskyFactor:
    """L of H + λ, with its inputs sorted by `order`; the last inputs are rounded first.

    inner: the diagonal blocks of L, [size, size] each. below: if H is a matrix, the part of L under each block,
    [in - end, size]; if H is a factor, V_B [rows, size], and `factor` is R sorted by `order`.
    """

    order: torch.Tensor
    inner: list[torch.Tensor]
    below: Sequence[torch.Tensor]
    factor: torch.Tensor | None

    def pivots(self) -> torch.Tensor:
        """L_ii² by input, [in]: the output error per squared rounding error that later roundings cannot correct."""
        diagonal = torch.cat([block.diagonal() for block in self.inner]).square()
        unsorted = torch.empty_like(diagonal)
        unsorted[self.order] = diagonal
        return unsorted

    def rescaled(self, factors: torch.Tensor) -> CholeskyFactor:
        """The Cholesky factor for X / factors, D⁻¹ L; this also scales the damping. factors: [in]."""
        ordered = factors[self.order]
        starts = range(0, len(ordered), _BLOCK)
        inner = [block / ordered[i : i + _BLOCK, None] for i, block in zip(starts, self.inner, strict=True)]
        if self.factor is not None:
            return replace(self, inner=inner, factor=self.factor / ordered)
        if isinstance(self.below, _BlocksOnDisk):
            return replace(self, inner=inner, below=self.below.rescaled(ordered))
        below = [block / ordered[i + _BLOCK :, None] for i, block in zip(starts, self.below, strict=True)]
        return replace(self, inner=inner, below=below)


def relative_damping(tokens: int, in_features: int) -> float:
    """λ relative to the mean of diag(H): 0.5 / sqrt(tokens per input), between 0.02 and 1.

    The fewer tokens per input, the more of H is chance. Measured on the inputs of a language model, on other tokens:
    with 3 tokens per input the least output error is at 0.3, with 30 at 0.1 or less, and it is flat around the least.
    """
    return min(1.0, max(0.02, 0.5 * math.sqrt(in_features / max(tokens, 1))))


def has_few_tokens(gram: Gram) -> bool:
    """Whether GPTQ may correct errors by correlations that are chance."""
    return gram.tokens < ENOUGH_TOKENS * gram.in_features


def factorize(gram: Gram) -> CholeskyFactor:
    """The Cholesky factor of H + λ, inputs sorted by H_ii. An input that no token reached contributes only damping.

    Raises NotFactorizable, which no layer of a model with finite hidden states should cause.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean().clamp_min(1e-20))
    if not math.isfinite(mean):
        raise NotFactorizable("H exceeds float32")
    order = torch.argsort(diagonal, stable=True)
    attempt = _try_cholesky_of_rows if gram.rows is not None else _try_cholesky
    attempt = attempt if gram.spilled is None else _try_cholesky_on_disk
    dampings = [relative_damping(gram.tokens, gram.in_features) * mean]
    while (cholesky := attempt(gram, order, dampings)) is None:  # float32 lost the smallest eigenvalues
        if dampings[-1] > _MOST_DAMPING * mean:
            raise NotFactorizable("H is not positive definite in float32")
        dampings.append(10 * dampings[-1])
    return cholesky


def _try_cholesky(gram: Gram, order: torch.Tensor, dampings: list[float]) -> CholeskyFactor | None:
    """The factor of H, sorted by `order`, with all dampings added; None if it is not positive definite in float32.

    Needs memory for one more matrix: rows are sorted block by block, and LAPACK factorizes in place.
    """
    assert gram.whole is not None
    lower = torch.empty_like(gram.whole)
    for first in range(0, len(order), _SORTED_ROWS):
        rows = slice(first, first + _SORTED_ROWS)
        lower[rows] = gram.rows_of_matrix(order[rows])[:, order]
    for damping in dampings:
        lower.diagonal().add_(damping)
    failed = torch.zeros((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed) > 0:
        return None
    starts = range(0, len(order), _BLOCK)
    inner = [lower[i : i + _BLOCK, i : i + _BLOCK] for i in starts]
    return CholeskyFactor(order, inner, [lower[i + _BLOCK :, i : i + _BLOCK] for i in starts], None)


def _try_cholesky_on_disk(gram: Gram, order: torch.Tensor, dampings: list[float]) -> CholeskyFactor | None:
    """The same for H on disk. Needs memory for three strips.

    Computes Lᵀ, a strip J of rows after the other: L_JJ⁻¹ (H_J - Σ L_JK L_Kᵀ), with the sum over the strips K before J.
    """
    assert gram.spilled is not None
    upper = gram.spilled.another()
    inner: list[torch.Tensor] = []
    for strip in upper.strips(_BLOCK):
        rest, size = slice(strip.start, None), strip.stop - strip.start
        h = gram.rows_of_matrix(order[strip])[:, order[rest]]  # [size, in - start]
        h.diagonal().add_(sum(dampings))
        for earlier in upper.strips(_BLOCK):
            if earlier.start >= strip.start:
                break
            above = upper.read(earlier, rest)
            h.addmm_(above[:, :size].T, above, alpha=-1.0)
        lower, failed = torch.linalg.cholesky_ex(h[:, :size])
        if int(failed) > 0:
            return None
        h[:, :size] = lower.T
        h[:, size:] = torch.linalg.solve_triangular(lower, h[:, size:], upper=False)
        upper.write(strip, rest, h)
        inner += [lower[i : i + _BLOCK, i : i + _BLOCK].clone() for i in range(0, size, _BLOCK)]
    return CholeskyFactor(order, inner, _BlocksOnDisk(upper), None)


def _try_cholesky_of_rows(gram: Gram, order: torch.Tensor, dampings: list[float]) -> CholeskyFactor | None:
    """The same for H = RᵀR."""
    factor = gram.factor
    assert factor is not None
    r = factor[:, order].contiguous()  # [rows, in]
    p = torch.eye(r.shape[0], dtype=torch.float32, device=r.device)
    inner, below = [], []
    failed = torch.zeros((), dtype=torch.int32, device=r.device)
    for first in range(0, r.shape[1], _BLOCK):
        block = r[:, first : first + _BLOCK]  # [rows, size]
        passed = p @ block
        square = block.T @ passed
        square.diagonal().add_(sum(dampings))
        lower, of_block = torch.linalg.cholesky_ex((square + square.T) / 2)
        failed = torch.maximum(failed, of_block)
        v = torch.linalg.solve_triangular(lower, passed.T, upper=False).T  # P R_B L^-T, [rows, size]
        p.addmm_(v, v.T, alpha=-1.0)
        inner.append(lower)
        below.append(v)
    return CholeskyFactor(order, inner, below, r) if int(failed) == 0 else None


def split_into_parts(weight: torch.Tensor) -> list[slice]:
    """Split the output channels of a weight [out, in] into ranges to round at once. Channels are independent."""
    on_cpu = weight.device.type == "cpu"
    count = math.ceil(weight.numel() / (_PART if on_cpu else 4 * _PART))
    step = math.ceil(len(weight) / max(count, 2 if on_cpu and weight.numel() > _SHARED else 1))
    return [slice(first, first + step) for first in range(0, len(weight), step)]


def round_in_order(weight: torch.Tensor, grid: QuantizedLinear, cholesky: CholeskyFactor) -> QuantizedLinear:
    """Round a weight [out, in] to the levels of `grid` with GPTQ. The integers of `grid` are not used."""
    order = cholesky.order
    group_of = order // (weight.shape[1] // grid.scales.shape[1])  # of each input, sorted by `order`
    scales = grid.scales.T.to(torch.float32)  # [groups, out]
    zeros = None if grid.zeros is None else grid.zeros.T.to(torch.float32)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # Δ of all inputs. With a factor R: Δ of one block, and `carried` is R Δᵀ of all inputs rounded so far.
    factor = cholesky.factor
    kept = len(order) if factor is None else _BLOCK
    delta = torch.empty((kept, len(weight)), dtype=torch.float32, device=weight.device)
    carried = None if factor is None else delta.new_zeros((factor.shape[0], len(weight)))
    for number in reversed(range(len(cholesky.inner))):
        first = number * _BLOCK
        inner, below = cholesky.inner[number], cholesky.below[number]
        block = slice(first, first + inner.shape[0])
        inputs, groups = order[block], group_of[block]
        errors = delta[block] if carried is None else delta[: inner.shape[0]]
        # Σ_j Δ_j L_ji over the inputs rounded in earlier blocks, [size, out]
        pull = below.T @ (delta[block.stop :] if carried is None else carried)
        steps = scales[groups]  # [size, out]
        levels = weight.T[inputs] / steps  # before rounding and compensation
        if zeros is not None:
            levels += zeros[groups]
        round_block = _round_block if weight.device.type == "cpu" else _round_block_on_card
        rounded = round_block(levels, steps, inner, pull, errors, grid.scheme.weight_range)
        q.T[inputs] = rounded.to(torch.int8)
        if carried is not None and factor is not None:
            carried.addmm_(factor[:, block], errors)
    return replace(grid, qweight=q, squares=None)


def _round_block(
    levels: torch.Tensor,
    steps: torch.Tensor,
    inner: torch.Tensor,
    pull: torch.Tensor,
    errors: torch.Tensor,
    weight_range: tuple[int, int],
) -> torch.Tensor:
    """The integers of a block as floats. Writes Δ to `errors`, overwrites `pull`. All [size, out], see _Block."""
    rounded = torch.empty_like(levels)
    minus_inverse = (-1.0 / inner.diagonal()).tolist()
    _round_inputs(_Block(levels, steps, inner, pull, errors, rounded), minus_inverse, weight_range)
    return rounded


@dataclass(frozen=True)
class _Block:
    """The operands of _round_inputs, float32 [size, out] each; inner [size, size]."""

    levels: torch.Tensor
    steps: torch.Tensor
    inner: torch.Tensor
    pull: torch.Tensor
    errors: torch.Tensor
    rounded: torch.Tensor


def _round_inputs(block: _Block, minus_inverse: list[float] | torch.Tensor, weight_range: tuple[int, int]) -> None:
    """Write the integers of a block to `rounded` and Δ to `errors`. Overwrites `pull`.

    minus_inverse: -1 / L_ii of each input; as a tensor [size] on a card, with the same result.
    One input has few weights, so calls cost more than arithmetic. Each input takes six calls and allocates nothing.
    """
    inner, pull, errors = block.inner, block.pull, block.errors
    rows_of = [tensor.unbind() for tensor in (block.levels, block.steps, pull, block.rounded, errors)]
    for end in range(inner.shape[0], 0, -_STRIP):
        start = max(0, end - _STRIP)
        for i in reversed(range(start, end)):
            level, step, pulled, integer, error = (rows[i] for rows in rows_of)
            if isinstance(minus_inverse, torch.Tensor):
                torch.addcdiv(level, torch.mul(pulled, minus_inverse[i], out=integer), step, out=integer)
            else:
                torch.addcdiv(level, pulled, step, value=minus_inverse[i], out=integer)
            integer.round_().clamp_(*weight_range)
            torch.sub(integer, level, out=error).mul_(step)
            if i > start:
                pull[start:i].addr_(inner[i, start:i], error)
        pull[:start].addmm_(inner[start:end, :start].T, errors[start:end])


# --- the same on a card, where each call would be a launch ------------------------------------------------------


@lru_cache(maxsize=8)  # the shapes of a layer; each holds five blocks on the card, for the 7B 48 MB at most
def _recorded_block(
    size: int, out: int, weight_range: tuple[int, int], device: torch.device
) -> tuple[_Block, torch.Tensor, Callable[[], None]]:
    """Buffers of a card, -1 / L_ii [size] among them, and what rounds their contents in one launch."""
    with torch.inference_mode(False):
        blocks = torch.zeros((5, size, out), dtype=torch.float32, device=device)
        levels, steps, pull, errors, rounded = blocks.unbind()
        inner = torch.zeros((size, size), dtype=torch.float32, device=device)
        minus_inverse = torch.zeros(size, dtype=torch.float32, device=device)
    block = _Block(levels, steps, inner, pull, errors, rounded)

    def run() -> None:
        _round_inputs(block, minus_inverse, weight_range)

    return block, minus_inverse, record_graph(device, run) or run


def _round_block_on_card(
    levels: torch.Tensor,
    steps: torch.Tensor,
    inner: torch.Tensor,
    pull: torch.Tensor,
    errors: torch.Tensor,
    weight_range: tuple[int, int],
) -> torch.Tensor:
    """_round_block without waiting. The result is overwritten by the next call."""
    block, minus_inverse, launch = _recorded_block(*levels.shape, weight_range, levels.device)
    for buffer, values in ((block.levels, levels), (block.steps, steps), (block.inner, inner), (block.pull, pull)):
        buffer.copy_(values)
    torch.div(-1.0, inner.diagonal(), out=minus_inverse)
    launch()
    errors.copy_(block.errors)
    return block.rounded
