"""The calibration samples on their way through the decoder layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import QuantError
from ..models import MODALITIES, LayerInput, LayerSpec, can_join, join_samples
from ..numerics import reduced_products, relative_error
from ..plan import QuantPlan, refit_budget
from ..runtime import SINGLE_PROCESS, Budget, Progress, Split, Team
from ..statistics import InputRecorder, InputStats, run_layer
from .batches import join_batches
from .ends import SampleEnds
from .layer_probe import Errors, LayerProbe, add_sums, squared_errors, sums_by_modality
from .sample_store import HiddenStates, refuse_nonfinite_states
from .stems import Stems
from .token_roles import assign_roles

# Shares of a layer's time that the forwards of the samples take, to estimate the time that is left in the first layer.
# From the table of phases in benchmarks/README.md. With H, the other phases take as long as this many tokens.
_FORWARD_SHARE, _TOKENS_OF_SEARCH = 0.44, 20_000

# Runs the layer on the samples at these positions, joined, and returns the output.
_Record = Callable[[range, LayerInput], torch.Tensor]

_BOUNDARIES = 3  # before a layer, after the float layer, and after the quantized layer


@dataclass(frozen=True)
class OutputError:
    """Relative error of what a layer adds to the residual stream, over all tokens and by modality.

    ordinary: over all tokens but those to which the layer adds more than MASSIVE times what it adds to the median token
    of their sample. massive: their number.
    """

    overall: float
    by_modality: dict[str, float]
    ordinary: float
    massive: int


@dataclass(frozen=True)
class Captured:
    """The result of the float layer's forward. importance: see TokenRoles."""

    stats: dict[str, InputStats]
    importance: dict[int, float]
    probe: LayerProbe


class CalibrationStream:
    """All samples at one boundary between decoder layers; `capture` and then `advance` move them to the next one.

    Short samples run through a layer joined, see join_batches. In a run of several processes, each process runs its own
    samples and keeps their hidden states in its own files. Results of `capture` and `advance` cover the samples of all
    processes.
    """

    def __init__(
        self,
        plan: QuantPlan,
        stems: Stems,
        folder: Path,
        device: torch.device,
        team: Team = SINGLE_PROCESS,
        progress: Progress | None = None,
    ) -> None:
        """folder: for the hidden states. progress: receives every sample of a forward.

        Raises QuantError where --max_memory is too small for these samples.
        """
        self.stems = stems
        self._plan = refit_budget(plan, stems.extent())
        self._folder = folder
        self._device = device
        self._team = team
        self._progress = progress or Progress()
        self._store = stems.store(self.budget.arguments)
        self._roles = assign_roles(stems.modalities, plan.calibration.modality_weights, stems.own_texts)
        can = can_join(self._store.arguments(stems.numbers[0], torch.device("cpu")))
        self._batches = join_batches(stems.lengths, self._roles.probe_samples if can else range(len(stems)))
        self._batch_split = team.split([sum(self._lengths(batch)) for batch in self._batches])
        owners = zip(self._batches, self._batch_split.owners, strict=True)
        self._split = Split(team, tuple(owner for batch, owner in owners for _ in batch))

    @property
    def budget(self) -> Budget:
        """The memory budget for the true number of tokens."""
        return self._plan.budget

    @property
    def judges_are_held_out(self) -> bool:
        """Whether the samples on which roundings are compared are kept out of H."""
        return bool(self._roles.held_out)

    # --- the stored hidden states ---

    def _boundary(self, layer: int, name: str = "hidden") -> HiddenStates:
        """The hidden states of this process' samples before a layer."""
        width = self._plan.layer_spec.hidden_size
        all_lengths = self.stems.lengths
        lengths = [all_lengths[position] for position in self._split.local_items]
        suffix = f"-{self._team.rank}" if self._team.size > 1 else ""
        cache_bytes = self.budget.hidden // _BOUNDARIES
        return HiddenStates(self._folder / f"{name}-{layer:04d}{suffix}.safetensors", lengths, width, cache_bytes)

    def can_start_at(self, layer: int) -> bool:
        """Whether the hidden states before this layer are stored and undamaged, for every process."""
        return layer == 0 or all(self._team.all_gather(self._boundary(layer).is_whole()))

    def start_at(self, layer: int) -> None:
        """Load the stored hidden states before a layer; before the first layer, those of the stems."""
        self._hidden = self._boundary(layer)
        if layer == 0 and not self._hidden.is_whole():
            numbers = [self.stems.numbers[position] for position in self._split.local_items]
            self._hidden.write(self._store.hidden(number) for number in numbers)

    def ends(self, layers: int) -> SampleEnds:
        """The samples before the first and behind the last of so many layers.

        `last` of the ends reads the outputs of these layers, which must be stored by then.
        """
        probe = tuple(sorted(self._roles.probe_samples))
        return SampleEnds(self._roles.held_out, self.stems, self._store, self._boundary(layers), layers, probe)

    def forget(self, layer: int) -> None:
        """Delete the hidden states before a layer, those of every process. Call it once the layer is safe on disk."""
        for path in self._folder.glob(f"hidden-{layer:04d}*.safetensors"):
            path.unlink()

    def _inputs(
        self, layer: int, forward: str, shares: tuple[float, float]
    ) -> Iterator[tuple[range, list[LayerInput]]]:
        """Positions and inputs of a layer of each batch of this process.

        forward: which forward it is, for the progress. shares: of the layer's work, before it and after it.
        """
        done, count, (before, after) = 0, len(self._split.local_items), shares
        for batch in (self._batches[item] for item in self._batch_split.local_items):
            self._progress.doing(f"{forward}, sample {done + 1}/{count}", before + (after - before) * done / count)
            samples = []
            for position in batch:
                number, hidden = self.stems.numbers[position], self._hidden.read(done)
                samples.append(self._store.layer_input(number, layer, hidden, self._device))
                done += 1
            yield batch, samples

    def _lengths(self, batch: range) -> list[int]:
        return self.stems.lengths[batch.start : batch.stop]

    def _forward_share(self) -> float:
        """The share of a layer's time that one forward of all samples takes, from measured runs."""
        if self._plan.statistics != "gram":
            return _FORWARD_SHARE
        tokens = sum(self.stems.lengths)
        return tokens / (tokens + _TOKENS_OF_SEARCH)

    # --- through a layer ---

    def capture(self, layer: int, module: torch.nn.Module, spec: LayerSpec, *, watch_blocks: bool = False) -> Captured:
        """Run the float layer on all samples: collect input statistics and store the outputs.

        watch_blocks: for LayerProbe.noise, also in a plan without a search on H. Products may be reduced, see
        numerics.products, but not those of the probe samples.
        """
        uses_gram, roles = self._plan.statistics == "gram", self._roles
        tokens = list(roles.gram_counts) if uses_gram else None
        recorder = InputRecorder(module, spec, tokens, self.budget, self._batch_split, roles.importance, self._folder)
        # Only a search on H tries its candidates in the blocks themselves.
        blocks = {group.block for group in spec.groups} if uses_gram or watch_blocks else set()
        probe = LayerProbe(module, blocks, roles.importance, self._split.subset(sorted(roles.probe_samples)))
        propagate = self._plan.calibration.propagate_error
        self._exact = self._boundary(layer, "exact") if propagate else self._boundary(layer + 1)
        outputs = self._float_outputs(layer, module, recorder, probe)
        self._exact.write(outputs, sync=not propagate)  # a run never resumes from the file named "exact"
        stats = recorder.finish()
        required = [group for group in spec.groups if group.expert is None]
        if unseen := [linear for group in required if group.name not in stats for linear in group.linears]:
            raise QuantError(f"layer {layer}: {unseen[0]} received no token", "exclude it, or give other samples")
        return Captured(stats, roles.importance, probe)

    def forward_float(self, layer: int, module: torch.nn.Module) -> None:
        """Run the float layer on all samples and store the outputs, without statistics; then `advance_float`."""
        self._exact = self._boundary(layer + 1)
        self._exact.write(self._plain_outputs(layer, module))

    def _plain_outputs(self, layer: int, module: torch.nn.Module) -> Iterator[torch.Tensor]:
        for batch, samples in self._inputs(layer, "float forward", (0.0, 1.0)):
            yield from self._finite(layer, batch, run_layer(module, join_samples(samples)).cpu())

    def _finite(self, layer: int, batch: range, out: torch.Tensor) -> Sequence[torch.Tensor]:
        """The output of each sample of a batch, [1, tokens, hidden]. Raises QuantError if one holds NaN or Inf."""
        outputs = torch.split(out, self._lengths(batch), dim=1)
        for position, of_sample in zip(batch, outputs, strict=True):
            refuse_nonfinite_states(of_sample, f"layer {layer}", self.stems.samples[position].where)
        return outputs

    def _float_outputs(
        self, layer: int, module: torch.nn.Module, recorder: InputRecorder, probe: LayerProbe
    ) -> Iterator[torch.Tensor]:
        record = partial(self._record, module, recorder, probe)
        for batch, samples in self._inputs(layer, "float forward", (0.0, self._forward_share())):
            try:
                out = record(batch, join_samples(samples))
            except QuantError as error:
                where = self._culprit(record, batch, samples)
                raise QuantError(f"layer {layer}, {error.message} with sample {where}", error.hint) from error
            yield from self._finite(layer, batch, out)

    def _record(
        self, module: torch.nn.Module, recorder: InputRecorder, probe: LayerProbe, batch: range, inputs: LayerInput
    ) -> torch.Tensor:
        """Run the float layer on a batch, with statistics. Returns its output on the CPU."""
        roles, lengths = self._roles, self._lengths(batch)
        firsts = [sum(lengths[:i]) for i in range(len(batch))]
        recorder.begin(
            torch.cat([self.stems.modalities[position] for position in batch]),
            torch.cat([roles.rows[position] + first for position, first in zip(batch, firsts, strict=True)]),
            in_gram=batch.start not in roles.held_out,
            gram_offsets=list(roles.gram_offsets[batch.start]),
        )
        if batch.start in roles.probe_samples:
            out = probe.watch(inputs, self.stems.modalities[batch.start])
        else:
            with reduced_products(module):
                out = run_layer(module, inputs)
        return recorder.end(out, inputs.lengths)

    def _culprit(self, record: _Record, batch: range, samples: Sequence[LayerInput]) -> str:
        """The sample of a batch that cannot be recorded. The run is over, so statistics may count samples twice."""
        for position, inputs in zip(batch, samples, strict=True):
            try:
                record(range(position, position + 1), inputs)
            except QuantError:
                return self.stems.samples[position].where
        return ", ".join(self.stems.samples[position].where for position in batch)

    def advance(self, layer: int, module: Callable[[], torch.nn.Module], probe_errors: Errors) -> OutputError:
        """Move to the next layer's inputs. Returns the error of the quantized layer's outputs against the float layer.

        With propagate_error the next inputs are the quantized layer's outputs, and the error covers all samples.
        Without it they are the float layer's outputs, and the error is `probe_errors`, that of the probe samples.
        module: builds the quantized layer; called only with propagate_error.
        """
        if self._plan.calibration.propagate_error:
            errors: list[tuple[torch.Tensor, torch.Tensor]] = []
            following = self._boundary(layer + 1)
            following.write(self._quantized_outputs(layer, module(), errors))
            self._exact.path.unlink()
            self._hidden = following
            sums = add_sums(self._split.gather(sums_by_modality(errors)))
        else:
            self.advance_float()
            sums = probe_errors
        error, signal = sums.error, sums.signal
        present = torch.nonzero(signal).flatten().tolist()
        return OutputError(
            relative_error(float(error.sum()), float(signal.sum())),
            {MODALITIES[i]: relative_error(float(error[i]), float(signal[i])) for i in present},
            relative_error(float(sums.ordinary_error.sum()), float(sums.ordinary_signal.sum())),
            int(sums.massive.sum()),
        )

    def advance_float(self) -> None:
        """Move to the next layer's inputs as the float layer computed them; for a plan without propagate_error."""
        self._hidden = self._exact

    def _quantized_outputs(
        self, layer: int, module: torch.nn.Module, errors: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """errors: receives the squares of each of this process' samples by token, and the tokens' modality."""
        shares, own = (1.0 - self._forward_share(), 1.0), 0
        for batch, samples in self._inputs(layer, "quantized forward", shares):
            joined = run_layer(module, join_samples(samples))
            outputs = torch.split(joined, self._lengths(batch), dim=1)
            for position, inputs, out in zip(batch, samples, outputs, strict=True):
                exact = self._exact.read(own).to(self._device)
                errors.append((squared_errors(inputs.hidden, exact, out), self.stems.modalities[position]))
                own += 1
                yield out
