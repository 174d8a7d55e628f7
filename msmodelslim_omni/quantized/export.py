"""export(): one of our outputs in another format, without quantizing again.

awq <-> compressed_tensors pack-quantized (asymmetric) moves the same integers, zero points and scales into another
layout, and ascendv1_saver <-> compressed_tensors int8 the same integers: ascendv1_saver holds scales in float32,
compressed_tensors in the checkpoint's dtype, so that one way rounds them as a direct run does, and the other keeps what
is left of them. What a format cannot hold is refused before anything is written.

The source is a finished output: the parts of a run are gone once it is finished. One tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import QuantError
from ..formats import FORMATS, OutLinear, OutputJob, OutTensor, format_tensors
from ..models import ModelSpec
from ..recipe import SAVER_CONFIGS
from ..report import PartSize, Report, stored_recipe, stored_report, write_documents
from ..run import (
    Outputs,
    Workspace,
    bits_per_weight,
    check_disk_space,
    check_save_path,
    float_item,
    in_pieces,
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

DEFAULT_PART_FILE_SIZE = 4  # GB, as the recipes have it


@dataclass(frozen=True)
class Exported:
    """What was written: sizes are of the tensors, in bytes; left_out those of the parts that speak."""

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
    """Write a quantized checkpoint in another format. Stopped at any moment, the same call goes on.

    part_file_size: GB a shard, 0 for one file. thinker_only leaves out the parts that speak. Raises QuantError for what
    is no whole quantized checkpoint, and for what `save_format` cannot hold.
    """
    progress = progress or Progress()
    if save_format not in SAVER_CONFIGS:
        raise QuantError(f"unknown save_format {save_format!r}. Known: {', '.join(SAVER_CONFIGS)}")
    if part_file_size < 0:
        raise QuantError(f"part_file_size is {part_file_size}", "give the GB of a shard, or 0 for one file")
    source, target = open_quantized(path), Path(save_path)
    check_save_path(target, source.path)
    if thinker_only and source.model.speaking is None:
        raise QuantError(
            f"{source.path}: a {source.model.hf_model_type} has no parts that speak", "leave --thinker_only out"
        )
    fmt = FORMATS[save_format]
    if why := fmt.refusal(source.schemes):
        raise QuantError(f"{save_format} cannot hold {source.path}: {why}")
    _refuse_other_linears(source)
    job = make_export_job(source, save_format, thinker_only)
    tensors = format_tensors(fmt, job)
    check_disk_space(target, sum(tensor.spec.nbytes for tensor in tensors))
    with Workspace(
        target, _fingerprint(source, save_format, part_file_size, thinker_only), overwrite=overwrite
    ) as workspace:
        if not workspace.is_committing():
            _write(job, save_format, part_file_size, workspace, progress)
            report = _report(source, job, tensors, save_format, target)
            recipe_text = stored_recipe(source.path, report)
            folders = {save_format: workspace.output_folder(save_format)}
            write_documents(report, folders, source.model, recipe_text, progress)
        workspace.commit([save_format])
    return Exported(
        str(target),
        str(source.path),
        source.saver,
        save_format,
        len(job.linears),
        source.checkpoint.total_bytes,
        sum(tensor.spec.nbytes for tensor in tensors),
        sum(i.nbytes for n, i in source.floats.items() if n.startswith(_left_out(source, thinker_only))),
    )


def _write(job: OutputJob, save_format: str, part_file_size: int, workspace: Workspace, progress: Progress) -> None:
    pieces = in_pieces(job.items)
    with Outputs(job, {save_format: part_file_size}, workspace) as outputs:
        for number, items in enumerate(pieces):
            if not outputs.is_whole(f"piece {number}", items):
                outputs.save(f"piece {number}", items)
            progress.step(f"write {save_format}", number + 1, len(pieces), "pieces")
        outputs.finish()


def _refuse_other_linears(source: QuantizedCheckpoint) -> None:
    """The formats' settings say that everything outside the decoder layers is float."""
    if odd := [name for name in source.linears if not name.startswith(source.model.layers_prefix)]:
        raise QuantError(
            f"{source.path}: {odd[0]} is quantized, which is no Linear of a decoder layer",
            "no format is written with any other quantized",
        )


def _left_out(source: QuantizedCheckpoint, thinker_only: bool) -> tuple[str, ...]:
    """The beginnings of the names that are not written."""
    return source.model.speech_prefixes if thinker_only else ()


def make_export_job(source: QuantizedCheckpoint, save_format: str, thinker_only: bool) -> OutputJob:
    """What the format writes: as after a run, in the order of the names, which is that of an index."""
    config = without_quantization(source.checkpoint.config)
    if thinker_only and source.model.speaking is not None:
        config = source.model.speaking.without_speech(config)
    by_name: dict[str, OutTensor | OutLinear] = {}
    for name, info in source.floats.items():
        if name.startswith(_left_out(source, thinker_only)):
            continue
        linear = source.linears.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        by_name[name] = float_item(info) if linear is None else _bias(info, linear.linear.float_dtype)
    for name, stored in source.linears.items():
        by_name[f"{name}.weight"] = _checked(stored.linear, save_format)
    floats = tuple(_float_linears(source.model, source.checkpoint, source.linears.keys()))
    return OutputJob(
        items=tuple(by_name[name] for name in sorted(by_name)),
        float_linears=floats,
        float_modules=source.model.loaders.modules_of(floats),
        ignore_patterns=source.model.ignore_patterns,
        config_paths=source.model.config_paths,
        config=config,
        source=source.path,
        other_files=tuple(source.checkpoint.other_files()),
        tied=tuple(source.model.family.tied_tensors(source.checkpoint.config)),
    )


def _float_linears(model: ModelSpec, checkpoint: Checkpoint, quantized: Collection[str]) -> list[str]:
    """The Linears of decoder layers that are not quantized."""
    config = checkpoint.config
    layers = range(model.family.num_layers(config))
    names = [model.layer_name(index, linear) for index in layers for linear in model.family.layer_spec(config).linears]
    return [name for name in names if name not in quantized]


def _bias(info: TensorInfo, float_dtype: str) -> OutTensor:
    """A quantized Linear's bias in the checkpoint's dtype again, where it came from there: awq holds it in float16,
    ascendv1_saver in float32. One that is no number of that dtype stays as it is.
    """
    if info.dtype == float_dtype or info.dtype not in FLOAT_DTYPES:
        return float_item(info)
    stored = load_finite(info)
    restored = stored.to(TORCH_DTYPES[float_dtype])
    if not torch.equal(restored.to(torch.float64), stored.to(torch.float64)):
        return float_item(info)
    return OutTensor(TensorSpec(info.name, float_dtype, info.shape), lambda: restored)


def _checked(linear: OutLinear, save_format: str) -> OutLinear:
    """A Linear whose scales are checked as they are read: finite, and where they belong to groups, exact in the dtype
    that the format stores them in. Those of int8 channels are rounded, as by a direct run.
    """
    dtype = torch.float16 if save_format == "awq" else TORCH_DTYPES[linear.float_dtype]

    def scales() -> torch.Tensor:
        loaded = finite_scales(linear)
        if linear.scheme.is_int4 and not torch.equal(loaded.to(dtype).to(torch.float32), loaded):
            raise QuantError(
                f"{linear.name}: its scales are no numbers of {str(dtype).removeprefix('torch.')}, in which"
                f" {save_format} stores them",
                "quantize the float checkpoint in that format instead",
            )
        return loaded

    return replace(linear, scales=scales)


def _fingerprint(
    source: QuantizedCheckpoint, save_format: str, part_file_size: int, thinker_only: bool
) -> dict[str, str]:
    """What the output depends on; a stopped export of anything else is not gone on with."""
    return {
        **versions(),
        "export of": source.checkpoint.identity()[:16],
        "save_format": save_format,
        "part_file_size": str(part_file_size),
        "thinker_only": str(thinker_only),
    }


# --- the report ----------------------------------------------------------------------------------------------


def _report(
    source: QuantizedCheckpoint,
    job: OutputJob,
    tensors: list[OutTensor],
    save_format: str,
    save_path: Path,
) -> Report:
    """The source's report with the new place and sizes, and a warning that says where it comes from.

    Errors, time and memory stay those of the run that quantized. A checkpoint without a report of ours gets one that
    says what is known of it.
    """
    note = f"exported from {source.path} ({source.saver}); errors, time and memory are of the run that quantized it"
    report = stored_report(source.path) or _bare_report(source)
    written = written_parts(source.model, tensors)
    parts = tuple(_written(part, written.get(part.name, (0, "left out"))) for part in report.parts)
    return replace(
        report,
        savers={save_format: str(save_path)},
        output_bytes={save_format: sum(tensor.spec.nbytes for tensor in tensors)},
        parts=parts,
        run_memory=memory_of(source.model, source.checkpoint.config, parts),
        bits_per_weight=bits_per_weight((linear.shape for linear in job.linears), tensors),
        warnings=(*(w for w in report.warnings if not w.startswith("exported from ")), note),
    )


def _bare_report(source: QuantizedCheckpoint) -> Report:
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
        parts=tuple(PartSize(name, len(all_), sum(all_), 0, "") for name, all_ in sizes.items()),
        output_bytes={},
        source_bytes=source.checkpoint.total_bytes,
        bits_per_weight=0.0,
        layers=(),
        seconds=0.0,
        seconds_by_phase={},
        resumed_at_layer=0,
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=0,
        warnings=("the source holds no report: sizes before are those of the source as it was quantized",),
    )


def _written(part: PartSize, sizes: tuple[int, str]) -> PartSize:
    return replace(part, bytes_after=sizes[0], scheme=sizes[1])
