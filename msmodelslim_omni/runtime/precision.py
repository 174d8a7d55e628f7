"""The number format of the products in the forwards of calibration: float32, or bfloat16 where it is faster.

Processors differ: with AMX, AVX512-BF16 or tensor cores a product of bfloat16 numbers with float32 sums takes a half
to a fifth of the time, and on others six times the time. So both are measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import QuantError
from .device import supports_bfloat16

ComputeDtype = Literal["auto", "float32", "bfloat16"]

_WORTH = 1.3  # how much faster bfloat16 must be
_SMALLEST = 1 << 21  # weights of a Linear: of smaller ones, the products are not what takes the time
_TOKENS, _ROWS, _REPEATS = 256, 1024, 3  # of the measured product, a tenth of a second in all


@dataclass(frozen=True)
class Precision:
    """The chosen format, by its name in torch, and why."""

    name: Literal["float32", "bfloat16"]
    reason: str

    @property
    def is_reduced(self) -> bool:
        return self.name == "bfloat16"


FLOAT32 = Precision("float32", "default")


def choose_precision(wanted: ComputeDtype, device: torch.device, shape: tuple[int, int]) -> Precision:
    """The format to compute with. shape: [out, in] of the largest Linear of a layer.

    Raises QuantError for bfloat16 on a device that does not have it.
    """
    if wanted == "float32":
        return Precision("float32", "as asked")
    if not supports_bfloat16(device):
        if wanted == "bfloat16":
            raise QuantError(f"compute_dtype: bfloat16, but {device} has no bfloat16 arithmetic", "use auto or float32")
        return Precision("float32", f"{device} has no bfloat16 arithmetic")
    if wanted == "bfloat16":
        return Precision("bfloat16", "as asked")
    if shape[0] * shape[1] < _SMALLEST:
        return Precision("float32", "the layers are small")
    seconds = {dtype: _seconds(dtype, device, shape) for dtype in (torch.float32, torch.bfloat16)}
    wide, narrow = seconds[torch.float32], seconds[torch.bfloat16]
    reason = f"a product takes {wide / narrow:.1f} times as long in float32 as in bfloat16"
    return Precision("bfloat16" if wide > _WORTH * narrow else "float32", reason)


def _seconds(dtype: torch.dtype, device: torch.device, shape: tuple[int, int]) -> float:
    """The least time of a few products of this width."""
    x = torch.ones((_TOKENS, shape[1]), dtype=dtype, device=device)
    weight = torch.ones((min(_ROWS, shape[0]), shape[1]), dtype=dtype, device=device)
    taken = []
    for _ in range(1 + _REPEATS):  # the first one chooses a kernel
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # waits for a card
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
