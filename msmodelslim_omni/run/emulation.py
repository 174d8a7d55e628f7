"""Emulation: a quantized layer in the library's float code, with the arithmetic of a runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..models import ModelSpec, pass_cache_through
from ..numerics import CacheScales, QuantizedLinear, code_values, dequantize, quantized_matmul, round_cached


class EmulatedLinear(torch.nn.Module):
    """A quantized Linear in a float layer, with the arithmetic of a runtime.

    keep_widened: with int8 activations, keep the integers as float32: faster, four times the memory.
    """

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, keep_widened: bool = True) -> None:
        super().__init__()
        wide = keep_widened and linear.scheme.act_bits is not None
        self._linear = replace(linear, qweight=code_values(linear.qweight)) if wide else linear
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(x, self._linear, self._bias)


def emulate(
    module: torch.nn.Module,
    quantized: Mapping[str, QuantizedLinear],
    weights: Mapping[str, torch.Tensor],
    keep_widened: bool = True,
) -> None:
    """Replace Linears, by relative name, with their emulation. Biases come from `weights`."""
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, EmulatedLinear(linear, weights.get(f"{name}.bias"), keep_widened))


def quantized_layer(
    model: ModelSpec,
    config: dict[str, Any],
    index: int,
    floats: Mapping[str, torch.Tensor],
    linears: Mapping[str, QuantizedLinear],
    keep_widened: bool = True,
    cache: CacheScales | None = None,
    as_stored: Collection[str] = (),
) -> torch.nn.Module:
    """The library's layer in float32. Linears with int8 activations are emulated; others hold dequantized weights.

    floats, linears: all tensors of the layer, by relative name. keep_widened: False keeps all weights as
    integers and widens them piece by piece in each product: a quarter of the memory, slower on many samples.
    cache: attention sees all keys and values rounded, its own token's too, as if all of them came from the cache.
    as_stored: float weights that the layer gets in their own dtype; the caller replaces their Linears.
    """
    weights = {name: tensor if name in as_stored else tensor.to(torch.float32) for name, tensor in floats.items()}
    emulated = {name: q for name, q in linears.items() if q.scheme.act_bits is not None or not keep_widened}
    for name, linear in linears.items():
        # A placeholder: the emulation replaces this Linear.
        weights[f"{name}.weight"] = linear.qweight if name in emulated else dequantize(linear)
    module: torch.nn.Module = model.family.build_layer(config, index, weights)
    emulate(module, emulated, weights, keep_widened)
    if cache is not None:
        round_cache(module, cache)
    return module


def round_cache(layer: torch.nn.Module, cache: CacheScales) -> None:
    """Let the attention of a layer use keys and values as it would read them from a rounded cache."""
    key_scales, value_scales, dtype = cache.key, cache.value, cache.dtype

    def rounded(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            round_cached(key, key_scales.to(key.device), dtype),
            round_cached(value, value_scales.to(value.device), dtype),
        )

    pass_cache_through(layer, rounded)
