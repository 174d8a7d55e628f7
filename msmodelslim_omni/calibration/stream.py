"""The calibration samples on their way through the decoder layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import QuantError
from ..models import (
    MODALITIES,
    LayerInput,
    LayerSpec,
    MediaLimits,
)
from ..numerics import relative_error
from ..plan import QuantPlan, settled
from ..runtime import ALONE, Budget, Extent, Progress, Team, free_modules
from ..statistics import (
    InputRecorder,
    InputStats,
    choose_rows,
    run_layer,
)
from .layer_probe import (
    Errors,
    LayerProbe,
    added,
    choose_judges,
    held_out,
    importance,
    squared_errors,
)
from .sample_store import HiddenStates, StemStore
from .samples import (
    CalibSample,
    CalibSet,
    prepare_sample,
    told_of,
)

_BOUNDARIES = 3  # before a layer, behind it as it is, and behind it quantized


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
        self._plan = settled(self._plan, self.extent())
        self._stem = StemStore(self._folder / "stem", self.budget.arguments)

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
        free_modules(self._device)  # the towers are larger than all that follows
        return left_out

    def tokens_by_modality(self) -> dict[str, int]:
        return {name: count for name, count in zip(MODALITIES, self._counts(), strict=True) if count}

    @property
    def budget(self) -> Budget:
        """The plan's, until `prepare` knows how much there is to run."""
        return self._plan.budget

    def extent(self) -> Extent:
        lengths = [len(modality) for modality in self._modalities]
        return Extent(sum(lengths), max(lengths), len(self.tokens_by_modality()))

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
            error, signal = added(self._split.collected(errors))
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
