"""One decoder layer while it is worked on: what processors are handed and hand back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..arithmetic import QuantizedLinear
from ..capture import InputStats
from ..models.spec import LayerSpec
from ..scheme import QuantScheme


@dataclass(frozen=True)
class SmoothingRecord:
    """What was decided for one group, for the report. `gain`: worst modality's error over plain rounding's."""

    group: str
    alpha: float | None
    gain: float
    reason: str


@dataclass(frozen=True)
class LayerWork:
    """A layer's tensors by relative name. Processors return a changed copy, never change the tensors in place.

    weights: stored dtype until a processor changes them, then float32 (Linears) or the stored dtype (norms, biases).
    stats:   of each group's input as it is now, after any smoothing; None in a data-free run.
    changed: names whose value differs from the checkpoint and must be written.
    """

    index: int
    spec: LayerSpec
    schemes: dict[str, QuantScheme]
    weights: dict[str, torch.Tensor]
    stats: dict[str, InputStats] | None = None
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    smoothing: tuple[SmoothingRecord, ...] = ()

    def with_weights(self, new: dict[str, torch.Tensor]) -> LayerWork:
        return replace(self, weights={**self.weights, **new}, changed=self.changed | set(new))

    def bias(self, linear: str) -> torch.Tensor | None:
        return self.weights.get(f"{linear}.bias")
