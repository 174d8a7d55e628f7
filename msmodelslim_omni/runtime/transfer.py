"""Copies from a card to the CPU, as few as possible: the host waits for the card at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_cpu(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one dtype and device, on the CPU. Those of a card are copied at once, those of the CPU not at all."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_floats(numbers: Sequence[torch.Tensor]) -> list[float]:
    """The values of tensors of one number each."""
    return [float(number) for number in to_cpu(numbers)]
