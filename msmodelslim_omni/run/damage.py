"""The damage of a unit: KL(float || changed) of the model if this unit alone is quantized. For `keep` and `analyze`.

A unit is the Linears that read one input, or all experts of a layer; runtimes fuse them, so they share a scheme. While
the samples pass the float model layer by layer, the probe samples also pass copies of it that differ in one unit each:
such a copy begins with the output of the layer that holds the unit, and goes on through the float layers. Behind the
last layer the next-token distributions are compared at every position that predicts text, in nats.

So later layers amplify or suppress an error as they do in use, and the first token, which others attend to, counts for
what it is worth. A copy costs as much as the probe samples in the layers behind the unit. Not modeled: errors of
several units that add up or cancel out; the damage of several units is taken to be the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..calibration import CalibrationStream, HiddenStates, LayerProbe
from ..errors import QuantError
from ..models import LinearGroup
from ..numerics import QuantizedLinear
from ..plan import LayerPlan, QuantPlan
from ..processors import PROCESSORS, LayerWork
from ..statistics import run_layer
from ..tuning import Head
from .emulation import EmulatedLinear

Unit = tuple[LinearGroup, ...]

_TEXT = 0  # the index of text in MODALITIES


class ChangedModels:
    """The probe samples in copies of the float model, on their way through the layers. Order: that of `advance`."""

    def __init__(self, plan: QuantPlan, stream: CalibrationStream, folder: Path, device: torch.device) -> None:
        """folder: for the hidden states of the copies, one file for each boundary between layers."""
        self._plan, self._folder, self._device = plan, folder, device
        self._ends = stream.ends(len(plan.layers))
        self._samples = self._ends.probe
        self._lengths = [len(self._ends.modality(position)) for position in self._samples]
        self._count = 0

    def _boundary(self, layer: int, count: int) -> HiddenStates:
        path = self._folder / f"changed-{layer:04d}.safetensors"
        return HiddenStates(path, self._lengths * count, self._plan.layer_spec.hidden_size, 0)

    def can_start_at(self, layer: int, count: int) -> bool:
        """Whether the states of so many copies before this layer are stored and undamaged."""
        return count == 0 or self._boundary(layer, count).is_whole()

    def start_at(self, count: int) -> None:
        """Go on with so many stored copies."""
        self._count = count

    def advance(self, layer: int, module: torch.nn.Module, new: Sequence[Sequence[torch.Tensor]]) -> None:
        """Take all copies through a float layer, and add new ones. new: the changed outputs of this layer."""
        before, count = self._boundary(layer, self._count), self._count + len(new)

        def states() -> Iterator[torch.Tensor]:
            for number in range(self._count):
                for own, position in enumerate(self._samples):
                    hidden = before.read(number * len(self._samples) + own)
                    yield run_layer(module, self._ends.layer_input(position, layer, hidden, self._device)).cpu()
            for outputs in new:
                yield from outputs

        if count:
            self._boundary(layer + 1, count).write(states())
        self._count = count

    def forget(self, layer: int) -> None:
        """Delete the states before a layer. Call it once what comes behind it is safe."""
        self._boundary(layer, 0).path.unlink(missing_ok=True)

    def divergences(self) -> list[float]:
        """The mean KL(float || copy) in nats of each copy, over the positions that predict text."""
        final = self._boundary(len(self._plan.layers), self._count)
        positions = [(self._ends.modality(p)[1:] == _TEXT).nonzero().flatten() for p in self._samples]
        total = sum(map(len, positions))
        if not total:
            raise QuantError("no probe sample has a text token whose prediction could be measured", "add texts")

        def scored(states: Iterator[torch.Tensor]) -> torch.Tensor:
            entering = [
                self._ends.entering_norm(position, next(states))[0, own]
                for position, own in zip(self._samples, positions, strict=True)
            ]
            return torch.cat(entering).to(self._device)

        def copies() -> Iterator[torch.Tensor]:
            states = (final.read(number) for number in range(len(final)))
            for _ in range(self._count):
                yield scored(states)

        exact = scored(self._ends.exact.read(position) for position in self._samples)
        return [kl / total for kl in Head(self._plan, self._device).divergences(exact, copies)]


def unit_changes(work: LayerWork, plan: LayerPlan, unit: Unit, probe: LayerProbe) -> list[torch.Tensor]:
    """How the layer's output changes on the probe samples if this unit alone is quantized; see LayerProbe.changes.

    work: the float layer. The steps of the plan, with their scaling or smoothing, are applied to this unit only.
    """
    block = unit[0].block
    return probe.changes(block, quantized_modules(work, plan, unit), is_last=block == work.spec.groups[-1].block)


def quantized_modules(work: LayerWork, plan: LayerPlan, unit: Unit) -> dict[str, torch.nn.Module]:
    """Apply the steps of the plan to one unit only. Returns its Linears as modules for use in the float layer.

    The modules of a group take unscaled inputs and divide these by the factors that the steps folded into the columns.
    If the unit also has the Linear before the group, as up before down of an expert, its rows are divided already.
    """
    linears = [linear for group in unit for linear in group.linears]
    for step in plan.steps:
        work = PROCESSORS[step.processor].apply(work, step.config, frozenset(linears))
    modules: dict[str, torch.nn.Module] = {}
    for group in unit:
        columns = None if group.previous in linears else work.fold(group.linears[0]).columns
        modules |= {linear: _Rescaled(work.quantized[linear], work.bias(linear), columns) for linear in group.linears}
    return modules


class _Rescaled(EmulatedLinear):
    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, columns: torch.Tensor | None) -> None:
        super().__init__(linear, bias)
        self._columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self._columns is None else x / self._columns)
