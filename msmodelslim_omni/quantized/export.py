"""export(): convert a quantized checkpoint to another format without quantizing again.

awq <-> compressed_tensors pack-quantized (asymmetric) moves integers, zero points and scales into another layout.
ascendv1_saver <-> compressed_tensors int8 keeps the integers. ascendv1_saver stores scales in float32 and
compressed_tensors in the checkpoint's dtype. Exporting to compressed_tensors therefore rounds scales as a direct run
does; exporting back keeps the rounded values. Checkpoints that a format cannot hold are refused before any write.

The source must be a finished output, because a run removes its parts when it finishes. One tensor at a time is in
memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import QuantError
from ..files import check_save_path, find_model_folder
from ..formats import FORMATS, OutLinear, OutputJob, OutTensor, format_tensors
from ..models import ModelSpec
from ..recipe import saver_names
from ..report import LEFT_OUT, PartSize, Report, stored_recipe, stored_report, write_documents
from ..run import (
    Outputs,
    Workspace,
    bits_per_weight,
    check_disk_space,
    float_item,
    in_pieces,
    is_finished,
    memory_of,
    versions,
    written_parts,
)
from ..runtime import Progress, peak_rss
from ..storage import (
    FLOAT_DTYPES,
    TORCH_DTYPES,
    Checkpoint,
    TensorInfo,
    TensorSpec,
    load_finite,
)
from .reader import (
    QuantizedCheckpoint,
    finite_scales,
    open_quantized,
    without_quantization,
)

DEFAULT_PART_FILE_SIZE = 4  # GB, the default of the recipes


@dataclass(frozen=True)
class Exported:
    """Summary of an export. Sizes are bytes of tensors; left_out_bytes counts the speech parts that were omitted."""

    path: str
    source: str
    source_format: str
    save_format: str
    linears: int
    source_bytes: int
    output_bytes: int
    left_out_bytes: int


def export(
    path: str | Path,
    save_path: str | Path,
    save_format: str,
    *,
    thinker_only: bool = False,
    part_file_size: int = DEFAULT_PART_FILE_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a quantized checkpoint in another format. If the export is interrupted, the same call resumes it.

    part_file_size: GB per shard, 0 for one file. thinker_only: omit the speech parts. Raises QuantError if the source
    is not a complete quantized checkpoint, or if `save_format` cannot hold the source.
    """
    progress = progress or Progress()
    _check_arguments(part_file_size)
    (save_format,) = saver_names([save_format])
    source, target = open_quantized(find_model_folder(path)), Path(save_path)
    _check_source(source, target, save_format, thinker_only)
    job = make_export_job(source, save_format, thinker_only)
    tensors = format_tensors(FORMATS[save_format], job)
    check_disk_space(target, _total_bytes(tensors))
    fingerprint = _fingerprint(source, save_format, part_file_size, thinker_only)
    if not overwrite and is_finished(target, [target], fingerprint):
        progress.say(f"finished already: {target} holds the output of this export; --overwrite makes it again")
    else:
        with Workspace(target, fingerprint, overwrite=overwrite) as workspace:
            if not workspace.manifest.committing:
                _write_tensors(job, save_format, part_file_size, workspace, progress)
                report = replace(
                    _make_report(source, job, tensors, save_format, target, thinker_only), fingerprint=fingerprint
                )
                _write_documents(report, source, save_format, workspace, progress)
            workspace.commit([save_format])
    return Exported(
        path=str(target),
        source=str(source.path),
        source_format=source.saver,
        save_format=save_format,
        linears=len(job.linears),
        source_bytes=source.checkpoint.total_bytes,
        output_bytes=_total_bytes(tensors),
        left_out_bytes=_omitted_bytes(source, thinker_only),
    )


# --- checks before anything is written -----------------------------------------------------------------------


def _check_arguments(part_file_size: int) -> None:
    if part_file_size < 0:
        raise QuantError(f"part_file_size is {part_file_size}", "give the shard size in GB, or 0 for one file")


def _check_source(source: QuantizedCheckpoint, target: Path, save_format: str, thinker_only: bool) -> None:
    """Raise QuantError if the source cannot be exported to this folder in this format."""
    check_save_path(target, source.path)
    if thinker_only and source.model.speech_support is None:
        raise QuantError(f"{source.path}: a {source.model.hf_model_type} has no speech parts", "omit --thinker_only")
    if reason := FORMATS[save_format].refusal(source.schemes):
        raise QuantError(f"{save_format} cannot hold {source.path}: {reason}")
    if source.kv_cache not in (None, FORMATS[save_format].kv_cache):
        raise QuantError(
            f"{save_format} cannot hold {source.path}: its KV cache is {source.kv_cache};"
            f" {FORMATS[save_format].kv_cache_reason}",
            "quantize the float checkpoint with a recipe without kv_cache",
        )
    _check_only_layers_quantized(source)


def _check_only_layers_quantized(source: QuantizedCheckpoint) -> None:
    """Every format's settings declare everything outside the decoder layers as float."""
    outside = [name for name in source.linears if not name.startswith(source.model.layers_prefix)]
    if outside:
        raise QuantError(
            f"{source.path}: {outside[0]} is quantized, but is not a Linear of a decoder layer",
            "quantize the float checkpoint again; only Linears of decoder layers can be exported",
        )


# --- writing -------------------------------------------------------------------------------------------------


def _total_bytes(tensors: Iterable[OutTensor]) -> int:
    return sum(tensor.spec.nbytes for tensor in tensors)


def _write_tensors(
    job: OutputJob, save_format: str, part_file_size: int, workspace: Workspace, progress: Progress
) -> None:
    pieces = in_pieces(job.items)
    with Outputs(job, {save_format: part_file_size}, workspace) as outputs:
        for number, items in enumerate(pieces):
            if not outputs.is_whole(f"piece {number}", items):
                outputs.save(f"piece {number}", items)
            progress.step(f"write {save_format}", number + 1, len(pieces), "pieces")
        outputs.finish()


def _write_documents(
    report: Report, source: QuantizedCheckpoint, save_format: str, workspace: Workspace, progress: Progress
) -> None:
    """Write the report, the recipe and the model card into the output folder."""
    folders = {save_format: workspace.output_folder(save_format)}
    write_documents(report, folders, source.model, stored_recipe(source.path, report), progress)


def _fingerprint(
    source: QuantizedCheckpoint, save_format: str, part_file_size: int, thinker_only: bool
) -> dict[str, str]:
    """Everything the output depends on. An interrupted export resumes only if all values are equal."""
    return {
        **versions(),
        "export of": source.checkpoint.identity()[:16],
        "save_format": save_format,
        "part_file_size": str(part_file_size),
        "thinker_only": str(thinker_only),
    }


# --- the output job ------------------------------------------------------------------------------------------


def _omitted_prefixes(source: QuantizedCheckpoint, thinker_only: bool) -> tuple[str, ...]:
    """Prefixes of the tensor names that are not written."""
    return source.model.speech_prefixes if thinker_only else ()


def _omitted_bytes(source: QuantizedCheckpoint, thinker_only: bool) -> int:
    omitted = _omitted_prefixes(source, thinker_only)
    return sum(info.nbytes for name, info in source.floats.items() if name.startswith(omitted))


def make_export_job(source: QuantizedCheckpoint, save_format: str, thinker_only: bool) -> OutputJob:
    """The items that the format writes, like those of a run, sorted by tensor name as in a safetensors index."""
    config = without_quantization(source.checkpoint.config)
    if thinker_only and source.model.speech_support is not None:
        config = source.model.speech_support.without_speech(config)
    by_name: dict[str, OutTensor | OutLinear] = {}
    for name, info in source.floats.items():
        if name.startswith(_omitted_prefixes(source, thinker_only)):
            continue
        linear = source.linears.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        by_name[name] = float_item(info) if linear is None else _bias_item(info, linear.linear.float_dtype)
    for name, stored in source.linears.items():
        by_name[f"{name}.weight"] = _with_checked_scales(stored.linear, save_format)
    float_linears = tuple(_float_linears(source.model, source.checkpoint, source.linears.keys()))
    return OutputJob(
        items=tuple(by_name[name] for name in sorted(by_name)),
        float_linears=float_linears,
        float_modules=source.model.loaders.modules_of(float_linears),
        ignore_patterns=source.model.ignore_patterns,
        config_paths=source.model.config_paths,
        config=config,
        source=source.path,
        other_files=tuple(source.checkpoint.other_files()),
        tied=tuple(source.model.family.tied_tensors(source.checkpoint.config)),
        kv_cache=source.kv_cache,
    )


def _float_linears(model: ModelSpec, checkpoint: Checkpoint, quantized: Collection[str]) -> list[str]:
    """Names of the decoder layers' Linears that are not quantized."""
    config = checkpoint.config
    layers = range(model.family.num_layers(config))
    names = [model.layer_name(index, linear) for index in layers for linear in model.family.layer_spec(config).linears]
    return [name for name in names if name not in quantized]


def _bias_item(info: TensorInfo, float_dtype: str) -> OutTensor:
    """The bias of a quantized Linear, converted back to the checkpoint's dtype if the conversion is exact.

    awq stores biases in float16 and ascendv1_saver in float32. A bias that would be rounded stays unchanged.
    """
    if info.dtype == float_dtype or info.dtype not in FLOAT_DTYPES:
        return float_item(info)
    stored = load_finite(info)
    restored = stored.to(TORCH_DTYPES[float_dtype])
    if not torch.equal(restored.to(torch.float64), stored.to(torch.float64)):
        return float_item(info)
    return OutTensor(TensorSpec(info.name, float_dtype, info.shape), lambda: restored)


def _with_checked_scales(linear: OutLinear, save_format: str) -> OutLinear:
    """A copy of the Linear that checks its scales when they are read.

    Scales must be finite. int4 group scales must be exact in the dtype that the format stores. int8 channel scales may
    be rounded, as in a direct run.
    """
    dtype = torch.float16 if save_format == "awq" else TORCH_DTYPES[linear.float_dtype]

    def scales() -> torch.Tensor:
        loaded = finite_scales(linear)
        if linear.scheme.is_int4 and not torch.equal(loaded.to(dtype).to(torch.float32), loaded):
            raise QuantError(
                f"{linear.name}: its scales are not exact in {str(dtype).removeprefix('torch.')}, the dtype that"
                f" {save_format} stores",
                f"quantize the float checkpoint to {save_format} instead",
            )
        return loaded

    return replace(linear, scales=scales)


# --- the report ----------------------------------------------------------------------------------------------


def _make_report(
    source: QuantizedCheckpoint,
    job: OutputJob,
    tensors: list[OutTensor],
    save_format: str,
    save_path: Path,
    thinker_only: bool,
) -> Report:
    """The source's report with the new path and sizes, and a warning that names the source.

    Errors, time and memory stay those of the quantizing run. If the source has no report, a minimal one is made.
    """
    note = f"exported from {source.path} ({source.saver}); errors, time and memory are those of the quantizing run"
    report = stored_report(source.path) or _minimal_report(source)
    written = written_parts(source.model, tensors)
    command = ["msmodelslim", "export", "OUT", "EXPORTED", "--save_format", save_format]
    command += ["--thinker_only"] if thinker_only else []
    parts = tuple(_with_written_size(part, written.get(part.name, (0, LEFT_OUT))) for part in report.parts)
    return replace(
        report,
        savers={save_format: str(save_path)},
        output_bytes={save_format: _total_bytes(tensors)},
        parts=parts,
        run_memory=memory_of(source.model, source.checkpoint.config, parts, source.kv_cache or ""),
        bits_per_weight=bits_per_weight((linear.shape for linear in job.linears), tensors),
        commands=(*report.commands, tuple(command)),
        warnings=(*(w for w in report.warnings if not w.startswith("exported from ")), note),
    )


def _minimal_report(source: QuantizedCheckpoint) -> Report:
    """A report of everything that the headers show, for a source without quant_report.json."""
    sizes: dict[str, list[int]] = {}
    for name, info in source.checkpoint.tensors.items():
        sizes.setdefault(source.model.part_of(name).name, []).append(info.nbytes)
    return Report(
        model_type=source.model.model_type,
        model_path=str(source.path),
        quant_type=", ".join(sorted(scheme.name for scheme in source.schemes)),
        recipe="unknown",
        savers={},
        versions=versions(),
        device="unknown",
        seed=0,
        data_free=False,
        samples=0,
        tokens_by_modality={},
        parts=tuple(PartSize(name, len(nbytes), sum(nbytes), 0, "") for name, nbytes in sizes.items()),
        output_bytes={},
        source_bytes=source.checkpoint.total_bytes,
        bits_per_weight=0.0,
        layers=(),
        seconds=0.0,
        seconds_by_phase={},
        resumed_at_layer=0,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=0,
        warnings=("the source holds no report: the sizes before are those of the quantized source",),
    )


def _with_written_size(part: PartSize, written: tuple[int, str]) -> PartSize:
    """written: bytes and scheme of the part in the output."""
    return replace(part, bytes_after=written[0], scheme=written[1])
