"""Checks of the folder: every safetensors header, the index, and leftovers of other runs. No weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import open_regular, parse_json, read_regular
from ..run import WORK_FOLDER
from ..storage import TensorInfo, read_header
from .findings import Finding, make_finding, shorten_list

# Parsed JSON takes up to about 30 times its file size. The largest real files are indexes and headers: a mixture of
# 18,624 quantized Linears of four tensors has an index of 9 MB.
MAX_JSON_BYTES = 16 << 20

INDEX_SUFFIX = ".safetensors.index.json"

_LEFTOVERS = ("*.partial", "*.incomplete", "*.tmp")


@dataclass(frozen=True)
class Folder:
    """The contents of a checkpoint folder.

    tensors: by name, of all readable files. duplicates: names of tensors that are in two files, with the second file.
    broken: files whose header is unreadable, with the finding that explains why. weight_map: of the index, empty if the
    index is missing or unreadable.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]
    duplicates: dict[str, str]
    broken: dict[str, Finding]
    index_name: str
    weight_map: dict[str, str]
    index_faults: tuple[Finding, ...]

    @property
    def lost_tensors(self) -> set[str]:
        """Names of tensors that the index places in missing or broken files."""
        usable = set(self.files) - set(self.broken)
        return {name for name, file in self.weight_map.items() if file not in usable}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size. Raises QuantError."""
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
    """Read all headers. An unreadable file is recorded in `broken`, and reading continues with the next file."""
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    tensors: dict[str, TensorInfo] = {}
    duplicates, broken = {}, {}
    for file in files:
        header, fault = _header_or_fault(file)
        if fault:  # outside of `except`, the parsed part of the header is no longer in memory
            broken[file.name] = make_finding(_broken_file_code(file), file.name, fault)
            continue
        duplicates.update({name: file.name for name in header if name in tensors})
        tensors.update((name, info) for name, info in header.items() if name not in duplicates)
    index_name, weight_map, faults = _read_index(path, {file.name for file in files}, tensors)
    return Folder(
        path, tensors, tuple(f.name for f in files), duplicates, broken, index_name, weight_map, tuple(faults)
    )


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
        raise QuantError(f"{file}: the header of {length} bytes is larger than the limit of {MAX_JSON_BYTES} bytes")
    return read_header(file)


def _broken_file_code(file: Path) -> str:
    """Return the finding code of a file that read_header rejects: too short, too long, or broken in another way."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or (2 < length <= MAX_JSON_BYTES and size < 8 + length):
                return "file_truncated"
            if length > min(MAX_JSON_BYTES, size - 8):
                return "file_broken"
            header = parse_json(stream.read(length).decode("utf-8"))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except OSError:
        return "file_unreadable"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
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
            faults.append(make_finding("index_stale", name, f"exists together with {chosen}"))
    if not chosen:
        if len(files) > 1:
            faults.append(
                make_finding("index_missing", f"*{INDEX_SUFFIX}", f"{len(files)} safetensors files and no index")
            )
        return "", {}, faults
    try:
        index = read_json(indexes[chosen])
    except QuantError as error:
        return chosen, {}, [*faults, make_finding("json_broken", chosen, error.message)]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return (
            chosen,
            {},
            [*faults, make_finding("index_no_weight_map", chosen, f"has the keys {shorten_list(map(str, index))}")],
        )
    faults += _check_total_size(chosen, index.get("metadata"), files, weight_map, tensors)
    return chosen, weight_map, faults


def _check_total_size(
    name: str, metadata: Any, files: set[str], weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> Iterator[Finding]:
    """Check that total_size is the size of all tensors in bytes, unless a file is missing or broken."""
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not set(weight_map) <= set(tensors) or not set(weight_map.values()) <= files:
        return
    actual = sum(tensors[tensor].nbytes for tensor in weight_map)
    if declared != actual:
        yield make_finding(
            "total_size_wrong", f"{name}: metadata.total_size", f"is {declared!r}; the tensors have {actual} bytes"
        )


# --- checks --------------------------------------------------------------------------------------------------


def check_files(folder: Folder) -> Iterator[Finding]:
    """Check that files are complete, that no tensor is in two files, and that no run left partial files."""
    if not folder.files:
        yield make_finding("no_weights", str(folder.path), "contains no *.safetensors file")
    yield from folder.broken.values()
    for file in sorted(set(folder.duplicates.values())):
        names = [name for name, second in folder.duplicates.items() if second == file]
        yield make_finding(
            "tensor_twice", file, f"{len(names)} of its tensors are also in other files: {shorten_list(names)}"
        )
    work = folder.path / WORK_FOLDER
    if work.exists() and any(work.iterdir() if work.is_dir() else [work]):
        yield make_finding("unfinished_run", WORK_FOLDER, "is the work folder of an unfinished run")
    for pattern in _LEFTOVERS:
        for leftover in sorted(folder.path.glob(pattern)):
            yield make_finding("unfinished_run", leftover.name, "is a partially written file")
    for pattern in ("pytorch_model*.bin", "model*.bin", "*.pth"):
        for pickle in sorted(folder.path.glob(pattern)):
            yield make_finding("pickle_weights", pickle.name, "contains weights in pickle format")


def check_index(folder: Folder) -> Iterator[Finding]:
    """Check that the index places every tensor in the file that contains it, and names nothing else."""
    yield from folder.index_faults
    if not folder.index_name or any(f.code in ("json_broken", "index_no_weight_map") for f in folder.index_faults):
        return
    index, listed = folder.index_name, set(folder.weight_map.values())
    for file in sorted(listed - set(folder.files)):
        names = [name for name, place in folder.weight_map.items() if place == file]
        yield make_finding(
            "index_names_absent_shard", file, f"{index} places {len(names)} tensors there: {shorten_list(names)}"
        )
    for file in sorted(set(folder.files) - listed):
        yield make_finding("shard_unlisted", file, f"is not in {index}")
    for name, file in folder.weight_map.items():
        if file in folder.broken or file not in folder.files:
            continue
        info = folder.tensors.get(name)
        if info is None:
            yield make_finding(
                "index_names_absent_tensor", name, f"{index} places it in {file}, which does not contain it"
            )
        elif info.file.name != file and name not in folder.duplicates:
            yield make_finding("index_wrong_shard", name, f"{index} places it in {file}, but it is in {info.file.name}")
    for name, info in folder.tensors.items():
        if name not in folder.weight_map and info.file.name in listed:
            yield make_finding("index_lacks_tensor", name, f"is in {info.file.name} but not in {index}")
