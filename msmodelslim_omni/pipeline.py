"""quantize(): the whole run, and the loop over layers. The one file to read first.

Recipe -> QuantPlan -> Checkpoint -> calibration stream
       -> layer by layer: load -> capture -> process -> propagate -> every format
       -> report
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from .admission import check_whole
from .arithmetic import QuantizedLinear, quantize_weight, relative_error
from .assembly import Item, Units, finished_items, make_job, units
from .background import Background, one_ahead
from .device import free_memory, peak_rss, told_out_of_memory
from .documents import write_documents
from .emulation import quantized_layer
from .errors import QuantError
from .forecast import forecast
from .judging import Errors, LayerProbe, zero_errors
from .measure import record_layer
from .outputs import Outputs
from .plan import LayerPlan, QuantPlan
from .preparation import Prepared, fingerprint, prepare
from .processors import PROCESSORS
from .processors.work import LayerWork
from .progress import Clock, Progress
from .report import Report, read_report
from .safetensors_io import load_tensor
from .stream import CalibrationStream
from .summary import make_report
from .team import open_team
from .workspace import WORK_FOLDER, Workspace, check_room, check_save_path

# A layer's quantized Linears and the float tensors that changed, by checkpoint name.
Results = tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]


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
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a checkpoint by a recipe and write it in every format the recipe names.

    `config_path` (a recipe file, or a shipped recipe's name) and `quant_type` exclude each other; without both it is
    w8a8. Raises QuantError for whatever the user can mend; a run stopped at any moment goes on when called again.
    Processes that torchrun has started share one run; the report is returned in each.
    """
    with open_team(device) as team:
        progress = progress if progress is not None and team.leads else Progress()
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
            max_memory=max_memory,
            progress=progress,
            team=team,
            check_later=True,
        )
        return run_guarded(prepared, Path(save_path), overwrite=overwrite, progress=progress)


def run_guarded(prepared: Prepared, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """`run`, with what the disk does to it told as a fault that the user can mend."""
    remedy = "give --max_memory, lower calibration.max_tokens or max_pixels, or use --device cpu"
    try:
        with told_out_of_memory(prepared.device, remedy):
            return run(prepared, save_path, overwrite=overwrite, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, remedy = f"the disk is full while writing to {str(save_path)!r}", "free some space"
        else:
            what, remedy = f"{error.filename or save_path}: {error.strerror or error}", "see to the file or disk"
        again = "then run the same command again: it goes on where it stopped"
        raise QuantError(what, f"{remedy}, {again}") from error


# --- the run -------------------------------------------------------------------------------------------------


def run(prepared: Prepared, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """Carry a prepared run out, or go on with it."""
    team = prepared.team
    if team.leads:
        report = _lead(prepared, save_path, overwrite, progress)
        team.told(next(iter(report.savers.values())))
        return report
    _follow(prepared, save_path / WORK_FOLDER)
    return read_report(Path(team.told()))


def _lead(prepared: Prepared, save_path: Path, overwrite: bool, progress: Progress) -> Report:
    """The process that owns the output, and computes its share of it; of one process all."""
    check_room(save_path, prepared.forecast.disk_bytes)
    if (save_path / WORK_FOLDER).exists():  # nothing of what lies there is touched before all is checked
        prepared = _checked(prepared, progress)
    with Workspace(save_path, fingerprint(prepared), overwrite=overwrite) as workspace:
        if prepared.team.told(workspace.is_committing()):
            progress.say("the output is finished; moving it to its place")
            return _commit(workspace, workspace.committed_savers())
        # Sums over threads depend on their number: a resumed run uses as many as the one that began.
        with _threads(prepared.team.told(workspace.remember("threads", torch.get_num_threads()))):
            return _run_layers(prepared, workspace, progress)


def _follow(prepared: Prepared, folder: Path) -> None:
    """Every other process: its share of each layer, in step with `_lead`; nothing of the output."""
    team = prepared.team
    if team.told():
        return
    with _threads(team.told()):
        clock = Clock()
        stream = _open_stream(prepared, folder, Progress(), clock)
        for _ in _quantized_layers(prepared, stream, _first_layer(team.told(), stream), clock):
            pass


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_layers(prepared: Prepared, workspace: Workspace, progress: Progress) -> Report:
    plan = prepared.plan
    clock = Clock(peak_rss)

    stream = _open_stream(prepared, workspace.folder, progress, clock)
    if stream is not None:
        # Now that the samples' lengths are known.
        check_room(workspace.save_path, forecast(plan, stream.extent()).disk_bytes)
    job = make_job(plan)
    parts = units(plan, job)
    with Outputs(job, {saver.type: saver.part_file_size for saver in plan.savers}, workspace) as outputs:
        with clock("resume"):
            first = _first_layer(prepared.team.told(_whole_layers(outputs, parts)), stream)
        if first:
            progress.say(f"going on at layer {first}; the layers before it are finished")
        with Background() as writing, Background() as copying, _stop_on_fault() as stop:
            copying.start(_copy_others, outputs, parts, stop)
            with clock("check"), _discard_on_fault(workspace):
                prepared = _checked(prepared, progress)
            for layer, results, record in _quantized_layers(prepared, stream, first, clock):
                with clock("write"):
                    copying.raise_what_failed()
                    if writing.busy:
                        writing.result()
                    writing.start(_save, outputs, stream, layer, finished_items(parts.layers[layer], *results), record)
                progress.step("layers", layer + 1, len(plan.layers), _detail(stream))
                del results
            with clock("write"):
                if writing.busy:
                    writing.result()
                copying.result()
        with clock("finish"):
            outputs.finish()
        return _finish(prepared, workspace, outputs, stream, first, clock, progress)


def _open_stream(prepared: Prepared, folder: Path, progress: Progress, clock: Clock) -> CalibrationStream | None:
    """The samples at the first layer; None for a data-free run."""
    if prepared.calib is None:
        return None
    stream = CalibrationStream(prepared.plan, prepared.calib, folder, prepared.device.torch, prepared.team)
    with clock("towers"):
        stream.prepare(progress)
    return stream


def _quantized_layers(
    prepared: Prepared, stream: CalibrationStream | None, first: int, clock: Clock
) -> Iterator[tuple[int, Results, dict[str, Any]]]:
    """Each layer's number, what became of it, and its record; what is next is read meanwhile."""
    if stream is None:
        yield from _rounded_layers(prepared, first, clock)
        return
    plan, device = prepared.plan, prepared.device.torch
    layers = plan.layers[first:]
    with one_ahead(partial(_load, plan), layers, stream.budget.read_ahead) as loaded:
        for layer in layers:
            with clock("read"):
                weights = next(loaded)
            work, record = _quantize_layer(prepared, layer, weights, stream, clock)
            results = _results(plan, work)
            del work, weights  # not held while the layer before is written
            yield layer.index, results, record
            del results
            free_memory(device)


def _rounded_layers(prepared: Prepared, first: int, clock: Clock) -> Iterator[tuple[int, Results, dict[str, Any]]]:
    """The same of a data-free run, which needs no more of a layer at once than a Linear and the next."""
    plan, device = prepared.plan, prepared.device.torch
    linears = plan.layer_spec.linears
    turns = [
        (layer, linear, plan.checkpoint.tensors[plan.model.layer_name(layer.index, f"{linear}.weight")])
        for layer in plan.layers[first:]
        for linear in linears
    ]
    # Taken in turn: one is read into while the other is rounded. Fresh memory takes longer than reading into it.
    widest = max((info.nbytes for _, _, info in turns), default=0)
    memory = [torch.empty(widest, dtype=torch.uint8) for _ in range(2 if plan.budget.read_ahead else 1)]

    def load(turn: int) -> torch.Tensor:
        return load_tensor(turns[turn][2], memory[turn % len(memory)])

    quantized: dict[str, QuantizedLinear] = {}
    records: list[dict[str, Any]] = []
    with one_ahead(load, range(len(turns)), plan.budget.read_ahead) as loaded:
        for layer, linear, _ in turns:
            with clock("read"):
                weights = {f"{linear}.weight": next(loaded).to(device)}
            work = LayerWork(layer.index, plan.layer_spec.of(linear), layer.schemes, weights, team=prepared.team)
            work = _process(layer.of(linear), work, clock)
            with clock("measure"):
                records.append(record_layer(plan, layer, work, None))
            quantized |= _results(plan, work)[0]
            if len(records) == len(linears):
                yield layer.index, (quantized, {}), {**records[0], "linears": [r["linears"][0] for r in records]}
                quantized, records = {}, []
                free_memory(device)


def _unit(layer: int) -> str:
    return f"layer {layer}"


def _whole_layers(outputs: Outputs, parts: Units) -> int:
    """How many layers, from the first on, are finished."""
    first = 0
    while first < len(parts.layers) and outputs.is_whole(_unit(first), parts.layers[first]):
        first += 1
    return first


def _first_layer(finished: int, stream: CalibrationStream | None) -> int:
    """The layer to begin with: after the finished ones, if what reaches it is still there."""
    if stream is None:
        return finished
    first = finished if stream.can_start_at(finished) else 0
    stream.start_at(first)
    return first


def _checked(prepared: Prepared, progress: Progress) -> Prepared:
    """With the whole checkpoint checked, if it is not yet."""
    plan = prepared.plan
    if plan.checked:
        return prepared
    warnings = check_whole(plan.model, plan.checkpoint)
    for warning in warnings:
        progress.say(f"warning: {warning}")
    return replace(prepared, plan=replace(plan, warnings=(*warnings, *plan.warnings), checked=True))


@contextmanager
def _discard_on_fault(workspace: Workspace) -> Iterator[None]:
    """Leave nothing of a run whose checkpoint turns out not to be whole: it could not be gone on with."""
    try:
        yield
    except QuantError:
        workspace.discard()
        raise


@contextmanager
def _stop_on_fault() -> Iterator[Event]:
    """What is to stop a thread when something goes wrong beside it."""
    stop = Event()
    try:
        yield stop
    except BaseException:
        stop.set()
        raise


def _copy_others(outputs: Outputs, parts: Units, stop: Event) -> None:
    """What no layer computes: towers, talker and all else, as they are."""
    for number, items in enumerate(parts.others):
        unit = f"others {number}"
        if not stop.is_set() and not outputs.is_whole(unit, items):
            outputs.save(unit, items)


def _detail(stream: CalibrationStream | None) -> str:
    return f"{len(stream)} samples" if stream is not None else ""


def _quantize_layer(
    prepared: Prepared,
    layer: LayerPlan,
    weights: dict[str, torch.Tensor],
    stream: CalibrationStream,
    clock: Clock,
) -> tuple[LayerWork, dict[str, Any]]:
    """One decoder layer: capture -> process -> propagate -> measure. Returns it quantized, and its record."""
    plan = prepared.plan
    on_device = {name: tensor.to(prepared.device.torch) for name, tensor in weights.items()}
    work = LayerWork(layer.index, plan.layer_spec, layer.schemes, on_device, team=prepared.team)
    with clock("forward"):
        seen = stream.capture(layer.index, _module(plan, work), plan.layer_spec)
    probe, stats = seen.probe, {group: s.weighed_by(seen.importance) for group, s in seen.stats.items()}
    seen = replace(seen, stats={})  # H of each modality
    loaded = replace(work, stats={group: s.without_gram() for group, s in stats.items()}, importance=seen.importance)
    work = _process(layer, replace(loaded, stats=stats, probe=probe), clock)
    work, judged = _judged(plan, loaded, work, probe, clock)
    with clock("propagate"):
        output = stream.advance(layer.index, partial(_module, plan, work), judged)
    with clock("measure"):
        return work, record_layer(plan, layer, work, output)


def _save(
    outputs: Outputs, stream: CalibrationStream | None, index: int, items: list[Item], record: dict[str, Any]
) -> None:
    """Once a layer is safe on the disk, what led to it is not needed any more."""
    outputs.save(_unit(index), items, record)
    if stream is not None:
        stream.forget(index)


def _process(layer: LayerPlan, work: LayerWork, clock: Clock) -> LayerWork:
    for step in layer.steps:
        with clock(step.processor):
            work = PROCESSORS[step.processor].apply(work, step.config, step.linears)
    return work


def _judged(
    plan: QuantPlan, loaded: LayerWork, work: LayerWork, probe: LayerProbe, clock: Clock
) -> tuple[LayerWork, Errors]:
    """The layer as it is to be written, and the errors of its outputs on the judging samples.

    Where a search was made on H the layer is tried, and plainly rounded if that is better; elsewhere the errors are
    asked for only if no sample runs through the quantized layer anyway.
    """
    probe.release()
    if plan.statistics == "gram":
        with clock("check"):
            return _no_worse_than_rounding(plan, loaded, work, probe)
    if plan.calibration.propagate_error:
        return work, zero_errors()
    with clock("check"):
        return work, probe.errors(_module(plan, work, held=False))


def _no_worse_than_rounding(
    plan: QuantPlan, loaded: LayerWork, work: LayerWork, probe: LayerProbe
) -> tuple[LayerWork, Errors]:
    """The layer as it is, if its true output error is below that of plain rounding; else plainly rounded."""
    if not loaded.schemes:
        return work, probe.errors(_module(plan, work, held=False))
    plain = replace(
        loaded,
        quantized={
            linear: quantize_weight(loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="minmax"))
            for linear, scheme in loaded.schemes.items()
        },
        smoothing=tuple(
            replace(record, alpha=None, gain=1.0, reason=f"taken back: {record.reason}") for record in work.smoothing
        ),
        notes=work.notes,
    )
    searched = probe.errors(_module(plan, work, held=False))
    rounded = probe.errors(_module(plan, plain, held=False))
    error, of_plain = probe.weighed(searched), probe.weighed(rounded)
    ratio = relative_error(error, of_plain)
    if error < of_plain:
        return replace(work, over_plain=ratio), searched
    note = "fell back to plain rounding: " + (
        f"the search's output error would be {ratio:.3f}x of it" if of_plain > 0 else "it loses nothing here"
    )
    return replace(plain, over_plain=1.0, notes=(*work.notes, note)), rounded


def _load(plan: QuantPlan, layer: LayerPlan) -> dict[str, torch.Tensor]:
    """The tensors of a layer in their stored dtype."""
    return {
        relative: plan.checkpoint.load_finite(plan.model.layer_name(layer.index, relative))
        for relative in plan.layer_spec.shapes
    }


def _module(plan: QuantPlan, work: LayerWork, held: bool = True) -> torch.nn.Module:
    """The library's layer as the work has it. held: see quantized_layer."""
    floats = {name: t for name, t in work.weights.items() if name.removesuffix(".weight") not in work.quantized}
    return quantized_layer(plan.model, plan.checkpoint.config, work.index, floats, work.quantized, held)


def _results(plan: QuantPlan, work: LayerWork) -> Results:
    """The quantized Linears and the float tensors that changed, by checkpoint name."""
    quantized = {plan.model.layer_name(work.index, name): linear for name, linear in work.quantized.items()}
    changed = work.changed - {f"{linear}.weight" for linear in work.quantized}
    return quantized, {plan.model.layer_name(work.index, relative): work.weights[relative] for relative in changed}


# --- the end -------------------------------------------------------------------------------------------------


def _finish(
    prepared: Prepared,
    workspace: Workspace,
    outputs: Outputs,
    stream: CalibrationStream | None,
    first: int,
    clock: Clock,
    progress: Progress,
) -> Report:
    """Write report and card into each output, and move all to its place."""
    plan = prepared.plan
    names: list[str] = [saver.type for saver in plan.savers]
    report = make_report(
        plan,
        device=prepared.device,
        tensors=outputs.tensors(),
        places={name: str(workspace.place(name, names)) for name in names},
        output_bytes=outputs.nbytes(),
        layers=[workspace.record(_unit(layer.index)) for layer in plan.layers],
        stream=stream,
        clock=clock,
        resumed_at_layer=first,
        warnings=(*(prepared.calib.warnings if prepared.calib else ()), *(stream.warnings if stream else ())),
    )
    folders = {name: workspace.output_folder(name) for name in names}
    for folder in folders.values():
        (folder / f"{plan.recipe.path.stem}.yaml").write_bytes(plan.recipe.text.encode())
    write_documents(report, folders, plan.model, plan.recipe.text, progress)
    return _commit(workspace, names)


def _commit(workspace: Workspace, savers: list[str]) -> Report:
    workspace.commit(savers)
    return read_report(workspace.place(savers[0], savers))
