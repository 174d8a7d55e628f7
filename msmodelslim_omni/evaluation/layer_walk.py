"""Both models side by side through the decoder layers, with one layer of one model in memory at a time.

Hidden states between two layers are on disk and, up to a budget, in memory. The next layer is read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration import HiddenStates
from ..models import MODALITIES
from ..numerics import CacheScales, QuantizedLinear
from ..quantized import Source, load_cache, load_linear
from ..report import LayerDrift
from ..run import quantized_layer
from ..runtime import Clock, Progress, free_memory, prefetch
from ..statistics import run_layer
from ..storage import load_finite
from .scoring import drift_figures, drift_sums, ordinary_drift
from .stem_pair import FLOAT, QUANT, StemPair, require_finite

# Memory that caches the hidden states of one boundary file. Each model has at most two such files.
HIDDEN_BUDGET = 128 << 20


class LayerWalk:
    """Both models at one boundary between layers: initially before layer 0, after `layers` past the last layer."""

    def __init__(
        self, float_source: Source, quant_source: Source, stems: StemPair, folder: Path, device: torch.device
    ) -> None:
        self._sources = {FLOAT: float_source, QUANT: quant_source}
        self._stems = stems
        self._folder = folder
        self._device = device
        family, config = float_source.model.family, float_source.config
        self._layers = family.num_layers(config)
        self._width = family.layer_spec(config).hidden_size
        self._passed = 0  # layers
        self._hidden = self._write_first_boundary()

    def hidden(self, side: str, position: int) -> torch.Tensor:
        """The hidden states of one sample that enter the next layer, or the final norm: [1, tokens, hidden]."""
        return self._stems.entering(side, position, self._passed, self._hidden[side].read(position).to(self._device))

    def layers(self, clock: Clock, progress: Progress) -> Iterator[LayerDrift]:
        """Run all decoder layers of both models. Yields the drift of the hidden states after each layer."""
        steps = [(index, side) for index in range(self._layers) for side in (FLOAT, QUANT)]
        following: dict[str, HiddenStates] = {}
        sums = torch.zeros((len(MODALITIES), 7), dtype=torch.float64)
        with prefetch(lambda step: load_layer(self._sources[step[1]], step[0]), steps) as loaded:
            for done, (index, side) in enumerate(steps, 1):
                with clock("read"):
                    weights = next(loaded)
                with clock("forward"):
                    module = build_layer(self._sources[side], index, weights, self._device)
                    del weights
                    following[side] = self._run_layer(side, index, module, following.get(FLOAT), sums)
                    del module
                free_memory(self._device)
                progress.step("layers", done, len(steps), f"{len(self._stems.samples)} samples")
                if side == QUANT:
                    self._move_to(following)
                    yield _layer_drift(index, sums)
                    following, sums = {}, torch.zeros_like(sums)

    def _write_first_boundary(self) -> dict[str, HiddenStates]:
        """The hidden states before layer 0 of each side. A shared stem has one file for both sides."""
        hidden: dict[str, HiddenStates] = {}
        positions = range(len(self._stems.samples))
        for side in (FLOAT,) if self._stems.shared else (FLOAT, QUANT):
            hidden[side] = self._boundary(side, 0)
            hidden[side].write((self._stems.hidden(side, position) for position in positions), sync=False)
        if self._stems.shared:
            hidden[QUANT] = hidden[FLOAT]
        return hidden

    def _boundary(self, side: str, layer: int) -> HiddenStates:
        lengths = [len(sample.tokens) for sample in self._stems.samples]
        return HiddenStates(self._folder / f"{side}-{layer:04d}.safetensors", lengths, self._width, HIDDEN_BUDGET)

    def _run_layer(
        self, side: str, index: int, module: torch.nn.Module, reference: HiddenStates | None, sums: torch.Tensor
    ) -> HiddenStates:
        """Run one layer of one model on all samples and write its outputs.

        reference: the float layer's outputs; the drift from them is added to `sums`. None for the float layer itself.
        """
        written = self._boundary(side, index + 1)

        def outputs() -> Iterator[torch.Tensor]:
            for position, sample in enumerate(self._stems.samples):
                hidden = self._hidden[side].read(position)
                out = run_layer(module, self._stems.layer_input(side, position, index, hidden))
                require_finite(out, f"{side} model, layer {index}, sample {sample.where}")
                if reference is not None:
                    float_out = reference.read(position).to(self._device)
                    sums.add_(drift_sums(float_out[0], out[0], sample.modality, len(MODALITIES)))
                yield out

        written.write(outputs(), sync=False)
        return written

    def _move_to(self, following: Mapping[str, HiddenStates]) -> None:
        """Make the next boundary the current one and delete the files of the previous one."""
        for previous in self._hidden.values():
            previous.path.unlink(missing_ok=True)
        self._hidden = dict(following)
        self._passed += 1


def _layer_drift(index: int, sums: torch.Tensor) -> LayerDrift:
    """sums: float64 [modalities, 7], see scoring.drift_sums."""
    by_modality = {name: drift_figures(sums[m])[0] for m, name in enumerate(MODALITIES) if sums[m, 3]}
    total = sums.sum(dim=0)
    return LayerDrift(index, drift_figures(total)[0], by_modality, *ordinary_drift(total))


# --- one layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer as stored: float tensors and quantized Linears by relative name, on the CPU.

    cache: the scales of its KV cache if the checkpoint rounds it.
    """

    floats: dict[str, torch.Tensor]
    linears: dict[str, QuantizedLinear]
    cache: CacheScales | None = None


def load_layer(source: Source, index: int) -> LoadedLayer:
    """Load all tensors of one decoder layer. Raises QuantError if a tensor holds NaN or Inf."""
    floats, linears = {}, {}
    for relative in source.model.family.layer_spec(source.config).shapes:
        name = source.model.layer_name(index, relative)
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in source.linears:
            linears[relative.removesuffix(".weight")] = load_linear(source.linears[linear])
        else:
            floats[relative] = load_finite(source.floats[name])
    cache = None if source.kv_cache is None else load_cache(source.model, source.kv_cache, source.floats, index)
    return LoadedLayer(floats, linears, cache)


def build_layer(source: Source, index: int, loaded: LoadedLayer, device: torch.device) -> torch.nn.Module:
    """The layer as a module of the library, on the device; see emulation.quantized_layer."""
    floats = {name: tensor.to(device) for name, tensor in loaded.floats.items()}
    linears = {name: _to_device(linear, device) for name, linear in loaded.linears.items()}
    return quantized_layer(source.model, source.config, index, floats, linears, cache=loaded.cache)


def _to_device(linear: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    zeros = None if linear.zeros is None else linear.zeros.to(device)
    input_global = None if linear.input_global is None else linear.input_global.to(device)
    return QuantizedLinear(
        linear.qweight.to(device), linear.scales.to(device), linear.scheme, zeros, input_global=input_global
    )
