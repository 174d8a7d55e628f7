"""The samples where a walk through all layers begins and ends, for tuning a quantized model as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models import LayerInput
from .sample_store import HiddenStates, StemStore
from .stems import Stems


@dataclass(frozen=True)
class SampleEnds:
    """All samples, by position: the input of the first layer, and the float model's output of the last layer.

    held_out: positions that do not enter H; probe: of the probe samples; see TokenRoles.
    """

    held_out: frozenset[int]
    stems: Stems
    store: StemStore
    exact: HiddenStates
    layers: int
    probe: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.stems)

    def modality(self, position: int) -> torch.Tensor:
        """int8 [tokens], indices into MODALITIES."""
        return self.stems.modalities[position]

    def first(self, position: int) -> torch.Tensor:
        """The hidden states that enter layer 0, float32 [1, tokens, hidden]."""
        return self.store.hidden(self.stems.numbers[position])

    def layer_input(self, position: int, layer: int, hidden: torch.Tensor, device: torch.device) -> LayerInput:
        """The input of a layer. hidden: what the layer before returned."""
        return self.store.layer_input(self.stems.numbers[position], layer, hidden, device)

    def last(self, position: int) -> torch.Tensor:
        """What the float model's last layer returned, float32 [1, tokens, hidden]."""
        return self.entering_norm(position, self.exact.read(position))

    def entering_norm(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the final norm reads, from what the last layer returned."""
        return self.store.entering(self.stems.numbers[position], self.layers, hidden)
