"""The scheme of a Linear, from the blocks of a recipe."""

from __future__ import annotations

from typing import Literal

from ..numerics import QuantScheme
from ..recipe import ActConfig, WeightConfig


def scheme_of(weight: WeightConfig, act: ActConfig | None = None) -> QuantScheme:
    """act: None for float activations."""
    bits = {"int8": 8, "int4": 4, "nf4": 4, "fp8_e4m3": 8, "nvfp4": 4}
    numbers: dict[str, Literal["e4m3", "e2m1"]] = {"fp8_e4m3": "e4m3", "nvfp4": "e2m1"}
    return QuantScheme(
        bits[weight.dtype],
        bits[act.dtype] if act else None,
        weight.method,
        weight.group_size,
        weight.symmetric,
        "nf4" if weight.dtype == "nf4" else None,
        weight.ext.double_quant,
        numbers.get(weight.dtype, "int"),
        weight.block_rows,
    )
