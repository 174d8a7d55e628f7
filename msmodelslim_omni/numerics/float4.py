"""NVFP4: weights as float4 e2m1, with a float8 e4m3 scale per 16 inputs and one global scale per Linear.

    W = value * block_scale / GLOBAL_SCALE     values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives

Codes are kept as int8 integers: twice the value. The scales of a QuantizedLinear are block_scale / GLOBAL_SCALE / 2, so
that integer times scale is the weight, exactly, as for other schemes.

The global scale only keeps the block scales within the range of e4m3. It is the same for every Linear, because runtimes
fuse Linears (q, k, v; gate, up) and require one value for all parts, and because the precision of a float block scale
does not depend on it: block maxima from 3.7e-4 to 10.5 have block scales of full precision.
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
