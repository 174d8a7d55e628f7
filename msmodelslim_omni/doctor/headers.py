"""The folder: every safetensors header, the index, and what a stopped run or another one left. No weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import open_regular, parse_json, read_regular
from ..run import WORK_FOLDER
from ..storage import TensorInfo, read_header
from .findings import Finding, found, some

# A JSON file takes up to some thirty times its size once parsed; those of real checkpoints stay below this.
MAX_JSON_BYTES = 8 << 20

INDEX_SUFFIX = ".safetensors.index.json"

_LEFTOVERS = ("*.partial", "*.incomplete", "*.tmp")


@dataclass(frozen=True)
class Folder:
    """What is there.

    tensors: by name, of all readable files. twice: names that stand in two files, with the second's name.
    broken: files whose tensors are unknown, with the finding that says why. index: as parsed, if it can be.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]
    twice: dict[str, str]
    broken: dict[str, Finding]
    index_name: str
    weight_map: dict[str, str]
    index_faults: tuple[Finding, ...]

    @property
    def lost(self) -> set[str]:
        """Names that the index places in files that are missing or broken."""
        usable = set(self.files) - set(self.broken)
        return {name for name, file in self.weight_map.items() if file not in usable}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises QuantError."""
    try:
        value = parse_json(read_regular(path, MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise QuantError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise QuantError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise QuantError("is not a JSON object")
    return value


def read_folder(path: Path) -> Folder:
    """All headers. A file that cannot be read is noted and the others are read on."""
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    tensors: dict[str, TensorInfo] = {}
    twice, broken = {}, {}
    for file in files:
        header, fault = _header_or_fault(file)
        if fault:  # only now is what was parsed of the header gone from memory
            broken[file.name] = found(_kind_of_break(file), file.name, fault)
            continue
        twice.update({name: file.name for name in header if name in tensors})
        tensors = {**header, **tensors}
    index_name, weight_map, faults = _read_index(path, {file.name for file in files}, tensors)
    return Folder(path, tensors, tuple(f.name for f in files), twice, broken, index_name, weight_map, tuple(faults))


def _header_or_fault(file: Path) -> tuple[dict[str, TensorInfo], str]:
    try:
        return _read_header(file), ""
    except QuantError as error:
        return {}, error.message.removeprefix(f"{file}: ")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8) or b"", "little")
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise QuantError(f"{file}: cannot be read: {error.strerror or error}") from error
    if MAX_JSON_BYTES < length <= size:
        raise QuantError(f"{file}: its header of {length} bytes is too large; at most {MAX_JSON_BYTES} are read")
    return read_header(file)


def _kind_of_break(file: Path) -> str:
    """Whether a file that read_header refuses is too short, too long, or neither."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or (2 < length <= MAX_JSON_BYTES and size < 8 + length):
                return "file_truncated"
            if length > min(MAX_JSON_BYTES, size - 8):
                return "file_broken"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except OSError:
        return "file_unreadable"
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return "file_broken"
    if not isinstance(needed, int) or needed == size:
        return "file_broken"
    return "file_truncated" if needed > size else "file_trailing_bytes"


def _read_index(
    path: Path, files: set[str], tensors: dict[str, TensorInfo]
) -> tuple[str, dict[str, str], list[Finding]]:
    indexes = {file.name: file for file in sorted(path.glob(f"*{INDEX_SUFFIX}")) if file.is_file()}
    faults: list[Finding] = []
    stems = {file.split("-of-")[0].rpartition("-")[0] or file.removesuffix(".safetensors") for file in files}
    chosen = next((name for name in indexes if name.removesuffix(INDEX_SUFFIX) in stems), next(iter(indexes), ""))
    for name in indexes:
        if name != chosen:
            faults.append(found("index_stale", name, f"stands beside {chosen}"))
    if not chosen:
        if len(files) > 1:
            faults.append(found("index_missing", f"*{INDEX_SUFFIX}", f"{len(files)} safetensors files and no index"))
        return "", {}, faults
    try:
        index = read_json(indexes[chosen])
    except QuantError as error:
        return chosen, {}, [*faults, found("json_broken", chosen, error.message)]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return chosen, {}, [*faults, found("index_no_weight_map", chosen, f"its keys are {some(map(str, index))}")]
    faults += _check_total(chosen, index.get("metadata"), files, weight_map, tensors)
    return chosen, weight_map, faults


def _check_total(
    name: str, metadata: Any, files: set[str], weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> Iterator[Finding]:
    """total_size is the bytes of all tensors; with a file missing or broken nothing can be said."""
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not set(weight_map) <= set(tensors) or not set(weight_map.values()) <= files:
        return
    actual = sum(tensors[tensor].nbytes for tensor in weight_map)
    if said != actual:
        yield found("total_size_wrong", f"{name}: metadata.total_size", f"{said!r}; its tensors have {actual} bytes")


# --- checks --------------------------------------------------------------------------------------------------


def check_files(folder: Folder) -> Iterator[Finding]:
    """Whole files, none twice, none half-written."""
    if not folder.files:
        yield found("no_weights", str(folder.path), "no *.safetensors file")
    yield from folder.broken.values()
    for file in sorted(set(folder.twice.values())):
        names = [name for name, second in folder.twice.items() if second == file]
        yield found("tensor_twice", file, f"{len(names)} of its tensors are in other files too: {some(names)}")
    work = folder.path / WORK_FOLDER
    if work.exists() and any(work.iterdir() if work.is_dir() else [work]):
        yield found("unfinished_run", WORK_FOLDER, "the work folder of a run that did not finish")
    for pattern in _LEFTOVERS:
        for leftover in sorted(folder.path.glob(pattern)):
            yield found("unfinished_run", leftover.name, "a half-written file")
    for pattern in ("pytorch_model*.bin", "model*.bin", "*.pth"):
        for pickle in sorted(folder.path.glob(pattern)):
            yield found("pickle_weights", pickle.name, "weights in a pickle file")


def check_index(folder: Folder) -> Iterator[Finding]:
    """The index names every tensor, each in its file, and nothing else."""
    yield from folder.index_faults
    if not folder.index_name or any(f.code in ("json_broken", "index_no_weight_map") for f in folder.index_faults):
        return
    index, listed = folder.index_name, set(folder.weight_map.values())
    for file in sorted(listed - set(folder.files)):
        names = [name for name, place in folder.weight_map.items() if place == file]
        yield found("index_names_absent_shard", file, f"{index} places {len(names)} tensors there: {some(names)}")
    for file in sorted(set(folder.files) - listed):
        yield found("shard_unlisted", file, f"{index} does not name it")
    for name, file in folder.weight_map.items():
        if file in folder.broken or file not in folder.files:
            continue
        info = folder.tensors.get(name)
        if info is None:
            yield found("index_names_absent_tensor", name, f"{index} places it in {file}, which does not hold it")
        elif info.file.name != file and name not in folder.twice:
            yield found("index_wrong_shard", name, f"{index} places it in {file}, it is in {info.file.name}")
    for name, info in folder.tensors.items():
        if name not in folder.weight_map and info.file.name in listed:
            yield found("index_lacks_tensor", name, f"in {info.file.name}, but not in {index}")
