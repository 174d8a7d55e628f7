"""Builds the Report of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

from ..calibration import CalibSet, Stems
from ..files import file_sha256
from ..formats import FLOAT, OutTensor
from ..models import ModelSpec
from ..plan import QuantPlan, card_memory, peak_memory
from ..report import PartSize, Report, RunMemory, kept_units, layer_record, run_memory, tuning_record
from ..runtime import DEFAULT_BUDGET, NO_SAMPLES, Budget, Clock, Device, Precision, peak_device_memory, peak_rss
from ..version import __version__
from .request import QuantRequest


def make_report(
    plan: QuantPlan,
    *,
    device: Device,
    tensors: list[OutTensor],
    places: dict[str, str],
    output_bytes: dict[str, int],
    layers: Sequence[dict[str, Any]],
    stems: Stems | None,
    clock: Clock,
    resumed_at_layer: int,
    fingerprint: dict[str, str],
    warnings: tuple[str, ...],
    calib: CalibSet | None,
    request: QuantRequest,
    tuning: dict[str, Any] | None,
    kept: Sequence[dict[str, Any]],
    precision: Precision,
) -> Report:
    """tensors: those of the first format, whose sizes the report shows. layers, tuning, kept: from the manifest."""
    parts = part_sizes(plan, tensors)
    extent = stems.extent() if stems is not None else NO_SAMPLES
    return Report(
        model_type=plan.model.model_type,
        model_path=str(plan.checkpoint.path),
        quant_type=plan.recipe.quant_type or "custom",
        recipe=plan.recipe.path.name,
        savers=places,
        versions=versions(),
        device=device.name,
        seed=plan.seed,
        data_free=stems is None,
        samples=len(stems) if stems is not None else 0,
        tokens_by_modality=stems.tokens_by_modality() if stems is not None else {},
        parts=parts,
        output_bytes=output_bytes,
        source_bytes=plan.checkpoint.total_bytes,
        bits_per_weight=bits_per_weight((lin.shape for lin in plan.linears if lin.scheme is not None), tensors),
        layers=tuple(layer_record(layer) for layer in layers),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        resumed_at_layer=resumed_at_layer,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_device_memory(device.torch),
        warnings=(*plan.warnings, *warnings),
        peak_rise_by_phase=clock.peak_rises,
        run_memory=memory_of(plan.model, plan.checkpoint.config, parts, plan.kv_cache or ""),
        fingerprint=fingerprint,
        dataset=calib.name if calib is not None else "",
        dataset_digest=file_sha256(calib.index) if calib is not None else "",
        max_samples=plan.calibration.max_samples if calib is not None else None,
        commands=(command_words(request, plan, calib),),
        distinct_media=calib.distinct_media if calib is not None else {},
        own_texts=stems.own_texts if stems is not None else 0,
        tuning=tuning_record(tuning) if tuning is not None else None,
        compute_dtype=precision.name if calib is not None else "",
        compute_dtype_reason=precision.reason if calib is not None else "",
        kv_cache=plan.kv_cache or "",
        kept=kept_units(kept),
        expected_rss_bytes=peak_memory(plan, extent),
        expected_device_bytes=card_memory(plan, extent) if device.torch.type != "cpu" else 0,
    )


def command_words(request: QuantRequest, plan: QuantPlan, calib: CalibSet | None) -> tuple[str, ...]:
    """The command that makes this output from the files beside it: local folders are cut to their names.

    Everything that a recipe does not hold and that changes the output is a flag of it.
    """
    words = ["msmodelslim", "quant", request.model_path.name or "FLOAT", "OUT"]
    words += ["--config_path", f"{plan.recipe.path.stem}.yaml"]
    for saver in plan.savers:
        words += ["--save_format", saver.type]
    if calib is not None:
        words += ["--dataset", calib.name] if request.dataset is not None else []
        words += ["--max_samples", str(request.max_samples)] if request.max_samples is not None else []
        words += ["--on_bad_sample", request.on_bad_sample] if request.on_bad_sample is not None else []
        words += ["--effort", request.effort] if request.effort is not None else []
        words += ["--compute_dtype", request.compute_dtype] if request.compute_dtype is not None else []
        words += ["--seed", str(plan.seed)]
        is_sketched = plan.statistics == "gram" and _memory_for_gram(plan.budget) != _memory_for_gram(DEFAULT_BUDGET)
        words += ["--max_memory", str(request.max_memory)] if is_sketched and request.max_memory is not None else []
    return tuple(words)


def _memory_for_gram(budget: Budget) -> tuple[int, int]:
    """The parts of a memory limit that change the output."""
    return budget.matrix, budget.factor


def memory_of(model: ModelSpec, config: dict[str, Any], parts: Iterable[PartSize], kv_cache: str = "") -> RunMemory:
    """Estimated memory of a runtime that keeps the weights, and the KV cache, as the checkpoint says."""
    sizes = ((part.name, part.bytes_before, part.bytes_after) for part in parts)
    return run_memory(model, config, sizes, kv_cache)


def part_sizes(plan: QuantPlan, tensors: list[OutTensor]) -> tuple[PartSize, ...]:
    """Bytes of each part before and after quantization."""
    before: dict[str, list[int]] = {}
    for name, info in plan.checkpoint.tensors.items():
        before.setdefault(plan.model.part_of(name).name, []).append(info.nbytes)
    written = written_parts(plan.model, tensors)
    return tuple(
        PartSize(part.name, len(before[part.name]), sum(before[part.name]), *written[part.name])
        for part in plan.model.parts
        if part.name in before
    )


def written_parts(model: ModelSpec, tensors: Sequence[OutTensor]) -> dict[str, tuple[int, str]]:
    """Written bytes and schemes of each part, by the part's name."""
    sizes: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    for tensor in tensors:
        part = model.part_of(tensor.spec.name).name
        sizes[part] = sizes.get(part, 0) + tensor.spec.nbytes
        kinds.setdefault(part, set()).add(tensor.kind)
    return {
        part: (size, ", ".join(sorted(kinds[part] - {FLOAT})) or "float, unchanged") for part, size in sizes.items()
    }


def bits_per_weight(shapes: Iterable[tuple[int, int]], tensors: Sequence[OutTensor]) -> float:
    """Stored bits per weight of the quantized Linears, scales included. shapes: (out, in) of each Linear."""
    bits = 8 * sum(tensor.spec.nbytes for tensor in tensors if tensor.kind != FLOAT)
    return bits / sum(out_features * in_features for out_features, in_features in shapes)


def versions() -> dict[str, str]:
    return {"msmodelslim_omni": __version__, **{name: version(name) for name in ("torch", "transformers")}}
