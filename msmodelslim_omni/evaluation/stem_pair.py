"""The inputs of the first decoder layer for both models: from media through processor, towers and embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibSample, StemStore, describe_fault, prepare_sample, run_stem
from ..errors import QuantError
from ..models import LayerInput, MediaProcessor, ModelInputs
from ..quantized import Source
from ..runtime import DEFAULT_BUDGET, Progress, free_modules
from ..storage import Checkpoint, is_finite, same_bytes
from .scoring import drift_sums

# Memory per model that caches the layer arguments, which are also on disk.
ARGUMENTS_BUDGET = 128 << 20

FLOAT, QUANT = "float", "quantized"

_IGNORED_CONFIG_KEYS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class Sample:
    """A sample after the processor. tokens: int64 [tokens]; modality: int8 [tokens]; answer: see ModelInputs."""

    where: str
    tokens: torch.Tensor
    modality: torch.Tensor
    answer: tuple[int, int] | None

    @property
    def read_by_talker(self) -> int:
        """The number of tokens whose states the talker reads: the prompt, and the answer without its end token."""
        return len(self.tokens) if self.answer is None else self.answer[1] - 1


class StemPair:
    """The inputs of the first decoder layer for both models, on disk. `prepare` computes them.

    samples: the usable samples, in order. warnings: skipped samples and unusable answers. shared: whether both models
    have the same stem, which then runs once. `prepare` sets all three.
    """

    def __init__(self, float_source: Source, quant_source: Source, folder: Path, device: torch.device) -> None:
        self._sources = {FLOAT: float_source, QUANT: quant_source}
        self._folder = folder
        self._device = device
        self._stores: dict[str, StemStore] = {}
        self._numbers: list[int] = []  # of the samples' files
        self.samples: list[Sample] = []
        self.warnings: list[str] = []
        self.shared = False

    def prepare(
        self,
        samples: Sequence[CalibSample],
        processor: MediaProcessor,
        *,
        skip_bad: bool,
        needs_answer: bool,
        progress: Progress,
    ) -> None:
        """Run every sample through processor, towers and embedding. Both models see the same inputs.

        skip_bad: skip unusable samples instead of raising. needs_answer: a sample whose answer cannot be separated from
        its prompt is unusable.
        """
        self.shared = self._has_same_stem()
        usable = dict(enumerate(samples))
        prepared: dict[int, Sample] = {}
        for side in (FLOAT,) if self.shared else (FLOAT, QUANT):
            source = self._sources[side]
            store = self._stores[side] = StemStore(self._folder / f"stem-{side}", ARGUMENTS_BUDGET)
            stem = source.model.family.open_stem(_float_checkpoint(source), self._device, DEFAULT_BUDGET.towers)
            phase = "towers" if self.shared else f"towers of the {side} model"
            for done, (number, sample) in enumerate(list(usable.items()), 1):
                try:
                    inputs = prepare_sample(sample, processor)
                    self._check_inputs(sample, inputs, needs_answer)
                    layer_input = run_stem(sample, inputs, stem)
                except QuantError as error:
                    self._skip_or_raise(sample, error, skip_bad)
                    del usable[number]
                    continue
                require_finite(layer_input.hidden, f"{side} model, embedding and towers, sample {sample.where}")
                store.write(number, layer_input, inputs.modality)
                prepared[number] = Sample(sample.where, inputs.tensors["input_ids"][0], inputs.modality, inputs.answer)
                progress.step(phase, done, len(samples), sample.where)
            del stem
            free_modules(self._device)  # the towers are the largest part in memory
        if not usable:
            raise QuantError("no sample could be used:\n" + "\n".join(self.warnings[:10]))
        if self.shared:
            self._stores[QUANT] = self._stores[FLOAT]
        self._numbers = list(usable)
        self.samples = [prepared[number] for number in usable]

    def hidden(self, side: str, position: int) -> torch.Tensor:
        """The hidden states before the first layer, of the sample at this position: float32 [1, tokens, hidden]."""
        return self._stores[side].hidden(self._numbers[position])

    def layer_input(self, side: str, position: int, layer: int, hidden: torch.Tensor) -> LayerInput:
        """The input of a layer for the sample at this position, on the device; see StemStore.layer_input."""
        return self._stores[side].layer_input(self._numbers[position], layer, hidden, self._device)

    def entering(self, side: str, position: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that enter a layer, or the final norm; see StemStore.entering."""
        return self._stores[side].entering(self._numbers[position], layer, hidden)

    def embedding_drift(self) -> torch.Tensor:
        """Drift of the embeddings that the talker reads: float64 [samples, 7], see scoring.drift_sums.

        Media tokens do not count, since the talker reads zeros in their place.
        """
        sums = []
        for position, sample in enumerate(self.samples):
            float_states, quant_states = (self.hidden(side, position)[0] for side in (FLOAT, QUANT))
            is_read = sample.modality == 0
            is_read[sample.read_by_talker :] = False
            group = torch.zeros(int(is_read.sum()))
            sums.append(drift_sums(float_states[is_read], quant_states[is_read], group, 1)[0])
        return torch.stack(sums)

    def _has_same_stem(self) -> bool:
        """Whether both models have equal configurations and equal tensors before the decoder layers."""
        float_source, quant_source = (self._sources[side] for side in (FLOAT, QUANT))
        if _without_ignored_keys(float_source.config) != _without_ignored_keys(quant_source.config):
            return False
        float_tensors, quant_tensors = float_source.floats, quant_source.floats
        prefixes = float_source.model.stem_prefixes
        names = {name for tensors in (float_tensors, quant_tensors) for name in tensors if name.startswith(prefixes)}
        return all(
            name in float_tensors and name in quant_tensors and same_bytes(float_tensors[name], quant_tensors[name])
            for name in sorted(names)
        )

    def _check_inputs(self, sample: CalibSample, inputs: ModelInputs, needs_answer: bool) -> None:
        source = self._sources[FLOAT]
        vocabulary = (source.shape_of(source.model.lm_head_tensor(source.config)) or (0,))[0]
        if (largest := int(inputs.tensors["input_ids"].max())) >= vocabulary:
            raise QuantError(
                f"token id {largest} is outside the vocabulary of {vocabulary}",
                "use the tokenizer that belongs to the model",
            )
        if sample.has_answer and inputs.answer is None:
            message = (
                f"{sample.where}: the answer cannot be separated from the prompt"
                " (it contains media, or the chat template is unusual)"
            )
            if needs_answer:
                raise QuantError(message, "use --positions auto")
            self._warn(f"{message}; the sample counts as one without an answer")

    def _skip_or_raise(self, sample: CalibSample, error: QuantError, skip_bad: bool) -> None:
        message = describe_fault(sample, error)
        if not skip_bad:
            raise QuantError(message, error.hint) from error
        self._warn(f"sample skipped: {message}")

    def _warn(self, text: str) -> None:
        """Add a warning once, even if both models meet the same sample."""
        if text not in self.warnings:
            self.warnings.append(text)


def _float_checkpoint(source: Source) -> Checkpoint:
    """A checkpoint of the source's float tensors, from which a stem can be opened."""
    return Checkpoint(source.path, source.config, source.floats, ())


def _without_ignored_keys(config: Any) -> Any:
    """config.json without keys that do not affect the model, and that other tools rewrite."""
    if isinstance(config, dict):
        return {key: _without_ignored_keys(value) for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    return config


def require_finite(tensor: torch.Tensor, where: str) -> None:
    if not is_finite(tensor):
        raise QuantError(f"{where}: NaN or Inf", "check the weights of that model, or remove the sample")
