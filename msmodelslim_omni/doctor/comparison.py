"""How a stored weight differs from its float source: errors of rows, factors of rows and columns, slopes of the scales.

Blocks of rows are read at a time, so that several float32 copies of a block fit in the cache. What the differences mean
is judged in source.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..numerics import QuantizedLinear, dequantize, linear_rows, relative_error
from ..storage import TORCH_DTYPES, TensorInfo, byte_view, read_bytes
from .content import is_readable, load_integers
from .linears import StoredLinear

_BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Comparison:
    """Stored weight y compared with source weight x.

    relative: |y - x| / |x|. rows: the same for each row. shift: mean of (y - x) / step. factors: a, per row.
    slopes: of the regression of x on y, per row and group, [rows, groups]; None for floats.
    """

    relative: float
    rows: torch.Tensor
    shift: float
    factors: torch.Tensor
    slopes: torch.Tensor | None = None


@dataclass(frozen=True)
class StoredWeight:
    """Access to a stored weight: its rows as float32; for integers, the step of each element and the scales.

    scales: [rows, groups], None for floats.
    """

    bits: int
    rows: Callable[[slice], torch.Tensor]
    steps: Callable[[slice], torch.Tensor] | None
    scales: torch.Tensor | None = None


def stored_weight(linear: StoredLinear) -> StoredWeight | None:
    """Return None if the weight cannot be read."""
    if not linear.quantized:
        info = linear.tensors["weight"]
        return StoredWeight(16, lambda rows: _rows(info, rows), None) if linear.sound else None
    if not is_readable(linear) or (linear.form == "ascend_static" and "weight_scale" not in linear.tensors):
        return None
    integers = load_integers(linear)
    return StoredWeight(
        integers.scheme.weight_bits,
        lambda rows: dequantize(linear_rows(integers, rows)),
        lambda rows: _steps(integers, rows),
        integers.scales,
    )


def _steps(linear: QuantizedLinear, rows: slice) -> torch.Tensor:
    """Return the quantization step of each element: [rows, in]. An FP8 code has 8 steps per factor of 2."""
    scales = linear.scales[rows]
    scales = scales.repeat_interleave(linear.qweight.shape[1] // scales.shape[1], dim=1)
    if linear.scheme.number != "e4m3":
        return scales
    exponents = torch.frexp(linear.qweight[rows].to(torch.float32)).exponent  # 2^(exponent - 1) <= |code|
    return torch.ldexp(scales, (exponents - 4).clamp_min(-9))


def _rows(info: TensorInfo, rows: slice) -> torch.Tensor:
    """Read consecutive rows of a two-dimensional tensor as float32."""
    first, last, _ = rows.indices(info.shape[0])
    block = torch.empty((last - first, info.shape[1]), dtype=TORCH_DTYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0]
    read_bytes(info, first * row_bytes, byte_view(block))
    return block.to(torch.float32)


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Return row slices so small that several float32 copies of a block fit in the cache."""
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    return [slice(first, first + step) for first in range(0, shape[0], step)]


def estimated_columns(
    stored: StoredWeight, weight: TensorInfo, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares factor of each column, g[c] = sum over r of y x / sum of x x, and sum of x x.

    factors: a, by which the rows of the source are multiplied first.
    """
    xy = torch.zeros(weight.shape[1], dtype=torch.float64)
    xx = torch.zeros_like(xy)
    for rows in _blocks(weight.shape):
        x, y = _rows(weight, rows) * factors[rows, None], stored.rows(rows)
        xy += (x * y).sum(dim=0)
        xx += (x * x).sum(dim=0)
    return torch.where(xx > 0, xy / xx, torch.ones_like(xx)).to(torch.float32), xx.to(torch.float32)


def compare(
    stored: StoredWeight, weight: TensorInfo, columns: torch.Tensor, rows_unknown: bool, regressed: torch.Tensor
) -> Comparison:
    """Compare the stored weight y with x = a W[:, c] g[c].

    a is 1, or with rows_unknown the least-squares factor of each row, sum of y x / sum of x x. regressed: the ratio of
    the expected factors g and the given ones; the slopes are those of the expected ones, because estimated factors
    would hide scales in a wrong order.
    """
    errors, factors, slopes, shift, count = [], [], [], 0.0, 0
    total_error = total_signal = 0.0
    for rows in _blocks(weight.shape):
        x, y = _rows(weight, rows) * columns, stored.rows(rows)
        a = torch.ones(x.shape[0])
        if rows_unknown:
            xx = (x * x).sum(dim=1)
            a = torch.where(xx > 0, (x * y).sum(dim=1) / xx, a)
            x = x * a[:, None]
        d = y - x
        error, signal = d.square().sum(dim=1, dtype=torch.float64), x.square().sum(dim=1, dtype=torch.float64)
        errors.append(torch.where(signal > 0, (error / signal).sqrt(), error.sign() * torch.inf).nan_to_num(nan=0.0))
        factors.append(a)
        total_error, total_signal = total_error + float(error.sum()), total_signal + float(signal.sum())
        if stored.scales is not None:
            slopes.append(group_slopes(x * regressed, y, stored.scales.shape[1]))
        if stored.steps is not None:
            shift += float((d / stored.steps(rows)).sum(dtype=torch.float64))
        count += d.numel()
    relative = total_error if total_error != total_error else relative_error(total_error, total_signal)
    found = torch.cat(slopes) if slopes else None
    return Comparison(relative, torch.cat(errors), shift / max(1, count), torch.cat(factors), found)


def group_slopes(x: torch.Tensor, y: torch.Tensor, groups: int) -> torch.Tensor:
    """Slope of the regression of x on y through zero, sum of x y / sum of y y, per row and group; NaN where y is 0."""
    xy, yy = ((a * y).view(y.shape[0], groups, -1).sum(dim=2) for a in (x, y))
    return torch.where(yy > 0, xy / yy, torch.nan)
