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
            codebook: the codes are those of a table instead, here NF4's sixteen (nf4.py), and the scale of a group is
            its absmax, which `double_quant` keeps in eight bits.
    act:    `act_bits` signed integers, symmetric, one scale per token, computed at run time (nothing is stored);
            None: floats.
    """

    weight_bits: int
    act_bits: int | None
    weight_method: WeightMethod = "minmax"
    group_size: int | None = None
    symmetric: bool = True
    codebook: Literal["nf4"] | None = None
    double_quant: bool = False

    @property
    def name(self) -> str:
        """The scheme's name in reports and descriptions: W8A8_DYNAMIC, W4A16_G128, W4A16_G128_SYM, NF4_G64."""
        if self.codebook is not None:
            return f"{self.codebook.upper()}_G{self.group_size}" + ("_DOUBLE" if self.double_quant else "")
        if self.act_bits is not None:
            return f"W{self.weight_bits}A{self.act_bits}_DYNAMIC"
        grouped = f"_G{self.group_size}" if self.group_size else ""
        return f"W{self.weight_bits}A16{grouped}" + ("_SYM" if self.symmetric else "")

    @property
    def is_int4(self) -> bool:
        """Four bits that are integers, not codes of a table."""
        return self.weight_bits == 4 and self.codebook is None

    @property
    def weight_range(self) -> tuple[int, int]:
        """The smallest and the largest integer: [-127, 127] for int8 with int8 activations, [-8, 7] for 4 bits.

        Grouped schemes use the lowest code as well: of sixteen levels one more or less counts. A codebook's codes are
        its indices.
        """
        if self.codebook is not None:
            return 0, 2**self.weight_bits - 1
        top = 2 ** (self.weight_bits - 1) - 1
        return (-top - 1 if self.group_size else -top), top
