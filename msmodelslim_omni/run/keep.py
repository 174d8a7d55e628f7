"""keep: which Linears stay in a better precision, because they cost most accuracy for their bytes.

Before the first layer is quantized, one pass of the samples through the float model measures the damage of every unit
(damage.py), quantized as the recipe does it and in the better precision. The units that avoid most damage per extra
byte are kept, as far as the recipe's limits reach. Measured layers and the choice are in the manifest, so a stopped run
does not measure again. With several processes the leader measures, and the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibrationStream, Stems
from ..plan import Keep, LayerPlan, QuantPlan
from ..processors import LayerWork
from ..report import KeptUnit, kept_units
from ..runtime import Clock, Progress, free_memory
from .damage import ChangedModels, Unit, unit_changes
from .keep_limits import extra_bytes, keep_budget
from .layers import float_module, load_layer
from .manifest import Manifest
from .preparation import Prepared
from .save_path import remove

_FOLDER = "keep"  # in the work folder, for hidden states


def resolve_keep(
    prepared: Prepared, stems: Stems, folder: Path, manifest: Manifest | None, clock: Clock, progress: Progress
) -> Prepared:
    """The run with a scheme for every Linear. manifest: None in every process but the leader."""
    plan, team = prepared.plan, prepared.team
    if not plan.keep:
        return prepared
    with clock("keep"):
        if manifest is None:
            for _ in range(team.broadcast()):
                team.broadcast()  # a sign of life, before a collective times out
            kept = team.broadcast()
        else:
            kept = manifest.recall("kept")
            team.broadcast(0 if kept is not None else len(plan.layers))
            if kept is None:
                candidates = _measure(prepared, stems, folder / _FOLDER, manifest, progress)
                kept = manifest.remember("kept", [asdict(unit) for unit in _choose_all(plan, candidates)])
            team.broadcast(kept)
    progress.say(f"keep: {len(kept)} of the measured units stay in a better precision")
    return replace(prepared, plan=apply_choice(plan, kept_units(kept)))


def apply_choice(plan: QuantPlan, kept: Sequence[KeptUnit]) -> QuantPlan:
    """The plan with the chosen units in their better precision, and nothing left to decide."""
    names = frozenset(name for unit in kept for name in unit.linears)
    decided = replace(plan, keep=())
    for keep in plan.keep:
        decided = decided.keeping(names & keep.names, keep)
    return decided


# --- the choice ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A unit that may be kept.

    avoided: damage as the recipe quantizes it minus damage in the better precision. extra_bytes: of the stored tensors
    in the better precision, more than in the recipe's. is_free: whether a weight takes no more bits; the extra bytes
    are then none, or a few for names and shapes.
    """

    avoided: float
    extra_bytes: int
    weights: int
    is_free: bool = False


def choose(candidates: Sequence[Candidate], max_bytes: int, max_free_weights: float) -> list[int]:
    """Positions of the units to keep, in the order of the choice: greedy by avoided damage per extra byte.

    Free units come first, by avoided damage per weight, up to max_free_weights in all: bytes do not limit them, but
    their activations stay float, so they cost time. No choice exceeds max_bytes. A unit that does not fit is passed
    over.
    """

    def rate(candidate: Candidate) -> float:
        return candidate.avoided / (candidate.weights if candidate.is_free else max(1, candidate.extra_bytes))

    order = sorted(range(len(candidates)), key=lambda i: (not candidates[i].is_free, -rate(candidates[i]), i))
    left_bytes, left_weights, chosen = float(max_bytes), max_free_weights, []
    for i in order:
        unit = candidates[i]
        weights = unit.weights if unit.is_free else 0
        if unit.avoided > 0 and unit.extra_bytes <= left_bytes and weights <= left_weights:
            chosen.append(i)
            left_bytes -= unit.extra_bytes
            left_weights -= weights
    return chosen


def _choose_all(plan: QuantPlan, measured: Sequence[tuple[Keep, KeptUnit]]) -> list[KeptUnit]:
    """The choice for every linear_quant with `keep`; each has its own limits."""
    chosen: list[KeptUnit] = []
    for keep in plan.keep:
        own = [unit for of, unit in measured if of is keep]
        weights = [sum(_weights(plan, name) for name in unit.linears) for unit in own]
        candidates = [
            Candidate(unit.damage - unit.damage_kept, unit.extra_bytes, count, keep.is_free)
            for unit, count in zip(own, weights, strict=True)
        ]
        share = keep.limits.share * sum(_weights(plan, name) for name in keep.names)
        chosen += [own[i] for i in choose(candidates, keep_budget(plan, keep), share)]
    return chosen


def _weights(plan: QuantPlan, name: str) -> int:
    out_features, in_features = plan.checkpoint.tensors[f"{name}.weight"].shape
    return out_features * in_features


# --- measuring -----------------------------------------------------------------------------------------------


def _measure(
    prepared: Prepared, stems: Stems, folder: Path, manifest: Manifest, progress: Progress
) -> list[tuple[Keep, KeptUnit]]:
    """Measure every unit of every `keep`. folder: for hidden states; deleted afterwards."""
    plan, device = prepared.plan, prepared.device.torch
    plan = replace(plan, calibration=plan.calibration.model_copy(update={"propagate_error": False}))
    prepared = replace(prepared, plan=plan)
    better = [plan.keeping(keep.names, keep) for keep in plan.keep]
    extra = [extra_bytes(plan, keep) for keep in plan.keep]
    folder.mkdir(exist_ok=True)
    stream = CalibrationStream(plan, stems, folder, device, progress=progress)
    copies = ChangedModels(plan, stream, folder, device)
    entries: list[dict[str, Any]] = manifest.recall(_ENTRIES) or []
    start = 1 + max((entry["layer"] for entry in entries), default=-1)
    if not (stream.can_start_at(start) and copies.can_start_at(start, _copies(entries))):
        start, entries = 0, []
    stream.start_at(start)
    copies.start_at(_copies(entries))
    for layer in plan.layers:
        if layer.index >= start:
            work, module = _float_layer(prepared, layer, device)
            of_layer = [(keep, made.layers[layer.index]) for keep, made in zip(plan.keep, better, strict=True)]
            found, outputs = _measure_layer(plan, layer, of_layer, work, module, stream)
            copies.advance(layer.index, module, outputs)
            entries += found
            manifest.replace(_ENTRIES, entries)
            stream.advance_float()
            stream.forget(layer.index)
            copies.forget(layer.index)
            del work, module, outputs
            free_memory(device)
            progress.step("keep", layer.index + 1, len(plan.layers), f"{len(stems)} samples")
        prepared.team.broadcast()
    damages = iter(copies.divergences())
    remove(folder)
    return [
        (plan.keep[entry["keep"]], _unit(plan, entry, extra[entry["keep"]], [next(damages) for _ in range(count)]))
        for entry in entries
        if (count := entry["copies"])
    ]


_ENTRIES = "units that keep measures"


def _copies(entries: Sequence[dict[str, Any]]) -> int:
    return sum(entry["copies"] for entry in entries)


def _float_layer(prepared: Prepared, layer: LayerPlan, device: torch.device) -> tuple[LayerWork, torch.nn.Module]:
    weights = {name: tensor.to(device) for name, tensor in load_layer(prepared.plan, layer).items()}
    work = LayerWork(layer.index, prepared.plan.layer_spec, layer.schemes, weights)
    return work, float_module(prepared, work)


def _measure_layer(
    plan: QuantPlan,
    layer: LayerPlan,
    better: Sequence[tuple[Keep, LayerPlan]],
    work: LayerWork,
    module: torch.nn.Module,
    stream: CalibrationStream,
) -> tuple[list[dict[str, Any]], list[list[torch.Tensor]]]:
    """The units of a layer as JSON data, and the layer's outputs with each of them quantized.

    better: the layer of each `keep`, with all of its Linears kept. copies: the number of outputs of a unit, in the
    recipe's scheme and, unless that is float, in the better one. A layer without units has one entry without copies.
    """
    seen = stream.capture(layer.index, module, plan.layer_spec, watch_blocks=True)
    stats = {group: own.weighted_by(seen.importance) for group, own in seen.stats.items()}
    work = replace(work, stats=stats, importance=seen.importance, probe=seen.probe)
    entries: list[dict[str, Any]] = []
    outputs: list[list[torch.Tensor]] = []
    for unit in plan.layer_spec.units:
        linears = [linear for group in unit for linear in group.linears]
        names = {plan.model.layer_name(layer.index, linear) for linear in linears}
        for number, (keep, own) in enumerate(better):
            if not names <= keep.names:
                continue
            variants = [layer] if keep.better is None else [layer, own]
            outputs += [
                seen.probe.changed_outputs(
                    unit_changes(replace(work, schemes=variant.schemes), variant, unit, seen.probe)
                )
                for variant in variants
            ]
            found = {"keep": number, "unit": _name(layer, unit), "linears": sorted(names), "copies": len(variants)}
            entries.append({"layer": layer.index, **found})
    return entries or [{"layer": layer.index, "copies": 0}], outputs


def _name(layer: LayerPlan, unit: Unit) -> str:
    return f"layer {layer.index} {unit[0].name if unit[0].expert is None else 'experts'}"


def _unit(plan: QuantPlan, entry: dict[str, Any], extra: dict[str, int], damages: Sequence[float]) -> KeptUnit:
    """damages: of a unit in the recipe's scheme and, unless that is float, in the better one."""
    names = tuple(entry["linears"])
    scheme = plan.keep[entry["keep"]].scheme_name
    damage, kept = (*damages, 0.0)[:2]
    return KeptUnit(entry["unit"], names, scheme, damage, kept, sum(extra[name] for name in names))
