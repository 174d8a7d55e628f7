"""quantize(): the whole run. Read this file first; layers.py holds the steps of one decoder layer.

recipe and checkpoint headers -> QuantPlan -> calibration stream
    -> layer by layer: load -> capture -> process -> propagate -> measure -> every format
    -> report
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch

from ..calibration import CalibrationStream, Stems, prepare_stems
from ..errors import QuantError
from ..files import WORK_FOLDER, check_save_path, find_model_folder, parse_size
from ..formats import OutLinear
from ..plan import backlog_bytes, check_all_tensors
from ..report import Report, read_report, write_documents
from ..runtime import (
    FLOAT32,
    Background,
    Backlog,
    Clock,
    ComputeDtype,
    Precision,
    Progress,
    choose_precision,
    open_team,
    out_of_memory_as_error,
    peak_rss,
)
from ..tuning import add_own_texts
from .assembly import Item, Units, finished_items, make_job, units
from .forecast import forecast
from .keep import resolve_keep
from .layers import quantized_layers
from .manifest import Manifest
from .outputs import Outputs
from .preparation import Prepared, fingerprint, prepare
from .request import QuantRequest
from .save_path import check_disk_space, is_finished, output_folder
from .summary import make_report
from .tuned import tuned_layers
from .workspace import Workspace


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
    on_bad_sample: Literal["fail", "skip"] | None = None,
    effort: Literal["fast", "best"] | None = None,
    compute_dtype: ComputeDtype | None = None,
    save_format: str | Sequence[str] = (),
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a checkpoint by a recipe and write it in every format that the recipe names.

    The arguments are the fields of QuantRequest, which describes them. overwrite: replace an earlier output in
    save_path. max_memory: bytes, or a text such as "6GiB". save_format: one or several. Raises QuantError for every
    error that the user can fix. A run that was stopped at any moment resumes when called again. Processes started by
    torchrun share one run; each of them returns the report.
    """
    request = QuantRequest(
        model_path=find_model_folder(model_path),
        model_type=model_type,
        device=device,
        quant_type=quant_type,
        config_path=config_path,
        dataset=dataset,
        max_samples=max_samples,
        on_bad_sample=on_bad_sample,
        effort=effort,
        compute_dtype=compute_dtype,
        save_format=(save_format,) if isinstance(save_format, str) else tuple(save_format),
        seed=seed,
        trust_remote_code=trust_remote_code,
        max_memory=parse_size(max_memory) if isinstance(max_memory, str) else max_memory,
    )
    return run_request(request, Path(save_path), overwrite=overwrite, progress=progress or Progress())


def run_request(request: QuantRequest, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """Carry out a request; see quantize."""
    with open_team(request.device) as team:
        progress = progress if team.is_leader else Progress()
        check_save_path(save_path, request.model_path)
        prepared = prepare(request, progress, team, check_later=True)
        return run_prepared(prepared, save_path, overwrite=overwrite, progress=progress)


def run_prepared(prepared: Prepared, save_path: Path, *, overwrite: bool, progress: Progress) -> Report:
    """Carry out or resume a prepared run. Disk and out-of-memory errors become QuantError with a hint."""
    hint = "use --max_memory, lower calibration.max_tokens or max_pixels, or use --device cpu"
    try:
        with out_of_memory_as_error(prepared.device, hint):
            return _run_shared(prepared, save_path, overwrite, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message, hint = f"the disk is full while writing to {str(save_path)!r}", "free some space"
        else:
            message, hint = f"{error.filename or save_path}: {error.strerror or error}", "check the file or disk"
        raise QuantError(message, f"{hint}, then run the same command again; it resumes where it stopped") from error


# --- the run -------------------------------------------------------------------------------------------------


def _run_shared(prepared: Prepared, save_path: Path, overwrite: bool, progress: Progress) -> Report:
    team = prepared.team
    if team.is_leader:
        report = _lead(prepared, save_path, overwrite, progress)
        team.broadcast(next(iter(report.savers.values())))
        return report
    _follow(prepared, save_path / WORK_FOLDER)
    return read_report(Path(team.broadcast()))


def _lead(prepared: Prepared, save_path: Path, overwrite: bool, progress: Progress) -> Report:
    """The process that owns the output and computes its share of it; with one process, all of it."""
    identity = fingerprint(prepared)
    names = [saver.type for saver in prepared.plan.savers]
    places = [output_folder(save_path, name, names) for name in names]
    if not overwrite and is_finished(save_path, places, identity):
        prepared.team.broadcast(True)  # _follow returns
        progress.say(f"finished already: {save_path} holds the output of this run; --overwrite makes it again")
        return read_report(places[0])
    check_disk_space(save_path, prepared.forecast.disk_bytes)
    if (save_path / WORK_FOLDER).exists():  # an existing work folder is changed only after every check has passed
        prepared = _with_checkpoint_checked(prepared, progress)
    with Workspace(save_path, identity, overwrite=overwrite, flags=prepared.request.flags()) as workspace:
        committing = workspace.manifest.committing
        if prepared.team.broadcast(bool(committing)):
            progress.say("the output is complete; moving it into place")
            return _commit(workspace, committing)
        # Sums over threads depend on their number, so a resumed run uses as many as the first one.
        threads = workspace.manifest.remember("threads", torch.get_num_threads())
        prepared.team.broadcast(threads)
        prepared = _with_precision(prepared, workspace, progress)
        with _threads(threads):
            return _run_layers(prepared, workspace, progress)


def _with_precision(prepared: Prepared, workspace: Workspace, progress: Progress) -> Prepared:
    """Choose the number format of products once: all processes and a resumed run take the same."""
    precision = FLOAT32
    if prepared.calib is not None:
        chosen = workspace.manifest.recall("precision")
        precision = _choose_precision(prepared) if chosen is None else Precision(*chosen)
        workspace.manifest.remember("precision", list(astuple(precision)))
        progress.say(f"products of the float model in {precision.name}: {precision.reason}")
    prepared.team.broadcast(precision.name)
    return replace(prepared, precision=precision)


def _choose_precision(prepared: Prepared) -> Precision:
    plan = prepared.plan
    shapes = [plan.layer_spec.shapes[f"{linear}.weight"] for linear in plan.layer_spec.linears]
    out_features, in_features = max(shapes, key=math.prod)
    return choose_precision(plan.calibration.compute_dtype, prepared.device.torch, (out_features, in_features))


def _follow(prepared: Prepared, folder: Path) -> None:
    """Every other process: its share of each layer, in step with `_lead`. It writes hidden states, but no output.

    Each broadcast receives what the leader sends: in the same order, since broadcasts have no names.
    """
    is_complete = prepared.team.broadcast()  # from _lead
    if is_complete:
        return
    threads = prepared.team.broadcast()  # from _lead
    prepared = replace(prepared, precision=Precision(prepared.team.broadcast(), "as the leader"))  # _with_precision
    with _threads(threads):
        clock, silent = Clock(), Progress()
        prepared, stems = _open_samples(prepared, folder, None, silent, clock)
        stream = _open_stream(prepared, stems, folder, silent)
        finished_layers = prepared.team.broadcast()  # from _run_layers
        for _ in quantized_layers(prepared, stream, _first_layer(finished_layers, stream), clock):
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
    clock = Clock(peak_rss, progress.doing)
    prepared, stems = _open_samples(prepared, workspace.folder, workspace.manifest, progress, clock)
    plan = prepared.plan
    stream = _open_stream(prepared, stems, workspace.folder, progress)
    if stream is not None:  # the samples' lengths are known only now
        check_disk_space(workspace.save_path, forecast(plan, stream.stems.extent()).disk_bytes)
    job = make_job(plan)
    output_units = units(plan, job)
    backlog = Backlog(backlog_bytes(plan))
    with Outputs(job, {saver.type: saver.part_file_size for saver in plan.savers}, workspace) as outputs:
        with clock("resume"):
            finished_layers = prepared.team.broadcast(_count_finished_layers(outputs, output_units))
            is_tuned = stream is not None and plan.tunes
            first = 0 if is_tuned else _first_layer(finished_layers, stream)
        if first:
            progress.say(f"resuming at layer {first}; the layers before it are finished")
        with Background() as writing, Background() as copying, _stop_on_error() as stop:
            copying.start(_copy_others, outputs, output_units, stop)
            with clock("check"), _discard_on_error(workspace):
                prepared = _with_checkpoint_checked(prepared, progress)
            if stream is not None and is_tuned:
                phase, layers = "writing", tuned_layers(prepared, stream, workspace, clock, progress)
            else:
                phase, layers = "layers", quantized_layers(prepared, stream, first, clock, backlog.add)
                progress.step(phase, first, len(plan.layers), _progress_detail(stream))
            for layer, (quantized, changed), record in layers:
                planned = output_units.layers[layer]
                items = finished_items(planned, quantized, changed)
                with clock("write"):
                    copying.raise_if_failed()
                    if writing.busy:
                        writing.result()
                    writing.start(_save, outputs, stream, layer, planned, items, record, backlog)
                progress.step(phase, layer + 1, len(plan.layers), _progress_detail(stream))
                del quantized, changed, items  # free them while the next layer is computed
            with clock("write"):
                if writing.busy:
                    writing.result()
                copying.result()
        with clock("finish"):
            outputs.finish()
        return _finish(prepared, workspace, outputs, stream, first, clock, progress)


def _open_samples(
    prepared: Prepared, folder: Path, manifest: Manifest | None, progress: Progress, clock: Clock
) -> tuple[Prepared, Stems | None]:
    """The samples in front of the first layer, None for a data-free run; and the run after `keep` has chosen.

    manifest: None in every process but the leader.
    """
    if prepared.calib is None:
        return prepared, None
    with clock("towers"):
        stems = prepare_stems(prepared.plan, prepared.calib, folder, prepared.device.torch, progress, prepared.team)
    if prepared.plan.calibration.effort == "best":
        with clock("own texts"):
            first = len(prepared.calib.samples)
            stems = add_own_texts(prepared.plan, stems, first, prepared.device.torch, progress)
        if not prepared.plan.tunes and not stems.own_texts:
            given = f"{sum(stems.lengths)} tokens"
            progress.say(f"warning: --effort best changes nothing: no texts of the model itself are added to {given}")
    return resolve_keep(prepared, stems, folder, manifest, clock, progress), stems


def _open_stream(prepared: Prepared, stems: Stems | None, folder: Path, progress: Progress) -> CalibrationStream | None:
    """The stream of the samples through the layers; None for a data-free run."""
    if stems is None:
        return None
    return CalibrationStream(prepared.plan, stems, folder, prepared.device.torch, prepared.team, progress)


def _layer_unit(layer: int) -> str:
    return f"layer {layer}"


def _count_finished_layers(outputs: Outputs, output_units: Units) -> int:
    """How many layers, counted from the first, are finished."""
    first = 0
    while first < len(output_units.layers) and outputs.is_whole(_layer_unit(first), output_units.layers[first]):
        first += 1
    return first


def _first_layer(finished: int, stream: CalibrationStream | None) -> int:
    """The layer to start with: the first unfinished one if its input is stored, otherwise layer 0."""
    if stream is None:
        return finished
    first = finished if stream.can_start_at(finished) else 0
    stream.start_at(first)
    return first


def _with_checkpoint_checked(prepared: Prepared, progress: Progress) -> Prepared:
    """Check the whole checkpoint, if `prepare` postponed that and it was not done since."""
    plan = prepared.plan
    if plan.checked:
        return prepared
    warnings = check_all_tensors(plan.model, plan.checkpoint)
    for warning in warnings:
        progress.say(f"warning: {warning}")
    return replace(prepared, plan=replace(plan, warnings=(*warnings, *plan.warnings), checked=True))


@contextmanager
def _discard_on_error(workspace: Workspace) -> Iterator[None]:
    """Delete the work folder of a run whose checkpoint is incomplete: it could never be resumed."""
    try:
        yield
    except QuantError:
        workspace.discard()
        raise


@contextmanager
def _stop_on_error() -> Iterator[Event]:
    """An event that tells a background thread to stop when the main thread fails."""
    stop = Event()
    try:
        yield stop
    except BaseException:
        stop.set()
        raise


def _copy_others(outputs: Outputs, output_units: Units, stop: Event) -> None:
    """Copy everything outside the decoder layers unchanged: towers, talker and the rest."""
    for number, items in enumerate(output_units.others):
        unit = f"others {number}"
        if not stop.is_set() and not outputs.is_whole(unit, items):
            outputs.save(unit, items)


def _progress_detail(stream: CalibrationStream | None) -> str:
    return f"{len(stream.stems)} samples" if stream is not None else ""


def _save(
    outputs: Outputs,
    stream: CalibrationStream | None,
    index: int,
    planned: Sequence[Item],
    items: list[Item],
    record: dict[str, Any],
    backlog: Backlog,
) -> None:
    """Write a layer, and free each Linear once it is written. Once all is safe on disk, the layer's input is deleted.

    planned: the items without contents.
    """

    def freed(item: Item) -> None:
        if stream is None and isinstance(item, OutLinear):
            backlog.remove(math.prod(item.shape))

    with backlog.writing():
        outputs.save_and_free(_layer_unit(index), planned, items, record, freed)
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
    """Write report and model card into each output, and move all outputs into place."""
    plan, stems = prepared.plan, None if stream is None else stream.stems
    names: list[str] = [saver.type for saver in plan.savers]
    report = make_report(
        plan,
        device=prepared.device,
        tensors=outputs.tensors(),
        places={name: str(workspace.place(name, names)) for name in names},
        output_bytes=outputs.nbytes(),
        layers=[workspace.manifest.record(_layer_unit(layer.index)) for layer in plan.layers],
        stems=stems,
        clock=clock,
        resumed_at_layer=first,
        fingerprint=workspace.fingerprint,
        warnings=(
            *(prepared.calib.warnings if prepared.calib else ()),
            *(stems.warnings if stems else ()),
            *_few_tokens(prepared, stream),
        ),
        calib=prepared.calib,
        request=prepared.request,
        tuning=workspace.manifest.recall("tuning"),
        kept=workspace.manifest.recall("kept") or (),
        precision=prepared.precision,
    )
    folders = {name: workspace.output_folder(name) for name in names}
    for folder in folders.values():
        (folder / f"{plan.recipe.path.stem}.yaml").write_bytes(plan.recipe.text.encode())
    write_documents(report, folders, plan.model, plan.recipe.text, progress)
    return _commit(workspace, names)


def _few_tokens(prepared: Prepared, stream: CalibrationStream | None) -> tuple[str, ...]:
    """Warnings where a Gram matrix has more inputs than tokens, and where roundings are judged on tokens in it."""
    plan = prepared.plan
    if stream is None or plan.statistics != "gram":
        return ()
    tokens = sum(stream.stems.tokens_by_modality().values())
    widest = max(linear.shape[1] for linear in plan.linears if linear.scheme is not None)
    warnings = []
    if tokens < widest:
        warnings.append(f"{tokens} tokens are few for Linears of {widest} inputs; calibrate on more samples")
    if not stream.judges_are_held_out:
        warnings.append(
            "too few samples to keep some out of H: roundings are compared on samples that they were fitted to;"
            " calibrate on at least three samples of each modality"
        )
    return tuple(warnings)


def _commit(workspace: Workspace, savers: list[str]) -> Report:
    workspace.commit(savers)
    return read_report(workspace.place(savers[0], savers))
