"""The vocabulary of quantization schemes, without torch: what one Linear becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightMethod = Literal["minmax", "mse"]


@dataclass(frozen=True)
class QuantScheme:
    """How one Linear is stored and multiplied.

    weight: `weight_bits` signed integers, symmetric, one scale per output channel, found by `weight_method`.
    act:    `act_bits` signed integers, symmetric, one scale per token, computed at run time (nothing is stored).
    """

    weight_bits: int
    act_bits: int
    weight_method: WeightMethod = "minmax"

    @property
    def name(self) -> str:
        """The scheme's name in reports and in Ascend descriptions, e.g. W8A8_DYNAMIC."""
        return f"W{self.weight_bits}A{self.act_bits}_DYNAMIC"
