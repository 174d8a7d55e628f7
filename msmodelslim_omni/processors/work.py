"""One decoder layer while it is worked on: what processors are handed and hand back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..models import LayerSpec
from ..numerics import QuantizedLinear, QuantScheme
from ..runtime import SINGLE_PROCESS, Team
from ..statistics import InputStats
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


@dataclass(frozen=True)
class Fold:
    """What smoothing and scaling make of a Linear's weight W [out, in]: W * columns / rows, in float32.

    columns: [in]; rows: [out]; None where nothing was folded. Kept apart from the weight, which would take twice its
    stored bytes in float32.
    """

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def multiplied(self, columns: torch.Tensor) -> Fold:
        return replace(self, columns=columns if self.columns is None else self.columns * columns)

    def divided(self, rows: torch.Tensor) -> Fold:
        return replace(self, rows=rows if self.rows is None else self.rows * rows)

    def of(self, weight: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Some rows of the weight, folded; a copy."""
        folded = weight[rows].to(torch.float32, copy=True)
        if self.columns is not None:
            folded.mul_(self.columns)
        return folded if self.rows is None else folded.div_(self.rows[rows, None])


class Probe(Protocol):
    """The float layer with some samples, on which changed weights can be tried."""

    def block_error(self, block: str, weights: Mapping[str, torch.Tensor]) -> float:
        """The squared error of a block's output (`self_attn`, `mlp`) with these weights (relative names) in it."""
        ...


@dataclass(frozen=True)
class LayerWork:
    """A layer's tensors by relative name. Processors return a changed copy, never change the tensors in place.

    weights: in the stored dtype; `weight` gives a Linear's with what is folded into it.
    stats:   of each group's input as it is now, after any smoothing; None in a data-free run.
    importance: the weight of one token of each modality present, by index; they sum to one over all tokens.
    triangles: H of each group's input factorized, where GPTQ is to round and awq has made them already.
    rounded: Linears that awq has rounded in earnest already, as they are with the weights here.
    probe: what a block's true output can be tried on, if anything.
    team: the processes that work on the layer; each has all of this, and comes to the same.
    folds: by Linear, what is folded into its weight.
    changed: names whose value differs from the checkpoint's.
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
    team: Team = SINGLE_PROCESS
    folds: Mapping[str, Fold] = field(default_factory=dict)
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    smoothing: tuple[SmoothingRecord, ...] = ()
    notes: tuple[str, ...] = ()
    over_plain: float | None = None

    def recorded(self, record: SmoothingRecord) -> LayerWork:
        return replace(self, smoothing=(*self.smoothing, record))

    def with_folds(self, new: Mapping[str, torch.Tensor], folds: Mapping[str, Fold]) -> LayerWork:
        """Other tensors and folds in the place of some; what was rounded of these before is not theirs any more."""
        changed = {*new, *(f"{linear}.weight" for linear in folds)}
        return replace(
            self,
            weights={**self.weights, **new},
            folds={**self.folds, **folds},
            changed=self.changed | changed,
            rounded={linear: q for linear, q in self.rounded.items() if f"{linear}.weight" not in changed},
        )

    def fold(self, linear: str) -> Fold:
        return self.folds.get(linear, Fold())

    def weight(self, linear: str, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """A Linear's weight, or some rows of it: as stored where nothing is folded into it, else float32."""
        stored = self.weights[f"{linear}.weight"]
        return self.folds[linear].of(stored, rows) if linear in self.folds else stored[rows]

    def scaled(self, linear: str, columns: torch.Tensor) -> torch.Tensor:
        """A Linear's weight as it would be with these factors folded into its columns, float32; a copy."""
        return self.fold(linear).multiplied(columns).of(self.weights[f"{linear}.weight"])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the layer by its name, with what is folded into it."""
        linear = name.removesuffix(".weight")
        return self.weight(linear) if linear in self.folds else self.weights[name]

    def bias(self, linear: str) -> torch.Tensor | None:
        return self.weights.get(f"{linear}.bias")
