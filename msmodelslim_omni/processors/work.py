"""One decoder layer while it is worked on: what processors are handed and hand back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..arithmetic import QuantizedLinear
from ..capture import InputStats
from ..models.spec import LayerSpec
from ..scheme import QuantScheme
from ..team import ALONE, Team
from .gptq import Triangle


@dataclass(frozen=True)
class SmoothingRecord:
    """What was decided for one group, for the report. `gain`: the error over plain rounding's; `alpha`: the exponent.

    For smooth_quant and iter_smooth the error is that of the worst modality.
    """

    group: str
    alpha: float | None
    gain: float
    reason: str


class Probe(Protocol):
    """The float layer with some samples, on which changed weights can be tried."""

    def block_error(self, block: str, weights: Mapping[str, torch.Tensor]) -> float:
        """The squared error of a block's output (`self_attn`, `mlp`) with these weights (relative names) in it."""
        ...


@dataclass(frozen=True)
class LayerWork:
    """A layer's tensors by relative name. Processors return a changed copy, never change the tensors in place.

    weights: stored dtype until a processor changes them, then float32 (Linears) or the stored dtype (norms, biases).
    stats:   of each group's input as it is now, after any smoothing; None in a data-free run.
    importance: the weight of one token of each modality present, by index; they sum to one over all tokens.
    triangles: H of each group's input factorized, where GPTQ is to round and awq has made them already.
    rounded: Linears that awq has rounded in earnest already, as they are with the weights here.
    probe: what a block's true output can be tried on, if anything.
    team: the processes that work on the layer; each has all of this, and comes to the same.
    changed: names whose value differs from the checkpoint and must be written.
    notes: what the report should say of this layer. over_plain: its true output error over plain rounding's.
    """

    index: int
    spec: LayerSpec
    schemes: dict[str, QuantScheme]
    weights: dict[str, torch.Tensor]
    stats: dict[str, InputStats] | None = None
    importance: Mapping[int, float] = field(default_factory=dict)
    triangles: Mapping[str, Triangle] = field(default_factory=dict)
    rounded: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    probe: Probe | None = None
    team: Team = ALONE
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    smoothing: tuple[SmoothingRecord, ...] = ()
    notes: tuple[str, ...] = ()
    over_plain: float | None = None

    def recorded(self, record: SmoothingRecord) -> LayerWork:
        return replace(self, smoothing=(*self.smoothing, record))

    def with_weights(self, new: dict[str, torch.Tensor]) -> LayerWork:
        rounded = {linear: q for linear, q in self.rounded.items() if f"{linear}.weight" not in new}
        return replace(self, weights={**self.weights, **new}, changed=self.changed | set(new), rounded=rounded)

    def bias(self, linear: str) -> torch.Tensor | None:
        return self.weights.get(f"{linear}.bias")
