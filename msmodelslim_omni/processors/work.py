"""LayerWork: one decoder layer in progress, the input and output of every processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..models import LayerSpec, LinearGroup
from ..numerics import QuantizedLinear, QuantScheme, input_global_scale
from ..runtime import SINGLE_PROCESS, Team
from ..statistics import InputStats
from .gptq import CholeskyFactor

# An expert that fewer tokens reached is rounded as in a data-free run: statistics of so few tokens say more about the
# calibration samples than about the expert.
FEWEST_EXPERT_TOKENS = 32


@dataclass(frozen=True)
class SmoothingRecord:
    """The decision for one group, for the report. gain: error / error of plain rounding; alpha: the exponent.

    For smooth_quant and iter_smooth, `gain` is that of the worst modality. alpha is None if the group is unchanged.
    """

    group: str
    alpha: float | None
    gain: float
    reason: str


@dataclass(frozen=True)
class Fold:
    """Factors that smoothing and scaling apply to the weight W [out, in] of a Linear: W * columns / rows, in float32.

    columns: [in]; rows: [out]; None means no factors. They are stored separately because the folded weight in float32
    takes twice its stored bytes.
    """

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def multiply_columns(self, columns: torch.Tensor) -> Fold:
        return replace(self, columns=columns if self.columns is None else self.columns * columns)

    def divide_rows(self, rows: torch.Tensor) -> Fold:
        return replace(self, rows=rows if self.rows is None else self.rows * rows)

    def apply_to(self, weight: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """A float32 copy of some rows of the weight with the factors applied."""
        folded = weight[rows].to(torch.float32, copy=True)
        if self.columns is not None:
            folded.mul_(self.columns)
        return folded if self.rows is None else folded.div_(self.rows[rows, None])


class Probe(Protocol):
    """A float layer with some samples, to measure the effect of changed weights. Implemented by LayerProbe."""

    def block_errors(self, block: str, candidates: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
        """The error of the output of a block (`self_attn`, `mlp`) with each set of weights, by relative name.

        Squared, weighted by statistics.relative_weights and the token's importance.
        """
        ...


@dataclass(frozen=True)
class LayerWork:
    """The tensors of a layer by relative name. Processors return a changed copy and never change tensors in place.

    weights: in the stored dtype, without folds. `weight` returns the weight of a Linear with its folds.
    stats: of the current input of each group, after any smoothing; None in a data-free run.
    importance: the weight of one token of each modality present, by index. The weights of all tokens sum to one.
    cholesky_factors: the Cholesky factor of H by group, if GPTQ rounds the group and awq already computed it.
    rounded: Linears that awq already rounded, from their current weights.
    probe: measures the true output of a block; None if not available.
    team: the processes that work on the layer. Each has all fields and gets the same result.
    folds: factors folded into the weight, by Linear.
    changed: names of tensors that differ from the checkpoint.
    notes: messages about this layer for the report.
    over_plain: true output error of the layer / that of plain rounding.
    """

    index: int
    spec: LayerSpec
    schemes: dict[str, QuantScheme]
    weights: dict[str, torch.Tensor]
    stats: dict[str, InputStats] | None = None
    importance: Mapping[int, float] = field(default_factory=dict)
    cholesky_factors: Mapping[str, CholeskyFactor] = field(default_factory=dict)
    rounded: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    probe: Probe | None = None
    team: Team = SINGLE_PROCESS
    folds: Mapping[str, Fold] = field(default_factory=dict)
    quantized: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    smoothing: tuple[SmoothingRecord, ...] = ()
    notes: tuple[str, ...] = ()
    over_plain: float | None = None

    def input_stats(self, group: LinearGroup) -> InputStats | None:
        """The statistics of a group's input; None in a data-free run, and for an expert with too few tokens."""
        stats = None if self.stats is None else self.stats.get(group.name)
        if stats is None or (group.expert is not None and int(stats.count.sum()) < FEWEST_EXPERT_TOKENS):
            return None
        return stats

    def input_global(self, linear: str) -> torch.Tensor | None:
        """The global scale of a Linear's input, float32 [1]; None if its scheme stores none, or without samples.

        All experts of a layer share one for gate and up, whose inputs are the same states, and one for down: runtimes
        use one for all, and an expert that no token reached needs one too.
        """
        if self.stats is None or not self.schemes[linear].stores_input_scale:
            return None
        own = next(group for group in self.spec.groups if linear in group.linears)
        ending = own.linears[0].rpartition(".")[2]
        alike = [own] if own.expert is None else [g for g in self.spec.groups if g.linears[0].endswith(f".{ending}")]
        peaks = [self.stats[g.name].absmax.amax() for g in alike if g.name in self.stats]
        return input_global_scale(torch.stack(peaks).amax())

    def without_gram(self) -> LayerWork:
        """The layer without H and its factors, once all Linears are rounded."""
        stats = None if self.stats is None else {group: stats.without_gram() for group, stats in self.stats.items()}
        return replace(self, stats=stats, cholesky_factors={}, rounded={})

    def with_record(self, record: SmoothingRecord) -> LayerWork:
        return replace(self, smoothing=(*self.smoothing, record))

    def with_folds(self, new: Mapping[str, torch.Tensor], folds: Mapping[str, Fold]) -> LayerWork:
        """Replace some tensors and folds. Drops `rounded` Linears whose weights change."""
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
        """The weight of a Linear or some rows of it with its folds, float32; in the stored dtype without folds."""
        stored = self.weights[f"{linear}.weight"]
        return self.folds[linear].apply_to(stored, rows) if linear in self.folds else stored[rows]

    def scaled_weight(self, linear: str, columns: torch.Tensor) -> torch.Tensor:
        """A float32 copy of the weight of a Linear with these factors also folded into its columns."""
        return self.fold(linear).multiply_columns(columns).apply_to(self.weights[f"{linear}.weight"])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the layer by its name, with its folds."""
        linear = name.removesuffix(".weight")
        return self.weight(linear) if linear in self.folds else self.weights[name]

    def bias(self, linear: str) -> torch.Tensor | None:
        return self.weights.get(f"{linear}.bias")
