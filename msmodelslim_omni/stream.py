"""The calibration samples on their way through the decoder layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from .arithmetic import QuantizedLinear, dequantize, quantized_matmul, relative_error, row_squares, squared_norm
from .calibration import CalibSample, CalibSet, prepare_sample, told_of
from .capture import InputRecorder, InputStats, choose_rows, run_layer
from .device import free_memory, trim_heap
from .errors import QuantError
from .models.spec import MODALITIES, LayerInput, LayerSpec, MediaLimits, ModelSpec
from .plan import QuantPlan
from .progress import Progress
from .recipe import Modality
from .sample_store import HiddenStates, StemStore
from .team import ALONE, WHOLE, Split, Team

_BOUNDARIES = 3  # before a layer, behind it as it is, and behind it quantized


# Squared sums by modality, float64 [modalities] each: of errors, and of what they are compared with.
Errors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class OutputError:
    """Relative error of what a layer adds to the residual stream, over all tokens and by modality."""

    overall: float
    by_modality: dict[str, float]


class CalibrationStream:
    """All samples at one boundary between layers. `prepare` brings them there from the media, `advance` to the next.

    Of several processes each runs its own samples and keeps their hidden states in files of its own; what precedes the
    layers lies in one folder for all. What `prepare` finds and what `capture` and `advance` return is of all samples.
    """

    def __init__(
        self, plan: QuantPlan, calib: CalibSet, folder: Path, device: torch.device, team: Team = ALONE
    ) -> None:
        self._plan = plan
        self._team = team
        self._samples = calib.samples
        self._folder = folder
        self._device = device
        self._stem = StemStore(folder / "stem", plan.budget.arguments)
        self._kept: list[int] = []
        self._split = team.split([])
        self._modalities: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []
        self._judges: frozenset[int] = frozenset()
        self._held_out: frozenset[int] = frozenset()
        self._importance: dict[int, float] = {}
        self.warnings: list[str] = []

    # --- from media to the first layer ---

    def prepare(self, progress: Progress) -> None:
        """Run every sample through processor, towers and embedding; those a stopped run has done are kept."""
        missing = self._team.told([number for number in range(len(self._samples)) if not self._stem.is_whole(number)])
        split = self._team.split([1.0] * len(missing))  # their lengths are not known yet
        left_out = self._run_stem([missing[item] for item in split.mine], progress)
        self.warnings += [warning for warning in split.collected(left_out) if warning]
        self._kept = [number for number in range(len(self._samples)) if self._stem.has(number)]
        if not self._kept:
            raise QuantError("no calibration sample could be used:\n" + "\n".join(self.warnings[:10]))
        self._modalities = [self._stem.modality(number) for number in self._kept]
        self._split = self._team.split([len(modality) for modality in self._modalities])
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

    def _run_stem(self, missing: list[int], progress: Progress) -> list[str]:
        """Write what precedes the layers. Returns of each sample why it was left out, or an empty string."""
        if not missing:
            return []
        left_out = [""] * len(missing)
        plan, family = self._plan, self._plan.model.family
        limits = MediaLimits(plan.calibration.max_tokens, plan.calibration.max_pixels, plan.calibration.video_fps)
        processor = family.open_media_processor(plan.checkpoint.path, limits, plan.trust_remote_code)
        stem = family.open_stem(plan.checkpoint, self._device, plan.budget.towers)
        for done, number in enumerate(missing):
            sample = self._samples[number]
            try:
                inputs = prepare_sample(sample, processor)
                reached = stem.layer_input(inputs)
            except QuantError as error:
                message = told_of(sample, error)
                if plan.calibration.on_bad_sample == "fail":
                    raise QuantError(message, error.hint) from error
                left_out[done] = f"sample left out: {message}"
                continue
            self._refuse_nonfinite(reached.hidden, "the embedding and towers", sample)
            self._stem.write(number, reached, inputs.modality)
            progress.step("towers", done + 1, len(missing), sample.where)
        del stem
        free_memory(self._device)
        trim_heap()  # the towers are larger than all that follows
        return left_out

    def tokens_by_modality(self) -> dict[str, int]:
        return {name: count for name, count in zip(MODALITIES, self._counts(), strict=True) if count}

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(modality) for modality in self._modalities]

    def _counts(self, without: frozenset[int] = frozenset()) -> list[int]:
        """Tokens of each modality in all samples but those at some positions."""
        counted = [modality for position, modality in enumerate(self._modalities) if position not in without]
        counts: list[int] = torch.cat(counted).bincount(minlength=len(MODALITIES)).tolist()
        return counts

    def _token_numbers(self) -> list[list[int]]:
        """Of each sample, by modality: the tokens in H of all samples before it."""
        counts = [
            modality.bincount(minlength=len(MODALITIES)) * (position not in self._held_out)
            for position, modality in enumerate(self._modalities)
        ]
        before = torch.stack(counts).cumsum(dim=0) - torch.stack(counts)
        numbers: list[list[int]] = before.tolist()
        return numbers

    def __len__(self) -> int:
        return len(self._kept)

    # --- from layer to layer ---

    def _boundary(self, layer: int, name: str = "hidden") -> HiddenStates:
        """Of this process' samples."""
        width = self._plan.layer_spec.shapes["input_layernorm.weight"][0]
        lengths = [len(self._modalities[position]) for position in self._split.mine]
        whose = f"-{self._team.rank}" if self._team.size > 1 else ""
        budget = self._plan.budget.hidden // _BOUNDARIES
        return HiddenStates(self._folder / f"{name}-{layer:04d}{whose}.safetensors", lengths, width, budget)

    def can_start_at(self, layer: int) -> bool:
        """Whether the hidden states before this layer are there, undamaged, those of every process."""
        return layer == 0 or all(self._team.everyones(self._boundary(layer).is_whole()))

    def start_at(self, layer: int) -> None:
        """Take the stored hidden states before a layer; before the first, those of the stem."""
        self._hidden = self._boundary(layer)
        if layer == 0 and not self._hidden.is_whole():
            self._hidden.write(self._stem.hidden(self._kept[position]) for position in self._split.mine)

    def _inputs(self) -> Iterator[tuple[int, LayerInput]]:
        """Position and what reaches the layer, of each of this process' samples."""
        for own, position in enumerate(self._split.mine):
            hidden = self._hidden.read(own).to(self._device)
            yield position, LayerInput(hidden, self._stem.arguments(self._kept[position], self._device))

    def capture(self, layer: int, module: torch.nn.Module, spec: LayerSpec) -> Captured:
        """Run the float layer on all samples: what its groups' inputs are like, and its outputs put aside."""
        tokens = self._counts(self._held_out) if self._plan.statistics == "gram" else None
        recorder = InputRecorder(module, spec, tokens, self._plan.budget, self._split)
        # Only a search on H tries its candidates in the blocks themselves.
        blocks = {group.block for group in spec.groups} if self._plan.statistics == "gram" else set()
        probe = LayerProbe(module, blocks, self._importance, self._split.of(sorted(self._judges)))
        numbers = self._token_numbers()
        propagate = self._plan.calibration.propagate_error
        self._exact = self._boundary(layer, "exact") if propagate else self._boundary(layer + 1)

        def outputs() -> Iterator[torch.Tensor]:
            for position, inputs in self._inputs():
                sample = self._samples[self._kept[position]]
                recorder.begin(
                    self._modalities[position],
                    self._chosen[position],
                    in_gram=position not in self._held_out,
                    numbers=numbers[position],
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

    def advance(self, layer: int, module: Callable[[], torch.nn.Module], judged: Errors) -> OutputError:
        """Go to the next layer's inputs. Returns the error of the quantized layer's outputs against the float layer's.

        With propagate_error they are the quantized layer's outputs on all samples, else those of the float layer; the
        error is then that of the judging samples, `judged`. What lies before this layer is deleted by `forget`, once
        the layer's part is safe on disk. module: makes the quantized layer, where it is needed.
        """
        following, (error, signal) = self._exact, judged
        if self._plan.calibration.propagate_error:
            following = self._boundary(layer + 1)
            errors: list[torch.Tensor] = []
            following.write(self._quantized_outputs(module(), errors))
            self._exact.path.unlink()
            error, signal = _added(self._split.collected(errors))
        self._hidden = following
        present = torch.nonzero(signal).flatten().tolist()
        by_modality = {MODALITIES[i]: relative_error(float(error[i]), float(signal[i])) for i in present}
        return OutputError(relative_error(float(error.sum()), float(signal.sum())), by_modality)

    def _quantized_outputs(self, module: torch.nn.Module, errors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """errors: gets the squared sums of each of this process' samples."""
        for own, (position, inputs) in enumerate(self._inputs()):
            out = run_layer(module, inputs)
            exact = self._exact.read(own).to(self._device)
            errors.append(squared_errors(inputs.hidden, exact, out, self._modalities[position]))
            yield out

    def pass_on(self) -> None:
        """Go to the next layer's inputs as the float layer made them; for a plan without propagate_error."""
        self._hidden = self._exact

    def forget(self, layer: int) -> None:
        """Delete the hidden states before a layer, those of every process; none of them needs them any more."""
        for path in self._folder.glob(f"hidden-{layer:04d}*.safetensors"):
            path.unlink()

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
        return _added(self._split.collected(errors))

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


def _added(sums: Sequence[torch.Tensor]) -> Errors:
    """Error and signal, [modalities] each, of the samples' sums in their order."""
    error, signal = reduce(torch.add, sums)
    return error, signal


def _hidden(out: Any) -> torch.Tensor:
    """The hidden states that a block or layer returns, alone or first of a tuple."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


class EmulatedLinear(torch.nn.Module):
    """A quantized Linear in a float layer, computed as the runtime does. held: with int8 activations the integers are
    kept as float32, for speed.
    """

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, held: bool = True) -> None:
        super().__init__()
        wide = held and linear.scheme.act_bits is not None
        self._linear = replace(linear, qweight=linear.qweight.to(torch.float32)) if wide else linear
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(x, self._linear, self._bias)


def emulate(
    module: torch.nn.Module,
    quantized: Mapping[str, QuantizedLinear],
    weights: Mapping[str, torch.Tensor],
    held: bool = True,
) -> None:
    """Replace Linears, by relative name, by their emulation; biases come from `weights`."""
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, EmulatedLinear(linear, weights.get(f"{name}.bias"), held))


def quantized_layer(
    model: ModelSpec,
    config: dict[str, Any],
    index: int,
    floats: Mapping[str, torch.Tensor],
    linears: Mapping[str, QuantizedLinear],
    held: bool = True,
) -> torch.nn.Module:
    """The library's layer in float32; Linears with int8 activations are emulated, others hold what they stand for.

    floats, linears: all tensors of the layer, by relative name. held: False keeps all weights as integers, which are
    widened a piece at a time in each product: a quarter of the memory, for a layer that runs on few samples.
    """
    weights = {name: tensor.to(torch.float32) for name, tensor in floats.items()}
    emulated = {name: q for name, q in linears.items() if q.scheme.act_bits is not None or not held}
    for name, linear in linears.items():
        # The emulation replaces the weight that it is given here.
        weights[f"{name}.weight"] = linear.qweight if name in emulated else dequantize(linear)
    module: torch.nn.Module = model.family.build_layer(config, index, weights)
    emulate(module, emulated, weights, held)
    return module
