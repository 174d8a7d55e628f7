"""A checkpoint folder: config.json, the tensors of its shards by name, and its other files.

Headers are read and checked first. Weights are read one tensor at a time, never a full shard. Pickle files are never
loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..files import parse_json, read_regular
from .safetensors_io import (
    TensorInfo,
    load_finite,
    load_rows,
    load_tensor,
    read_header,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The largest real files are tokenizers of about 10 MB. A parsed file takes up to about 30 times its size.
MAX_JSON_BYTES = 32 << 20

_MAX_FILE_NAME_LENGTH = 200

# Files with weights, or indexes of weights. Each output format writes its own.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it. `tensors` locates each tensor by name; no data is loaded."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def load(self, name: str) -> torch.Tensor:
        """Load one tensor in its stored dtype, on the CPU."""
        return load_tensor(self.tensors[name])

    def load_finite(self, name: str) -> torch.Tensor:
        """Load one tensor. Raises QuantError with its name if it holds NaN or Inf."""
        return load_finite(self.tensors[name])

    def load_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Load some rows of one tensor, for example of the embedding."""
        return load_rows(self.tensors[name], rows)

    def other_files(self) -> list[Path]:
        """List all files except weights and hidden files: tokenizer, templates, spk_dict.pt, ...; relative paths.

        Raises QuantError for a link that points outside the checkpoint: its target would be copied into the output.
        """
        root = self.path.resolve()
        allowed_roots = (root, root.parent.parent / "blobs")  # snapshots in a Hugging Face cache link to blobs
        files = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            at_top = len(relative.parts) == 1
            if not path.is_file() or _hidden(relative) or (at_top and path.name.endswith(_WEIGHT_SUFFIXES)):
                continue
            if not any(allowed in path.resolve().parents for allowed in allowed_roots):
                raise QuantError(f"{path}: links outside the checkpoint", "replace the link with the file itself")
            files.append(relative)
        return files

    def identity(self) -> str:
        """A SHA-256 digest of the config, the headers, and the size and modification time of each shard."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for info in self.tensors.values():
            digest.update(f"{info.name}|{info.dtype}|{info.shape}|{info.file.name}|{info.start}\n".encode())
        for shard in self.shards:
            stat = shard.stat()
            digest.update(f"{shard.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config.json and all headers. Raises QuantError if `path` is not a complete safetensors checkpoint."""
    path = Path(path)
    if not path.exists():
        raise QuantError(f"model_path {str(path)!r} does not exist", "give the folder that contains config.json")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise QuantError(
            f"model_path {str(path)!r} is not a checkpoint: it has no config.json",
            "give the folder that contains config.json and the safetensors files",
        )
    config = load_json_object(path / "config.json")
    tensors, shards = _read_shards(path)
    return Checkpoint(path, config, tensors, shards)


def config_block(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The object at a path of keys in a config.json, () for the top level; an empty dict if there is no such object."""
    block: Any = config
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def load_json_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file of at most MAX_JSON_BYTES. unique: reject keys that appear twice."""
    try:
        value = parse_json(read_regular(path, MAX_JSON_BYTES).decode("utf-8"), unique=unique)
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: cannot be read as JSON: {error}", "fetch or copy the file again") from error
    if not isinstance(value, dict):
        raise QuantError(f"{path}: is not a JSON object", "fetch or copy the file again")
    return value


def _read_shards(path: Path) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    index = path / INDEX_NAME
    if not index.is_file():
        single = path / SINGLE_NAME
        if not single.is_file():
            raise QuantError(
                f"{path}: contains neither {INDEX_NAME} nor {SINGLE_NAME}",
                "only safetensors checkpoints are supported; convert .bin files with transformers' save_pretrained",
            )
        return read_header(single), (single,)
    return read_indexed_shards(path, index)


def read_indexed_shards(path: Path, index: Path) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    """Read the headers of all shards listed in an index file. Returns the tensors by name, and the shards' paths.

    Raises QuantError unless the shards contain exactly the listed tensors, each in the listed shard.
    """
    weight_map = load_json_object(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QuantError(f"{index}: has no weight_map {{tensor: file}}", "fetch or copy the file again")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors") or len(file) > _MAX_FILE_NAME_LENGTH:
            raise QuantError(
                f"{index}: lists the file {file[:_MAX_FILE_NAME_LENGTH]!r}, which is not a shard in the same folder",
                "fetch or copy the file again",
            )
        if not (path / file).is_file():
            raise QuantError(
                f"{index}: shard {file!r} is missing in {path}", "fetch the checkpoint again; it is incomplete"
            )
        headers[file] = read_header(path / file)
    tensors = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise QuantError(f"{index}: tensor {name[:120]!r} is not in {file!r}", "fetch the checkpoint again")
        tensors[name] = headers[file][name]
    unlisted = sorted(set().union(*headers.values()) - set(tensors))
    if unlisted:
        raise QuantError(
            f"{index}: does not list {len(unlisted)} tensor(s) of the shards, for example {unlisted[0]!r}",
            "fetch the checkpoint again; its index and shards have different versions",
        )
    return tensors, tuple(path / file for file in headers)
