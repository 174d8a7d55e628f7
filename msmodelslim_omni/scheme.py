"""The vocabulary of quantization schemes, without torch: what one Linear becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightMethod = Literal["minmax", "mse", "gptq"]


@dataclass(frozen=True)
class QuantScheme:
    """How one Linear is stored and multiplied.

    weight: `weight_bits` signed integers with one scale per output channel, or per `group_size` consecutive inputs of
            it; symmetric, or with a zero point beside each scale; scales found by `weight_method`.
    act:    `act_bits` signed integers, symmetric, one scale per token, computed at run time (nothing is stored);
            None: floats.
    """

    weight_bits: int
    act_bits: int | None
    weight_method: WeightMethod = "minmax"
    group_size: int | None = None
    symmetric: bool = True

    @property
    def name(self) -> str:
        """The scheme's name in reports and descriptions: W8A8_DYNAMIC, W4A16_G128, W4A16_G128_SYM."""
        if self.act_bits is not None:
            return f"W{self.weight_bits}A{self.act_bits}_DYNAMIC"
        grouped = f"_G{self.group_size}" if self.group_size else ""
        return f"W{self.weight_bits}A16{grouped}" + ("_SYM" if self.symmetric else "")

    @property
    def weight_range(self) -> tuple[int, int]:
        """The smallest and the largest integer: [-127, 127] for int8 with int8 activations, [-8, 7] for 4 bits.

        Grouped schemes use the lowest code as well: of sixteen levels one more or less counts.
        """
        top = 2 ** (self.weight_bits - 1) - 1
        return (-top - 1 if self.group_size else -top), top
