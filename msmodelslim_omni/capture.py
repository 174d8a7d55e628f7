"""Hooks on one layer -> statistics of each Linear's input.

Statistics add: maxima, counts and rows of two sets of samples merge into those of both. They are kept per modality,
so that a weighting of modalities needs no further forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .models.spec import MODALITIES, LayerInput, LayerSpec

# Rows of a Linear's input that are kept, per modality: enough to tell apart errors that differ by a few percent.
ROWS_PER_MODALITY = 256


@dataclass(frozen=True)
class InputStats:
    """The input of one group of Linears over all samples.

    absmax: float32 [modalities, in], the largest |x| per channel; zero for a modality without tokens.
    count:  int64 [modalities], tokens seen.
    rows:   float32 [n, in], a fixed choice of tokens; row_modality: int8 [n].
    """

    absmax: torch.Tensor
    count: torch.Tensor
    rows: torch.Tensor
    row_modality: torch.Tensor

    def merged(self, other: InputStats) -> InputStats:
        return InputStats(
            torch.maximum(self.absmax, other.absmax),
            self.count + other.count,
            torch.cat([self.rows, other.rows]),
            torch.cat([self.row_modality, other.row_modality]),
        )

    def present(self) -> list[int]:
        """Indices of the modalities that have tokens."""
        return [int(m) for m in torch.nonzero(self.count).flatten()]


def input_stats(x: torch.Tensor, modality: torch.Tensor, chosen: torch.Tensor) -> InputStats:
    """Statistics of one sample. x: [tokens, in] float32; modality: int8 [tokens]; chosen: rows to keep."""
    absmax = torch.zeros((len(MODALITIES), x.shape[1]), dtype=torch.float32, device=x.device)
    count = torch.zeros(len(MODALITIES), dtype=torch.int64)
    for index in range(len(MODALITIES)):
        mine = modality == index
        count[index] = int(mine.sum())
        if count[index]:
            absmax[index] = x[mine.to(x.device)].abs().amax(dim=0)
    return InputStats(absmax, count, x[chosen.to(x.device)].clone(), modality[chosen])


def choose_rows(modalities: Sequence[torch.Tensor], per_modality: int = ROWS_PER_MODALITY) -> list[torch.Tensor]:
    """For each sample the token positions to keep: evenly spread over all tokens of each modality.

    modalities: int8 [tokens] per sample. No randomness, so that a resumed run keeps the same rows.
    """
    everything = torch.cat([*modalities])
    keep = torch.zeros(len(everything), dtype=torch.bool)
    for index in range(len(MODALITIES)):
        positions = torch.nonzero(everything == index).flatten()
        if len(positions):
            count = min(per_modality, len(positions))
            keep[positions[torch.linspace(0, len(positions) - 1, count).round().long()]] = True
    return [torch.nonzero(part).flatten() for part in torch.split(keep, [len(m) for m in modalities])]


class InputRecorder:
    """Hooks on one layer that collect InputStats for each of its groups while samples run through it."""

    def __init__(self, layer: torch.nn.Module, spec: LayerSpec) -> None:
        self.stats: dict[str, InputStats] = {}
        self._modality = torch.zeros(0, dtype=torch.int8)
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._hooks = [
            layer.get_submodule(group.linears[0]).register_forward_pre_hook(self._recorder(group.name))
            for group in spec.groups
        ]

    def begin(self, modality: torch.Tensor, chosen: torch.Tensor) -> None:
        """What the tokens of the next sample are."""
        self._modality, self._chosen = modality, chosen

    def _recorder(self, group: str) -> Any:
        def record(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            new = input_stats(arguments[0][0], self._modality, self._chosen)
            self.stats[group] = self.stats[group].merged(new) if group in self.stats else new

        return record

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def run_layer(layer: torch.nn.Module, inputs: LayerInput) -> torch.Tensor:
    """The hidden states after a layer, [1, tokens, hidden]; transformers 4 returns them in a tuple."""
    with torch.inference_mode():
        out = layer(inputs.hidden, **inputs.arguments)
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
