"""Quantize, dequantize and multiply: pure functions on tensors, in float32 whatever the stored dtype.

Notation: W [out, in] weight, X [tokens, in] activations, s scale, q integers. Rounding is half to even.
Left out on purpose: files, model names, and where a tensor comes from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from ..errors import QuantError
from .nf4 import (
    NestedScales,
    codes_of,
    nest,
    values_of,
)
from .scheme import QuantScheme

S = TypeVar("S")
T = TypeVar("T")

# Rows are worked on in blocks of about this many weights, so that the float32 copies stay in the cache
# (and in bounded memory) instead of being several times the weight.
_BLOCK_ELEMENTS = 3 << 18
_PRODUCT_ELEMENTS = 1 << 22  # of a weight that is made of its integers for a product

# Candidates of the `mse` clip: the scale is shrunk to these shares of the one that covers the whole range.
_MSE_SHRINKS = tuple(1.0 - 0.02 * i for i in range(16))
_GROUP_SHRINKS = tuple(1.0 - 0.05 * i for i in range(8))

# Scales of grouped schemes are stored as float16 by one format and in the checkpoint's dtype by the other.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight: W is near (qweight - zeros) * scales, or NF4_LEVELS[qweight] * scales of a codebook.

    qweight: int8 [out, in], signed. scales: float32 [out, groups]; per channel there is one group.
    zeros: int8 [out, groups], signed, within the range of the integers; None for a symmetric scheme.
    nested: what the scales are stored as where the scheme quantizes them too; `scales` are what that stands for.
    error: |W - Ŵ| / |W|, where rounding has found it on the way; see weight_error.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    scheme: QuantScheme
    zeros: torch.Tensor | None = None
    nested: NestedScales | None = None
    error: float | None = None


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor | None = None
) -> QuantizedLinear:
    """Round a weight to integers: q = clamp(round(W / s) + z), with s and z per output channel or per group of inputs.

    Symmetric, per channel:   s = absmax / qmax, z = 0; the lowest code is not used.
    Symmetric, per group:     s = max(max / qmax, min / qmin), z = 0: the tightest that clips nothing.
    Asymmetric, per group:    s = (max - min) / (qmax - qmin), z = round(qmin - min / s), with zero drawn into
                              [min, max], so that z is a code and a group of one sign does not collapse.
    `mse` (and `gptq`, whose rounding follows elsewhere) shrinks s where that lowers the squared error d·d of the
    weight, or what `importance` makes of it: with diagonal blocks of H = XᵀX, [groups, g, g], the output's error
    dᵀ H d; with a weight of each input, [groups, g], Σ h d².
    Grouped scales are rounded to what float16 and bfloat16 both hold. A channel or group of zeros gets s = 1 and q = z.
    A codebook's codes and scales are nf4.py's.

    weight: [out, in], any float dtype. Raises QuantError where it holds NaN or Inf.
    """
    if scheme.codebook is not None:
        return _quantize_by_codebook(weight, scheme)
    if scheme.group_size is None:
        return _quantize_per_channel(weight, scheme)
    out_features, in_features = weight.shape
    groups = in_features // scheme.group_size
    qweight = torch.empty((out_features, in_features), dtype=torch.int8, device=weight.device)
    scales = torch.empty((out_features, groups), dtype=torch.float32, device=weight.device)
    zeros = None if scheme.symmetric else torch.empty_like(scales, dtype=torch.int8)

    def round_rows(rows: slice) -> None:
        block = weight[rows].to(torch.float32)  # [rows, in]
        _refuse_nonfinite(block.abs().amax())
        grouped = block.view(-1, groups, in_features // groups)  # [rows, groups, g]
        s, z = group_grid(grouped, scheme, importance)
        scales[rows] = s.squeeze(2)
        qweight[rows] = round_to_grid(grouped, s, z, scheme).flatten(1)
        if zeros is not None and z is not None:
            zeros[rows] = z.squeeze(2).to(torch.int8)

    map_row_blocks(round_rows, weight)
    return QuantizedLinear(qweight, scales, scheme, zeros)


def _quantize_per_channel(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedLinear:
    """The error comes along: the weight and its integers are in the cache here, and would have to be widened again."""
    qweight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    buffers = _Buffers(weight.device)

    def round_rows(rows: slice) -> tuple[float, float]:
        block, q = buffers.two(weight[rows].shape)  # [rows, in]
        block.copy_(weight[rows])
        absmax = torch.abs(block, out=q).amax(dim=1, keepdim=True)
        _refuse_nonfinite(absmax)
        signal = _sum_of_squares(q)
        s = _channel_scales(block, absmax, scheme)
        torch.div(block, s, out=q).round_().clamp_(*scheme.weight_range)
        scales[rows], qweight[rows] = s, q
        return _sum_of_squares(q.mul_(s).sub_(block)), signal

    errors, signals = zip(*map_row_blocks(round_rows, weight), strict=True)
    return QuantizedLinear(qweight, scales, scheme, error=relative_error(sum(errors), sum(signals)))


class _Buffers(threading.local):
    """float32 memory of each thread, kept from block to block: fresh memory takes longer than what is done in it."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty((2, 0), dtype=torch.float32, device=device)

    def two(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        if shape.numel() > self._memory.shape[1]:
            self._memory = self._memory.new_empty((2, shape.numel()))
        block, other = self._memory[:, : shape.numel()]
        return block.view(shape), other.view(shape)


def _sum_of_squares(x: torch.Tensor) -> float:
    """squared_norm, in the memory of x itself."""
    return float(x.square_().sum(dim=-1).cpu().to(torch.float64).sum())


def _refuse_nonfinite(absmax: torch.Tensor) -> None:
    if not torch.isfinite(absmax).all():
        raise QuantError("the weight holds NaN or Inf", "fetch the checkpoint again")


def _quantize_by_codebook(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedLinear:
    block_size = scheme.group_size
    assert block_size is not None
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty((weight.shape[0], weight.shape[1] // block_size), dtype=torch.float32)

    def round_rows(rows: slice) -> None:
        _refuse_nonfinite(weight[rows].abs().amax())
        codes[rows], scales[rows] = codes_of(weight[rows], block_size)

    map_row_blocks(round_rows, weight)
    nested = nest(scales) if scheme.double_quant else None
    scales = scales if nested is None else nested.absmax().view_as(scales)
    return QuantizedLinear(codes.to(weight.device), scales.to(weight.device), scheme, nested=nested)


def _channel_scales(block: torch.Tensor, absmax: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[rows, in] and each row's absmax [rows, 1] -> [rows, 1]."""
    qmax = scheme.weight_range[1]
    s = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax))
    s = torch.where(s > 0, s, torch.full_like(s, torch.finfo(torch.float32).tiny))  # absmax / qmax underflowed
    return _search_mse_scale(block, s, qmax) if scheme.weight_method == "mse" else s


def group_grid(
    grouped: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points (as floats) of each group: [rows, groups, g] -> [rows, groups, 1] each.

    importance: see quantize_weight; it serves the clip search of `mse` and `gptq`.
    """
    low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    best_s, best_z = _grid_of_range(low, high, scheme)
    if scheme.weight_method == "minmax":
        return best_s, best_z
    best = _group_error(grouped, best_s, best_z, scheme, importance)
    for shrink in _GROUP_SHRINKS[1:]:
        s, z = _grid_of_range(low * shrink, high * shrink, scheme)
        error = _group_error(grouped, s, z, scheme, importance)
        better = error < best
        best, best_s = torch.where(better, error, best), torch.where(better, s, best_s)
        best_z = torch.where(better, z, best_z) if z is not None and best_z is not None else None
    return best_s, best_z


def grouped_rounding_error(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Ŵ - W of plain rounding in groups, without making integers of it: [out, in] float32 -> the same."""
    assert scheme.group_size is not None
    if scheme.codebook is not None:
        return dequantize(_quantize_by_codebook(weight, scheme)).sub_(weight)
    grouped = weight.view(len(weight), -1, scheme.group_size)  # [out, groups, g]
    s, z = _grid_of_range(grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True), scheme)
    q = round_to_grid(grouped, s, z, scheme)
    return (q if z is None else q.sub_(z)).mul_(s).sub_(grouped).flatten(1)


def _grid_of_range(
    low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme
) -> tuple[torch.Tensor, torch.Tensor | None]:
    qmin, qmax = scheme.weight_range
    if scheme.symmetric:
        s = torch.maximum(high / qmax, low / qmin)
        return storable_scales(torch.where(s > 0, s, torch.ones_like(s))), None
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low
    s = storable_scales(torch.where(width > 0, width / (qmax - qmin), torch.ones_like(width)))
    return s, (qmin - low / s).round_().clamp_(qmin, qmax)


def storable_scales(scales: torch.Tensor) -> torch.Tensor:
    """Positive scales rounded to numbers that float16 and bfloat16 hold exactly, so that every format has the same.

    Eight significant bits, and multiples of 2^-24 where float16 is subnormal.
    """
    if float(scales.max()) > _LARGEST_SCALE:
        raise QuantError(
            f"the weight needs a scale of {float(scales.max()):g}; float16, in which 4-bit scales are stored, ends at"
            f" {_LARGEST_SCALE:g}",
            "exclude this Linear",
        )
    rounded = scales.to(torch.bfloat16).clamp(_SMALLEST_SCALE, 65280.0)
    return rounded.to(torch.float16).to(torch.float32)


def round_to_grid(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """The integers as floats. weight, scales and zeros are of shapes that broadcast."""
    q = (weight / scales).round_()
    q = q if zeros is None else q.add_(zeros)
    return q.clamp_(*scheme.weight_range)


def _group_error(
    grouped: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: QuantScheme,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Squared error of each group, as `importance` sees it: [rows, groups, 1]."""
    q = round_to_grid(grouped, scales, zeros, scheme)
    d = (q if zeros is None else q.sub_(zeros)).mul_(scales).sub_(grouped)  # [rows, groups, g]
    if importance is None:
        return d.square_().sum(dim=2, keepdim=True)
    if importance.ndim == 2:
        return (d.square_() * importance).sum(dim=2, keepdim=True)
    weighted = torch.bmm(d.transpose(0, 1), importance).transpose(0, 1)  # [rows, groups, g]
    return (weighted * d).sum(dim=2, keepdim=True)


def row_blocks(weight: torch.Tensor, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    """Slices over the first axis of [out, in], each of about so many weights."""
    step = max(1, elements // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]


def map_row_blocks(function: Callable[[slice], T], weight: torch.Tensor) -> list[T]:
    """What the function gives for each of row_blocks, in their order."""
    return map_blocks(function, row_blocks(weight), weight.device)


def map_blocks(function: Callable[[S], T], blocks: Sequence[S], device: torch.device) -> list[T]:
    """What the function gives for each block of work, in their order.

    On the CPU each thread works on blocks of its own, since one block is too little for all of them together.
    """
    threads = min(torch.get_num_threads(), len(blocks)) if device.type == "cpu" else 1
    if threads <= 1:
        return [function(block) for block in blocks]

    def by_itself(block: S) -> T:
        torch.set_num_threads(1)  # of this thread
        return function(block)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(by_itself, blocks))


def _search_mse_scale(block: torch.Tensor, full: torch.Tensor, qmax: int) -> torch.Tensor:
    """Per row the shrunk scale with the least squared error; the full scale stays where nothing is better.

    block: [rows, in] float32; full: [rows, 1], absmax / qmax. Each candidate is refined once by least squares:
    for given integers the best scale is sum(W q) / sum(q q).
    """
    best, best_error = full, _squared_error(block, full, qmax)
    for shrink in _MSE_SHRINKS:
        start = full * shrink
        q = (block / start).round_().clamp_(-qmax, qmax)
        fitted = (block * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True).clamp_min(1.0)
        for candidate in (start, torch.where(fitted > 0, fitted, start)):
            error = _squared_error(block, candidate, qmax)
            better = error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    return best


def _squared_error(block: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    q = (block / scale).round_().clamp_(-qmax, qmax)
    return (block - q * scale).square().sum(dim=1, keepdim=True)  # [rows, 1]


def dequantize(linear: QuantizedLinear) -> torch.Tensor:
    """The weight that the integers stand for, [out, in] float32."""
    groups = linear.scales.shape[1]
    plain = linear.scheme.codebook is None
    q = linear.qweight.to(torch.float32, copy=True) if plain else values_of(linear.qweight)
    q = q.view(-1, groups, linear.qweight.shape[1] // groups)  # [out, groups, g]
    if linear.zeros is not None:
        q.sub_(linear.zeros.to(torch.float32).unsqueeze(2))
    return q.mul_(linear.scales.unsqueeze(2)).flatten(1)


def linear_rows(linear: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """Some output channels of a quantized Linear, for its numbers: what its scales are stored as is not cut."""
    zeros = None if linear.zeros is None else linear.zeros[rows]
    return replace(
        linear, qweight=linear.qweight[rows], scales=linear.scales[rows], zeros=zeros, nested=None, error=None
    )


def quantize_act(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric rounding per token: s = absmax / qmax over the last axis.

    x: [..., in] float32. Returns the integers as float32 [..., in] and the scales [..., 1]; a token of zeros has s = 1.
    """
    qmax = 2 ** (bits - 1) - 1
    absmax = x.abs().amax(dim=-1, keepdim=True)
    s = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / s).round_().clamp_(-qmax, qmax), s


def quantized_matmul(x: torch.Tensor, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the runtime computes, in float32: (q_x @ q_w^T) * s_x * s_w + bias for int8, else x @ Ŵ^T + bias.

    x: [..., in] float32 -> [..., out] float32. A weight in integers is widened some rows at a time.
    """
    bits = linear.scheme.act_bits
    q_x, s_x = (x, None) if bits is None else quantize_act(x, bits)
    y = x.new_empty((*x.shape[:-1], linear.qweight.shape[0]))
    whole = linear.qweight.is_floating_point()
    for rows in [slice(None)] if whole else row_blocks(linear.qweight, _PRODUCT_ELEMENTS):
        part = linear_rows(linear, rows)
        if s_x is None:
            y[..., rows] = F.linear(x, dequantize(part))
        else:
            y[..., rows] = F.linear(q_x, part.qweight.to(torch.float32)) * s_x * part.scales.squeeze(1)
    return y if bias is None else y.add_(bias)


def squared_norm(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares, float64 on the CPU so that sums over many tokens add without loss. x: [tokens, features]."""
    return row_squares(x).sum()


def row_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, float64 on the CPU; the rows themselves in float32, as accelerators can."""
    return x.square().sum(dim=-1).cpu().to(torch.float64)


def relative_error(error: float, signal: float) -> float:
    """sqrt(error / signal) of two sums of squares; zero where there is no signal and no error."""
    if signal > 0:
        return float((error / signal) ** 0.5)
    return 0.0 if error == 0 else float("inf")


def weight_error(weight: torch.Tensor, linear: QuantizedLinear) -> float:
    """Relative Frobenius error of the weight itself: |W - s q| / |W|."""
    if linear.error is not None:
        return linear.error

    def squares(rows: slice) -> tuple[float, float]:
        block = weight[rows].to(torch.float32)
        signal = float(squared_norm(block))
        return float(squared_norm(dequantize(linear_rows(linear, rows)).sub_(block))), signal

    errors, signals = zip(*map_row_blocks(squares, weight), strict=True)
    return relative_error(sum(errors), sum(signals))
