"""Hooks on one layer -> statistics of each Linear's input.

Statistics add: maxima, counts and rows of two sets of samples merge into those of both. They are kept per modality,
so that a weighting of modalities needs no further forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from ..errors import QuantError
from ..models import MODALITIES, LayerInput, LayerSpec
from ..runtime import DEFAULT_BUDGET, UNSPLIT, Budget, Split
from .gram import (
    Gram,
    GramBuilder,
    combined,
    sketch_rows,
)

# Rows of a Linear's input that are kept, per modality: enough to tell apart errors that differ by a few percent.
ROWS_PER_MODALITY = 256


@dataclass(frozen=True)
class InputStats:
    """The input of one group of Linears over all samples.

    absmax: float32 [modalities, in], the largest |x| per channel; zero for a modality without tokens.
    abssum: float32 [modalities, in], the sum of |x| per channel.
    count:  int64 [modalities], tokens seen.
    rows:   float32 [n, in], a fixed choice of tokens; row_modality: int8 [n].
    grams:  the second moment of each modality present, by index; empty where no processor asks for it.
    weighed: in their place, that of all modalities, tokens weighed by an importance.
    """

    absmax: torch.Tensor
    abssum: torch.Tensor
    count: torch.Tensor
    rows: torch.Tensor
    row_modality: torch.Tensor
    grams: dict[int, Gram] = field(default_factory=dict)
    weighed: Gram | None = None

    def merged(self, other: InputStats) -> InputStats:
        return InputStats(
            torch.maximum(self.absmax, other.absmax),
            self.abssum + other.abssum,
            self.count + other.count,
            torch.cat([self.rows, other.rows]),
            torch.cat([self.row_modality, other.row_modality]),
        )

    def present(self) -> list[int]:
        """Indices of the modalities that have tokens."""
        return [int(m) for m in torch.nonzero(self.count).flatten()]

    @property
    def has_gram(self) -> bool:
        return self.weighed is not None or bool(self.grams)

    def gram(self, importance: Mapping[int, float]) -> Gram:
        """H with each token of a modality weighed by its importance; what weighs nothing is left out."""
        if self.weighed is not None:
            return self.weighed
        chosen = [(gram, importance[m]) for m, gram in self.grams.items() if importance[m] > 0]
        return combined([gram for gram, _ in chosen], [weight for _, weight in chosen])

    def weighed_by(self, importance: Mapping[int, float]) -> InputStats:
        """With the one H that this importance makes of all modalities', which are given up."""
        return replace(self, grams={}, weighed=self.gram(importance)) if self.has_gram else self

    def without_gram(self) -> InputStats:
        return replace(self, grams={}, weighed=None)

    def mean_abs(self, importance: Mapping[int, float]) -> torch.Tensor:
        """The mean |x| of each channel, [in], tokens weighed likewise."""
        weights = [importance[m] for m in self.present()]
        total = sum(weight * float(self.count[m]) for weight, m in zip(weights, self.present(), strict=True))
        sums = torch.stack([self.abssum[m] * weight for weight, m in zip(weights, self.present(), strict=True)])
        return sums.sum(dim=0) / total

    def divided(self, factors: torch.Tensor) -> InputStats:
        """Of the input divided by factors [in]."""
        return replace(
            self,
            absmax=self.absmax / factors,
            abssum=self.abssum / factors,
            rows=self.rows / factors,
            grams={m: gram.rescaled(factors) for m, gram in self.grams.items()},
            weighed=None if self.weighed is None else self.weighed.rescaled(factors),
        )


def input_stats(x: torch.Tensor, modality: torch.Tensor, chosen: torch.Tensor) -> InputStats:
    """Statistics of one sample. x: [tokens, in] float32; modality: int8 [tokens]; chosen: rows to keep."""
    absmax = torch.zeros((len(MODALITIES), x.shape[1]), dtype=torch.float32, device=x.device)
    abssum = torch.zeros_like(absmax)
    count = torch.zeros(len(MODALITIES), dtype=torch.int64)
    for index in range(len(MODALITIES)):
        mine = modality == index
        count[index] = int(mine.sum())
        if count[index]:
            magnitude = (x if mine.all() else x[mine.to(x.device)]).abs()
            absmax[index], abssum[index] = magnitude.amax(dim=0), magnitude.sum(dim=0)
    return InputStats(absmax, abssum, count, x[chosen.to(x.device)].clone(), modality[chosen])


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
    """Hooks on one layer that collect InputStats for each of its groups while samples run through it.

    tokens: of each modality over the samples that count in H, where it is to be collected; else None. budget: of H.
    split: where several processes run samples, whose each is. Each process then keeps the statistics of its samples
    apart (8 float32 per channel and sample), so that all are merged in the samples' order, to the bits of one process.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        spec: LayerSpec,
        tokens: Sequence[int] | None = None,
        budget: Budget = DEFAULT_BUDGET,
        split: Split = UNSPLIT,
    ) -> None:
        self._split = split
        self._stats: dict[str, list[InputStats]] = {group.name: [] for group in spec.groups}
        self._grams = {
            group.name: _builders(layer.get_submodule(group.linears[0]).get_parameter("weight"), tokens, budget)
            for group in spec.groups
        }
        self._modality = torch.zeros(0, dtype=torch.int8)
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._in_gram = True
        self._numbers: Sequence[int] | None = None
        self._hooks = [
            layer.get_submodule(group.linears[0]).register_forward_pre_hook(self._recorder(group.name, group.linears))
            for group in spec.groups
        ]

    def begin(
        self,
        modality: torch.Tensor,
        chosen: torch.Tensor,
        *,
        in_gram: bool = True,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """What the tokens of the next sample are, which rows to keep, and whether it counts in H.

        numbers: of each modality the tokens in H of all samples before this one; left out, those that were seen.
        """
        self._modality, self._chosen, self._in_gram, self._numbers = modality, chosen, in_gram, numbers

    def _recorder(self, group: str, linears: tuple[str, ...]) -> Any:
        def record(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0][0]
            new = input_stats(x, self._modality, self._chosen)
            if not torch.isfinite(new.abssum).all():
                raise QuantError(
                    f"{linears[0]}: NaN or Inf in the activations that reach it",
                    "check the checkpoint with the float model, or remove the sample",
                )
            seen = self._stats[group]
            self._stats[group] = [*seen, new] if self._split.team.size > 1 or not seen else [seen[0].merged(new)]
            if self._in_gram:
                self._add_to_grams(group, x)

        return record

    def _add_to_grams(self, group: str, x: torch.Tensor) -> None:
        for m, builder in self._grams[group].items():
            mine, number = self._modality == m, self._numbers[m] if self._numbers is not None else None
            if mine.all():
                builder.add(x, number)
            elif mine.any():
                builder.add(x[mine.to(x.device)], number)

    def finish(self) -> dict[str, InputStats]:
        """Remove the hooks and return what they saw, in all processes; a group that saw nothing is left out."""
        self.remove()
        found = {}
        for group, own in self._stats.items():
            grams = {m: builder.finish(self._split.team) for m, builder in self._grams.pop(group).items()}
            if stats := _of_all(own, self._split):
                found[group] = replace(reduce(InputStats.merged, stats), grams=grams)
        return found

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _builders(weight: torch.Tensor, tokens: Sequence[int] | None, budget: Budget) -> dict[int, GramBuilder]:
    """For H of each modality that has tokens, by its index. weight: [out, in] of a Linear that reads the input."""
    if tokens is None:
        return {}
    rows = sketch_rows(tokens, weight.shape[1], budget.matrix, budget.factor)
    return {
        m: GramBuilder(weight.shape[1], rows[m] if rows else None, weight.device, seed=m)
        for m, count in enumerate(tokens)
        if count
    }


def _of_all(own: list[InputStats], split: Split) -> list[InputStats]:
    """Those of all samples in their order, of those of this process' samples."""
    if split.team.size == 1:
        return own
    by_rank = split.team.all_gather([[s.absmax, s.abssum, s.count, s.rows, s.row_modality] for s in own])
    return [InputStats(*tensors) for tensors in split.interleave(by_rank)] if any(by_rank) else []


def run_layer(layer: torch.nn.Module, inputs: LayerInput) -> torch.Tensor:
    """The hidden states after a layer, [1, tokens, hidden]; transformers 4 returns them in a tuple."""
    with torch.inference_mode():
        out = layer(inputs.hidden, **inputs.arguments)
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
