"""FP8: numbers in float8 e4m3, with one float scale per output channel, per block of weights, or per token.

    W = code * s     a code has 1 sign bit, 4 exponent bits (bias 7) and 3 mantissa bits ("e4m3fn": no Inf, and 0x7F
                     and 0xFF are NaN); its largest value is 448, its smallest normal value 2^-6, its step below that
                     2^-9 (arXiv 2209.05433)

Values are clamped to 448 before rounding, so a NaN code is never written.
"""

from __future__ import annotations

import torch

from ..errors import QuantError
from .checks import WeightChecks

E4M3_MAX = 448.0

# The smallest scale of activations in vLLM's kernels, which also applies to a token of zeros.
_SMALLEST_ACT_SCALE = 1.0 / (E4M3_MAX * 512.0)

# Scales of weights are normal numbers of float16 that bfloat16 also represents. A scale larger than necessary costs
# precision only below 2^-6 of it, because codes are floats.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65280.0

# Candidates of the `mse` search. The error of a float code repeats with every factor of 2; below 1 the largest weights
# are clipped.
_MSE_FACTORS = tuple(2.0 ** (i / 8) for i in range(-2, 8))


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest code, half to even, and clamp to ±448. Overwrites x (float32); returns float8_e4m3fn."""
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values of float8_e4m3fn codes without NaN, as float32; the same as a cast, which is many times slower.

    A code shifted left by 7 bits, without the copy of its sign at bit 14, is a float16 of 2^-8 of its value: both have
    the sign first, and the biases of the exponents are 7 and 15.
    """
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return (halves.to(torch.float32) if out is None else out.copy_(halves)).mul_(256.0)


def e4m3_scales(absmax: torch.Tensor, checks: WeightChecks) -> torch.Tensor:
    """Return scales that map absmax to 448, as bfloat16 and float16 both represent them; 1 for an absmax of 0."""

    def fault(largest: float) -> QuantError:
        return QuantError(f"a weight of {largest:g} requires a scale above {_LARGEST_SCALE:g}", "exclude this Linear")

    checks.at_most(absmax.max(), E4M3_MAX * _LARGEST_SCALE, fault)
    s = (absmax / E4M3_MAX).to(torch.bfloat16).to(torch.float32).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE)
    return torch.where(absmax > 0, s, torch.ones_like(s))


def search_e4m3_scales(weight: torch.Tensor, absmax: torch.Tensor, checks: WeightChecks) -> torch.Tensor:
    """Return the scale with the least squared error of each row.

    weight: float32 [rows, n]; a row holds all weights that share a scale. absmax: [rows, 1].
    """
    best = e4m3_scales(absmax, checks)
    best_error = _squared_error(weight, best)
    for factor in _MSE_FACTORS:
        s = e4m3_scales(absmax * factor, checks)
        error = _squared_error(weight, s)
        best, best_error = torch.where(error < best_error, s, best), torch.minimum(error, best_error)
    return best


def _squared_error(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (
        decode_e4m3(round_e4m3(weight / scales)).mul_(scales).sub_(weight).square_().sum(dim=1, keepdim=True)
    )  # [rows, 1]


def quantize_act_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations with one dynamic scale over the last axis: s = max(absmax / 448, 1 / (448 * 512)).

    x: float32 [..., n]. Returns the codes' values as float32 [..., n] and the scales [..., 1]. The formula is that of
    vLLM's per-token kernel.
    """
    s = (x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp_min(_SMALLEST_ACT_SCALE)
    return decode_e4m3(round_e4m3(x / s)), s
