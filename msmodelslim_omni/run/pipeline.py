"""quantize(): the whole run. The one file to read first; what becomes of a layer is in layers.py.

Recipe -> QuantPlan -> Checkpoint -> calibration stream
       -> layer by layer: load -> capture -> process -> propagate -> every format
       -> report
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from ..calibration import CalibrationStream
from ..errors import QuantError
from ..plan import check_whole
from ..report import Report, read_report, write_documents
from ..runtime import Background, Clock, Progress, open_team, peak_rss, told_out_of_memory
from .assembly import (
    Item,
    Units,
    finished_items,
    make_job,
    units,
)
from .forecast import forecast
from .layers import quantized_layers
from .outputs import Outputs
from .preparation import Prepared, fingerprint, prepare
from .summary import make_report
from .workspace import (
    WORK_FOLDER,
    Workspace,
    check_room,
    check_save_path,
)


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
        for _ in quantized_layers(prepared, stream, _first_layer(team.told(), stream), clock):
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
            for layer, results, record in quantized_layers(prepared, stream, first, clock):
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


def _save(
    outputs: Outputs, stream: CalibrationStream | None, index: int, items: list[Item], record: dict[str, Any]
) -> None:
    """Once a layer is safe on the disk, what led to it is not needed any more."""
    outputs.save(_unit(index), items, record)
    if stream is not None:
        stream.forget(index)


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
