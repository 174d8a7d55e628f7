"""quantize(): the whole run, and the loop over layers. The one file to read first.

Recipe -> QuantPlan -> Checkpoint -> calibration stream
       -> layer by layer: load -> capture -> process -> propagate -> part
       -> formats -> report
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from . import __version__
from .assembly import make_job
from .calibration import CalibSet, load_calib_set
from .checkpoint import open_checkpoint
from .device import OUT_OF_MEMORY, Device, free_memory, peak_device_memory, peak_rss, resolve_device
from .digests import file_digest, value_digest
from .errors import QuantError
from .forecast import Forecast, check_disk, forecast
from .formats import FORMATS
from .formats.job import OutTensor
from .formats.shards import format_tensors, write_output
from .measure import record_layer
from .models import derive_model_type, named_model_type
from .models.spec import ModelSpec
from .plan import LayerPlan, QuantPlan, make_plan
from .processors import PROCESSORS
from .processors.work import LayerWork
from .progress import Clock, Progress
from .recipe import Recipe, find_recipe, resolve_recipe
from .report import PartSize, Report, layer_record, read_report, write_report
from .stream import CalibrationStream, emulate
from .workspace import Workspace, check_save_path


@dataclass(frozen=True)
class Prepared:
    """A run that could start: everything checked, nothing computed."""

    plan: QuantPlan
    device: Device
    calib: CalibSet | None
    forecast: Forecast


def quantize(
    model_path: str | Path,
    save_path: str | Path,
    *,
    model_type: str | None = None,
    device: str = "auto",
    quant_type: str | None = None,
    config_path: str | None = None,
    dataset: str | None = None,
    max_samples: int | None = None,
    save_format: Sequence[str] = (),
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a checkpoint by a recipe and write it in every format the recipe names.

    `config_path` (a recipe file, or a shipped recipe's name) and `quant_type` exclude each other; without both it is
    w8a8. Raises QuantError for whatever the user can mend; a run stopped at any moment goes on when called again.
    """
    progress = progress or Progress()
    check_save_path(Path(save_path), Path(model_path))
    prepared = prepare(
        model_path,
        model_type=model_type,
        device=device,
        quant_type=quant_type,
        config_path=config_path,
        dataset=dataset,
        max_samples=max_samples,
        save_format=save_format,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return run_guarded(prepared, Path(save_path), overwrite=overwrite, progress=progress)


def run_guarded(prepared: Prepared, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """`run`, with what the disk does to it told as a fault that the user can mend."""
    try:
        return run(prepared, save_path, overwrite=overwrite, progress=progress)
    except OUT_OF_MEMORY as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise QuantError(
            f"out of memory on {prepared.device.name}: {reason}",
            "lower calibration.max_tokens or max_pixels, or use --device cpu",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, remedy = f"the disk is full while writing to {str(save_path)!r}", "free some space"
        else:
            what, remedy = f"{error.filename or save_path}: {error.strerror or error}", "see to the file or disk"
        again = "then run the same command again: it goes on where it stopped"
        raise QuantError(what, f"{remedy}, {again}") from error


def prepare(
    model_path: str | Path,
    *,
    model_type: str | None = None,
    device: str = "auto",
    quant_type: str | None = None,
    config_path: str | None = None,
    dataset: str | None = None,
    max_samples: int | None = None,
    save_format: Sequence[str] = (),
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """All checks before the first weight is read: device, recipe, checkpoint, plan, dataset, forecast."""
    progress = progress or Progress()
    chosen = resolve_device(device)
    progress.say(f"device {chosen.name} ({chosen.reason})")
    named = named_model_type(model_type) if model_type else None
    checkpoint = open_checkpoint(model_path)
    model = named or derive_model_type(checkpoint.config)
    if named is None:
        progress.say(f"model type {model.model_type}, derived from config.json")
    recipe = choose_recipe(model, quant_type, config_path)
    progress.say(f"recipe {recipe.path}")
    plan = make_plan(
        recipe,
        model,
        checkpoint,
        save_formats=save_format,
        dataset=dataset,
        max_samples=max_samples,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    calib = _load_calibration(plan)
    return Prepared(plan, chosen, calib, forecast(plan, len(calib.samples) if calib else 0))


def choose_recipe(model: ModelSpec, quant_type: str | None, config_path: str | None) -> Recipe:
    """The recipe that is asked for; w8a8 where nothing is."""
    if quant_type and config_path:
        raise QuantError("--quant_type and --config_path exclude each other", "give one of them")
    if config_path:
        return resolve_recipe(config_path)
    return find_recipe(model.model_type, quant_type or "w8a8")


def _load_calibration(plan: QuantPlan) -> CalibSet | None:
    if plan.dataset is None:
        return None
    return load_calib_set(
        plan.dataset,
        plan.recipe.spec.default_text,
        max_samples=plan.calibration.max_samples,
        seed=plan.seed,
        on_bad_sample=plan.calibration.on_bad_sample,
    )


# --- the run -------------------------------------------------------------------------------------------------


def run(prepared: Prepared, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """Carry a prepared run out, or go on with it."""
    check_disk(prepared.forecast, save_path)
    with Workspace(save_path, _fingerprint(prepared), overwrite=overwrite) as workspace:
        if workspace.is_committing():
            return _finish_commit(prepared.plan, workspace, progress)
        return _run_layers(prepared, workspace, progress)


def _finish_commit(plan: QuantPlan, workspace: Workspace, progress: Progress) -> Report:
    """Go on with the moves of a stopped run, if they are of the formats that are asked for."""
    moving = workspace.committed_savers()
    if moving != [saver.type for saver in plan.savers]:
        raise QuantError(
            f"{str(workspace.save_path)!r} holds the finished output of a stopped run as {', '.join(moving)}",
            "finish that run with its own command, or choose another save_path",
        )
    progress.say("the output is finished; moving it to its place")
    return _commit(workspace, moving)


def _run_layers(prepared: Prepared, workspace: Workspace, progress: Progress) -> Report:
    plan, device = prepared.plan, prepared.device
    clock = Clock()
    # Sums over threads depend on their number: a resumed run uses as many as the one that began.
    torch.set_num_threads(workspace.remember("threads", torch.get_num_threads()))

    stream = None
    if prepared.calib is not None:
        stream = CalibrationStream(plan, prepared.calib, workspace.folder, device.torch)
        with clock("towers"):
            stream.prepare(progress)
        tokens = sum(stream.tokens_by_modality().values())
        check_disk(forecast(plan, len(stream), tokens), workspace.save_path)  # now that the samples' lengths are known
    first = _first_layer(workspace, stream)
    if first:
        progress.say(f"going on at layer {first}; the layers before it are finished")
    for layer in plan.layers[first:]:
        _quantize_layer(plan, layer, stream, device.torch, workspace, clock)
        progress.step("layers", layer.index + 1, len(plan.layers), _detail(stream))
    return _finish(prepared, workspace, stream, first, clock, progress)


def _first_layer(workspace: Workspace, stream: CalibrationStream | None) -> int:
    """The layer to begin with: after the last finished one, if what reaches it is still there."""
    first = workspace.finished_layers()
    if stream is not None:
        first = first if stream.can_start_at(first) else 0
        stream.start_at(first)
    return first


def _detail(stream: CalibrationStream | None) -> str:
    return f"{len(stream)} samples" if stream is not None else ""


def _quantize_layer(
    plan: QuantPlan,
    layer: LayerPlan,
    stream: CalibrationStream | None,
    device: torch.device,
    workspace: Workspace,
    clock: Clock,
) -> None:
    """One decoder layer: load -> capture -> process -> propagate -> part -> forget."""
    with clock("read"):
        work = _load_layer(plan, layer, device, calibrated=stream is not None)
    if stream is not None:
        with clock("forward"):
            work = replace(work, stats=stream.capture(layer.index, _module(plan, work), plan.layer_spec))
    for step in layer.steps:
        with clock(step.processor):
            work = PROCESSORS[step.processor].apply(work, step.config, step.linears)
    output = None
    if stream is not None:
        with clock("propagate"):
            output = stream.advance(layer.index, _module(plan, work))
    with clock("measure"):
        record = record_layer(plan, layer, work, output)
    with clock("write"):
        workspace.save_part(layer.index, _part_tensors(plan, work), record)
    if stream is not None:
        stream.forget(layer.index)
    free_memory(device)


def _load_layer(plan: QuantPlan, layer: LayerPlan, device: torch.device, *, calibrated: bool) -> LayerWork:
    """The layer's tensors in their stored dtype. A data-free run leaves the check for NaN to the rounding itself."""
    weights = {}
    for relative, shape in plan.layer_spec.shapes.items():
        name = plan.model.layer_name(layer.index, relative)
        load = plan.checkpoint.load_finite if calibrated or len(shape) == 1 else plan.checkpoint.load
        weights[relative] = load(name).to(device)
    return LayerWork(layer.index, plan.layer_spec, layer.schemes, weights)


def _module(plan: QuantPlan, work: LayerWork) -> torch.nn.Module:
    """The library's layer with the work's weights in float32, its quantized Linears emulated."""
    emulated = {f"{linear}.weight" for linear in work.quantized}  # not widened: their emulation replaces them
    weights = {n: t if n in emulated else t.to(torch.float32) for n, t in work.weights.items()}
    module = plan.model.family.build_layer(plan.checkpoint.config, work.index, weights)
    emulate(module, work.quantized, weights)
    return module


def _part_tensors(plan: QuantPlan, work: LayerWork) -> dict[str, torch.Tensor]:
    """What a part holds: each quantized Linear's integers and scales, and every float tensor that changed."""
    tensors = {}
    for linear, quantized in work.quantized.items():
        name = plan.model.layer_name(work.index, linear)
        tensors[f"{name}.qweight"], tensors[f"{name}.scales"] = quantized.qweight, quantized.scales
    for relative in work.changed - {f"{linear}.weight" for linear in work.quantized}:
        tensors[plan.model.layer_name(work.index, relative)] = work.weights[relative]
    return tensors


# --- the end -------------------------------------------------------------------------------------------------


def _finish(
    prepared: Prepared,
    workspace: Workspace,
    stream: CalibrationStream | None,
    first: int,
    clock: Clock,
    progress: Progress,
) -> Report:
    """Assemble every format from the parts, write the report into each, and move all to its place."""
    plan = prepared.plan
    job = make_job(plan, workspace.part)
    output_bytes: dict[str, int] = {}
    with clock("assemble"):
        for saver in plan.savers:

            def shown(done: int, total: int, name: str = saver.type) -> None:
                progress.step(f"write {name}", done, total, "shards")

            folder = workspace.output_folder(saver.type)
            output_bytes[saver.type] = write_output(FORMATS[saver.type], job, folder, saver.part_file_size, shown)
    tensors = format_tensors(FORMATS[plan.savers[0].type], job)  # the report's sizes are the first format's
    names: list[str] = [saver.type for saver in plan.savers]
    places = {name: str(workspace.place(name, names)) for name in names}
    report = Report(
        model_type=plan.model.model_type,
        model_path=str(plan.checkpoint.path),
        quant_type=plan.recipe.quant_type or "custom",
        recipe=plan.recipe.path.name,
        savers=places,
        versions=_versions(),
        device=prepared.device.name,
        seed=plan.seed,
        data_free=stream is None,
        samples=len(stream) if stream is not None else 0,
        tokens_by_modality=stream.tokens_by_modality() if stream is not None else {},
        parts=_part_sizes(plan, tensors),
        output_bytes=output_bytes,
        source_bytes=plan.checkpoint.total_bytes,
        bits_per_weight=_bits_per_weight(plan, tensors),
        layers=tuple(layer_record(workspace.record(layer.index)) for layer in plan.layers),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        resumed_at_layer=first,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_device_memory(prepared.device.torch),
        warnings=(
            *plan.warnings,
            *(prepared.calib.warnings if prepared.calib else ()),
            *(stream.warnings if stream is not None else ()),
        ),
    )
    for name in names:
        folder = workspace.output_folder(name)
        write_report(report, folder)
        (folder / f"{plan.recipe.path.stem}.yaml").write_bytes(plan.recipe.text.encode())
    return _commit(workspace, names)


def _commit(workspace: Workspace, savers: list[str]) -> Report:
    workspace.commit(savers)
    return read_report(workspace.place(savers[0], savers))


def _part_sizes(plan: QuantPlan, tensors: list[OutTensor]) -> tuple[PartSize, ...]:
    """Bytes of each part before and after."""
    before: dict[str, list[int]] = {}
    for name, info in plan.checkpoint.tensors.items():
        before.setdefault(plan.model.part_of(name).name, []).append(info.nbytes)
    after: dict[str, int] = {}
    kinds: dict[str, set[str]] = {}
    for tensor in tensors:
        part = plan.model.part_of(tensor.spec.name).name
        after[part] = after.get(part, 0) + tensor.spec.nbytes
        kinds.setdefault(part, set()).add(tensor.kind)
    return tuple(
        PartSize(
            part.name,
            len(before[part.name]),
            sum(before[part.name]),
            after[part.name],
            _kind(kinds[part.name]),
        )
        for part in plan.model.parts
        if part.name in before
    )


def _kind(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds - {"FLOAT"})) or "float, unchanged"


def _bits_per_weight(plan: QuantPlan, tensors: list[OutTensor]) -> float:
    """Stored bits of the quantized Linears, scales included, over their weights."""
    bits = 8 * sum(tensor.spec.nbytes for tensor in tensors if tensor.kind != "FLOAT")
    return bits / sum(linear.shape[0] * linear.shape[1] for linear in plan.linears if linear.scheme is not None)


def _versions() -> dict[str, str]:
    return {"msmodelslim_omni": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def _fingerprint(prepared: Prepared) -> dict[str, str]:
    """What the parts depend on; a work folder with another fingerprint is not gone on with."""
    plan, calib = prepared.plan, prepared.calib
    return {
        **_versions(),
        "model_type": plan.model.model_type,
        **{key: value_digest(value) for key, value in _recipe_blocks(plan).items()},
        **_media_fingerprint(plan),
        "checkpoint": plan.checkpoint.identity()[:16],
        "dataset": calib.identity()[:16] if calib else "none",
        "seed": str(plan.seed),
        "device": prepared.device.torch.type,
    }


def _media_fingerprint(plan: QuantPlan) -> dict[str, str]:
    """What turns media into tokens; nothing for a data-free run."""
    if plan.dataset is None:
        return {}
    files = [file for file in plan.checkpoint.other_files() if file.suffix in (".json", ".txt", ".jinja")]
    digests = {str(file): file_digest(plan.checkpoint.path / file) for file in files}
    libraries = {name: version(name) for name in ("av", "pillow", "torchvision", "qwen_omni_utils", "soxr")}
    return {"processor files": value_digest(digests), **libraries}


def _recipe_blocks(plan: QuantPlan) -> dict[str, object]:
    return {
        "recipe process": plan.recipe.model_dump(mode="json")["spec"]["process"],
        "recipe calibration": plan.calibration.model_dump(mode="json") if plan.dataset else {},
    }
