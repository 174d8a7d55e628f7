"""The calibration samples on their way through the decoder layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .arithmetic import QuantizedLinear, quantized_matmul, relative_error, squared_norm
from .calibration import CalibSample, CalibSet, prepare_sample
from .capture import InputRecorder, InputStats, choose_rows, run_layer
from .device import free_memory
from .errors import QuantError
from .models.spec import MODALITIES, LayerInput, LayerSpec, MediaLimits
from .plan import QuantPlan
from .progress import Progress
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
        self.warnings: list[str] = []

    # --- from media to the first layer ---

    def prepare(self, progress: Progress) -> None:
        """Run every sample through processor, towers and embedding; those a stopped run has done are kept."""
        missing = [number for number in range(len(self._samples)) if not self._stem.has(number)]
        if missing:
            self._run_stem(missing, progress)
        self._kept = [number for number in range(len(self._samples)) if self._stem.has(number)]
        if not self._kept:
            raise QuantError("no calibration sample could be used:\n" + "\n".join(self.warnings[:10]))
        self._modalities = [self._stem.modality(number) for number in self._kept]
        self._chosen = choose_rows(self._modalities)

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
                named = error.message.startswith(sample.where)
                message = error.message if named else f"{sample.where}: {error.message}"
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
        counts = torch.cat(self._modalities).bincount(minlength=len(MODALITIES)).tolist()
        return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}

    def __len__(self) -> int:
        return len(self._kept)

    # --- from layer to layer ---

    def _boundary(self, layer: int, name: str = "hidden") -> HiddenStates:
        width = self._plan.layer_spec.shapes["input_layernorm.weight"][0]
        lengths = [len(modality) for modality in self._modalities]
        return HiddenStates(self._folder / f"{name}-{layer:04d}.safetensors", lengths, width, HIDDEN_BUDGET)

    def can_start_at(self, layer: int) -> bool:
        """Whether the hidden states before this layer are there."""
        return layer == 0 or self._boundary(layer).path.exists()

    def start_at(self, layer: int) -> None:
        """Take the stored hidden states before a layer; before the first, those of the stem."""
        self._hidden = self._boundary(layer)
        if layer == 0 and not self._hidden.path.exists():
            self._hidden.write(self._stem.hidden(number) for number in self._kept)

    def _inputs(self) -> Iterator[tuple[int, LayerInput]]:
        """Position and what reaches the layer, sample by sample."""
        for position, number in enumerate(self._kept):
            hidden = self._hidden.read(position).to(self._device)
            yield position, LayerInput(hidden, self._stem.arguments(number, self._device))

    def capture(self, layer: int, module: torch.nn.Module, spec: LayerSpec) -> dict[str, InputStats]:
        """Run the float layer on all samples: statistics of each group's input, and its outputs put aside."""
        recorder = InputRecorder(module, spec)
        self._exact = self._boundary(layer, "exact")

        def outputs() -> Iterator[torch.Tensor]:
            for position, inputs in self._inputs():
                recorder.begin(self._modalities[position], self._chosen[position])
                out = run_layer(module, inputs)
                self._refuse_nonfinite(out, f"layer {layer}", self._samples[self._kept[position]])
                yield out

        self._exact.write(outputs(), sync=False)  # never resumed from
        recorder.remove()
        return recorder.stats

    def advance(self, layer: int, module: torch.nn.Module) -> OutputError:
        """Run the quantized layer: its outputs are the next layer's inputs. Returns its error against the float layer.

        What lies before this layer is deleted by `forget`, once the layer's part is safe on disk.
        """
        following = self._boundary(layer + 1)
        error = torch.zeros(len(MODALITIES), dtype=torch.float64)
        signal = torch.zeros(len(MODALITIES), dtype=torch.float64)

        def outputs() -> Iterator[torch.Tensor]:
            for position, inputs in self._inputs():
                out = run_layer(module, inputs)
                exact = self._exact.read(position).to(self._device)
                for index in torch.unique(self._modalities[position]).tolist():
                    mine = (self._modalities[position] == index).to(self._device)
                    error[index] += squared_norm((out - exact)[0, mine])
                    signal[index] += squared_norm((exact - inputs.hidden)[0, mine])
                yield out

        following.write(outputs())
        self._exact.path.unlink()
        self._hidden = following
        present = torch.nonzero(signal).flatten().tolist()
        by_modality = {MODALITIES[i]: relative_error(float(error[i]), float(signal[i])) for i in present}
        return OutputError(relative_error(float(error.sum()), float(signal.sum())), by_modality)

    def forget(self, layer: int) -> None:
        """Delete the hidden states before a layer."""
        self._boundary(layer).path.unlink(missing_ok=True)

    def _refuse_nonfinite(self, hidden: torch.Tensor, where: str, sample: CalibSample) -> None:
        if not torch.isfinite(hidden).all():
            raise QuantError(
                f"{where}: NaN or Inf in the hidden states of sample {sample.where}",
                "check the checkpoint with the float model, or leave the sample out",
            )


class EmulatedLinear(torch.nn.Module):
    """A quantized Linear in a float layer: int8 activations per token, the integers kept as float32 for speed."""

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._linear = replace(linear, qweight=linear.qweight.to(torch.float32))
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_matmul(x, self._linear, self._bias)


def emulate(module: torch.nn.Module, quantized: dict[str, QuantizedLinear], weights: dict[str, torch.Tensor]) -> None:
    """Replace the quantized Linears of a layer, by relative name, by their emulation; biases come from `weights`."""
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, EmulatedLinear(linear, weights.get(f"{name}.bias")))
