"""Quantization error of each Linear, and its effect on the model. Processes one decoder layer at a time.

For each Linear, on the inputs of the float model: the relative error of its weight and of its output, by modality, as
int4 and as int8 with int8 activations, both with plain rounding. These errors are a property of the Linear and
reproducible. A unit is the Linears that read one input, or all experts of a layer; runtimes fuse them, so they share a
scheme. For each unit, after the steps of the recipe (AWQ and GPTQ, or smoothing) were applied to this unit only:

    damage(u, k) = KL(float || model with u alone in scheme k), in nats      (run/damage.py)
    noise(u, k)  = mean over tokens of |e|² / |h|², by modality

with e [hidden] the true error of the output of the unit's layer for one token, and h [hidden] that output. The noise
shows what media tokens suffer, whose effect on the text after them the damage includes.

The damage of several units is the sum of their damages: KL grows with the square of a small noise, and in the square of
a sum of noises, Σ_u |e_u|² + Σ_{u≠v} e_u·e_v, the products vanish on average if the errors have no common direction.
Not modeled: aligned errors, and noise so large that its effect is no longer quadratic. Therefore every recipe is
evaluated before it is returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from ..calibration import CalibrationStream, CalibSet, Captured, Stems, prepare_stems
from ..errors import QuantError
from ..models import MODALITIES, LayerSpec
from ..numerics import (
    QuantizedLinear,
    QuantScheme,
    dequantize,
    quantize_weight,
    relative_error,
    weight_error,
)
from ..plan import LayerPlan, QuantPlan
from ..processors import LayerWork
from ..run import ChangedModels, Unit, output_error, output_squares, unit_changes
from ..runtime import Progress, free_memory
from ..statistics import InputStats

# A value is an outlier beyond this many times the root mean square of all values of the input.
OUTLIER_RMS = 6.0


@dataclass(frozen=True)
class Error:
    """A relative error: over all tokens, and by modality."""

    overall: float
    by_modality: dict[str, float]


@dataclass(frozen=True)
class LinearSensitivity:
    """Errors of one Linear with plain rounding, by name of the scheme, and statistics of its input.

    weight_error: |Ŵ - W| / |W|. output_error: |Ŷ - Y| / |Y|, for int4 over all tokens in H, for int8 over the kept rows
    (a fixed number of evenly spaced tokens per modality). kurtosis: E[x⁴] / E[x²]² - 3 of the values in the kept rows;
    0 for a normal distribution. outlier_share: share of these values beyond OUTLIER_RMS times their root mean square.
    """

    name: str
    shape: tuple[int, int]
    weight_error: dict[str, float]
    output_error: dict[str, Error]
    kurtosis: float
    outlier_share: float


@dataclass(frozen=True)
class UnitSensitivity:
    """The Linears that share one scheme, with their full names.

    noise: by name of the scheme and modality; damage: by name of the scheme; see the top of this file. size: stored
    bytes by name of the scheme, including FLOAT. damage is empty until the samples have passed the last layer, and size
    until run.py sets it.
    """

    layer: int
    group: str
    linears: tuple[LinearSensitivity, ...]
    noise: dict[str, dict[str, float]]
    damage: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.group}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)


class FinishedLayers(Protocol):
    """Where a pass keeps the units of each layer that it has measured."""

    @property
    def layers(self) -> list[list[UnitSensitivity]]:
        """The units of the finished layers, from the first layer on."""

    def keep(self, count: int) -> None:
        """Drop all but the first `count` layers."""

    def add_layer(self, units: Sequence[UnitSensitivity]) -> None:
        """Add the next layer."""

    def finish(self, layers: Sequence[Sequence[UnitSensitivity]]) -> None:
        """Replace all layers by the same with the damage of their units."""


def measure_units(
    plans: Mapping[str, QuantPlan],
    calib: CalibSet,
    folder: Path,
    device: torch.device,
    progress: Progress,
    store: FinishedLayers,
    linears: Collection[str],
) -> tuple[list[UnitSensitivity], Stems]:
    """Measure units in one pass of the samples through the float model. Returns them with the stems of the samples.

    plans: by the name of the scheme that all Linears have in the plan. The stream uses the first plan, which collects H
    and does not set propagate_error. folder: for hidden states, which are deleted after use. store: receives each
    layer. Its layers of an interrupted pass are not measured again if the hidden states behind them are in `folder`.
    linears: full names. A unit with any of them is measured; layers without such a unit only pass the samples on.
    """
    plan = next(iter(plans.values()))
    stems = prepare_stems(plan, calib, folder, device, progress)
    stream = CalibrationStream(plan, stems, folder, device, progress=progress)
    finished = store.layers
    selected = [_selected_units(plan, layer.index, linears) for layer in plan.layers]
    if len(finished) == len(plan.layers) and all(unit.damage for of_layer in finished for unit in of_layer):
        return [unit for layer_units in finished for unit in layer_units], stems
    copies = ChangedModels(plan, stream, folder, device)
    first, count = len(finished), sum(len(unit.noise) for of_layer in finished for unit in of_layer)
    if not (stream.can_start_at(first) and copies.can_start_at(first, count)):
        first = count = 0
    store.keep(first)
    layers = finished[:first]
    stream.start_at(first)
    copies.start_at(count)
    progress.step("layers", first, len(plan.layers), f"{len(stems)} samples")
    for layer, chosen in zip(plan.layers[first:], selected[first:], strict=True):
        layers.append(_measure_layer(plans, layer.index, chosen, stream, copies, device))
        stream.advance_float()
        store.add_layer(layers[-1])
        stream.forget(layer.index)
        copies.forget(layer.index)
        free_memory(device)
        progress.step("layers", layer.index + 1, len(plan.layers), f"{len(stems)} samples")
    damages = iter(copies.divergences())
    layers = [
        [replace(unit, damage={scheme: next(damages) for scheme in unit.noise}) for unit in of_layer]
        for of_layer in layers
    ]
    store.finish(layers)
    return [unit for of_layer in layers for unit in of_layer], stems


def _selected_units(plan: QuantPlan, index: int, linears: Collection[str]) -> list[Unit]:
    """The units of a layer with any of these Linears."""
    return [
        unit
        for unit in plan.layer_spec.units
        if any(plan.model.layer_name(index, linear) in linears for group in unit for linear in group.linears)
    ]


def _measure_layer(
    plans: Mapping[str, QuantPlan],
    index: int,
    units: Sequence[Unit],
    stream: CalibrationStream,
    copies: ChangedModels,
    device: torch.device,
) -> list[UnitSensitivity]:
    """Measure these units of a layer, and compute its outputs, also those of `copies` and of the layer's own copies."""
    plan = next(iter(plans.values()))
    model, checkpoint, spec = plan.model, plan.checkpoint, plan.layer_spec
    weights = {
        relative: checkpoint.load_finite(model.layer_name(index, relative)).to(device, torch.float32)
        for relative in spec.shapes
    }
    module = model.family.build_layer(checkpoint.config, index, weights)
    measured: list[UnitSensitivity] = []
    outputs: list[list[torch.Tensor]] = []
    if not units:
        stream.forward_float(index, module)
    else:
        captured = stream.capture(index, module, spec)
        for unit in units:
            names = {linear: model.layer_name(index, linear) for group in unit for linear in group.linears}
            try:
                found, changed = measure_unit(
                    unit, names, weights, {s: p.layers[index] for s, p in plans.items()}, spec, captured
                )
            except QuantError as error:
                raise QuantError(f"layer {index}, {error.message}", error.hint) from error
            measured.append(found)
            outputs += changed
    copies.advance(index, module, outputs)
    return measured


def measure_unit(
    unit: Unit,
    names: Mapping[str, str],
    weights: Mapping[str, torch.Tensor],
    plans: Mapping[str, LayerPlan],
    spec: LayerSpec,
    captured: Captured,
) -> tuple[UnitSensitivity, list[list[torch.Tensor]]]:
    """Measure one unit in every scheme; its damage is still unknown. Also returns the layer's outputs on the probe
    samples with the unit in each scheme.

    weights: of the layer, by relative name, float32. names: relative -> full.
    """
    group_of = {linear: group for group in unit for linear in group.linears}
    weight_errors: dict[str, dict[str, float]] = {linear: {} for linear in group_of}
    output_errors: dict[str, dict[str, Error]] = {linear: {} for linear in group_of}
    noise: dict[str, dict[str, float]] = {}
    outputs: list[list[torch.Tensor]] = []
    for scheme, plan in plans.items():
        for linear, group in group_of.items():
            weight = weights[f"{linear}.weight"]
            quantized = _round_plainly(linear, weight, plan.schemes[linear])
            weight_errors[linear][scheme] = weight_error(weight, quantized)
            stats = captured.stats.get(group.name)
            reached = stats is not None and len(stats.rows) > 0  # an expert may get no token
            output_errors[linear][scheme] = (
                _output_error(stats, weight, quantized)
                if stats is not None and reached
                else Error(weight_errors[linear][scheme], {})
            )
        work = LayerWork(
            plan.index, spec, plan.schemes, dict(weights), captured.stats, captured.importance, probe=captured.probe
        )
        changes = unit_changes(work, plan, unit, captured.probe)
        noise[scheme] = captured.probe.noise(changes)
        outputs.append(captured.probe.changed_outputs(changes))
    tails = {group.name: _tail_of(captured.stats.get(group.name)) for group in unit}
    linears = tuple(
        LinearSensitivity(
            names[linear],
            (weights[f"{linear}.weight"].shape[0], weights[f"{linear}.weight"].shape[1]),
            weight_errors[linear],
            output_errors[linear],
            *tails[group.name],
        )
        for linear, group in group_of.items()
    )
    name = unit[0].name if unit[0].expert is None else "experts"
    return UnitSensitivity(next(iter(plans.values())).index, name, linears, noise), outputs


def _round_plainly(linear: str, weight: torch.Tensor, scheme: QuantScheme) -> QuantizedLinear:
    try:
        return quantize_weight(weight, replace(scheme, weight_method="minmax"))
    except QuantError as error:
        raise QuantError(f"{linear}.weight: {error.message}", error.hint) from error


def _output_error(stats: InputStats, weight: torch.Tensor, quantized: QuantizedLinear) -> Error:
    """Relative output error: Σ ΔW H ΔWᵀ / Σ W H Wᵀ, exact, if activations stay float and H is per modality.

    Otherwise measured on the kept rows.
    """
    if quantized.scheme.act_bits is not None or not stats.grams:
        return Error(*output_error(stats, output_squares(stats, weight, quantized).cpu()))
    change = dequantize(quantized) - weight
    errors = {m: float(gram.output_error(change).sum()) for m, gram in stats.grams.items()}
    signals = {m: float(gram.output_error(weight).sum()) for m, gram in stats.grams.items()}
    by_modality = {MODALITIES[m]: relative_error(errors[m], signals[m]) for m in sorted(errors)}
    return Error(relative_error(sum(errors.values()), sum(signals.values())), by_modality)


def _tail_of(stats: InputStats | None) -> tuple[float, float]:
    return (0.0, 0.0) if stats is None or not len(stats.rows) else tail_statistics(stats.rows)


def tail_statistics(rows: torch.Tensor) -> tuple[float, float]:
    """Excess kurtosis about zero of all values of rows [n, in], and outlier share; see LinearSensitivity."""
    square = rows.square()
    mean = float(square.mean())
    if mean == 0:
        return 0.0, 0.0
    scaled = square / mean  # normalized before squaring again, to avoid overflow in float32
    return float(scaled.square().mean()) - 3.0, float((scaled > OUTLIER_RMS**2).to(torch.float32).mean())
