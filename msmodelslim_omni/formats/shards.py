"""Writes an OutputJob in one format: shards, index, config and the untouched files of the source.

Shards are written once and in order; one that is already whole (a run that was stopped while writing) is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..safetensors_io import SafetensorsWriter, TensorSpec, encode_header, in_file_order, read_header
from .job import Format, OutLinear, OutputJob, OutTensor

GB = 10**9

# "format: pt" is what transformers asks a checkpoint for.
_METADATA = {"format": "pt"}

# Files that would contradict the new weights.
_STALE_FILES = frozenset(
    {"config.json", "quant_model_description.json", "quant_report.json", "quant_report.md"}
    | {"eval/eval_report.json", "eval/eval_report.md"}
)


def format_tensors(fmt: Format, job: OutputJob) -> list[OutTensor]:
    """Every tensor of the output, in the checkpoint's order."""
    biases = job.quantized_biases
    tensors: list[OutTensor] = []
    for item in job.items:
        if isinstance(item, OutLinear):
            tensors += fmt.linear_tensors(item)
        else:
            tensors.append(fmt.float_tensor(item, item.spec.name in biases))
    return tensors


def write_output(
    fmt: Format, job: OutputJob, folder: Path, part_file_size: int, on_shard: Callable[[int, int], None]
) -> int:
    """Write the whole output into `folder`; returns the bytes of its tensors. `on_shard(i, n)` after each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = format_tensors(fmt, job)
    shards = split_shards(tensors, part_file_size)
    names = _shard_names(fmt.weights_stem, len(shards))
    for leftover in folder.iterdir():  # of a stopped run, perhaps with other settings; whole shards are kept
        if leftover.name.removesuffix(".partial") not in names:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for number, (name, shard) in enumerate(zip(names, shards, strict=True), 1):
        _write_shard(folder / name, shard)
        on_shard(number, len(shards))
    total = sum(tensor.spec.nbytes for tensor in tensors)
    if len(shards) > 1:
        write_json(folder / _index_name(fmt), _index(names, shards, total))
    _copy_other_files(job, folder)
    for name, content in fmt.json_files(job, tensors).items():
        write_json(folder / name, content)
    return total


def output_files(fmt: Format, job: OutputJob, part_file_size: int) -> dict[str, int]:
    """Every file that write_output makes, by its relative name, with its exact bytes; from sizes alone."""
    tensors = format_tensors(fmt, job)
    shards = split_shards(tensors, part_file_size)
    names = _shard_names(fmt.weights_stem, len(shards))
    files = {}
    for name, shard in zip(names, shards, strict=True):
        specs = in_file_order(tensor.spec for tensor in shard)
        files[name] = len(encode_header(specs, _METADATA)) + sum(spec.nbytes for spec in specs)
    if len(shards) > 1:
        index = _index(names, shards, sum(tensor.spec.nbytes for tensor in tensors))
        files[_index_name(fmt)] = len(_json_text(index).encode())
    copied = [relative for relative in job.other_files if str(relative) not in _STALE_FILES]
    files |= {str(relative): (job.source / relative).stat().st_size for relative in copied}
    return files | {name: len(_json_text(content).encode()) for name, content in fmt.json_files(job, tensors).items()}


def _index_name(fmt: Format) -> str:
    return f"{fmt.weights_stem}.safetensors.index.json"


def _index(names: list[str], shards: list[list[OutTensor]], total: int) -> dict[str, Any]:
    weight_map = {t.spec.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def split_shards(tensors: list[OutTensor], part_file_size: int) -> list[list[OutTensor]]:
    """Consecutive tensors in files of at most part_file_size GB (0: one file); a larger tensor gets its own."""
    limit = part_file_size * GB or float("inf")
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_shard(path: Path, tensors: list[OutTensor]) -> None:
    specs = {tensor.spec.name: tensor.spec for tensor in tensors}
    if path.exists() and _holds(path, specs):
        return
    by_name = {tensor.spec.name: tensor for tensor in tensors}
    with SafetensorsWriter(path, specs.values(), _METADATA) as writer:
        for spec in writer.specs:
            data = by_name[spec.name].load()
            writer.write(spec.name, data.cpu() if isinstance(data, torch.Tensor) else data)


def _holds(path: Path, specs: dict[str, TensorSpec]) -> bool:
    """Whether a shard of an earlier, stopped run is whole and has these tensors."""
    try:
        found = read_header(path)
    except QuantError:
        return False
    return {n: (i.dtype, i.shape) for n, i in found.items()} == {n: (s.dtype, s.shape) for n, s in specs.items()}


def _copy_other_files(job: OutputJob, folder: Path) -> None:
    """Tokenizer, templates, spk_dict.pt and all else: as bytes, under the same relative names."""
    for relative in job.other_files:
        if str(relative) in _STALE_FILES:
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(job.source / relative, target)
        except OSError as error:
            raise QuantError(f"{job.source / relative}: cannot be copied: {error.strerror or error}") from error


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, written aside, synced and renamed."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(_json_text(content))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
