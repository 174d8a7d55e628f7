"""A quantized layer in the library's float code, computed as the runtime does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..models import ModelSpec
from ..numerics import QuantizedLinear, dequantize, quantized_matmul


class EmulatedLinear(torch.nn.Module):
    """A quantized Linear in a float layer, computed as the runtime does. held: with int8 activations the integers are
    kept as float32, for speed.
    """

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, held: bool = True) -> None:
        super().__init__()
        wide = held and linear.scheme.act_bits is not None
        self._linear = replace(linear, qweight=linear.qweight.to(torch.float32)) if wide else linear
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(x, self._linear, self._bias)


def emulate(
    module: torch.nn.Module,
    quantized: Mapping[str, QuantizedLinear],
    weights: Mapping[str, torch.Tensor],
    held: bool = True,
) -> None:
    """Replace Linears, by relative name, by their emulation; biases come from `weights`."""
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, EmulatedLinear(linear, weights.get(f"{name}.bias"), held))


def quantized_layer(
    model: ModelSpec,
    config: dict[str, Any],
    index: int,
    floats: Mapping[str, torch.Tensor],
    linears: Mapping[str, QuantizedLinear],
    held: bool = True,
) -> torch.nn.Module:
    """The library's layer in float32; Linears with int8 activations are emulated, others hold what they stand for.

    floats, linears: all tensors of the layer, by relative name. held: False keeps all weights as integers, which are
    widened a piece at a time in each product: a quarter of the memory, for a layer that runs on few samples.
    """
    weights = {name: tensor.to(torch.float32) for name, tensor in floats.items()}
    emulated = {name: q for name, q in linears.items() if q.scheme.act_bits is not None or not held}
    for name, linear in linears.items():
        # The emulation replaces the weight that it is given here.
        weights[f"{name}.weight"] = linear.qweight if name in emulated else dequantize(linear)
    module: torch.nn.Module = model.family.build_layer(config, index, weights)
    emulate(module, emulated, weights, held)
    return module
