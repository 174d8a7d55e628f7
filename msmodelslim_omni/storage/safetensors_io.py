"""Read and write safetensors files tensor by tensor, using no more memory than the requested data.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of
JSON {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}, then the bytes of all tensors
back to back. This module parses the header itself and reads into buffers of known size, because the safetensors
library maps complete files (which counts as resident memory) and cannot write a file larger than memory. Files are
untrusted input: every number in the header is checked against the file before use.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import QuantError
from ..files import open_regular, parse_json
from .direct_io import DirectFile

# Enough for 100,000 tensors. A parsed header takes up to about 30 times its size.
MAX_HEADER_BYTES = 16 << 20
_MAX_NAME_LENGTH = 1000

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_CHUNK_BYTES = 32 << 20  # read at a time for comparisons and checksums
_CHECKSUM, _UNKNOWN_CRC = "crc32", "--------"  # the placeholder is overwritten once the CRC is known
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor: bytes [start, start + nbytes) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property  # asked for again and again
    def nbytes(self) -> int:
        return self.numel * TORCH_DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of one file by name. Raises QuantError if the header is invalid or does not match the file."""
    return _tensors_of(path, *_json_header(path))


def _tensors_of(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries}
    _check_layout(path, tensors.values(), data_start, size)
    return tensors


def _json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset of the first tensor, and the size of the file."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8) or b""
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _invalid_file(path, f"the header claims {length} bytes, the file has {size}")
            header = parse_json(stream.read(length).decode("utf-8"), unique=True)
    except OSError as error:
        raise QuantError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _invalid_file(path, f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _invalid_file(path, "the header is not a JSON object")
    return header, 8 + length, size


def _invalid_file(path: Path, why: str) -> QuantError:
    return QuantError(f"{path}: not a valid safetensors file: {why}", "fetch or copy the file again")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > _MAX_NAME_LENGTH or not name.isprintable():  # names are printed and written to other files
        raise _invalid_file(path, f"a tensor has the invalid name {name[:120]!r}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _invalid_file(path, f"tensor {name[:120]!r} has no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str):
        raise _invalid_file(path, f"tensor {name[:120]!r} has no dtype")
    if dtype not in TORCH_DTYPES:
        raise QuantError(f"{path}: tensor {name!r} has the unsupported dtype {str(dtype)[:40]!r}")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)) or len(shape) > 16:
        raise _invalid_file(path, f"tensor {name[:120]!r} has an invalid shape or invalid data_offsets")
    info = TensorInfo(name, dtype, shape, path, data_start + begin)
    if end - begin != info.nbytes:
        raise _invalid_file(path, f"tensor {name!r} needs {info.nbytes} bytes, its data_offsets span {end - begin}")
    return info


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Raise QuantError unless the tensors fill the data exactly: no overlap, no gap, nothing beyond the end."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.nbytes)):
        if info.start != position:
            raise _invalid_file(path, f"tensor {info.name!r} overlaps another tensor or leaves a gap")
        position += info.nbytes
    if position != size:
        raise _invalid_file(path, f"the tensors end at byte {position}, the file at byte {size}")


def read_bytes(info: TensorInfo, first: int, buffer: memoryview) -> None:
    """Fill `buffer` with the tensor's bytes, starting at its byte `first`."""
    try:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.start + first)
            done = 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise _invalid_file(info.file, f"the file ends within tensor {info.name!r}")
                done += count
    except OSError as error:
        raise QuantError(
            f"{info.file}: reading tensor {info.name!r} failed: {error.strerror or error}",
            "check the disk, then run the same command again; it resumes where it stopped",
        ) from error


def load_tensor(info: TensorInfo, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Load one tensor in its stored dtype, into new memory or into the first bytes of `memory` (uint8)."""
    memory = torch.empty(info.nbytes, dtype=torch.uint8) if memory is None else memory[: info.nbytes]
    tensor = memory.view(TORCH_DTYPES[info.dtype]).view(info.shape)
    if info.nbytes:
        read_bytes(info, 0, byte_view(tensor))
    return tensor


def load_finite(info: TensorInfo) -> torch.Tensor:
    """Load one tensor. Raises QuantError with its name if it holds NaN or Inf."""
    tensor = load_tensor(info)
    require_finite(tensor, info)
    return tensor


def require_finite(tensor: torch.Tensor, info: TensorInfo) -> None:
    """Raise QuantError if `tensor`, all or part of the tensor `info`, holds NaN or Inf."""
    if info.dtype in FLOAT_DTYPES and not is_finite(tensor):
        raise QuantError(f"{info.file}: tensor {info.name} holds NaN or Inf", "fetch the checkpoint again")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf. On a CPU ten times as fast as isfinite of each number."""
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor)  # both propagate NaN and Inf
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


def load_rows(info: TensorInfo, rows: Iterable[int]) -> torch.Tensor:
    """Load the given rows (first axis) of one tensor in its stored dtype. Other rows are not read."""
    indices = list(rows)
    out = torch.empty((len(indices), *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
    view = byte_view(out)
    row_bytes = info.nbytes // info.shape[0]
    for i, row in enumerate(indices):
        read_bytes(info, row * row_bytes, view[i * row_bytes : (i + 1) * row_bytes])
    return out


def row_range(info: TensorInfo, first: int, end: int) -> TensorInfo:
    """The location of rows `first` to `end` - 1 of a tensor, as a separate tensor."""
    row_bytes = info.nbytes // info.shape[0]
    return replace(info, shape=(min(end, info.shape[0]) - first, *info.shape[1:]), start=info.start + first * row_bytes)


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes. Reads both in chunks of at most 32 MiB."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.start) == (b.file, b.start):
        return True
    chunk_a, chunk_b = (torch.empty(min(_CHUNK_BYTES, a.nbytes), dtype=torch.uint8) for _ in range(2))
    for first in range(0, a.nbytes, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, a.nbytes - first)
        for info, buffer in ((a, chunk_a), (b, chunk_b)):
            read_bytes(info, first, byte_view(buffer)[:size])
        if not torch.equal(chunk_a[:size], chunk_b[:size]):
            return False
    return True


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat).cast("B")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written, as the header describes it. The data follow later."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Sort by decreasing item size, then by name. The safetensors library expects this alignment."""
    return sorted(specs, key=lambda spec: (-TORCH_DTYPES[spec.dtype].itemsize, spec.name))


def encode_header(specs: Iterable[TensorSpec], metadata: dict[str, str] | None) -> bytes:
    """Encode everything before the tensor data: the header's length and the header. specs: in the order of the file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for spec in specs:
        offsets = [begin, begin + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        begin += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


class SafetensorsWriter:
    """Writes one file in one pass: first the header, from `specs`; then the tensors, in the order of `self.specs`.

    The file has a temporary name until `close` syncs and renames it. An exception in the `with` block removes it.
    Tensors are sorted by decreasing item size. checksum: store a CRC-32 of the tensor data in the metadata for
    `is_whole`.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: dict[str, str] | None = None,
        *,
        sync: bool = True,
        checksum: bool = False,
    ) -> None:
        self.path = path
        self._sync = sync
        self._crc = 0
        if checksum:
            metadata = {_CHECKSUM: _UNKNOWN_CRC, **(metadata or {})}
        self.specs = in_file_order(specs)
        self._pending: Iterator[TensorSpec] = iter(self.specs)
        self._temporary = path.with_name(path.name + ".partial")
        self._stream = self._temporary.open("wb")
        header = encode_header(self.specs, metadata)
        self._crc_place = header.index(_UNKNOWN_CRC.encode()) if checksum else None
        self._stream.write(header)

    def write(self, name: str, data: torch.Tensor | Iterable[memoryview]) -> None:
        """Write the next tensor, given as a tensor or as chunks of bytes. Order and sizes must match `self.specs`."""
        spec = next(self._pending)
        if spec.name != name:
            raise ValueError(f"{self.path}: expected tensor {spec.name}, got {name}")
        written = 0
        for chunk in [byte_view(data.contiguous())] if isinstance(data, torch.Tensor) else data:
            self._stream.write(chunk)
            written += len(chunk)
            if self._crc_place is not None:
                self._crc = zlib.crc32(chunk, self._crc)
        if written != spec.nbytes:
            raise ValueError(f"{self.path}: expected {spec.nbytes} bytes for tensor {name}, got {written}")

    def close(self) -> None:
        if (missing := next(self._pending, None)) is not None:
            raise ValueError(f"{self.path}: tensor {missing.name} was not written")
        if self._crc_place is not None:
            self._stream.seek(self._crc_place)
            self._stream.write(f"{self._crc:08x}".encode())
        self._stream.flush()
        if self._sync:
            os.fsync(self._stream.fileno())
        self._stream.close()
        self._temporary.replace(self.path)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # after a successful close, both calls do nothing
            self._stream.close()
            self._temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether `path` is an undamaged file from a SafetensorsWriter with `checksum`. Reads the complete file."""
    try:
        header, data_start, size = _json_header(path)
        _tensors_of(path, header, data_start, size)
        crc = 0
        with path.open("rb") as stream:
            stream.seek(data_start)
            while chunk := stream.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
    except (QuantError, OSError):
        return False
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and metadata.get(_CHECKSUM) == f"{crc:08x}"


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, *, checksum: bool = False
) -> None:
    """Write tensors in memory to one file, which is synced under a temporary name and then renamed."""
    specs = [TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, specs, metadata, checksum=checksum) as writer:
        for spec in writer.specs:
            writer.write(spec.name, tensors[spec.name].cpu())


class RandomAccessShard:
    """Writes one file whose tensors arrive in any order. The header and the file's final length are set at the start.

    The file has a temporary name until `close`. A file with the same header from a stopped run is resumed; the caller
    checks by checksum which of its tensors are complete. Several threads may write different tensors at once.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".partial")
        ordered = in_file_order(specs)
        header = encode_header(ordered, metadata)
        self._infos: dict[str, TensorInfo] = {}
        position = len(header)
        for spec in ordered:
            self._infos[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, self._temporary, position)
            position += spec.nbytes
        if _begins_with(path, header, position):  # the stopped run had already renamed this shard
            path.replace(self._temporary)
        if not _begins_with(self._temporary, header, position):
            with self._temporary.open("wb") as stream:
                stream.write(header)
                stream.truncate(position)
        self._file = DirectFile(self._temporary)

    def put(self, name: str, data: torch.Tensor | Iterable[memoryview], crc: int = 0) -> int:
        """Write one tensor (or its bytes in chunks). Returns the CRC-32 of its bytes, continued from `crc`."""
        info, written = self._infos[name], 0
        for chunk in [byte_view(data.contiguous())] if isinstance(data, torch.Tensor) else data:
            crc = zlib.crc32(chunk, crc)
            self._file.write(info.start + written, chunk)
            written += len(chunk)
        if written != info.nbytes:
            raise ValueError(f"{self.path}: expected {info.nbytes} bytes for tensor {name}, got {written}")
        return crc

    def crc(self, name: str, crc: int = 0) -> int:
        """The CRC-32 of a tensor's bytes in the file, continued from `crc`."""
        info = self._infos[name]
        buffer = byte_view(torch.empty(min(_CHUNK_BYTES, info.nbytes), dtype=torch.uint8))
        for first in range(0, info.nbytes, _CHUNK_BYTES):
            piece = buffer[: min(_CHUNK_BYTES, info.nbytes - first)]
            read_bytes(info, first, piece)
            crc = zlib.crc32(piece, crc)
        return crc

    def sync(self) -> None:
        """Wait until all written tensors are on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Sync the file and give it its final name. The caller must have written every tensor."""
        self.sync()
        self._file.close()
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        """Close the file and keep it under its temporary name."""
        self._file.close()


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    """Whether `path` is a file of `size` bytes that begins with `header`."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(header)) == header and stream.seek(0, os.SEEK_END) == size
    except FileNotFoundError:
        return False
