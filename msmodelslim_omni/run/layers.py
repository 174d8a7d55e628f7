"""The steps of each decoder layer: load -> capture -> process -> propagate -> measure. The next layer is read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..calibration import CalibrationStream, Errors, LayerProbe, zero_errors
from ..formats import cache_tensors
from ..numerics import (
    CacheScales,
    QuantizedLinear,
    WeightChecks,
    make_reducible,
    quantize_weight,
    relative_error,
    widen_on_use,
)
from ..plan import LayerPlan, QuantPlan
from ..processors import PROCESSORS, LayerWork
from ..runtime import Clock, free_memory, prefetch
from ..storage import TORCH_DTYPES, load_tensor
from .cache import CachePeaks
from .emulation import quantized_layer
from .measure import record_layer
from .preparation import Prepared

# A layer's quantized Linears and the float tensors that changed, by checkpoint name.
Results = tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]


def quantized_layers(
    prepared: Prepared,
    stream: CalibrationStream | None,
    first: int,
    clock: Clock,
    computed: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[tuple[int, Results, dict[str, Any]]]:
    """Quantize the layers from `first` on. Yields each layer's number, its results and its record for the report.

    computed: in a data-free run, gets the number of integers of each Linear, and may wait.
    """
    if stream is None:
        yield from _rounded_layers(prepared, first, clock, computed)
        return
    plan, device = prepared.plan, prepared.device.torch
    layers = plan.layers[first:]
    with prefetch(partial(load_layer, plan), layers, stream.budget.read_ahead) as loaded:
        for layer in layers:
            with clock("read"):
                weights = next(loaded)
            work, record = _quantize_layer(prepared, layer, weights, stream, clock)
            results = _results(plan, work)
            del work, weights  # free them while the previous layer is written
            yield layer.index, results, record
            del results
            free_memory(device)


def _rounded_layers(
    prepared: Prepared, first: int, clock: Clock, computed: Callable[[int], None]
) -> Iterator[tuple[int, Results, dict[str, Any]]]:
    """The same for a data-free run, which holds one Linear and the next one instead of a whole layer."""
    plan, device = prepared.plan, prepared.device.torch
    linears = plan.layer_spec.linears
    turns = [
        (layer, linear, plan.checkpoint.tensors[plan.model.layer_name(layer.index, f"{linear}.weight")])
        for layer in plan.layers[first:]
        for linear in linears
    ]
    # Two buffers in turn: one is read into while the other is rounded. Fresh memory would be slower than the reading.
    widest = max((info.nbytes for _, _, info in turns), default=0)
    memory = [torch.empty(widest, dtype=torch.uint8) for _ in range(2 if plan.budget.read_ahead else 1)]

    def load(turn: int) -> torch.Tensor:
        return load_tensor(turns[turn][2], memory[turn % len(memory)])

    quantized: dict[str, QuantizedLinear] = {}
    records: list[dict[str, Any]] = []
    with prefetch(load, range(len(turns)), plan.budget.read_ahead) as loaded:
        for layer, linear, _ in turns:
            with clock("read"):
                weights = {f"{linear}.weight": next(loaded).to(device)}
            work = LayerWork(
                layer.index, plan.layer_spec.for_linear(linear), layer.schemes, weights, team=prepared.team
            )
            work = _process(layer.for_linear(linear), work, clock)
            with clock("measure"):
                records.append(record_layer(plan, layer, work, None))
            quantized |= _results(plan, work)[0]
            with clock("write"):
                computed(sum(q.qweight.numel() for q in work.quantized.values()))
            del work
            if len(records) == len(linears):
                yield layer.index, (quantized, {}), {**records[0], "linears": [r["linears"][0] for r in records]}
                quantized, records = {}, []
                free_memory(device)


def _quantize_layer(
    prepared: Prepared,
    layer: LayerPlan,
    weights: dict[str, torch.Tensor],
    stream: CalibrationStream,
    clock: Clock,
) -> tuple[LayerWork, dict[str, Any]]:
    """One decoder layer: capture -> process -> propagate -> measure. Returns the quantized layer and its record."""
    plan = prepared.plan
    on_device = {name: tensor.to(prepared.device.torch) for name, tensor in weights.items()}
    work = LayerWork(layer.index, plan.layer_spec, layer.schemes, on_device, team=prepared.team)
    with clock("forward"):
        module = float_module(prepared, work)
        peaks = CachePeaks(module) if plan.kv_cache is not None else None
        seen = stream.capture(layer.index, module, plan.layer_spec)
        del module
    probe, stats = seen.probe, {group: s.weighted_by(seen.importance) for group, s in seen.stats.items()}
    seen = replace(seen, stats={})  # frees H of each modality
    loaded = replace(work, stats={group: s.without_gram() for group, s in stats.items()}, importance=seen.importance)
    work = _process(layer, replace(loaded, stats=stats, probe=probe), clock)
    del stats
    work = work.without_gram()
    work, probe_errors = _check_against_rounding(plan, loaded, work, probe, clock)
    cache = None
    if peaks is not None and plan.kv_cache is not None:
        cache = peaks.scales(plan.kv_cache, work, prepared.team)
        work = _with_cache(plan, work, cache)
    with clock("propagate"):
        output = stream.advance(layer.index, partial(_module, plan, work, cache=cache), probe_errors)
    with clock("measure"):
        return work, record_layer(plan, layer, work, output)


def _with_cache(plan: QuantPlan, work: LayerWork, cache: CacheScales) -> LayerWork:
    """The layer with the scales of its KV cache among its tensors, in the dtype of k_proj."""
    key_weight = plan.checkpoint.tensors[plan.model.layer_name(work.index, "self_attn.k_proj.weight")]
    tensors = cache_tensors(cache, TORCH_DTYPES[key_weight.dtype])
    return replace(work, weights={**work.weights, **tensors}, changed=work.changed | tensors.keys())


def _process(layer: LayerPlan, work: LayerWork, clock: Clock) -> LayerWork:
    for step in layer.steps:
        with clock(step.processor):
            work = PROCESSORS[step.processor].apply(work, step.config, step.linears)
    return work


def _check_against_rounding(
    plan: QuantPlan, loaded: LayerWork, work: LayerWork, probe: LayerProbe, clock: Clock
) -> tuple[LayerWork, Errors]:
    """The layer to write, and its output errors on the probe samples.

    After a search on H, the layer is compared with plain rounding and the better one is taken. Otherwise the errors
    are measured only if no sample runs through the quantized layer later, that is, without propagate_error.
    """
    probe.release()
    if plan.statistics == "gram":
        with clock("check"):
            return _no_worse_than_rounding(plan, loaded, work, probe)
    if plan.calibration.propagate_error:
        return work, zero_errors()
    with clock("check"):
        return work, probe.errors(_module(plan, work, keep_widened=False))


def _no_worse_than_rounding(
    plan: QuantPlan, loaded: LayerWork, work: LayerWork, probe: LayerProbe
) -> tuple[LayerWork, Errors]:
    """The layer, its blocks plainly rounded or not, whichever changes the output least.

    If the output error is not below that of plain rounding, often only one of attention and MLP is to blame: no factor
    is folded from one into the other, so that each can be rounded plainly alone.
    """
    if not loaded.schemes:
        return work, probe.errors(_module(plan, work, keep_widened=False))
    checks = WeightChecks()
    plain = replace(
        loaded,
        quantized={
            linear: replace(
                quantize_weight(
                    loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="minmax"), checks=checks
                ),
                input_global=loaded.input_global(linear),
            )
            for linear, scheme in loaded.schemes.items()
        },
    )
    checks.raise_fault()
    searched = probe.errors(_module(plan, work, keep_widened=False))
    rounded = probe.errors(_module(plan, plain, keep_widened=False))
    error, of_plain = probe.weighted_error(searched), probe.weighted_error(rounded)
    ratio = relative_error(error, of_plain)
    if error < of_plain:
        return replace(work, over_plain=ratio), searched
    why = f"the search's output error was {ratio:.3f}x as large" if of_plain > 0 else "it is exact here"
    blocks = {group.block for group in loaded.spec.groups}
    candidates = [(_with_plain_blocks(work, plain, blocks), "fell back to plain rounding", rounded)]
    for block in sorted(blocks) if len(blocks) > 1 else ():
        mixed = _with_plain_blocks(work, plain, {block})
        errors = probe.errors(_module(plan, mixed, keep_widened=False))
        candidates.append((mixed, f"{block} fell back to plain rounding", errors))
    chosen, what, errors = min(candidates, key=lambda candidate: probe.weighted_error(candidate[2]))
    ratio = relative_error(probe.weighted_error(errors), of_plain) if of_plain > 0 else 1.0
    return replace(chosen, over_plain=ratio, notes=(*work.notes, f"{what}: {why}")), errors


def _with_plain_blocks(work: LayerWork, plain: LayerWork, blocks: set[str]) -> LayerWork:
    """`work` with some of its blocks as in `plain`, together with the norms in front of them."""
    groups = [group for group in work.spec.groups if group.block in blocks]
    prefixes = tuple(f"{name}." for name in {*blocks, *(group.previous for group in groups)})
    linears = {linear for group in groups for linear in group.linears}
    reverted = {group.name for group in groups}
    unscaled = {name: stats for name, stats in (plain.stats or {}).items() if name in reverted}
    return replace(
        work,
        weights={n: plain.weights[n] if n.startswith(prefixes) else tensor for n, tensor in work.weights.items()},
        folds={linear: fold for linear, fold in work.folds.items() if linear not in linears},
        quantized={n: plain.quantized[n] if n in linears else q for n, q in work.quantized.items()},
        stats=None if work.stats is None else {**work.stats, **unscaled},
        changed=frozenset(name for name in work.changed if not name.startswith(prefixes)),
        smoothing=tuple(
            replace(record, alpha=None, gain=1.0, reason=f"reverted: {record.reason}")
            if record.group in reverted
            else record
            for record in work.smoothing
        ),
    )


def load_layer(plan: QuantPlan, layer: LayerPlan) -> dict[str, torch.Tensor]:
    """The tensors of a layer in their stored dtype."""
    return {
        relative: plan.checkpoint.load_finite(plan.model.layer_name(layer.index, relative))
        for relative in plan.layer_spec.shapes
    }


def _module(
    plan: QuantPlan, work: LayerWork, keep_widened: bool = True, cache: CacheScales | None = None
) -> torch.nn.Module:
    """The library's layer with the tensors of `work`. keep_widened, cache: see quantized_layer."""
    of_layer = {name: work.weights[name] for name in plan.layer_spec.shapes}  # without the scales of the cache
    floats = {name: t for name, t in of_layer.items() if name.removesuffix(".weight") not in work.quantized}
    return quantized_layer(plan.model, plan.checkpoint.config, work.index, floats, work.quantized, keep_widened, cache)


def float_module(prepared: Prepared, work: LayerWork) -> torch.nn.Module:
    """The library's layer before quantization, with products in the chosen number format.

    Experts, which are most of the memory, keep the weights of `work`, in their stored dtype.
    """
    plan, names = prepared.plan, work.spec.linears
    experts = [name for group in work.spec.groups if group.expert is not None for name in group.linears]
    floats = {name: work.weights[name] for name in plan.layer_spec.shapes}
    as_stored = frozenset(f"{name}.weight" for name in experts)
    module = quantized_layer(plan.model, plan.checkpoint.config, work.index, floats, {}, as_stored=as_stored)
    if prepared.precision.is_reduced:
        exact = [name for name in names if work.weights[f"{name}.weight"].dtype == torch.bfloat16]
        make_reducible(module, exact, [name for name in names if name not in exact])
    else:
        widen_on_use(module, experts)
    return module


def _results(plan: QuantPlan, work: LayerWork) -> Results:
    """The quantized Linears and the float tensors that changed, by checkpoint name."""
    quantized = {plan.model.layer_name(work.index, name): linear for name, linear in work.quantized.items()}
    changed = work.changed - {f"{linear}.weight" for linear in work.quantized}
    return quantized, {plan.model.layer_name(work.index, relative): work.weights[relative] for relative in changed}
