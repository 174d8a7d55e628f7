"""The tuned factors of a decoder layer, and their fold into scales, norms and biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..models import LayerSpec
from ..numerics import QuantizedLinear, storable_scales


@dataclass(frozen=True)
class SolvedLayer:
    """A quantized decoder layer.

    linears: quantized Linears by relative name. floats: all other tensors of the layer, by relative name, in their
    stored dtype. changed: names of the floats that differ from the checkpoint's.
    """

    index: int
    linears: dict[str, QuantizedLinear]
    floats: dict[str, torch.Tensor]
    changed: frozenset[str]


@dataclass(frozen=True)
class Factors:
    """What tuning changes in a layer, float32.

    rows: [out] by Linear, logarithms of factors of the scales of each output channel. norms: [hidden] by norm,
    logarithms of factors of its weight. biases: [out] by Linear that has a bias, added to it.
    """

    rows: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All factors in a fixed order, by names that are unique in the layer."""
        yield from ((f"rows.{name}", tensor) for name, tensor in sorted(self.rows.items()))
        yield from ((f"norms.{name}", tensor) for name, tensor in sorted(self.norms.items()))
        yield from ((f"biases.{name}", tensor) for name, tensor in sorted(self.biases.items()))

    def copied(self) -> Factors:
        return Factors(
            {name: tensor.detach().clone() for name, tensor in self.rows.items()},
            {name: tensor.detach().clone() for name, tensor in self.norms.items()},
            {name: tensor.detach().clone() for name, tensor in self.biases.items()},
        )


def is_tunable(linear: QuantizedLinear) -> bool:
    """Whether the scales of a Linear may get a factor: those of 4-bit integers with float activations."""
    return linear.scheme.is_int4 and linear.scheme.act_bits is None


def neutral_factors(layer: SolvedLayer, spec: LayerSpec, device: torch.device) -> Factors:
    """Factors of 1 for every tunable Linear and for every norm in front of one, and nothing added to biases."""
    tunable = [name for name, linear in layer.linears.items() if is_tunable(linear)]
    norms = {
        part.previous
        for part in spec.subgraphs
        if part.is_tunable and any(linear in tunable for linear in part.linears)
    }
    sizes = {norm: layer.floats[f"{norm}.weight"].shape[0] for norm in norms}
    return Factors(
        {name: torch.zeros(layer.linears[name].qweight.shape[0], device=device) for name in tunable},
        {norm: torch.zeros(size, device=device) for norm, size in sizes.items()},
        {
            name: torch.zeros_like(layer.floats[f"{name}.bias"], dtype=torch.float32, device=device)
            for name in tunable
            if f"{name}.bias" in layer.floats
        },
    )


def fold_factors(layer: SolvedLayer, factors: Factors) -> SolvedLayer:
    """The layer with the factors in its scales and norms, each rounded as it is stored."""
    linears = dict(layer.linears)
    for name, logarithms in factors.rows.items():
        old = linears[name]
        scaled = old.scales * logarithms.exp()[:, None].to(old.scales.device)
        linears[name] = replace(old, scales=storable_scales(scaled, None), squares=None)
    floats, changed = dict(layer.floats), set(layer.changed)
    for name, logarithms in factors.norms.items():
        key = f"{name}.weight"
        norm = floats[key]
        floats[key] = (norm.to(torch.float32) * logarithms.exp().to(norm.device)).to(norm.dtype)
        changed.add(key)
    for name, added in factors.biases.items():
        key = f"{name}.bias"
        bias = floats[key]
        floats[key] = (bias.to(torch.float32) + added.to(bias.device)).to(bias.dtype)
        changed.add(key)
    return SolvedLayer(layer.index, linears, floats, frozenset(changed))
