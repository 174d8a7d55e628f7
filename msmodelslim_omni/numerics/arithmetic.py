"""Quantize, dequantize and multiply: pure functions on tensors, in float32 for every stored dtype.

Notation: W [out, in] weight, X [tokens, in] activations, s scale, q integers, z zero point, H = X^T X. Rounding is half
to even.
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
from ..runtime import to_cpu
from .checks import WeightChecks
from .float4 import nvfp4_scales, round_act_nvfp4, round_e2m1, search_nvfp4_scales
from .float8 import decode_e4m3, e4m3_scales, quantize_act_e4m3, round_e4m3, search_e4m3_scales
from .nf4 import NestedScales, decode_nf4, encode_nf4, nest_absmax
from .scheme import QuantScheme

S = TypeVar("S")
T = TypeVar("T")

# Rows are processed in blocks of about this many weights, so that the float32 copies fit the cache and memory stays
# bounded. A card needs larger blocks to be busy.
_BLOCK_ELEMENTS = 3 << 18
_CARD_BLOCKS = 16  # times as large
_PRODUCT_ELEMENTS = 1 << 22  # the same for a weight that is converted from integers for a product

# Candidates of the `mse` clip search, as shares of the scale that covers the full range.
_MSE_SHRINKS = tuple(1.0 - 0.02 * i for i in range(16))
_GROUP_SHRINKS = tuple(1.0 - 0.05 * i for i in range(8))

# Formats store the scales of grouped schemes as float16 or in the checkpoint's dtype.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight: W ≈ (qweight - zeros) * scales, or NF4_LEVELS[qweight] * scales for a codebook.

    qweight: int8 [out, in], signed; float8_e4m3fn for e4m3. scales: float32 [out, groups]; one group for per_channel;
    for blocks, the channels of a block have equal scales.
    zeros: int8 [out, groups], signed, within the range of the integers; None for a symmetric scheme.
    nested: the stored form of the scales if the scheme quantizes them too; `scales` are its dequantized values.
    input_global: float32 [1], the global scale of the Linear's input, for a scheme that stores one; see float4.py.
    squares: if rounding has computed them, the squares of W - Ŵ and of W summed by row: float32 [2, rows] for each
    block of rows, see weight_error.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    scheme: QuantScheme
    zeros: torch.Tensor | None = None
    nested: NestedScales | None = None
    squares: tuple[torch.Tensor, ...] | None = None
    input_global: torch.Tensor | None = None

    @property
    def error(self) -> float | None:
        """|W - Ŵ| / |W| if rounding has computed it, else None."""
        return None if self.squares is None else relative_norms([self.squares])[0]


def quantize_weight(
    weight: torch.Tensor,
    scheme: QuantScheme,
    importance: torch.Tensor | None = None,
    checks: WeightChecks | None = None,
) -> QuantizedLinear:
    """Round a weight to integers: q = clamp(round(W / s) + z), with s and z per output channel or per group of inputs.

    Symmetric, per channel:   s = absmax / qmax, rounded to bfloat16, z = 0; the lowest code is not used.
    Symmetric, per group:     s = max(max / qmax, min / qmin), z = 0: the smallest scale without clipping.
    Asymmetric, per group:    s = (max - min) / (qmax - qmin), z = round(qmin - min / s). [min, max] is extended to
                              include zero, so that z is a code and a group of one sign does not collapse.
    `mse` (and `gptq`, which rounds in processors) shrinks s if that lowers the squared error Σ d² of the weight. With
    `importance`, it lowers the output error dᵀ H d for diagonal blocks of H, [groups, g, g], or Σ h d² for one weight
    per input, [groups, g].
    Grouped scales are rounded to values that float16 and bfloat16 both represent. A channel or group of zeros gets
    s = 1 and q = z. For a codebook, see nf4.py; for e4m3, float8.py; for e2m1, float4.py.

    weight: [out, in], any float dtype. Raises QuantError if it holds NaN or Inf; with `checks`, the caller does.
    """
    if checks is None:
        checks = WeightChecks()
        quantized = quantize_weight(weight, scheme, importance, checks)
        checks.raise_fault()
        return quantized
    if scheme.codebook is not None:
        return _quantize_by_codebook(weight, scheme, checks)
    if scheme.group_size is None:
        return _quantize_per_channel(weight, scheme, checks)
    if scheme.block_rows is not None:
        return _quantize_in_blocks(weight, scheme, checks)
    out_features, in_features = weight.shape
    groups = in_features // scheme.group_size
    qweight = torch.empty((out_features, in_features), dtype=torch.int8, device=weight.device)
    scales = torch.empty((out_features, groups), dtype=torch.float32, device=weight.device)
    zeros = None if scheme.symmetric else torch.empty_like(scales, dtype=torch.int8)

    def round_rows(rows: slice) -> None:
        block = weight[rows].to(torch.float32)  # [rows, in]
        _refuse_nonfinite(block.abs().amax(), checks)
        grouped = block.view(-1, groups, in_features // groups)  # [rows, groups, g]
        s, z = group_grid(grouped, scheme, importance, checks)
        scales[rows] = s.squeeze(2)
        qweight[rows] = round_to_grid(grouped, s, z, scheme).flatten(1)
        if zeros is not None and z is not None:
            zeros[rows] = z.squeeze(2).to(torch.int8)

    map_row_blocks(round_rows, weight)
    return QuantizedLinear(qweight, scales, scheme, zeros)


def _quantize_per_channel(weight: torch.Tensor, scheme: QuantScheme, checks: WeightChecks) -> QuantizedLinear:
    """Also computes the error, while the weight and its integers are in the cache as float32."""
    is_e4m3 = scheme.number == "e4m3"
    code_dtype = torch.float8_e4m3fn if is_e4m3 else torch.int8
    qweight = torch.empty(weight.shape, dtype=code_dtype, device=weight.device)
    scales = torch.empty((len(weight), 1), dtype=torch.float32, device=weight.device)
    buffers = _Buffers(weight.device)

    def round_rows(rows: slice) -> torch.Tensor:
        block, q = buffers.pair(weight[rows].shape)  # [rows, in]
        block.copy_(weight[rows])
        absmax = torch.abs(block, out=q).amax(dim=1, keepdim=True)
        _refuse_nonfinite(absmax.amax(), checks)
        signal = _row_squares(q)
        s = _channel_scales(block, absmax, scheme, checks)
        torch.div(block, s, out=q)
        codes = round_e4m3(q) if is_e4m3 else q.round_().clamp_(*scheme.weight_range)
        scales[rows], qweight[rows] = s, codes
        q = decode_e4m3(codes, out=q) if is_e4m3 else q
        return torch.stack([_row_squares(q.mul_(s).sub_(block)), signal])

    squares = tuple(map_row_blocks(round_rows, weight))
    return QuantizedLinear(qweight, scales, scheme, squares=squares)


def _quantize_in_blocks(weight: torch.Tensor, scheme: QuantScheme, checks: WeightChecks) -> QuantizedLinear:
    """Round a weight to e4m3 with one scale per block of channels by inputs. The last channels may be a short block."""
    assert scheme.block_rows is not None and scheme.group_size is not None
    out_features, in_features = weight.shape
    groups = in_features // scheme.group_size
    qweight = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty((out_features, groups), dtype=torch.float32, device=weight.device)

    def round_rows(rows: slice) -> torch.Tensor:
        strip = weight[rows].to(torch.float32)  # [rows, in]
        blocks = strip.view(len(strip), groups, -1).transpose(0, 1).flatten(1)  # [groups, rows * g]
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        _refuse_nonfinite(absmax.amax(), checks)
        s = _e4m3_scales(blocks, absmax, scheme, checks)  # [groups, 1]
        codes = round_e4m3(blocks / s)
        scales[rows] = s.squeeze(1)
        qweight[rows] = codes.view(groups, len(strip), -1).transpose(0, 1).flatten(1)
        return torch.stack([_row_squares(decode_e4m3(codes).mul_(s).sub_(blocks)), _row_squares(blocks)])

    size = scheme.block_rows
    strips = [slice(first, min(first + size, out_features)) for first in range(0, out_features, size)]
    squares = tuple(map_blocks(round_rows, strips, weight.device))
    return QuantizedLinear(qweight, scales, scheme, squares=squares)


class _Buffers(threading.local):
    """Two float32 buffers per thread, reused for every block: allocating them takes longer than the computation."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty((2, 0), dtype=torch.float32, device=device)

    def pair(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        if shape.numel() > self._memory.shape[1]:
            self._memory = self._memory.new_empty((2, shape.numel()))
        block, other = self._memory[:, : shape.numel()]
        return block.view(shape), other.view(shape)


def _row_squares(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each row, float32 on the device of x. Overwrites x."""
    return x.square_().sum(dim=-1)


def _refuse_nonfinite(absmax: torch.Tensor, checks: WeightChecks) -> None:
    def fault(_: float) -> QuantError:
        return QuantError("the weight holds NaN or Inf", "fetch the checkpoint again")

    checks.at_most(absmax.to(torch.float32), torch.finfo(torch.float32).max, fault)


def _quantize_by_codebook(weight: torch.Tensor, scheme: QuantScheme, checks: WeightChecks) -> QuantizedLinear:
    block_size = scheme.group_size
    assert block_size is not None
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty((weight.shape[0], weight.shape[1] // block_size), dtype=torch.float32)

    def round_rows(rows: slice) -> None:
        _refuse_nonfinite(weight[rows].abs().amax(), checks)
        codes[rows], scales[rows] = encode_nf4(weight[rows], block_size)

    map_row_blocks(round_rows, weight)
    nested = nest_absmax(scales) if scheme.double_quant else None
    scales = scales if nested is None else nested.absmax().view_as(scales)
    return QuantizedLinear(codes.to(weight.device), scales.to(weight.device), scheme, nested=nested)


def _channel_scales(
    block: torch.Tensor, absmax: torch.Tensor, scheme: QuantScheme, checks: WeightChecks
) -> torch.Tensor:
    """Return the scales [rows, 1] of a block [rows, in] from the absmax of its rows [rows, 1]."""
    if scheme.number == "e4m3":
        return _e4m3_scales(block, absmax, scheme, checks)
    qmax = scheme.weight_range[1]
    s = channel_scales(torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax)))
    return _search_mse_scale(block, s, qmax) if scheme.weight_method == "mse" else s


def channel_scales(scales: torch.Tensor) -> torch.Tensor:
    """Round positive scales of int8 channels to bfloat16, in which compressed-tensors stores them.

    So all formats store the same scales as the integers were rounded with. Float16 represents them down to 2^-17, the
    scale of a channel whose largest weight is 0.001.
    """
    tiny = torch.finfo(torch.bfloat16).tiny  # absmax / qmax may underflow
    return scales.to(torch.bfloat16).clamp_min(tiny).to(torch.float32)


def _e4m3_scales(rows: torch.Tensor, absmax: torch.Tensor, scheme: QuantScheme, checks: WeightChecks) -> torch.Tensor:
    return search_e4m3_scales(rows, absmax, checks) if scheme.weight_method == "mse" else e4m3_scales(absmax, checks)


def group_grid(
    grouped: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor | None, checks: WeightChecks
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points (as floats), [rows, groups, 1] each, of groups [rows, groups, g].

    importance: for the clip search of `mse` and `gptq`; see quantize_weight.
    """
    low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    if scheme.number == "e2m1":
        absmax = torch.maximum(high, -low)
        searched = scheme.weight_method == "mse"
        return search_nvfp4_scales(grouped, absmax, checks) if searched else nvfp4_scales(absmax, checks), None
    best_s, best_z = _range_grid(low, high, scheme, checks)
    if scheme.weight_method == "minmax":
        return best_s, best_z
    best_error = _group_error(grouped, best_s, best_z, scheme, importance)
    for shrink in _GROUP_SHRINKS[1:]:
        s, z = _range_grid(low * shrink, high * shrink, scheme, None)  # checked above, where they are larger
        error = _group_error(grouped, s, z, scheme, importance)
        better = error < best_error
        best_error, best_s = torch.where(better, error, best_error), torch.where(better, s, best_s)
        best_z = torch.where(better, z, best_z) if z is not None and best_z is not None else None
    return best_s, best_z


def grouped_rounding_error(weight: torch.Tensor, scheme: QuantScheme, checks: WeightChecks) -> torch.Tensor:
    """Return Ŵ - W of plain rounding in groups, without storing integers. weight and result: float32 [out, in]."""
    assert scheme.group_size is not None
    if scheme.codebook is not None:
        return dequantize(_quantize_by_codebook(weight, scheme, checks)).sub_(weight)
    grouped = weight.view(len(weight), -1, scheme.group_size)  # [out, groups, g]
    s, z = _range_grid(grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True), scheme, checks)
    q = round_to_grid(grouped, s, z, scheme)
    return (q if z is None else q.sub_(z)).mul_(s).sub_(grouped).flatten(1)


def _range_grid(
    low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme, checks: WeightChecks | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points that cover the range of each group; see quantize_weight, storable_scales."""
    qmin, qmax = scheme.weight_range
    if scheme.symmetric:
        s = torch.maximum(high / qmax, low / qmin)
        return storable_scales(torch.where(s > 0, s, torch.ones_like(s)), checks), None
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low
    s = storable_scales(torch.where(width > 0, width / (qmax - qmin), torch.ones_like(width)), checks)
    return s, (qmin - low / s).round_().clamp_(qmin, qmax)


def storable_scales(scales: torch.Tensor, checks: WeightChecks | None) -> torch.Tensor:
    """Round positive scales to values that float16 and bfloat16 represent exactly, so that all formats store the same.

    These have eight significant bits, and are multiples of 2^-24 in float16's subnormal range. checks: refuse a scale
    above the maximum of float16; None if none is.
    """

    def fault(largest: float) -> QuantError:
        return QuantError(
            f"the weight requires a scale of {largest:g}, but 4-bit scales are stored as float16, whose maximum is"
            f" {_LARGEST_SCALE:g}",
            "exclude this Linear",
        )

    if checks is not None:
        checks.at_most(scales.max(), _LARGEST_SCALE, fault)
    rounded = scales.to(torch.bfloat16).clamp(_SMALLEST_SCALE, 65280.0)
    return rounded.to(torch.float16).to(torch.float32)


def round_to_grid(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """Return the rounded weight: integers, stored as floats. The shapes of the tensors must broadcast."""
    if scheme.number == "e2m1":
        return round_e2m1(weight / scales)
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
    """Return the squared error of each group, weighted by `importance`: [rows, groups, 1]."""
    q = round_to_grid(grouped, scales, zeros, scheme)
    d = (q if zeros is None else q.sub_(zeros)).mul_(scales).sub_(grouped)  # [rows, groups, g]
    if importance is None:
        return d.square_().sum(dim=2, keepdim=True)
    if importance.ndim == 2:
        return (d.square_() * importance).sum(dim=2, keepdim=True)
    weighted = torch.bmm(d.transpose(0, 1), importance).transpose(0, 1)  # [rows, groups, g]
    return (weighted * d).sum(dim=2, keepdim=True)


def row_blocks(weight: torch.Tensor, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    """Return slices over the first axis of a weight [out, in], with about `elements` weights each, on a card more."""
    elements = elements if weight.device.type == "cpu" else _CARD_BLOCKS * elements
    step = max(1, elements // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]


def map_row_blocks(function: Callable[[slice], T], weight: torch.Tensor) -> list[T]:
    """Apply the function to each slice of row_blocks(weight). Returns the results in order."""
    return map_blocks(function, row_blocks(weight), weight.device)


def map_blocks(function: Callable[[S], T], blocks: Sequence[S], device: torch.device) -> list[T]:
    """Apply the function to each block. Returns the results in order.

    On the CPU, each thread processes separate blocks, because one block is too small to be split among threads.
    """
    threads = min(torch.get_num_threads(), len(blocks)) if device.type == "cpu" else 1
    if threads <= 1:
        return [function(block) for block in blocks]

    def run_single_threaded(block: S) -> T:
        torch.set_num_threads(1)  # affects only this thread
        return function(block)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run_single_threaded, blocks))


def _search_mse_scale(block: torch.Tensor, full: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the shrunk scale with the least squared error of each row, or the full scale if none is better.

    block: float32 [rows, in]. full: [rows, 1], of absmax / qmax. Each candidate is refined once by least squares: for
    given integers, the best scale is sum(W q) / sum(q q).
    """
    best, best_error = full, _squared_error(block, full, qmax)
    for shrink in _MSE_SHRINKS:
        start = full * shrink
        q = (block / start).round_().clamp_(-qmax, qmax)
        fitted = (block * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True).clamp_min(1.0)
        for exact in (start, torch.where(fitted > 0, fitted, start)):
            candidate = channel_scales(exact)
            error = _squared_error(block, candidate, qmax)
            better = error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
    return best


def _squared_error(block: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    q = (block / scale).round_().clamp_(-qmax, qmax)
    return (block - q * scale).square().sum(dim=1, keepdim=True)  # [rows, 1]


def dequantize(linear: QuantizedLinear) -> torch.Tensor:
    """Return the dequantized weight, float32 [out, in]."""
    groups = linear.scales.shape[1]
    uniform = linear.scheme.codebook is None
    q = code_values(linear.qweight) if uniform else decode_nf4(linear.qweight)
    q = q.view(-1, groups, linear.qweight.shape[1] // groups)  # [out, groups, g]
    if linear.zeros is not None:
        q.sub_(linear.zeros.to(torch.float32).unsqueeze(2))
    return q.mul_(linear.scales.unsqueeze(2)).flatten(1)


def code_values(codes: torch.Tensor) -> torch.Tensor:
    """A float32 copy of integers or of e4m3 codes."""
    return decode_e4m3(codes) if codes.dtype == torch.float8_e4m3fn else codes.to(torch.float32, copy=True)


def linear_rows(linear: QuantizedLinear, rows: slice) -> QuantizedLinear:
    """Return some output channels of a quantized Linear, for computation only: `nested` is dropped."""
    zeros = None if linear.zeros is None else linear.zeros[rows]
    return replace(
        linear, qweight=linear.qweight[rows], scales=linear.scales[rows], zeros=zeros, nested=None, squares=None
    )


def quantize_act(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations symmetrically with one dynamic scale per token: s = absmax / qmax over the last axis.

    x: float32 [..., in]. Returns the integers as float32 [..., in] and the scales [..., 1]; a token of zeros has s = 1.
    """
    qmax = 2 ** (bits - 1) - 1
    absmax = x.abs().amax(dim=-1, keepdim=True)
    s = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / s).round_().clamp_(-qmax, qmax), s


def quantize_tokens(x: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations with one scale per token, as the runtime of the scheme does; see QuantScheme.rounds_tokens.

    x: float32 [..., in]. Returns the codes' values as float32 [..., in] and the scales [..., 1].
    """
    assert scheme.act_bits is not None
    return quantize_act_e4m3(x) if scheme.number == "e4m3" else quantize_act(x, scheme.act_bits)


def round_act(x: torch.Tensor, scheme: QuantScheme, input_global: torch.Tensor | None = None) -> torch.Tensor:
    """Return the dequantized activations of a scheme, float32 like x [..., in]; x itself if they stay float.

    input_global: that of the Linear, see QuantizedLinear; None takes that of x.
    """
    if scheme.act_bits is None:
        return x
    if scheme.group_size is None:
        q, s = quantize_tokens(x, scheme)
        return q * s
    grouped = x.reshape(*x.shape[:-1], -1, scheme.group_size)  # [..., groups, g]
    if scheme.number == "e2m1":
        return round_act_nvfp4(grouped, input_global).flatten(-2)
    q, s = quantize_act_e4m3(grouped)
    return (q * s).flatten(-2)


def quantized_matmul(x: torch.Tensor, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the product of the runtime, in float32.

    (q_x @ q_w^T) * s_x * s_w + bias for one scale per token and per channel, else X̂ @ Ŵ^T + bias.

    x: float32 [..., in]. Returns float32 [..., out]. A weight is converted from its codes a block of rows at a time.
    """
    scheme = linear.scheme
    q_x, s_x = quantize_tokens(x, scheme) if scheme.rounds_tokens else (round_act(x, scheme, linear.input_global), None)
    y = x.new_empty((*x.shape[:-1], linear.qweight.shape[0]))
    is_float = linear.qweight.dtype == torch.float32
    for rows in [slice(None)] if is_float else row_blocks(linear.qweight, _PRODUCT_ELEMENTS):
        part = linear_rows(linear, rows)
        if s_x is None:
            y[..., rows] = F.linear(q_x, dequantize(part))
        else:
            q_w = part.qweight if is_float else code_values(part.qweight)
            y[..., rows] = F.linear(q_x, q_w) * s_x * part.scales.squeeze(1)
    return y if bias is None else y.add_(bias)


def row_squares(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each row, float64 on the CPU. Rows are summed in float32, on any device."""
    return x.square().sum(dim=-1).cpu().to(torch.float64)


def relative_error(error: float, signal: float) -> float:
    """Return sqrt(error / signal) of two sums of squares; 0 if both are 0, inf if only the signal is 0."""
    if signal > 0:
        return float((error / signal) ** 0.5)
    return 0.0 if error == 0 else float("inf")


def weight_error(weight: torch.Tensor, linear: QuantizedLinear) -> float:
    """Return the relative Frobenius error of the weight, |W - Ŵ| / |W|."""
    return relative_norms([weight_squares(weight, linear)])[0]


def weight_squares(weight: torch.Tensor, linear: QuantizedLinear) -> tuple[torch.Tensor, ...]:
    """Return `linear.squares`, computed if rounding has not."""
    if linear.squares is not None:
        return linear.squares

    def of_rows(rows: slice) -> torch.Tensor:
        block = weight[rows].to(torch.float32)
        error = dequantize(linear_rows(linear, rows)).sub_(block)
        return torch.stack([_row_squares(error), block.square().sum(dim=-1)])

    return tuple(map_row_blocks(of_rows, weight))


def relative_norms(squares: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """Return |error| / |signal| for each item of `squares`, see QuantizedLinear. One copy from a card for all items.

    Rows are summed in float32 on any device, and their sums in float64.
    """
    blocks = iter(to_cpu([block for blocks in squares for block in blocks]))
    sums = [
        [[float(row.sum()) for row in next(blocks).to(torch.float64)] for _ in of_item] for of_item in squares
    ]  # [item][block][error, signal]
    return [relative_error(sum(b[0] for b in of_item), sum(b[1] for b in of_item)) for of_item in sums]
