"""The calibration samples on their way through the decoder layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .arithmetic import QuantizedLinear, dequantize, quantized_matmul, relative_error, row_squares, squared_norm
from .calibration import CalibSample, CalibSet, prepare_sample, told_of
from .capture import InputRecorder, InputStats, choose_rows, run_layer
from .device import free_memory
from .errors import QuantError
from .models.spec import MODALITIES, LayerInput, LayerSpec, MediaLimits, ModelSpec
from .plan import QuantPlan
from .progress import Progress
from .recipe import Modality
from .sample_store import HiddenStates, StemStore

# Memory for what is also on disk; beyond it, samples are read back when they are needed.
HIDDEN_BUDGET = 512 << 20
ARGUMENTS_BUDGET = 256 << 20


@dataclass(frozen=True)
class OutputError:
    """Relative error of what a layer adds to the residual stream, over all tokens and by modality."""

    overall: float
    by_modality: dict[str, float]


class CalibrationStream:
    """All samples at one boundary between layers. `prepare` brings them there from the media, `advance` to the next."""

    def __init__(self, plan: QuantPlan, calib: CalibSet, folder: Path, device: torch.device) -> None:
        self._plan = plan
        self._samples = calib.samples
        self._folder = folder
        self._device = device
        self._stem = StemStore(folder / "stem", ARGUMENTS_BUDGET)
        self._kept: list[int] = []
        self._modalities: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []
        self._judges: frozenset[int] = frozenset()
        self._held_out: frozenset[int] = frozenset()
        self._importance: dict[int, float] = {}
        self.warnings: list[str] = []

    # --- from media to the first layer ---

    def prepare(self, progress: Progress) -> None:
        """Run every sample through processor, towers and embedding; those a stopped run has done are kept."""
        missing = [number for number in range(len(self._samples)) if not self._stem.is_whole(number)]
        if missing:
            self._run_stem(missing, progress)
        self._kept = [number for number in range(len(self._samples)) if self._stem.has(number)]
        if not self._kept:
            raise QuantError("no calibration sample could be used:\n" + "\n".join(self.warnings[:10]))
        self._modalities = [self._stem.modality(number) for number in self._kept]
        self._chosen = choose_rows(self._modalities)
        self._judges = choose_judges(self._modalities)
        self._held_out = held_out(self._judges, self._modalities)
        self._refuse_weightless()
        self._importance = importance(self._plan.calibration.modality_weights, self._counts(self._held_out))

    def _refuse_weightless(self) -> None:
        """Samples that were left out may have been the only ones of the modalities that weigh anything."""
        weights = self._plan.calibration.modality_weights
        if isinstance(weights, str):
            return
        weighed = [name for name, weight in weights.items() if weight > 0]
        if not set(weighed) & set(self.tokens_by_modality()):
            raise QuantError(
                f"calibration.modality_weights counts {', '.join(weighed)} only, and no sample that could be used has"
                f" that; they have {', '.join(self.tokens_by_modality())}\n" + "\n".join(self.warnings[:10]),
                "mend the samples, or give a weight to what is there",
            )

    def _run_stem(self, missing: list[int], progress: Progress) -> None:
        plan, family = self._plan, self._plan.model.family
        limits = MediaLimits(plan.calibration.max_tokens, plan.calibration.max_pixels, plan.calibration.video_fps)
        processor = family.open_media_processor(plan.checkpoint.path, limits, plan.trust_remote_code)
        stem = family.open_stem(plan.checkpoint, self._device)
        for done, number in enumerate(missing, 1):
            sample = self._samples[number]
            try:
                inputs = prepare_sample(sample, processor)
                reached = stem.layer_input(inputs)
            except QuantError as error:
                message = told_of(sample, error)
                if plan.calibration.on_bad_sample == "fail":
                    raise QuantError(message, error.hint) from error
                self.warnings.append(f"sample left out: {message}")
                continue
            self._refuse_nonfinite(reached.hidden, "the embedding and towers", sample)
            self._stem.write(number, reached, inputs.modality)
            progress.step("towers", done, len(missing), sample.where)
        del stem
        free_memory(self._device)

    def tokens_by_modality(self) -> dict[str, int]:
        return {name: count for name, count in zip(MODALITIES, self._counts(), strict=True) if count}

    def _counts(self, without: frozenset[int] = frozenset()) -> list[int]:
        """Tokens of each modality in all samples but those at some positions."""
        counted = [modality for position, modality in enumerate(self._modalities) if position not in without]
        counts: list[int] = torch.cat(counted).bincount(minlength=len(MODALITIES)).tolist()
        return counts

    def __len__(self) -> int:
        return len(self._kept)

    # --- from layer to layer ---

    def _boundary(self, layer: int, name: str = "hidden") -> HiddenStates:
        width = self._plan.layer_spec.shapes["input_layernorm.weight"][0]
        lengths = [len(modality) for modality in self._modalities]
        return HiddenStates(self._folder / f"{name}-{layer:04d}.safetensors", lengths, width, HIDDEN_BUDGET)

    def can_start_at(self, layer: int) -> bool:
        """Whether the hidden states before this layer are there, undamaged."""
        return layer == 0 or self._boundary(layer).is_whole()

    def start_at(self, layer: int) -> None:
        """Take the stored hidden states before a layer; before the first, those of the stem."""
        self._hidden = self._boundary(layer)
        if layer == 0 and not self._hidden.is_whole():
            self._hidden.write(self._stem.hidden(number) for number in self._kept)

    def _inputs(self) -> Iterator[tuple[int, LayerInput]]:
        """Position and what reaches the layer, sample by sample."""
        for position, number in enumerate(self._kept):
            hidden = self._hidden.read(position).to(self._device)
            yield position, LayerInput(hidden, self._stem.arguments(number, self._device))

    def capture(self, layer: int, module: torch.nn.Module, spec: LayerSpec) -> Captured:
        """Run the float layer on all samples: what its groups' inputs are like, and its outputs put aside."""
        recorder = InputRecorder(
            module, spec, self._counts(self._held_out) if self._plan.statistics == "gram" else None
        )
        probe = LayerProbe(module, {group.block for group in spec.groups}, self._importance)
        propagate = self._plan.calibration.propagate_error
        self._exact = self._boundary(layer, "exact") if propagate else self._boundary(layer + 1)

        def outputs() -> Iterator[torch.Tensor]:
            for position, inputs in self._inputs():
                sample = self._samples[self._kept[position]]
                recorder.begin(
                    self._modalities[position], self._chosen[position], in_gram=position not in self._held_out
                )
                try:
                    if position in self._judges:
                        out = probe.watch(inputs, self._modalities[position])
                    else:
                        out = run_layer(module, inputs)
                except QuantError as error:
                    raise QuantError(
                        f"layer {layer}, {error.message} with sample {sample.where}", error.hint
                    ) from error
                self._refuse_nonfinite(out, f"layer {layer}", sample)
                yield out

        self._exact.write(outputs(), sync=not propagate)  # what is called exact is never resumed from
        stats = recorder.finish()
        if unseen := [linear for group in spec.groups if group.name not in stats for linear in group.linears]:
            raise QuantError(f"layer {layer}: {unseen[0]} never saw a token", "exclude it, or give other samples")
        return Captured(stats, self._importance, probe)

    def advance(self, layer: int, module: torch.nn.Module, probe: LayerProbe) -> OutputError:
        """Go to the next layer's inputs. Returns the error of the quantized layer's outputs against the float layer's.

        With propagate_error they are the quantized layer's outputs on all samples, else those of the float layer; the
        error is then known of the judging samples. What lies before this layer is deleted by `forget`, once the
        layer's part is safe on disk.
        """
        following = self._exact
        error, signal = probe.errors(module) if not self._plan.calibration.propagate_error else _zero_errors()
        if self._plan.calibration.propagate_error:
            following = self._boundary(layer + 1)
            following.write(self._quantized_outputs(module, error, signal))
            self._exact.path.unlink()
        self._hidden = following
        present = torch.nonzero(signal).flatten().tolist()
        by_modality = {MODALITIES[i]: relative_error(float(error[i]), float(signal[i])) for i in present}
        return OutputError(relative_error(float(error.sum()), float(signal.sum())), by_modality)

    def _quantized_outputs(
        self, module: torch.nn.Module, error: torch.Tensor, signal: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        for position, inputs in self._inputs():
            out = run_layer(module, inputs)
            exact = self._exact.read(position).to(self._device)
            add_errors(error, signal, inputs.hidden, exact, out, self._modalities[position])
            yield out

    def pass_on(self) -> None:
        """Go to the next layer's inputs as the float layer made them; for a plan without propagate_error."""
        self._hidden = self._exact

    def forget(self, layer: int) -> None:
        """Delete the hidden states before a layer."""
        self._boundary(layer).path.unlink(missing_ok=True)

    def _refuse_nonfinite(self, hidden: torch.Tensor, where: str, sample: CalibSample) -> None:
        if not torch.isfinite(hidden).all():
            raise QuantError(
                f"{where}: NaN or Inf in the hidden states of sample {sample.where}",
                "check the checkpoint with the float model, or leave the sample out",
            )


@dataclass(frozen=True)
class Captured:
    """What the float layer's forward showed. importance: see LayerWork."""

    stats: dict[str, InputStats]
    importance: dict[int, float]
    probe: LayerProbe


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
    """A float layer and the samples that judge changes to it, with its blocks' inputs and true outputs."""

    def __init__(self, layer: torch.nn.Module, blocks: set[str], importance: Mapping[int, float]) -> None:
        self._layer = layer
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
        total = 0.0
        with torch.inference_mode():
            for (args, kwargs, exact), modality in zip(self._calls[block], self._modalities, strict=True):
                out = _hidden(torch.func.functional_call(module, replaced, args, kwargs))
                per_token = torch.tensor([self._importance[m] for m in modality.tolist()]).to(out.device)
                total += float((per_token * (out - exact)[0].square().sum(dim=1)).sum())
        return total

    def noise(self, block: str, linears: Mapping[str, torch.nn.Module]) -> dict[str, float]:
        """Noise-to-signal ratio of the layer's output, by modality, with other modules for some Linears of a block.

        The mean over a modality's tokens of |e|² / |h|², e [hidden] the error of the block's output for one token and
        h [hidden] the layer's true output, into which the block's is added. By token, since the next norm sets each
        one to the same length. linears: by name relative to the layer.
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

    def errors(self, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared sums by modality: of a changed layer's error, and of what the float layer adds to its input."""
        error, signal = _zero_errors()
        for (inputs, exact), modality in zip(self._samples, self._modalities, strict=True):
            add_errors(error, signal, inputs.hidden, exact, run_layer(layer, inputs), modality)
        return error, signal

    def layer_error(self, layer: torch.nn.Module) -> float:
        """The squared error of a changed layer's output, tokens weighed by importance."""
        error, _ = self.errors(layer)
        return sum(weight * float(error[m]) for m, weight in self._importance.items())


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


def _zero_errors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(len(MODALITIES), dtype=torch.float64), torch.zeros(len(MODALITIES), dtype=torch.float64)


def add_errors(
    error: torch.Tensor,
    signal: torch.Tensor,
    entering: torch.Tensor,
    exact: torch.Tensor,
    out: torch.Tensor,
    modality: torch.Tensor,
) -> None:
    """Add one sample's squared sums by modality, float64 [modalities]: of out - exact and of exact - entering.

    entering, exact, out: [1, tokens, hidden]; modality: int8 [tokens].
    """
    for index in torch.unique(modality).tolist():
        mine = (modality == index).to(out.device)
        error[index] += squared_norm((out - exact)[0, mine])
        signal[index] += squared_norm((exact - entering)[0, mine])


def _hidden(out: Any) -> torch.Tensor:
    """The hidden states that a block or layer returns, alone or first of a tuple."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


class EmulatedLinear(torch.nn.Module):
    """A quantized Linear in a float layer: int8 activations per token, the integers kept as float32 for speed."""

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._linear = replace(linear, qweight=linear.qweight.to(torch.float32))
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(x, self._linear, self._bias)


def emulate(
    module: torch.nn.Module, quantized: Mapping[str, QuantizedLinear], weights: Mapping[str, torch.Tensor]
) -> None:
    """Replace the Linears with int8 activations, by relative name, by their emulation; biases come from `weights`."""
    for name, linear in quantized.items():
        if linear.scheme.act_bits is None:
            continue  # an ordinary Linear with a dequantized weight
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, EmulatedLinear(linear, weights.get(f"{name}.bias")))


def quantized_layer(
    model: ModelSpec,
    config: dict[str, Any],
    index: int,
    floats: Mapping[str, torch.Tensor],
    linears: Mapping[str, QuantizedLinear],
) -> torch.nn.Module:
    """The library's layer in float32; Linears with int8 activations are emulated, others hold what they stand for.

    floats, linears: all tensors of the layer, by relative name.
    """
    weights = {name: tensor.to(torch.float32) for name, tensor in floats.items()}
    for name, linear in linears.items():
        emulated = linear.scheme.act_bits is not None  # the emulation replaces this weight
        weights[f"{name}.weight"] = linear.qweight if emulated else dequantize(linear)
    module: torch.nn.Module = model.family.build_layer(config, index, weights)
    emulate(module, linears, weights)
    return module
