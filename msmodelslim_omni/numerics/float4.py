"""NVFP4: weights and activations as float4 e2m1, with a float8 e4m3 scale per 16 inputs and a global scale.

    W = value * block_scale / GLOBAL_SCALE     values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Codes are kept as int8 integers: twice the value. The scales of a QuantizedLinear are block_scale / GLOBAL_SCALE / 2, so
that integer times scale is the weight, exactly, as for other schemes.

The global scale only keeps the block scales within the range of e4m3. It is the same for every Linear, because runtimes
fuse Linears (q, k, v; gate, up) and require one value for all parts, and because the precision of a float block scale
does not depend on it: block maxima from 3.7e-4 to 10.5 have block scales of full precision.

Activations are rounded at run time, in the same blocks, relative to a stored global scale of the Linear's input:

    x = value * block_scale / G        block_scale = e4m3(G * absmax of the block / 6)

G is the largest power of two with which the largest calibrated |x| is not clipped. The block scales then reach from 224
or more down to 2^-9; those of blocks with less than about 1/14336 of the largest |x| lose precision.
"""

from __future__ import annotations

import torch

from ..errors import QuantError
from .checks import WeightChecks
from .float8 import E4M3_MAX, decode_e4m3, round_e4m3

GLOBAL_SCALE = 256.0
NVFP4_GROUP = 16

_LARGEST = 6.0  # the largest e2m1 value
_SMALLEST_BLOCK_SCALE = 2.0**-9  # the smallest positive e4m3 value
_SMALLEST_INPUT = 2.0**-60  # an input of zeros gets a finite G

# Values that the maximum of a block may be mapped to in the `mse` search. At 4, the step below the maximum is 1, at 6
# it is 2; the others move the grid between these.
_MSE_TOPS = (6.0, 5.5, 5.0, 4.5, 4.0, 3.75, 3.5)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest doubled e2m1 value (0, 1, 2, 3, 4, 6, 8, 12), half to the even code; clamp to ±12.

    x: float32, in units of half a block scale. A tie between two codes goes to the one whose last bit is 0.
    """
    magnitude = x.abs()
    step = torch.where(magnitude < 4, 1.0, torch.where(magnitude < 8, 2.0, 4.0))
    return (x / step).round_().mul_(step).clamp_(-2 * _LARGEST, 2 * _LARGEST)


def nvfp4_scales(absmax: torch.Tensor, checks: WeightChecks, top: float = _LARGEST) -> torch.Tensor:
    """Return scales, as QuantizedLinear stores them, that map absmax of each block to the value `top`."""
    wanted = absmax * (GLOBAL_SCALE / top)

    def fault(largest: float) -> QuantError:
        return QuantError(
            f"a weight of {largest * top / GLOBAL_SCALE:g} is too large for NVFP4, whose largest value here is"
            f" {E4M3_MAX * _LARGEST / GLOBAL_SCALE:g}",
            "exclude this Linear",
        )

    checks.at_most(wanted.max(), 1.0625 * E4M3_MAX, fault)  # above this, e4m3 would clip the scale
    block_scales = decode_e4m3(round_e4m3(wanted)).clamp_min_(_SMALLEST_BLOCK_SCALE)
    return block_scales.div_(2 * GLOBAL_SCALE)


def input_global_scale(absmax: torch.Tensor) -> torch.Tensor:
    """G of an input, float32 [1]: the largest power of two up to 448 * 6 / absmax. absmax: of all its values."""
    wanted = E4M3_MAX * _LARGEST / absmax.reshape(1).to(torch.float32).clamp_min(_SMALLEST_INPUT)
    return torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 1)


def round_act_nvfp4(x: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """The dequantized activations, float32 like x [..., 16]. The formula is that of vLLM's kernel.

    global_scale: G, [1]; None takes that of x. A block whose scale is rounded to zero becomes zero; a block beyond the
    calibrated range is clipped.
    """
    global_scale = input_global_scale(x.abs().amax()) if global_scale is None else global_scale
    absmax = x.abs().amax(dim=-1, keepdim=True)
    half_scale = decode_e4m3(round_e4m3(absmax * (global_scale / _LARGEST))).div_(2 * global_scale)
    return torch.where(half_scale > 0, round_e2m1(x / half_scale).mul_(half_scale), torch.zeros_like(x))


def search_nvfp4_scales(grouped: torch.Tensor, absmax: torch.Tensor, checks: WeightChecks) -> torch.Tensor:
    """Return the scale with the least squared error of each block. grouped: [rows, groups, 16]; absmax: [..., 1]."""
    best = nvfp4_scales(absmax, checks)
    best_error = _squared_error(grouped, best)
    largest = E4M3_MAX / GLOBAL_SCALE  # of absmax / top
    for top in _MSE_TOPS[1:]:
        s = nvfp4_scales(absmax.clamp_max(largest * top), checks, top)
        error = _squared_error(grouped, s)
        best, best_error = torch.where(error < best_error, s, best), torch.minimum(error, best_error)
    return best


def _squared_error(grouped: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return round_e2m1(grouped / scales).mul_(scales).sub_(grouped).square_().sum(dim=2, keepdim=True)
