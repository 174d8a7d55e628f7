"""`--effort best`: every layer is quantized and stored, the whole model is tuned, and only then the formats get it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibrationStream
from ..numerics import QuantizedLinear
from ..plan import LayerPlan, QuantPlan
from ..runtime import Clock, Progress
from ..storage import is_whole, load_tensor, read_header, write_tensors
from ..tuning import SolvedLayer, tune
from .layers import Results, quantized_layers
from .manifest import Manifest
from .preparation import Prepared
from .workspace import Workspace


def tuned_layers(
    prepared: Prepared, stream: CalibrationStream, workspace: Workspace, clock: Clock, progress: Progress
) -> Iterator[tuple[int, Results, dict[str, Any]]]:
    """Quantize all layers, keep them in the work folder, tune them, and yield them as quantized_layers does.

    A stopped run goes on after its last quantized layer, or after its last epoch.
    """
    plan, device = prepared.plan, prepared.device.torch
    folder, manifest = workspace.folder, workspace.manifest
    _quantize_all(prepared, stream, folder, manifest, clock, progress)
    read = partial(_read, plan, folder, device)
    with clock("tuning"):
        tuned, result = tune(plan, stream.ends(len(plan.layers)), read, folder, device, progress)
    manifest.remember("tuning", asdict(result))
    for layer in plan.layers:
        solved = tuned(layer.index)
        changed = {name: solved.floats[name] for name in solved.changed}
        yield layer.index, _named(plan, layer, solved.linears, changed), manifest.record(_unit(layer.index))


def _quantize_all(
    prepared: Prepared, stream: CalibrationStream, folder: Path, manifest: Manifest, clock: Clock, progress: Progress
) -> None:
    """Quantize the layers that are not stored yet. The float model's outputs of the last layer stay stored too."""
    layers = prepared.plan.layers
    finished = 0
    while (
        finished < len(layers) and manifest.checksums(_unit(finished)) is not None and is_whole(_file(folder, finished))
    ):
        finished += 1
    if not stream.can_start_at(finished):
        finished = 0
    if finished == len(layers):
        return
    stream.start_at(finished)
    if finished:
        progress.say(f"resuming at layer {finished}; the layers before it are finished")
    for index, (linears, floats), record in quantized_layers(prepared, stream, finished, clock):
        progress.step("layers", index, len(layers), f"{len(stream.stems)} samples")
        with clock("write"):
            _write(prepared.plan, folder, index, linears, floats)
            manifest.enter(_unit(index), {}, record)
            stream.forget(index)
    progress.step("layers", len(layers), len(layers), f"{len(stream.stems)} samples")


# --- quantized layers in the work folder ---------------------------------------------------------------------


def _unit(index: int) -> str:
    return f"untuned {index}"


def _file(folder: Path, index: int) -> Path:
    return folder / f"untuned-{index:04d}.safetensors"


def _write(
    plan: QuantPlan, folder: Path, index: int, linears: dict[str, QuantizedLinear], floats: dict[str, torch.Tensor]
) -> None:
    """linears, floats: by checkpoint name, see Results."""
    start = len(plan.model.layer_name(index, ""))
    tensors = {f"float.{name[start:]}": tensor for name, tensor in floats.items()}
    for name, linear in linears.items():
        parts = {"qweight": linear.qweight, "scales": linear.scales, "zeros": linear.zeros}
        tensors |= {f"{part}.{name[start:]}": tensor for part, tensor in parts.items() if tensor is not None}
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(_file(folder, index), on_cpu, checksum=True)


def _read(plan: QuantPlan, folder: Path, device: torch.device, index: int) -> SolvedLayer:
    """A stored layer, together with what the checkpoint holds unchanged, on the device."""
    stored = {name: load_tensor(info).to(device) for name, info in read_header(_file(folder, index)).items()}
    linears = {
        linear: QuantizedLinear(
            stored[f"qweight.{linear}"], stored[f"scales.{linear}"], scheme, stored.get(f"zeros.{linear}")
        )
        for linear, scheme in plan.layers[index].schemes.items()
    }
    changed = {name.removeprefix("float."): tensor for name, tensor in stored.items() if name.startswith("float.")}
    kept = plan.layer_spec.shapes.keys() - changed.keys() - {f"{linear}.weight" for linear in linears}
    source = {name: plan.checkpoint.load_finite(plan.model.layer_name(index, name)).to(device) for name in sorted(kept)}
    return SolvedLayer(index, linears, {**source, **changed}, frozenset(changed))


def _named(
    plan: QuantPlan, layer: LayerPlan, linears: dict[str, QuantizedLinear], floats: dict[str, torch.Tensor]
) -> Results:
    """The same by checkpoint name."""
    named = partial(plan.model.layer_name, layer.index)
    return {named(name): q for name, q in linears.items()}, {named(name): t for name, t in floats.items()}
