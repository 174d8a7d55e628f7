"""Forward hooks on one decoder layer that collect statistics of the inputs of its Linears.

Statistics are additive: those of two sets of samples merge into the statistics of both sets. They are kept per
modality, so that modalities can be weighted later without another forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import QuantError
from ..models import MODALITIES, AttentionRecord, LayerInput, LayerSpec, LinearGroup, RoutedBlock, attention_apart
from ..runtime import DEFAULT_BUDGET, UNSPLIT, Budget, Split, Team, float64_device, to_cpu
from .gram import (
    Gram,
    GramBuilder,
    RoutedGramBuilder,
    choose_form,
    weighted_sum,
)
from .spilled import Spill

# Input rows to keep: enough to distinguish errors that differ by a few percent, and to find factors for channels that
# only some tokens use. Every modality has at least ROWS_PER_MODALITY of them.
ROWS, ROWS_PER_MODALITY = 1024, 256

# A token with more than this many times the length of an ordinary one has massive activations. In language models these
# tokens have about 100 to 1000 times it, and the others up to 5 times.
MASSIVE = 10.0

_COMBINED = -1  # the key of a builder of H of all modalities


@dataclass(frozen=True)
class InputStats:
    """Statistics of the input of one group of Linears over all samples.

    absmax: float32 [modalities, in], the largest |x| per channel; zero for a modality without tokens.
    abssum: float32 [modalities, in], the sum of |x| per channel; zeros where no processor needs H, see mean_abs.
    count:  int64 [modalities], the number of tokens.
    rows:   float32 [n, in], the inputs of a fixed choice of tokens; row_modality: int8 [n].
    grams:  H of each modality that has tokens, by index; empty if no processor needs H.
        Tokens in H are weighted: by relative_weights where the Linear adds to the residual stream, by the attention
        that they receive where one of the Linears is v_proj; see value_weights.
    weighted: H of all modalities, each token weighted by its importance. Replaces `grams` after `weighted_by`, and from
        the start if one H per modality does not fit the budget.
    """

    absmax: torch.Tensor
    abssum: torch.Tensor
    count: torch.Tensor
    rows: torch.Tensor
    row_modality: torch.Tensor
    grams: dict[int, Gram] = field(default_factory=dict)
    weighted: Gram | None = None

    def merged(self, other: InputStats) -> InputStats:
        """The statistics of both sets of samples, without H."""
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

    def sampled(self) -> list[int]:
        """Indices of the modalities of which tokens are kept as rows: of an expert's input, not always all present."""
        return self.sampled_of(self.row_modality)

    def sampled_of(self, modality: torch.Tensor) -> list[int]:
        """The same for some of the rows, given by their modality."""
        return [m for m in self.present() if bool((modality == m).any())]

    @property
    def has_gram(self) -> bool:
        return self.weighted is not None or bool(self.grams)

    def gram(self, importance: Mapping[int, float]) -> Gram:
        """H of all modalities, each token weighted by the importance of its modality. Skips modalities of weight 0."""
        if self.weighted is not None:
            return self.weighted
        chosen = [(gram, importance[m]) for m, gram in self.grams.items() if importance[m] > 0]
        return weighted_sum([gram for gram, _ in chosen], [weight for _, weight in chosen])

    def weighted_by(self, importance: Mapping[int, float]) -> InputStats:
        """Replace H per modality by one H, in which each token has the importance of its modality."""
        return replace(self, grams={}, weighted=self.gram(importance)) if self.has_gram else self

    def without_gram(self) -> InputStats:
        return replace(self, grams={}, weighted=None)

    def without_rows(self) -> InputStats:
        return replace(self, rows=self.rows[:0].clone(), row_modality=self.row_modality[:0].clone())

    def mean_abs(self, importance: Mapping[int, float]) -> torch.Tensor:
        """The mean |x| of each channel, [in], each token weighted by the importance of its modality."""
        weights = [importance[m] for m in self.present()]
        total = sum(weight * float(self.count[m]) for weight, m in zip(weights, self.present(), strict=True))
        sums = torch.stack([self.abssum[m] * weight for weight, m in zip(weights, self.present(), strict=True)])
        return sums.sum(dim=0) / total

    def divided(self, factors: torch.Tensor) -> InputStats:
        """The statistics of the input divided by `factors` [in]."""
        return replace(
            self,
            absmax=self.absmax / factors,
            abssum=self.abssum / factors,
            rows=self.rows / factors,
            grams={m: gram.rescaled(factors) for m, gram in self.grams.items()},
            weighted=None if self.weighted is None else self.weighted.rescaled(factors),
        )


def merge_stats(inputs: Sequence[InputStats]) -> InputStats:
    """The statistics of all inputs together, without rows and H."""
    return reduce(InputStats.merged, [stats.without_rows() for stats in inputs])


def input_stats(x: torch.Tensor, modality: torch.Tensor, chosen: torch.Tensor, *, with_sums: bool = True) -> InputStats:
    """The statistics of one sample. x: float32 [tokens, in]; modality: int8 [tokens]; chosen: indices of kept rows.

    with_sums: whether to fill `abssum`, which takes as long as all the rest.
    """
    absmax = torch.zeros((len(MODALITIES), x.shape[1]), dtype=torch.float32, device=x.device)
    abssum = torch.zeros_like(absmax)
    count = torch.zeros(len(MODALITIES), dtype=torch.int64)
    for index in range(len(MODALITIES)):
        selected = (modality == index).nonzero().flatten()  # not a mask: a card would wait for its size
        count[index] = len(selected)
        if len(selected):
            of_modality = _rows_of(x, selected)
            absmax[index] = torch.maximum(of_modality.amax(dim=0), of_modality.amin(dim=0).neg_())
            if with_sums:
                abssum[index] = of_modality.abs().sum(dim=0)
    return InputStats(absmax, abssum, count, x[chosen.to(x.device)].clone(), modality[chosen])


def _rows_of(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows of x at these positions, ascending indices on the CPU. x itself if they are all."""
    return x if len(positions) == len(x) else x[positions.to(x.device)]


def evenly_spaced(count: int, most: int) -> torch.Tensor:
    """Indices of at most `most` of `count` items, evenly spaced, with the first and the last one."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def rows_per_modality(present: int) -> int:
    """The number of rows to keep of each of `present` modalities."""
    return max(ROWS_PER_MODALITY, ROWS // max(1, present))


def choose_rows(modalities: Sequence[torch.Tensor], per_modality: int | None = None) -> list[torch.Tensor]:
    """Choose the token positions to keep in each sample: evenly spaced over all tokens of each modality.

    modalities: int8 [tokens] per sample. The choice is not random, so that a resumed run keeps the same rows.
    """
    all_tokens = torch.cat([*modalities])
    keep = torch.zeros(len(all_tokens), dtype=torch.bool)
    per_modality = per_modality or rows_per_modality(len(torch.unique(all_tokens)))
    for index in range(len(MODALITIES)):
        positions = torch.nonzero(all_tokens == index).flatten()
        if len(positions):
            keep[positions[evenly_spaced(len(positions), per_modality)]] = True
    return [torch.nonzero(part).flatten() for part in torch.split(keep, [len(m) for m in modalities])]


def relative_weights(out: torch.Tensor) -> torch.Tensor:
    """The weight 1 / |h| of each token, [tokens], for squared errors in the output h of a layer, [tokens, hidden].

    In a language model a few tokens, such as the first, have a hundred times the length of the others (attention sinks
    with massive activations). Unweighted they alone would decide, and the error of all others doubles. By 1 / |h|², the
    error relative to the token's length, they would count as one token of many, but all other tokens attend to them.
    1 / |h| lies between; of the three it costs the least KL in the layers that write and remove such tokens.
    A token of length zero counts as one of 1e-3 of the longest of its sample.
    """
    lengths = out.square().sum(dim=1).sqrt()
    exact = float64_device(out.device) == out.device
    longest = lengths.amax().to(torch.float64 if exact else torch.float32)
    return 1.0 / lengths.clamp_min((1e-3 * longest).clamp_min(1e-20).to(torch.float32))


def value_weights(received: torch.Tensor) -> torch.Tensor:
    """The weight of each token in H of the input of q, k and v, [tokens]. received: see models.received_attention.

    One, for its own query and key, and what its value does to all tokens that attend to it.
    """
    return 1.0 + received


class _RunningStats:
    """The statistics of one input over the samples so far, without H.

    Their size does not depend on the number of samples, but for the kept rows, which are joined once at the end.
    """

    def __init__(self) -> None:
        self._total: InputStats | None = None  # without rows
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # rows and their modality, by sample

    def add(self, sample: int, new: InputStats) -> None:
        """Add the statistics of one sample, given by its position among all samples."""
        if len(new.rows):
            self._rows[sample] = (new.rows, new.row_modality)
        alone = new.without_rows()
        self._total = self._total.merged(alone) if self._total else alone

    def finish(self, team: Team) -> InputStats | None:
        """The statistics of all processes, with the rows in the order of the samples; None if no token arrived."""
        total, own = self._total, []
        if total is not None:
            own = [[total.absmax, total.abssum, total.count, total.rows, total.row_modality]]
        totals = [InputStats(*tensors) for of_rank in team.all_gather(own) for tensors in of_rank]
        rows = {int(sample): pair for of_rank in team.all_gather(list(self._rows.items())) for sample, pair in of_rank}
        if not totals:
            return None
        merged, ordered = reduce(InputStats.merged, totals), [rows[sample] for sample in sorted(rows)]
        return replace(
            merged,
            rows=torch.cat([merged.rows, *(part for part, _ in ordered)]),
            row_modality=torch.cat([merged.row_modality, *(part for _, part in ordered)]),
        )


def is_ordinary(squares: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """Which tokens are no massive ones: at most MASSIVE times as long as the median of their modality. bool [tokens].

    squares: |x|² of the tokens of one sample, float64 [tokens] on the CPU. modality: int8 [tokens].
    """
    ordinary = torch.ones_like(modality, dtype=torch.bool)
    for index in torch.unique(modality).tolist():
        mine = modality == index
        ordinary[mine] = squares[mine] <= MASSIVE**2 * squares[mine].median()
    return ordinary


class InputRecorder:
    """Hooks on one layer that collect InputStats for each of its groups while samples run through the layer.

    tokens: the number of tokens of each modality in the samples that enter H, or None if H is not collected.
    importance: the weight of one token of each modality, with which H of all modalities may be summed at once; None if
    H is needed per modality. budget: the memory budget of H. folder: for an H that does not fit.
    split: the assignment of samples to processes; joined samples are one here. Maxima, counts and rows of several
    processes are bit-identical to those of a single process; sums of |x| are added in another order, in float32.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        spec: LayerSpec,
        tokens: Sequence[int] | None = None,
        budget: Budget = DEFAULT_BUDGET,
        split: Split = UNSPLIT,
        importance: Mapping[int, float] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._team = split.team
        self._positions = split.local_items  # of this process' samples; empty if the split is unknown
        self._importance = importance
        self._with_sums = tokens is not None
        self._block = cast(RoutedBlock, layer.get_submodule(spec.experts.block)) if spec.experts else None
        self._stats = {group.name: _RunningStats() for group in spec.groups}
        self._grams = {
            group.name: _gram_builders(
                layer.get_submodule(group.linears[0]).get_parameter("weight"),
                tokens,
                budget,
                folder,
                combinable=importance is not None,
                is_routed=group.expert is not None,
            )
            for group in spec.groups
        }
        values = spec.value_group if tokens is not None else None
        self._value_group = "" if values is None else values.name
        self._attention = None if values is None else AttentionRecord(layer)
        self._begun = 0  # samples
        self._modality = torch.zeros(0, dtype=torch.int8)
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._in_gram = True
        # Inputs whose weights in H depend on what follows in the layer, and the positions of an expert's tokens.
        self._waiting: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._gram_offsets: Sequence[int] | None = None
        self._faults: dict[str, torch.Tensor] = {}  # whether the input of a Linear held NaN or Inf, of one sample
        self._hooks = [
            layer.get_submodule(group.linears[0]).register_forward_pre_hook(self._recorder(group))
            for group in spec.groups
        ]

    def begin(
        self,
        modality: torch.Tensor,
        chosen: torch.Tensor,
        *,
        in_gram: bool = True,
        gram_offsets: Sequence[int] | None = None,
    ) -> None:
        """Prepare for the next sample, or the next joined samples. Run the layer on it next, then call `end`.

        modality: int8 [tokens]. chosen: indices of rows to keep. in_gram: whether the sample enters H.
        gram_offsets: the number of tokens of each modality in H from all samples before this one, in all processes;
        by default those that this recorder has added.
        """
        self._modality, self._chosen, self._in_gram, self._gram_offsets = modality, chosen, in_gram, gram_offsets
        self._begun += 1
        self._waiting, self._faults = {}, {}
        if self._attention is not None:
            self._attention.forget()

    def end(self, out: torch.Tensor, lengths: Sequence[int] = ()) -> torch.Tensor:
        """Complete H with the sample that has run through the layer. out: the layer's output, [1, tokens, hidden].

        lengths: tokens of each of joined samples. Returns `out` on the CPU. Raises QuantError if an input of a Linear
        held NaN or Inf.
        """
        *faults, out_on_cpu = to_cpu([*(fault.to(out.dtype) for fault in self._faults.values()), out])
        for name, fault in zip(self._faults, faults, strict=True):
            if fault:
                raise QuantError(
                    f"{name}: NaN or Inf in the input activations",
                    "check the checkpoint with the float model, or remove the sample",
                )
        if self._waiting:
            by_length = torch.cat([relative_weights(part) for part in torch.split(out[0], [*lengths] or len(out[0]))])
            for group, (x, tokens) in self._waiting.items():
                of_tokens = self._of_values() if group == self._value_group else by_length
                of_tokens = (of_tokens if tokens is None else of_tokens[tokens.to(of_tokens.device)]).sqrt()[:, None]
                self._add_to_grams(group, x * of_tokens, self._modality if tokens is None else self._modality[tokens])
            self._waiting = {}
        return out_on_cpu

    def _of_values(self) -> torch.Tensor:
        assert self._attention is not None  # a layer with a value group has one
        return value_weights(self._attention.received())

    def _recorder(self, group: LinearGroup) -> Any:
        def record(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0][0]
            modality, chosen = self._tokens_of(group.expert)
            new = input_stats(x, modality, chosen, with_sums=self._with_sums)
            # Maxima propagate NaN. `end` asks for the fault: a card is waited for once.
            self._faults[group.linears[0]] = ~torch.isfinite(new.absmax).all()
            own = self._begun - 1
            self._stats[group.name].add(self._positions[own] if self._positions else own, new)
            if self._in_gram and self._grams[group.name]:
                if group.adds_to_residual or group.name == self._value_group:
                    tokens = None if group.expert is None else self._routed_tokens(group.expert)
                    self._waiting[group.name] = (x, tokens)
                else:
                    self._add_to_grams(group.name, x, modality)

        return record

    def _tokens_of(self, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Modality of each token of the current input, and indices of the rows to keep.

        Of an expert, those of its tokens; its first token if none of them is chosen, as a rarely used expert may get no
        chosen token of any sample.
        """
        if expert is None:
            return self._modality, self._chosen
        tokens = self._routed_tokens(expert)
        kept = torch.isin(tokens, self._chosen).nonzero().flatten()
        return self._modality[tokens], kept if len(kept) else torch.zeros(1, dtype=torch.int64)

    def _routed_tokens(self, expert: int) -> torch.Tensor:
        assert self._block is not None  # a layer with experts has a block that routes
        return self._block.routed[expert].cpu()

    def _add_to_grams(self, group: str, x: torch.Tensor, modality: torch.Tensor) -> None:
        for m, builder in self._grams[group].items():
            if m == _COMBINED:
                builder.add(self._weigh(x, modality))
                continue
            selected = (modality == m).nonzero().flatten()
            offset = self._gram_offsets[m] if self._gram_offsets is not None else None
            if len(selected):
                builder.add(_rows_of(x, selected), offset)

    def _weigh(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """The tokens x [tokens, in] scaled so that XᵀX is H weighted by importance; tokens of weight 0 are dropped."""
        assert self._importance is not None
        weights = torch.tensor([self._importance.get(m, 0.0) for m in modality.tolist()])
        kept = (weights > 0).nonzero().flatten()
        scales = weights[kept].sqrt().to(x.device)[:, None]
        return _rows_of(x, kept) * scales

    def finish(self) -> dict[str, InputStats]:
        """Remove the hooks. Returns the statistics from all processes by group, for the groups that got input."""
        self.remove()
        merged = {}
        for group, running in self._stats.items():
            grams = {m: builder.finish(self._team) for m, builder in self._grams.pop(group).items()}
            if stats := running.finish(self._team):
                weighted = grams.pop(_COMBINED, None)
                merged[group] = replace(stats, grams=grams, weighted=weighted)
        return merged

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        if self._attention is not None:
            self._attention.remove()


def _gram_builders(
    weight: torch.Tensor,
    tokens: Sequence[int] | None,
    budget: Budget,
    folder: Path | None,
    *,
    combinable: bool,
    is_routed: bool,
) -> dict[int, GramBuilder | RoutedGramBuilder]:
    """One builder of H per modality with tokens, by index, or one of all of them under _COMBINED.

    weight: [out, in] of a Linear that reads the input. combinable: see choose_form. is_routed: whether the input has
    only the tokens of one expert, whose number is not known before.
    """
    if tokens is None:
        return {}
    if is_routed:
        if not combinable:
            raise QuantError("H of each modality is not available for experts", "give the modalities fixed weights")
        return {_COMBINED: RoutedGramBuilder(weight.shape[1], weight.device)}
    form = choose_form(tokens, weight.shape[1], budget.matrix, budget.factor, combinable=combinable)
    spill = None if form.strip is None else Spill(folder, form.strip)
    if form.combined:
        return {_COMBINED: GramBuilder(weight.shape[1], None, weight.device, spill)}
    return {
        m: GramBuilder(weight.shape[1], form.rows[m] if form.rows else None, weight.device, spill)
        for m, count in enumerate(tokens)
        if count
    }


def run_layer(layer: torch.nn.Module, inputs: LayerInput) -> torch.Tensor:
    """Run one layer. Returns its output hidden states, [1, tokens, hidden]."""
    apart = attention_apart(layer, inputs.lengths, inputs.masks) if inputs.lengths else nullcontext()
    with torch.inference_mode(), apart:
        out = layer(inputs.hidden, **inputs.arguments)
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out  # transformers 4 returns a tuple
    return hidden
