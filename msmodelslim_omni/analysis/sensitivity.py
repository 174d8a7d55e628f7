"""How much each Linear of a decoder layer loses by quantization, and what that does to the model: one layer at a time.

Of each Linear alone, on the float model's inputs: the relative error of its weight and of its output, by modality, as
int4 and as int8 with int8 activations, both plainly rounded: a property of the Linear, the same from run to run. Of a
unit (the Linears that read one input, which runtimes fuse and which therefore share a scheme) also its damage, a share
of noise in the residual stream, after the recipe's own steps (AWQ and GPTQ, or smoothing) were applied to it alone:

    damage(u, k) = mean over tokens of |e|² / |h|²

with e [hidden] the true error of the block's output (attention or MLP) for one token when u alone has the scheme k, and
h [hidden] what leaves the layer. The mean is of text tokens, since at these the next token is foretold and KL measured;
it is known of the other modalities too.

Damages are added up: logits depend on the last h relative to its length, KL(float || quant) grows with the square of a
small noise, and in the square of a sum of noises, Σ_u |e_u|² + Σ_{u≠v} e_u·e_v, the products vanish on average where
errors have no common direction. That takes all noise to reach the logits alike. Left out are: errors that are aligned;
later layers, which amplify some directions and forget others, so that a unit's depth matters too; what noise in media
tokens does to the text behind them; a few tokens that have most of the noise and matter least, as int8 makes them;
noise so large that its effect is no longer a square. Hence a recipe made from damages is measured before it is handed
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..calibration import CalibrationStream, CalibSet, Captured, Stems, prepare_stems
from ..errors import QuantError
from ..models import MODALITIES, LayerSpec, LinearGroup
from ..numerics import (
    QuantizedLinear,
    QuantScheme,
    dequantize,
    quantize_weight,
    relative_error,
    weight_error,
)
from ..plan import LayerPlan, QuantPlan
from ..processors import PROCESSORS, LayerWork
from ..run import EmulatedLinear, output_error
from ..runtime import Progress, free_memory
from ..statistics import InputStats

# A value counts as an outlier beyond so many times the root mean square of all values of the input.
OUTLIER_RMS = 6.0


@dataclass(frozen=True)
class Error:
    """A relative error over all tokens, and by modality."""

    overall: float
    by_modality: dict[str, float]


@dataclass(frozen=True)
class LinearSensitivity:
    """One Linear; errors are of plain rounding, by the scheme's name.

    weight_error: |Ŵ - W| / |W|. output_error: |Ŷ - Y| / |Y|, for int4 over all tokens that H holds, for int8 over the
    kept rows (a fixed number of each modality, evenly spread). kurtosis: E[x⁴] / E[x²]² - 3 of the kept rows' values, 0
    for a normal distribution. outlier_share: share of them beyond OUTLIER_RMS times their root mean square.
    """

    name: str
    shape: tuple[int, int]
    weight_error: dict[str, float]
    output_error: dict[str, Error]
    kurtosis: float
    outlier_share: float


@dataclass(frozen=True)
class UnitSensitivity:
    """Linears that share one scheme, by full name.

    damage: see the top of this file; by the scheme's name. size: bytes as they are stored, by the scheme's name and of
    FLOAT, where that was asked for.
    """

    layer: int
    group: str
    linears: tuple[LinearSensitivity, ...]
    damage: dict[str, Error]
    size: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.group}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)


def measure_units(
    plans: Mapping[str, QuantPlan],
    calib: CalibSet,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[list[UnitSensitivity], Stems]:
    """One pass of the samples through the float model. folder: for hidden states, which are deleted as they are used.

    plans: by the scheme that all Linears have in it; the first is that of the stream, without propagate_error and with
    H. The returned stems say how many samples and tokens were used.
    """
    plan = next(iter(plans.values()))
    stems = prepare_stems(plan, calib, folder, device, progress)
    stream = CalibrationStream(plan, stems, folder, device)
    stream.start_at(0)
    units: list[UnitSensitivity] = []
    for layer in plan.layers:
        units += _measure_layer(plans, layer.index, stream, device)
        stream.advance_float()
        stream.forget(layer.index)
        free_memory(device)
        progress.step("layers", layer.index + 1, len(plan.layers), f"{len(stems)} samples")
    return units, stems


def _measure_layer(
    plans: Mapping[str, QuantPlan], index: int, stream: CalibrationStream, device: torch.device
) -> Iterator[UnitSensitivity]:
    plan = next(iter(plans.values()))
    model, checkpoint, spec = plan.model, plan.checkpoint, plan.layer_spec
    weights = {
        relative: checkpoint.load_finite(model.layer_name(index, relative)).to(device, torch.float32)
        for relative in spec.shapes
    }
    seen = stream.capture(index, model.family.build_layer(checkpoint.config, index, weights), spec)
    for group in spec.groups:
        names = {linear: model.layer_name(index, linear) for linear in group.linears}
        try:
            yield measure_unit(group, names, weights, {s: p.layers[index] for s, p in plans.items()}, spec, seen)
        except QuantError as error:
            raise QuantError(f"layer {index}, {error.message}", error.hint) from error


def measure_unit(
    group: LinearGroup,
    names: Mapping[str, str],
    weights: Mapping[str, torch.Tensor],
    plans: Mapping[str, LayerPlan],
    spec: LayerSpec,
    seen: Captured,
) -> UnitSensitivity:
    """One unit in every scheme. weights: of the layer by relative name, float32; names: relative -> full."""
    stats = seen.stats[group.name]
    of_weight: dict[str, dict[str, float]] = {linear: {} for linear in group.linears}
    of_output: dict[str, dict[str, Error]] = {linear: {} for linear in group.linears}
    damage: dict[str, Error] = {}
    for scheme, plan in plans.items():
        for linear in group.linears:
            weight = weights[f"{linear}.weight"]
            quantized = _plainly_rounded(linear, weight, plan.schemes[linear])
            of_weight[linear][scheme] = weight_error(weight, quantized)
            of_output[linear][scheme] = _output_error(stats, weight, quantized)
        work = LayerWork(plan.index, spec, plan.schemes, dict(weights), seen.stats, seen.importance, probe=seen.probe)
        noise = seen.probe.noise(group.block, quantized_modules(work, plan, group))
        damage[scheme] = Error(noise.get("text", sum(noise.values()) / len(noise)), noise)
    kurtosis, outlier_share = tail_statistics(stats.rows)
    linears = tuple(
        LinearSensitivity(
            names[linear],
            (weights[f"{linear}.weight"].shape[0], weights[f"{linear}.weight"].shape[1]),
            of_weight[linear],
            of_output[linear],
            kurtosis,
            outlier_share,
        )
        for linear in group.linears
    )
    return UnitSensitivity(next(iter(plans.values())).index, group.name, linears, damage)


def quantized_modules(work: LayerWork, plan: LayerPlan, group: LinearGroup) -> dict[str, torch.nn.Module]:
    """What the plan's steps make of one group alone, as modules for the float layer: they take what that layer hands
    them, and divide it by the factors that the steps have multiplied the columns by.
    """
    for step in plan.steps:
        work = PROCESSORS[step.processor].apply(work, step.config, frozenset(group.linears))
    columns = work.fold(group.linears[0]).columns
    return {linear: _Rescaled(work.quantized[linear], work.bias(linear), columns) for linear in group.linears}


class _Rescaled(EmulatedLinear):
    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None, columns: torch.Tensor | None) -> None:
        super().__init__(linear, bias)
        self._columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self._columns is None else x / self._columns)


def _plainly_rounded(linear: str, weight: torch.Tensor, scheme: QuantScheme) -> QuantizedLinear:
    try:
        return quantize_weight(weight, replace(scheme, weight_method="minmax"))
    except QuantError as error:
        raise QuantError(f"{linear}.weight: {error.message}", error.hint) from error


def _output_error(stats: InputStats, weight: torch.Tensor, quantized: QuantizedLinear) -> Error:
    """From H where activations stay float, exactly Σ ΔW H ΔWᵀ over Σ W H Wᵀ; else from the kept rows."""
    if quantized.scheme.act_bits is not None:
        return Error(*output_error(stats, weight, quantized))
    change = dequantize(quantized) - weight
    errors = {m: float(gram.output_error(change).sum()) for m, gram in stats.grams.items()}
    signals = {m: float(gram.output_error(weight).sum()) for m, gram in stats.grams.items()}
    by_modality = {MODALITIES[m]: relative_error(errors[m], signals[m]) for m in sorted(errors)}
    return Error(relative_error(sum(errors.values()), sum(signals.values())), by_modality)


def tail_statistics(rows: torch.Tensor) -> tuple[float, float]:
    """Excess kurtosis about zero of all values of rows [n, in], and the share beyond OUTLIER_RMS; see above."""
    square = rows.square()
    mean = float(square.mean())
    if mean == 0:
        return 0.0, 0.0
    scaled = square / mean  # before it is squared again, so that float32 holds it
    return float(scaled.square().mean()) - 3.0, float((scaled > OUTLIER_RMS**2).to(torch.float32).mean())
