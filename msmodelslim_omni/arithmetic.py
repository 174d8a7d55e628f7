"""Quantize, dequantize and multiply: pure functions on tensors, in float32 whatever the stored dtype.

Notation: W [out, in] weight, X [tokens, in] activations, s scale, q integers. Rounding is half to even.
Left out on purpose: files, model names, and where a tensor comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .errors import QuantError
from .scheme import QuantScheme

# Rows are worked on in blocks of about this many weights, so that the float32 copies stay in the cache
# (and in bounded memory) instead of being several times the weight.
_BLOCK_ELEMENTS = 1 << 20

# Candidates of the `mse` clip: the scale is shrunk to these shares of absmax / qmax.
_MSE_SHRINKS = tuple(1.0 - 0.02 * i for i in range(16))


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight: `qweight` int8 [out, in], `scales` float32 [out, 1]; W is near qweight * scales."""

    qweight: torch.Tensor
    scales: torch.Tensor
    scheme: QuantScheme


def quantize_weight(weight: torch.Tensor, scheme: QuantScheme) -> QuantizedLinear:
    """Symmetric rounding per output channel: s = absmax / qmax, q = clamp(round(W / s), -qmax, qmax).

    `mse` shrinks s per channel where that lowers sum((W - s q)^2). A channel of zeros gets s = 1 and q = 0, since
    a scale of zero divides. weight: [out, in], any float dtype. Raises QuantError where it holds NaN or Inf.
    """
    qmax = 2 ** (scheme.weight_bits - 1) - 1
    out_features, in_features = weight.shape
    qweight = torch.empty((out_features, in_features), dtype=torch.int8, device=weight.device)
    scales = torch.empty((out_features, 1), dtype=torch.float32, device=weight.device)
    for rows in row_blocks(weight):
        block = weight[rows].to(torch.float32)  # [rows, in]
        absmax = block.abs().amax(dim=1, keepdim=True)  # [rows, 1]
        if not torch.isfinite(absmax).all():
            raise QuantError("the weight holds NaN or Inf", "fetch the checkpoint again")
        s = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax))
        s = torch.where(s > 0, s, torch.full_like(s, torch.finfo(torch.float32).tiny))  # absmax / qmax underflowed
        if scheme.weight_method == "mse":
            s = _search_mse_scale(block, s, qmax)
        scales[rows] = s
        qweight[rows] = (block / s).round_().clamp_(-qmax, qmax).to(torch.int8)
    return QuantizedLinear(qweight, scales, scheme)


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Slices over the first axis of [out, in], each of about a million weights."""
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]


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
    return linear.qweight.to(torch.float32) * linear.scales


def quantize_act(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric rounding per token: s = absmax / qmax over the last axis.

    x: [..., in] float32. Returns the integers as float32 [..., in] and the scales [..., 1]; a token of zeros has s = 1.
    """
    qmax = 2 ** (bits - 1) - 1
    absmax = x.abs().amax(dim=-1, keepdim=True)
    s = torch.where(absmax > 0, absmax / qmax, torch.ones_like(absmax)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / s).round_().clamp_(-qmax, qmax), s


def quantized_matmul(x: torch.Tensor, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the runtime's int8 kernel computes: (q_x @ q_w^T) * s_x * s_w + bias, in float32.

    x: [..., in] float32 -> [..., out] float32.
    """
    q_x, s_x = quantize_act(x, linear.scheme.act_bits)
    y = F.linear(q_x, linear.qweight.to(torch.float32)) * s_x * linear.scales.squeeze(1)
    return y if bias is None else y + bias


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
    error = signal = 0.0
    for rows in row_blocks(weight):
        block = weight[rows].to(torch.float32)
        approximated = linear.qweight[rows].to(torch.float32) * linear.scales[rows]
        signal += float(squared_norm(block))
        error += float(squared_norm(block - approximated))
    return relative_error(error, signal)
