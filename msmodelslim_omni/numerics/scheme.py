"""QuantScheme: the quantization scheme of one Linear. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightMethod = Literal["minmax", "mse", "gptq"]


@dataclass(frozen=True)
class QuantScheme:
    """How one Linear is stored and multiplied.

    weight: signed integers of `weight_bits` with one scale per output channel, or per `group_size` consecutive inputs
            of a channel; symmetric, or with one zero point per scale. `weight_method` finds the scales.
            With a `codebook`, the integers are indices into its table (nf4.py: the 16 NF4 levels) and the scale of a
            group is its absmax. `double_quant` also quantizes the absmax, to 8 bits.
            With number `e4m3`, weights and activations are 8-bit floats (float8.py) instead of integers; with
            `block_rows`, a scale covers `block_rows` output channels by `group_size` inputs. With number `e2m1`, the
            integers are twice the 4-bit floats of NVFP4 (float4.py).
    act:    signed integers of `act_bits`, symmetric, with one scale per token, computed at run time and not stored;
            per `group_size` inputs of a token for e4m3 in blocks, and for e2m1, whose scales are relative to a stored
            global scale of the Linear's input. None: float activations.
    """

    weight_bits: int
    act_bits: int | None
    weight_method: WeightMethod = "minmax"
    group_size: int | None = None
    symmetric: bool = True
    codebook: Literal["nf4"] | None = None
    double_quant: bool = False
    number: Literal["int", "e4m3", "e2m1"] = "int"
    block_rows: int | None = None

    @property
    def name(self) -> str:
        """Name of the scheme in reports and descriptions: W8A8_DYNAMIC, W4A16_G128_SYM, W8A16, NF4_G64, FP8_DYNAMIC."""
        if self.number == "e2m1":
            return "NVFP4A16" if self.act_bits is None else "NVFP4"
        if self.number == "e4m3":
            return "FP8_BLOCK" if self.block_rows else "FP8_DYNAMIC"
        if self.codebook is not None:
            return f"{self.codebook.upper()}_G{self.group_size}" + ("_DOUBLE" if self.double_quant else "")
        if self.act_bits is not None:
            return f"W{self.weight_bits}A{self.act_bits}_DYNAMIC"
        grouped = f"_G{self.group_size}" if self.group_size else ""
        return f"W{self.weight_bits}A16{grouped}" + ("_SYM" if self.symmetric and self.weight_bits == 4 else "")

    @property
    def is_int4(self) -> bool:
        """Whether the weights are 4-bit integers, not codes of a codebook."""
        return self.weight_bits == 4 and self.codebook is None and self.number == "int"

    @property
    def stores_input_scale(self) -> bool:
        """Whether a scale of the Linear's input is calibrated and stored."""
        return self.number == "e2m1" and self.act_bits is not None

    @property
    def rounds_tokens(self) -> bool:
        """Whether activations have one scale per token, so that the product can be scaled after it is computed."""
        return self.act_bits is not None and self.group_size is None

    @property
    def weight_range(self) -> tuple[int, int]:
        """Smallest and largest integer: [-127, 127] for int8 per channel, [-8, 7] for int4; [-448, 448] for e4m3;
        [-12, 12] for doubled e2m1.

        Grouped schemes also use the lowest code, because one level of sixteen matters. For a codebook, the range of its
        indices.
        """
        if self.codebook is not None:
            return 0, 2**self.weight_bits - 1
        if self.number == "e4m3":
            return -448, 448
        if self.number == "e2m1":
            return -12, 12
        top = 2 ** (self.weight_bits - 1) - 1
        return (-top - 1 if self.group_size else -top), top
