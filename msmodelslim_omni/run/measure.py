"""Measures the error of each quantized Linear, for the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..calibration import OutputError
from ..models import MODALITIES
from ..numerics import (
    QuantizedLinear,
    quantized_matmul,
    relative_error,
    row_squares,
    weight_error,
)
from ..plan import LayerPlan, QuantPlan
from ..processors import LayerWork
from ..report import LayerRecord, LinearRecord
from ..statistics import InputStats, is_ordinary


def record_layer(plan: QuantPlan, layer: LayerPlan, work: LayerWork, output: OutputError | None) -> dict[str, Any]:
    """The LayerRecord of a layer as JSON data. output: the error of the whole layer; None for a data-free run."""
    linears = work.team.map(
        lambda linear: asdict(_linear_record(plan, layer, work, linear)),
        work.spec.linears,
        [float(work.weights[f"{linear}.weight"].numel()) for linear in work.spec.linears],
    )
    smoothing = tuple(asdict(record) for record in work.smoothing)
    record = LayerRecord(layer.index, (), smoothing, notes=work.notes, error_over_plain=work.over_plain)
    if work.stats is not None and work.spec.experts is not None:
        record = replace(record, expert_tokens=_expert_tokens(work))
    if output is not None:
        record = replace(
            record,
            output_error=output.overall,
            output_error_by_modality=output.by_modality,
            output_error_ordinary=output.ordinary,
            massive_tokens=output.massive,
        )
    return {**asdict(record), "linears": linears}


def _expert_tokens(work: LayerWork) -> dict[str, list[int]]:
    """The number of calibration tokens that each expert got, by modality."""
    assert work.stats is not None and work.spec.experts is not None
    counts = torch.zeros((len(MODALITIES), work.spec.experts.count), dtype=torch.int64)
    for group in work.spec.groups:
        if group.expert is not None and group.name in work.stats:
            counts[:, group.expert] = work.stats[group.name].count
    return {name: counts[m].tolist() for m, name in enumerate(MODALITIES) if bool(counts[m].any())}


def _linear_record(plan: QuantPlan, layer: LayerPlan, work: LayerWork, linear: str) -> LinearRecord:
    name, weight = plan.model.layer_name(layer.index, linear), work.weight(linear)
    shape = (weight.shape[0], weight.shape[1])
    quantized = work.quantized.get(linear)
    if quantized is None:
        return LinearRecord(name, shape, "FLOAT")
    of_weight = weight_error(weight, quantized)
    if work.stats is None:
        return LinearRecord(name, shape, quantized.scheme.name, of_weight)
    group = next(group for group in work.spec.groups if linear in group.linears)
    stats = work.stats.get(group.name)
    if stats is None or not len(stats.rows):  # no kept token reached this expert
        return LinearRecord(name, shape, quantized.scheme.name, of_weight)
    overall, by_modality = output_error(stats, weight, quantized)
    return LinearRecord(name, shape, quantized.scheme.name, of_weight, overall, by_modality)


def output_error(stats: InputStats, weight: torch.Tensor, linear: QuantizedLinear) -> tuple[float, dict[str, float]]:
    """|Y - Ŷ| / |Y| on the kept rows, overall and by modality. The bias cancels and is omitted.

    Rows with massive outputs are left out, because the figures would show nothing else; see is_ordinary. Overall weighs
    the modalities by the tokens that all samples have, not by the rows kept.
    """
    exact = stats.rows @ weight.to(torch.float32).T  # [rows, out]
    error, signal = row_squares(quantized_matmul(stats.rows, linear) - exact), row_squares(exact)
    ordinary = is_ordinary(signal, stats.row_modality)
    total_error = total_signal = 0.0
    by_modality = {}
    for index in stats.sampled():
        mine = (stats.row_modality == index) & ordinary
        e, s = float(error[mine].mean()), float(signal[mine].mean())
        by_modality[MODALITIES[index]] = relative_error(e, s)
        total_error += e * int(stats.count[index])
        total_signal += s * int(stats.count[index])
    return relative_error(total_error, total_signal), by_modality
