"""Two models on the same samples, side by side through the decoder layers: one layer of one model in memory at a time.

What lies between two layers is on disk, and as far as a budget goes in memory. The next layer is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibSample, HiddenStates, StemStore, describe_fault, prepare_sample
from ..errors import QuantError
from ..models import (
    MODALITIES,
    LayerInput,
    MediaProcessor,
    ModelInputs,
)
from ..numerics import QuantizedLinear
from ..quantized import Source, load_linear
from ..report import LayerDrift
from ..run import quantized_layer
from ..runtime import DEFAULT_BUDGET, Clock, Progress, free_memory, free_modules, one_ahead
from ..statistics import run_layer
from ..storage import Checkpoint, load_finite, same_bytes
from .scoring import drift, drift_figures

# Memory for what is also on disk, for each of at most two files per model.
HIDDEN_BUDGET = 128 << 20
ARGUMENTS_BUDGET = 128 << 20

FLOAT, QUANT = "float", "quantized"

_INDIFFERENT_KEYS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class Sample:
    """What is known of a sample once the processor has seen it. answer: see ModelInputs.

    tokens: int64 [tokens]; modality: int8 [tokens].
    """

    where: str
    tokens: torch.Tensor
    modality: torch.Tensor
    answer: tuple[int, int] | None

    @property
    def read_by_talker(self) -> int:
        """Tokens whose states the talker reads: the prompt, and the answer without the token that ends it."""
        return len(self.tokens) if self.answer is None else self.answer[1] - 1


class SideBySide:
    """Both models at one boundary between layers. `prepare` brings the samples there from the media, `layers` on.

    samples: those that could be used, in their order; known once `prepare` is done.
    """

    def __init__(self, exact: Source, other: Source, folder: Path, device: torch.device) -> None:
        self._sources = {FLOAT: exact, QUANT: other}
        self._folder = folder
        self._device = device
        self._layers = exact.model.family.num_layers(exact.config)
        self._width = exact.model.family.layer_spec(exact.config).shapes["input_layernorm.weight"][0]
        self._stems: dict[str, StemStore] = {}
        self._kept: list[int] = []
        self._hidden: dict[str, HiddenStates] = {}
        self.samples: list[Sample] = []
        self.warnings: list[str] = []

    # --- from media to the first layer ---

    def prepare(
        self,
        samples: Sequence[CalibSample],
        processor: MediaProcessor,
        *,
        skip_bad: bool,
        needs_answer: bool,
        progress: Progress,
    ) -> None:
        """Run every sample through processor, towers and embedding; both models see the same inputs.

        Where all that precedes the decoder layers is the same in both, it is run once. skip_bad: leave out samples that
        cannot be used; needs_answer: one whose answer is not told from its prompt is such.
        """
        shared = self._same_stem()
        usable = dict(enumerate(samples))
        prepared: dict[int, Sample] = {}
        for side in (FLOAT,) if shared else (FLOAT, QUANT):
            source = self._sources[side]
            store = self._stems[side] = StemStore(self._folder / f"stem-{side}", ARGUMENTS_BUDGET)
            stem = source.model.family.open_stem(_floats_of(source), self._device, DEFAULT_BUDGET.towers)
            for done, (number, sample) in enumerate(list(usable.items()), 1):
                try:
                    inputs = prepare_sample(sample, processor)
                    self._check_inputs(sample, inputs, needs_answer)
                    reached = stem.layer_input(inputs)
                except QuantError as error:
                    self._leave_out(sample, error, skip_bad)
                    del usable[number]
                    continue
                refuse_nonfinite(reached.hidden, f"{side} model, embedding and towers, sample {sample.where}")
                store.write(number, reached, inputs.modality)
                prepared[number] = Sample(sample.where, inputs.tensors["input_ids"][0], inputs.modality, inputs.answer)
                progress.step("towers" if shared else f"towers of the {side} model", done, len(samples), sample.where)
            del stem
            free_modules(self._device)  # the towers are larger than all that follows
        if not usable:
            raise QuantError("no sample could be used:\n" + "\n".join(self.warnings[:10]))
        self._kept = list(usable)
        self.samples = [prepared[number] for number in usable]
        self._start(shared)

    def _same_stem(self) -> bool:
        """Whether configuration and tensors of all that precedes the decoder layers are the same."""
        exact, other = (self._sources[side] for side in (FLOAT, QUANT))
        if _deciding(exact.config) != _deciding(other.config):
            return False
        prefixes = exact.model.stem_prefixes
        names = {name for source in (exact, other) for name in source.floats if name.startswith(prefixes)}
        return all(
            name in exact.floats and name in other.floats and same_bytes(exact.floats[name], other.floats[name])
            for name in sorted(names)
        )

    def _check_inputs(self, sample: CalibSample, inputs: ModelInputs, needs_answer: bool) -> None:
        source = self._sources[FLOAT]
        vocabulary = (source.shape_of(source.model.head_of(source.config)) or (0,))[0]
        if (largest := int(inputs.tensors["input_ids"].max())) >= vocabulary:
            raise QuantError(
                f"token {largest} of a vocabulary of {vocabulary}", "tokenizer and model do not belong together"
            )
        if sample.answered and inputs.answer is None:
            told = f"{sample.where}: its answer is not told from its prompt (media in it, or an unusual chat template)"
            if needs_answer:
                raise QuantError(told, "use --positions auto")
            self._warn(f"{told}; counted as a sample without answer")

    def _leave_out(self, sample: CalibSample, error: QuantError, skip_bad: bool) -> None:
        message = describe_fault(sample, error)
        if not skip_bad:
            raise QuantError(message, error.hint) from error
        self._warn(f"sample skipped: {message}")

    def _warn(self, text: str) -> None:
        """Once, though two models may meet the same sample."""
        if text not in self.warnings:
            self.warnings.append(text)

    def _start(self, shared: bool) -> None:
        """The hidden states before the first layer, of each model or of both."""
        for side in (FLOAT,) if shared else (FLOAT, QUANT):
            self._hidden[side] = self._boundary(side, 0)
            self._hidden[side].write((self._stems[side].hidden(number) for number in self._kept), sync=False)
        if shared:
            self._stems[QUANT], self._hidden[QUANT] = self._stems[FLOAT], self._hidden[FLOAT]

    def _boundary(self, side: str, layer: int) -> HiddenStates:
        lengths = [len(sample.tokens) for sample in self.samples]
        return HiddenStates(self._folder / f"{side}-{layer:04d}.safetensors", lengths, self._width, HIDDEN_BUDGET)

    # --- from layer to layer ---

    def hidden(self, side: str, position: int) -> torch.Tensor:
        """[1, tokens, hidden] of one sample at this boundary."""
        return self._hidden[side].read(position).to(self._device)

    def layers(self, clock: Clock, progress: Progress) -> Iterator[LayerDrift]:
        """Go through all decoder layers; what the states of the two differ by is told after each."""
        steps = [(index, side) for index in range(self._layers) for side in (FLOAT, QUANT)]
        following: dict[str, HiddenStates] = {}
        sums = torch.zeros((len(MODALITIES), 4), dtype=torch.float64)
        with one_ahead(lambda step: load_layer(self._sources[step[1]], step[0]), steps) as loaded:
            for done, (index, side) in enumerate(steps, 1):
                with clock("read"):
                    weights = next(loaded)
                with clock("forward"):
                    module = build_layer(self._sources[side], index, weights, self._device)
                    del weights
                    following[side] = self._advance(side, index, module, following.get(FLOAT), sums)
                    del module
                free_memory(self._device)
                progress.step("layers", done, len(steps), f"{len(self.samples)} samples")
                if side == QUANT:
                    self._take(following)
                    yield _layer_drift(index, sums)
                    following, sums = {}, torch.zeros_like(sums)

    def _advance(
        self, side: str, index: int, module: torch.nn.Module, exact: HiddenStates | None, sums: torch.Tensor
    ) -> HiddenStates:
        """Run one model's layer on all samples; against `exact`, the float layer's outputs, the drift is added up."""
        written = self._boundary(side, index + 1)

        def outputs() -> Iterator[torch.Tensor]:
            for position, (number, sample) in enumerate(zip(self._kept, self.samples, strict=True)):
                arguments = self._stems[side].arguments(number, self._device)
                out = run_layer(module, LayerInput(self.hidden(side, position), arguments))
                refuse_nonfinite(out, f"{side} model, layer {index}, sample {sample.where}")
                if exact is not None:
                    reference = exact.read(position).to(self._device)
                    sums.add_(drift(reference[0], out[0], sample.modality, len(MODALITIES)))
                yield out

        written.write(outputs(), sync=False)
        return written

    def _take(self, following: Mapping[str, HiddenStates]) -> None:
        for before in self._hidden.values():
            before.path.unlink(missing_ok=True)
        self._hidden = dict(following)

    # --- what the talker reads besides ---

    def embedding_drift(self) -> torch.Tensor:
        """Of each sample what the talker reads of the states before the first layer: float64 [samples, 4], see drift.

        In place of media it is handed zeros, so their tokens do not count.
        """
        sums = []
        for number, sample in zip(self._kept, self.samples, strict=True):
            exact, other = (self._stems[side].hidden(number)[0] for side in (FLOAT, QUANT))
            read = sample.modality == 0
            read[sample.read_by_talker :] = False
            sums.append(drift(exact[read], other[read], torch.zeros(int(read.sum())), 1)[0])
        return torch.stack(sums)


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer as it is stored: float tensors and quantized Linears by relative name."""

    floats: dict[str, torch.Tensor]
    linears: dict[str, QuantizedLinear]


def load_layer(source: Source, index: int) -> LoadedLayer:
    """Raises QuantError where a tensor holds NaN or Inf."""
    floats, linears = {}, {}
    for relative in source.model.family.layer_spec(source.config).shapes:
        name = source.model.layer_name(index, relative)
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in source.linears:
            linears[relative.removesuffix(".weight")] = load_linear(source.linears[linear])
        else:
            floats[relative] = load_finite(source.floats[name])
    return LoadedLayer(floats, linears)


def build_layer(source: Source, index: int, loaded: LoadedLayer, device: torch.device) -> torch.nn.Module:
    """The layer as a module of the library's; see emulation.quantized_layer."""
    floats = {name: tensor.to(device) for name, tensor in loaded.floats.items()}
    linears = {name: _on_device(linear, device) for name, linear in loaded.linears.items()}
    return quantized_layer(source.model, source.config, index, floats, linears)


def _on_device(linear: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    zeros = None if linear.zeros is None else linear.zeros.to(device)
    return QuantizedLinear(linear.qweight.to(device), linear.scales.to(device), linear.scheme, zeros)


def _floats_of(source: Source) -> Checkpoint:
    """A source's float tensors as the checkpoint that a stem is opened from."""
    return Checkpoint(source.path, source.config, source.floats, ())


def _layer_drift(index: int, sums: torch.Tensor) -> LayerDrift:
    """sums: float64 [modalities, 4], see drift."""
    by_modality = {name: drift_figures(sums[m])[0] for m, name in enumerate(MODALITIES) if sums[m, 3]}
    return LayerDrift(index, drift_figures(sums.sum(dim=0))[0], by_modality)


def _deciding(config: Any) -> Any:
    """config.json without what says nothing of the model, and what other tools write anew."""
    if isinstance(config, dict):
        return {key: _deciding(value) for key, value in config.items() if key not in _INDIFFERENT_KEYS}
    return config


def refuse_nonfinite(tensor: torch.Tensor, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise QuantError(f"{where}: NaN or Inf", "check that model alone, or remove the sample")
