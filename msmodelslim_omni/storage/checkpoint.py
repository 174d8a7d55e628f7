"""A float checkpoint on disk: config.json, the tensors of its shards by name, and its other files.

Headers are read first and checked; weights are read tensor by tensor, never a whole shard. No pickle is ever loaded.
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
# The largest are tokenizers, of some ten megabytes. Parsed, it takes up to some thirty times its size.
MAX_JSON_BYTES = 32 << 20

_LONGEST_FILE_NAME = 200

# Files that describe or hold weights: formats write their own.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """What the headers say. `tensors` maps checkpoint names to their place; nothing is loaded yet."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def load(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, on the CPU."""
        return load_tensor(self.tensors[name])

    def load_finite(self, name: str) -> torch.Tensor:
        """`load`, refusing NaN and Inf by the tensor's name."""
        return load_finite(self.tensors[name])

    def load_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of one tensor, e.g. of the embedding."""
        return load_rows(self.tensors[name], rows)

    def other_files(self) -> list[Path]:
        """Every file but the weights (tokenizer, templates, spk_dict.pt, ...), hidden ones left out.

        Raises QuantError for a link that leads out of the checkpoint: its target would end up in what is published.
        """
        root = self.path.resolve()
        homes = (root, root.parent.parent / "blobs")  # a hub cache links its snapshots to its blobs
        files = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            at_top = len(relative.parts) == 1
            if not path.is_file() or _hidden(relative) or (at_top and path.name.endswith(_WEIGHT_SUFFIXES)):
                continue
            if not any(home in path.resolve().parents for home in homes):
                raise QuantError(f"{path}: is a link out of the checkpoint", "put the file itself in its place")
            files.append(relative)
        return files

    def identity(self) -> str:
        """A digest that changes when the checkpoint does: config, headers, and each shard's size and time."""
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
    """Read config.json and all headers. Raises QuantError for whatever is not a whole safetensors checkpoint."""
    path = Path(path)
    if not path.exists():
        raise QuantError(f"model_path {str(path)!r} does not exist", "give the folder that holds config.json")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise QuantError(
            f"model_path {str(path)!r} is not a checkpoint: it holds no config.json",
            "give the folder that holds config.json and the safetensors files",
        )
    config = load_json_object(path / "config.json")
    tensors, shards = _read_shards(path)
    return Checkpoint(path, config, tensors, shards)


def config_block(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The block of a config.json at a path of keys, () for all of it; empty where there is no such object."""
    block: Any = config
    for key in path:
        block = block.get(key) if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def load_json_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file of bounded size. unique: none of its keys may stand twice."""
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
                f"{path}: holds neither {INDEX_NAME} nor {SINGLE_NAME}",
                "only safetensors checkpoints are read; convert .bin files with transformers' save_pretrained",
            )
        return read_header(single), (single,)
    return follow_index(path, index)


def follow_index(path: Path, index: Path) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    """The headers of all shards that an index file names, each tensor where the index says, and none beside them."""
    weight_map = load_json_object(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QuantError(f"{index}: has no weight_map {{tensor: file}}", "fetch or copy the file again")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors") or len(file) > _LONGEST_FILE_NAME:
            raise QuantError(f"{index}: names the file {file[:_LONGEST_FILE_NAME]!r}, which is not a shard beside it")
        if not (path / file).is_file():
            raise QuantError(
                f"{index}: shard {file!r} is missing in {path}", "fetch the checkpoint again; it is not whole"
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
            f"{index}: {len(unlisted)} tensors of the shards are not listed, e.g. {unlisted[0]!r}",
            "fetch the checkpoint again; index and shards are of different versions",
        )
    return tensors, tuple(path / file for file in headers)
