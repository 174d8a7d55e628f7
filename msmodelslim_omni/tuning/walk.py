"""The quantized model as a chain of decoder layers: forward with all boundaries kept, then backward to the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..calibration import SampleEnds
from ..models import LayerInput
from ..numerics import dequantize
from ..plan import QuantPlan
from .factors import Factors, SolvedLayer

# Boundaries of one batch: per layer and sample, the hidden states that the layer before returned, [1, tokens, hidden].
Boundaries = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Chain:
    """The quantized layers in order. solved: reads one of them, with its tensors on the device."""

    plan: QuantPlan
    solved: Callable[[int], SolvedLayer]
    samples: SampleEnds
    device: torch.device

    def __len__(self) -> int:
        return len(self.plan.layers)

    def forward(self, batch: Sequence[int], factors: Sequence[Factors] | None) -> Boundaries:
        """Run samples through all layers. factors: of every layer; None: the layers as they are stored.

        Returns len(self) + 1 boundaries. The last one is what the final norm reads.
        """
        boundaries = [[self.samples.first(position).to(self.device) for position in batch]]
        with torch.no_grad():
            for index in range(len(self)):
                module = build_module(self.plan, self.solved(index), None if factors is None else factors[index])
                boundaries.append(
                    [
                        _run(module, self.samples.layer_input(position, index, hidden, self.device))
                        for position, hidden in zip(batch, boundaries[-1], strict=True)
                    ]
                )
        boundaries[-1] = [
            self.samples.entering_norm(position, hidden) for position, hidden in zip(batch, boundaries[-1], strict=True)
        ]
        return boundaries

    def backward(
        self,
        batch: Sequence[int],
        boundaries: Boundaries,
        gradients: list[torch.Tensor],
        factors: Sequence[Factors],
    ) -> None:
        """Add the gradient of the loss to every factor. gradients: of each sample's last boundary; overwritten.

        Each layer is run again with the factors as leaves. Only the hidden states between layers were kept.
        """
        for index in reversed(range(len(self))):
            module = build_module(self.plan, self.solved(index), factors[index])
            for item, position in enumerate(batch):
                inputs = self.samples.layer_input(position, index, boundaries[index][item], self.device)
                leaf = inputs.hidden.detach().clone().requires_grad_()
                with torch.enable_grad():
                    out = _run(module, LayerInput(leaf, inputs.arguments))
                torch.autograd.backward(out, gradients[item])
                assert leaf.grad is not None
                gradients[item] = leaf.grad  # what is added between layers does not depend on the factors
            boundaries[index + 1] = []  # no longer needed


def build_module(plan: QuantPlan, layer: SolvedLayer, factors: Factors | None = None) -> torch.nn.Module:
    """The library's layer in float32 with dequantized weights; the factors act on the outputs of its modules."""
    weights = {name: tensor.to(torch.float32) for name, tensor in layer.floats.items()}
    weights |= {f"{name}.weight": dequantize(linear) for name, linear in layer.linears.items()}
    module = plan.model.family.build_layer(plan.checkpoint.config, layer.index, weights).requires_grad_(False)
    if factors is not None:
        for name, logarithms in factors.rows.items():
            module.get_submodule(name).register_forward_hook(partial(_scale_rows, logarithms))
        for name, added in factors.biases.items():
            module.get_submodule(name).register_forward_hook(partial(_add, added))
        for name, logarithms in factors.norms.items():
            module.get_submodule(name).register_forward_hook(partial(_scale_norm, logarithms))
    return module


def _scale_rows(logarithms: torch.Tensor, linear: torch.nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
    """The output of a Linear whose rows are multiplied by the factors; the bias is not."""
    bias = getattr(linear, "bias", None)
    return out * logarithms.exp() if bias is None else (out - bias) * logarithms.exp() + bias


def _add(added: torch.Tensor, _linear: torch.nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
    return out + added


def _scale_norm(logarithms: torch.Tensor, _norm: torch.nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
    return out * logarithms.exp()


def _run(module: torch.nn.Module, inputs: LayerInput) -> torch.Tensor:
    out = module(inputs.hidden, **inputs.arguments)
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out  # transformers 4 returns a tuple
    return hidden
