"""Measures the error of each quantized Linear, for the report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..calibration import OutputError
from ..models import MODALITIES
from ..numerics import QuantizedLinear, quantized_matmul, relative_error, relative_norms, weight_squares
from ..plan import LayerPlan, QuantPlan
from ..processors import LayerWork
from ..report import LayerRecord, LinearRecord
from ..runtime import to_cpu
from ..statistics import InputStats, is_ordinary


def record_layer(plan: QuantPlan, layer: LayerPlan, work: LayerWork, output: OutputError | None) -> dict[str, Any]:
    """The LayerRecord of a layer as JSON data. output: the error of the whole layer; None for a data-free run."""
    squares = work.team.map(
        lambda linear: _squares(work, linear),
        work.spec.linears,
        [float(work.weights[f"{linear}.weight"].numel()) for linear in work.spec.linears],
    )
    on_cpu = iter(to_cpu([tensor for of_linear in squares for tensor in of_linear]))
    linears = tuple(
        asdict(_linear_record(plan, layer, work, linear, [next(on_cpu) for _ in of_linear]))
        for linear, of_linear in zip(work.spec.linears, squares, strict=True)
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
    return {**asdict(record), "linears": list(linears)}


def _expert_tokens(work: LayerWork) -> dict[str, list[int]]:
    """The number of calibration tokens that each expert got, by modality."""
    assert work.stats is not None and work.spec.experts is not None
    counts = torch.zeros((len(MODALITIES), work.spec.experts.count), dtype=torch.int64)
    for group in work.spec.groups:
        if group.expert is not None and group.name in work.stats:
            counts[:, group.expert] = work.stats[group.name].count
    return {name: counts[m].tolist() for m, name in enumerate(MODALITIES) if bool(counts[m].any())}


def _squares(work: LayerWork, linear: str) -> list[torch.Tensor]:
    """What the record of a Linear is computed from: weight_squares, then output_squares if there are rows."""
    quantized = work.quantized.get(linear)
    if quantized is None:
        return []
    weight, stats = work.weight(linear), _input_stats(work, linear)
    of_output = [] if stats is None else [output_squares(stats, weight, quantized)]
    return [*weight_squares(weight, quantized), *of_output]


def _input_stats(work: LayerWork, linear: str) -> InputStats | None:
    """The statistics of the input of a Linear; None without samples, or if no kept token reached this expert."""
    group = next(group for group in work.spec.groups if linear in group.linears)
    stats = None if work.stats is None else work.stats.get(group.name)
    return stats if stats is not None and len(stats.rows) else None


def _linear_record(
    plan: QuantPlan, layer: LayerPlan, work: LayerWork, linear: str, squares: list[torch.Tensor]
) -> LinearRecord:
    name, shape = plan.model.layer_name(layer.index, linear), work.weights[f"{linear}.weight"].shape
    quantized = work.quantized.get(linear)
    if quantized is None:
        return LinearRecord(name, (shape[0], shape[1]), "FLOAT")
    stats = _input_stats(work, linear)
    (of_weight,) = relative_norms([squares if stats is None else squares[:-1]])
    if stats is None:
        return LinearRecord(name, (shape[0], shape[1]), quantized.scheme.name, of_weight)
    overall, by_modality = output_error(stats, squares[-1])
    return LinearRecord(name, (shape[0], shape[1]), quantized.scheme.name, of_weight, overall, by_modality)


def output_squares(stats: InputStats, weight: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    """|Y - Ŷ|² and |Y|² of each kept row, float32 [2, rows]. The bias cancels and is omitted."""
    exact = stats.rows @ weight.to(torch.float32).T  # [rows, out]
    error = quantized_matmul(stats.rows, linear).sub_(exact)
    return torch.stack([error.square_().sum(dim=1), exact.square_().sum(dim=1)])


def output_error(stats: InputStats, squares: torch.Tensor) -> tuple[float, dict[str, float]]:
    """|Y - Ŷ| / |Y| on the kept rows, overall and by modality. squares: output_squares, on the CPU.

    Rows with massive outputs are left out, because the figures would show nothing else; see is_ordinary. Overall weighs
    the modalities by the tokens that all samples have, not by the rows kept.
    """
    error, signal = squares.to(torch.float64)
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
