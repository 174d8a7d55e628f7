"""Copies from a card to the CPU, as few as possible: the host waits for the card at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_cpu(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the CPU. Those of a card have one dtype and are copied at once; those of the CPU are not copied."""
    on_card = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not on_card:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in on_card]).cpu()
    parts = iter(torch.split(flat, [tensor.numel() for tensor in on_card]))
    return [t if t.device.type == "cpu" else next(parts).view(t.shape) for t in tensors]


def to_floats(numbers: Sequence[torch.Tensor]) -> list[float]:
    """The values of tensors of one number each."""
    return [float(number) for number in to_cpu(numbers)]
