"""Write a checkpoint in one format: shards, index, config and the unchanged files of the source.

Each tensor is written once, at its final offset in its shard, as soon as it is available.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..files import write_atomically
from ..storage import (
    RandomAccessShard,
    TensorSpec,
    encode_header,
    in_file_order,
)
from .format import Format
from .job import (
    OutLinear,
    OutputJob,
    OutTensor,
)

GB = 10**9

# transformers requires "format: pt".
_METADATA = {"format": "pt"}

# Files of the source that do not apply to the new weights.
_STALE_FILES = frozenset(
    {"config.json", "quant_model_description.json", "quant_report.json", "quant_report.md", "quant_report.html"}
    | {"eval/eval_report.json", "eval/eval_report.md", "eval/eval_report.html", "eval/quant_report.html"}
)


def format_tensors(fmt: Format, job: OutputJob) -> list[OutTensor]:
    """List all tensors of the output in the order of the source checkpoint."""
    biases = job.quantized_biases
    return [tensor for item in job.items for tensor in _item_tensors(fmt, item, biases)]


def _item_tensors(fmt: Format, item: OutTensor | OutLinear, biases: frozenset[str]) -> list[OutTensor]:
    if isinstance(item, OutLinear):
        return fmt.linear_tensors(item)
    return [fmt.float_tensor(item, item.spec.name in biases)]


class Output:
    """The output folder of one format while it is written. Tensors may arrive in any order.

    `job` gives the size of every tensor at the start; `put` writes the data. The folder becomes a checkpoint only by
    `finish`. A stopped run can be resumed with the same folder and the same plan.
    """

    def __init__(self, fmt: Format, job: OutputJob, folder: Path, part_file_size: int) -> None:
        self.folder = folder
        self.tensors = format_tensors(fmt, job)
        self._fmt, self._job, self._biases = fmt, job, job.quantized_biases
        shards = split_shards(self.tensors, part_file_size)
        self._names = _shard_names(fmt.weights_stem, len(shards))
        self._contents = [[tensor.spec for tensor in shard] for shard in shards]
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():  # from a stopped run, perhaps with other settings
            if leftover.name.removesuffix(".partial") not in self._names:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self._shards = [
            RandomAccessShard(folder / name, specs, _METADATA)
            for name, specs in zip(self._names, self._contents, strict=True)
        ]
        self._shard_of = {
            spec.name: shard for shard, specs in zip(self._shards, self._contents, strict=True) for spec in specs
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    def put(self, items: Iterable[OutTensor | OutLinear]) -> int:
        """Load the items and write their tensors. Returns a checksum of the written bytes."""
        crc = 0
        for tensor in self._tensors_of(items):
            data = tensor.load()
            shard = self._shard_of[tensor.spec.name]
            crc = shard.put(tensor.spec.name, data.cpu() if isinstance(data, torch.Tensor) else data, crc)
        return crc

    def crc(self, items: Iterable[OutTensor | OutLinear]) -> int:
        """The checksum of the items' tensors as stored in the files. The items are not loaded."""
        crc = 0
        for tensor in self._tensors_of(items):
            crc = self._shard_of[tensor.spec.name].crc(tensor.spec.name, crc)
        return crc

    def _tensors_of(self, items: Iterable[OutTensor | OutLinear]) -> Iterator[OutTensor]:
        for item in items:
            yield from _item_tensors(self._fmt, item, self._biases)

    def sync(self, items: Iterable[OutTensor | OutLinear]) -> None:
        """Wait until the files that contain the items' tensors are on the disk."""
        for shard in {self._shard_of[tensor.spec.name] for tensor in self._tensors_of(items)}:
            shard.sync()

    def finish(self) -> None:
        """Give the shards their final names and add the index, the config and the other files of the source.

        All tensors must have been written.
        """
        for shard in self._shards:
            shard.close()
        if len(self._names) > 1:
            write_json(self.folder / _index_name(self._fmt), _index(self._names, self._contents, self.nbytes))
        _copy_other_files(self._job, self.folder)
        for name, content in self._fmt.json_files(self._job, self.tensors).items():
            write_json(self.folder / name, content)

    def abandon(self) -> None:
        """Close the shards without finishing them. A later run can resume them."""
        for shard in self._shards:
            shard.abandon()


def output_files(fmt: Format, job: OutputJob, part_file_size: int) -> dict[str, int]:
    """The exact size in bytes of every file that an Output writes, by relative path. No tensor is loaded."""
    tensors = format_tensors(fmt, job)
    shards = split_shards(tensors, part_file_size)
    names = _shard_names(fmt.weights_stem, len(shards))
    files = {}
    for name, shard in zip(names, shards, strict=True):
        specs = in_file_order(tensor.spec for tensor in shard)
        files[name] = len(encode_header(specs, _METADATA)) + sum(spec.nbytes for spec in specs)
    if len(shards) > 1:
        contents = [[tensor.spec for tensor in shard] for shard in shards]
        index = _index(names, contents, sum(tensor.spec.nbytes for tensor in tensors))
        files[_index_name(fmt)] = len(_json_text(index).encode())
    copied = [relative for relative in job.other_files if str(relative) not in _STALE_FILES]
    files |= {str(relative): (job.source / relative).stat().st_size for relative in copied}
    return files | {name: len(_json_text(content).encode()) for name, content in fmt.json_files(job, tensors).items()}


def _index_name(fmt: Format) -> str:
    return f"{fmt.weights_stem}.safetensors.index.json"


def _index(names: list[str], contents: list[list[TensorSpec]], total: int) -> dict[str, Any]:
    weight_map = {spec.name: name for name, specs in zip(names, contents, strict=True) for spec in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def split_shards(tensors: list[OutTensor], part_file_size: int) -> list[list[OutTensor]]:
    """Split consecutive tensors into files of at most part_file_size GB (0: one file). Larger tensors get their own."""
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


def _copy_other_files(job: OutputJob, folder: Path) -> None:
    """Copy the tokenizer, templates, spk_dict.pt and all other files unchanged, under the same relative paths."""
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
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as in a path of another encoding, can only be written as an escape
        text = json.dumps(content, indent=2)
    return text + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file: sync it under a temporary name, then rename it."""
    write_atomically(path, _json_text(content), sync=True)
