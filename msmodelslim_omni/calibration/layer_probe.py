"""LayerProbe: measures how much a changed layer differs from the float layer, on a few samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch

from ..models import MODALITIES, LayerInput
from ..numerics import row_squares
from ..runtime import UNSPLIT, Split, to_cpu, to_floats
from ..statistics import is_ordinary, relative_weights, run_layer


class Errors(NamedTuple):
    """Sums over the tokens of each modality, float64 [modalities] each.

    error: of |e|² with the error e of a token. signal: of the squared signal that it is compared with. noise: of
    |e|² / |h| with the token's hidden state h, see relative_weights. ordinary_error, ordinary_signal: of ordinary
    tokens, see is_ordinary, by their signal. massive: the number of the other tokens.
    """

    error: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    ordinary_error: torch.Tensor
    ordinary_signal: torch.Tensor
    massive: torch.Tensor


class LayerProbe:
    """A float layer with the inputs and outputs of its blocks on the probe samples.

    blocks: modules of the layer whose calls are recorded. importance: the weight of one token by modality, see
    TokenRoles. split: which process runs which probe sample. Sums are made in the order of the samples, so that every
    process gets the same bits as a single process does.
    After `release`, only `errors` may be called.
    """

    def __init__(
        self, layer: torch.nn.Module, blocks: set[str], importance: Mapping[int, float], split: Split = UNSPLIT
    ) -> None:
        self._layer = layer
        self._split = split
        self._blocks = blocks
        self._importance = importance
        self._calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]] = {b: [] for b in blocks}
        self._samples: list[tuple[LayerInput, torch.Tensor]] = []
        self._modalities: list[torch.Tensor] = []
        self._token_weights: list[torch.Tensor] = []  # of squared errors, [tokens] of each sample

    def watch(self, inputs: LayerInput, modality: torch.Tensor) -> torch.Tensor:
        """Run the layer on a sample and record the inputs and outputs of its blocks. Returns the layer's output."""

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
        importance = torch.tensor([self._importance[m] for m in modality.tolist()]).to(out.device)
        self._token_weights.append(importance * relative_weights(out[0]))
        return out

    def block_errors(self, block: str, candidates: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
        """See processors.work.Probe. One copy from a card for all candidates."""
        module = self._layer.get_submodule(block)
        errors: list[list[torch.Tensor]] = []
        with torch.inference_mode():
            for weights in candidates:
                replaced = {name.removeprefix(f"{block}."): weight for name, weight in weights.items()}
                errors.append([])
                for (args, kwargs, exact), per_token in zip(self._calls[block], self._token_weights, strict=True):
                    out = _hidden(torch.func.functional_call(module, replaced, args, kwargs))
                    errors[-1].append((per_token * (out - exact)[0].square().sum(dim=1)).sum())
        values = iter(to_floats([error for of_samples in errors for error in of_samples]))
        own = [[next(values) for _ in of_samples] for of_samples in errors]
        return [float(sum(self._split.gather(of_samples))) for of_samples in own]

    def changes(self, block: str, linears: Mapping[str, torch.nn.Module], *, is_last: bool) -> list[torch.Tensor]:
        """The change of the layer's output of each probe sample, [1, tokens, hidden], with other modules for some
        Linears of a block.

        linears: by name relative to the layer. is_last: whether the block's output goes into the layer's output alone,
        so that only the block needs to run; that of attention also goes through the layer's own MLP. Covers only the
        samples of this process.
        """
        changes = []
        with torch.inference_mode(), _linears_replaced(self._layer, linears):
            module = self._layer.get_submodule(block)
            for (args, kwargs, exact), (inputs, out) in zip(self._calls[block], self._samples, strict=True):
                changes.append(
                    _hidden(module(*args, **kwargs)) - exact if is_last else run_layer(self._layer, inputs) - out
                )
        return changes

    def noise(self, changes: Sequence[torch.Tensor]) -> dict[str, float]:
        """Noise-to-signal ratio of changes of the layer's output, by modality.

        The mean over a modality's tokens of |e|² / |h|², where e [hidden] is the change of the layer's output for one
        token and h [hidden] the float layer's output. Per token, because the next norm scales every token to the same
        length.
        """
        ratios = [
            row_squares(change[0]) / row_squares(out[0]).clamp_min(1e-30)
            for change, (_, out) in zip(changes, self._samples, strict=True)
        ]
        ratio, modalities = torch.cat(ratios), torch.cat([*self._modalities])  # [tokens]
        present = torch.unique(modalities).tolist()
        return {MODALITIES[index]: float(ratio[modalities == index].mean()) for index in present}

    def changed_outputs(self, changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The layer's outputs with these changes, on the CPU: [1, tokens, hidden] of each probe sample."""
        return [(out + change).cpu() for change, (_, out) in zip(changes, self._samples, strict=True)]

    def errors(self, layer: torch.nn.Module) -> Errors:
        """Sums by modality of a changed layer's output error; the signal is what the float layer adds to its input."""
        errors = [
            (squared_errors(inputs.hidden, exact, run_layer(layer, inputs)), modality)
            for (inputs, exact), modality in zip(self._samples, self._modalities, strict=True)
        ]
        return add_sums(self._split.gather(sums_by_modality(errors)))

    def weighted_error(self, errors: Errors) -> float:
        """The squared output error of a layer, by relative_weights and each token's importance."""
        return sum(weight * float(errors.noise[m]) for m, weight in self._importance.items())

    def release(self) -> None:
        """Free the layer and the recorded calls."""
        self._layer = torch.nn.Identity()
        self._calls.clear()


@contextmanager
def _linears_replaced(layer: torch.nn.Module, linears: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some Linears, and restore the Linears afterwards."""
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
    return Errors(*torch.zeros((len(Errors._fields), len(MODALITIES)), dtype=torch.float64))


def squared_errors(entering: torch.Tensor, exact: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Of each token of one sample: |out - exact|², |exact - entering|², the token's weight: float32 [3, tokens].

    entering, exact, out: [1, tokens, hidden]. The weight is that of relative_weights.
    """
    error, signal = (out - exact)[0], (exact - entering)[0]
    return torch.stack([error.square().sum(dim=1), signal.square().sum(dim=1), relative_weights(exact[0])])


def sums_by_modality(errors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The sums of each sample, float64 [sums, modalities]; see Errors. One copy from a card for all samples.

    errors: the squared_errors of each sample, and its modality, int8 [tokens].
    """
    all_sums = []
    for squares, (_, modality) in zip(to_cpu([squares for squares, _ in errors]), errors, strict=True):
        error, signal, weight = squares.to(torch.float64)
        ordinary = is_ordinary(signal, modality).to(torch.float64)
        by_token = torch.stack([error, signal, error * weight, error * ordinary, signal * ordinary, 1 - ordinary])
        sums = torch.zeros((len(by_token), len(MODALITIES)), dtype=torch.float64)
        for index in torch.unique(modality).tolist():
            sums[:, index] = by_token[:, modality == index].sum(dim=1)
        all_sums.append(sums)
    return all_sums


def add_sums(sums: Sequence[torch.Tensor]) -> Errors:
    """The samples' sums, added in order."""
    return Errors(*reduce(torch.add, sums))


def _hidden(out: Any) -> torch.Tensor:
    """The hidden states that a block or layer returns, alone or as the first of a tuple."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
