"""What judges a changed layer: samples chosen for it, the weight of a token, the float layer with its true outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from ..models import MODALITIES, LayerInput
from ..numerics import row_squares, squared_norm
from ..recipe import Modality
from ..runtime import WHOLE, Split
from ..statistics import run_layer

# Squared sums by modality, float64 [modalities] each: of errors, and of what they are compared with.
Errors = tuple[torch.Tensor, torch.Tensor]


def importance(weights: str | Mapping[Modality, float], counts: Sequence[int]) -> dict[int, float]:
    """The weight of one token of each modality that has any; over all tokens counted they sum to one.

    balanced: every modality has the same say; tokens: every token; a mapping: every modality the say that is given.
    """
    present = [m for m, count in enumerate(counts) if count]
    if weights == "tokens":
        return dict.fromkeys(present, 1 / sum(counts))
    named = None if isinstance(weights, str) else {str(name): weight for name, weight in weights.items()}
    say = {m: 1.0 if named is None else named.get(MODALITIES[m], 0.0) for m in present}
    return {m: say[m] / (sum(say.values()) * counts[m]) for m in present}


def choose_judges(modalities: Sequence[torch.Tensor], enough: int = 128) -> frozenset[int]:
    """Positions of few and short samples that have 128 tokens of every modality, or an eighth of them if that is less.

    modalities: int8 [tokens] per sample.
    """
    counts = torch.stack([modality.bincount(minlength=len(MODALITIES)) for modality in modalities])
    by_length = sorted(range(len(modalities)), key=lambda i: (len(modalities[i]), i))
    chosen: list[int] = []
    for index, total in enumerate(counts.sum(dim=0).tolist()):
        for position in by_length:
            if int(counts[chosen, index].sum()) >= min(enough, total / 8):
                break
            if counts[position, index] and position not in chosen:
                chosen.append(position)
    return frozenset(chosen)


def held_out(judges: frozenset[int], modalities: Sequence[torch.Tensor]) -> frozenset[int]:
    """The judges, if the other samples have at least twice their tokens of each modality; else none.

    Kept out of H they can tell what GPTQ has learnt of the layer from what it has learnt of the tokens.
    """
    judging = torch.stack([modalities[i].bincount(minlength=len(MODALITIES)) for i in sorted(judges)]).sum(dim=0)
    total = torch.cat([*modalities]).bincount(minlength=len(MODALITIES))
    return judges if bool((total - judging >= 2 * judging).all()) else frozenset()


class LayerProbe:
    """A float layer and the samples that judge changes to it, with its blocks' inputs and true outputs.

    `release` gives up the layer and what the blocks saw: then only `errors` may be asked for.

    split: where several processes have samples that judge, whose each is. Sums are then made in the samples' order, so
    that every process has the same, and the same as one process alone.
    """

    def __init__(
        self, layer: torch.nn.Module, blocks: set[str], importance: Mapping[int, float], split: Split = WHOLE
    ) -> None:
        self._layer = layer
        self._split = split
        self._blocks = blocks
        self._importance = importance
        self._calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]] = {b: [] for b in blocks}
        self._samples: list[tuple[LayerInput, torch.Tensor]] = []
        self._modalities: list[torch.Tensor] = []

    def watch(self, inputs: LayerInput, modality: torch.Tensor) -> torch.Tensor:
        """Run the layer on a sample and keep what enters and leaves its blocks. Returns the layer's output."""

        def keep(block: str) -> Any:
            def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                self._calls[block].append((args, kwargs, _hidden(out)))

            return hook

        hooks = [
            self._layer.get_submodule(block).register_forward_hook(keep(block), with_kwargs=True)
            for block in self._blocks
        ]
        out = run_layer(self._layer, inputs)
        for handle in hooks:
            handle.remove()
        self._samples.append((inputs, out))
        self._modalities.append(modality)
        return out

    def block_error(self, block: str, weights: Mapping[str, torch.Tensor]) -> float:
        """See processors.work.Probe."""
        module = self._layer.get_submodule(block)
        replaced = {name.removeprefix(f"{block}."): weight for name, weight in weights.items()}
        errors = []
        with torch.inference_mode():
            for (args, kwargs, exact), modality in zip(self._calls[block], self._modalities, strict=True):
                out = _hidden(torch.func.functional_call(module, replaced, args, kwargs))
                per_token = torch.tensor([self._importance[m] for m in modality.tolist()]).to(out.device)
                errors.append(float((per_token * (out - exact)[0].square().sum(dim=1)).sum()))
        return float(sum(self._split.collected(errors)))

    def noise(self, block: str, linears: Mapping[str, torch.nn.Module]) -> dict[str, float]:
        """Noise-to-signal ratio of the layer's output, by modality, with other modules for some Linears of a block.

        The mean over a modality's tokens of |e|² / |h|², e [hidden] the error of the block's output for one token and
        h [hidden] the layer's true output, into which the block's is added. By token, since the next norm sets each
        one to the same length. linears: by name relative to the layer. Only of this process' samples.
        """
        ratios, modalities = [], torch.cat([*self._modalities])
        with torch.inference_mode(), _standing_in(self._layer, linears):
            module = self._layer.get_submodule(block)
            for (args, kwargs, exact), (_, out) in zip(self._calls[block], self._samples, strict=True):
                error, signal = row_squares(_hidden(module(*args, **kwargs))[0] - exact[0]), row_squares(out[0])
                ratios.append(error / signal.clamp_min(1e-30))
        ratio = torch.cat(ratios)  # [tokens]
        present = torch.unique(modalities).tolist()
        return {MODALITIES[index]: float(ratio[modalities == index].mean()) for index in present}

    def errors(self, layer: torch.nn.Module) -> Errors:
        """Squared sums by modality: of a changed layer's error, and of what the float layer adds to its input."""
        errors = [
            squared_errors(inputs.hidden, exact, run_layer(layer, inputs), modality)
            for (inputs, exact), modality in zip(self._samples, self._modalities, strict=True)
        ]
        return added(self._split.collected(errors))

    def weighed(self, errors: Errors) -> float:
        """A squared error of a layer's output, tokens weighed by importance."""
        return sum(weight * float(errors[0][m]) for m, weight in self._importance.items())

    def release(self) -> None:
        self._layer = torch.nn.Identity()
        self._calls.clear()


@contextmanager
def _standing_in(layer: torch.nn.Module, linears: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """The layer with other modules in some places, and afterwards as it was."""
    places = {name: (layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in linears}
    before = {name: layer.get_submodule(name) for name in linears}
    try:
        for name, (parent, child) in places.items():
            setattr(parent, child, linears[name])
        yield
    finally:
        for name, (parent, child) in places.items():
            setattr(parent, child, before[name])


def zero_errors() -> Errors:
    return torch.zeros(len(MODALITIES), dtype=torch.float64), torch.zeros(len(MODALITIES), dtype=torch.float64)


def squared_errors(
    entering: torch.Tensor, exact: torch.Tensor, out: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """One sample's squared sums by modality, float64 [2, modalities]: of out - exact and of exact - entering.

    entering, exact, out: [1, tokens, hidden]; modality: int8 [tokens].
    """
    sums = torch.zeros((2, len(MODALITIES)), dtype=torch.float64)
    for index in torch.unique(modality).tolist():
        mine = (modality == index).to(out.device)
        sums[0, index] = squared_norm((out - exact)[0, mine])
        sums[1, index] = squared_norm((exact - entering)[0, mine])
    return sums


def added(sums: Sequence[torch.Tensor]) -> Errors:
    """Error and signal, [modalities] each, of the samples' sums in their order."""
    error, signal = reduce(torch.add, sums)
    return error, signal


def _hidden(out: Any) -> torch.Tensor:
    """The hidden states that a block or layer returns, alone or first of a tuple."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
