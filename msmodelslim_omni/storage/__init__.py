"""Tensors on disk: safetensors files and checkpoint folders with one or more shards. Input is never trusted.

safetensors_io.py reads headers and tensors and writes files. checkpoint.py opens a checkpoint folder. direct_io.py
writes large files without filling the page cache.
May import: files, errors.
Not here: the meaning of the tensors; see models and formats.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, config_block, load_json_object, open_checkpoint, read_indexed_shards
from .safetensors_io import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    TORCH_DTYPES,
    RandomAccessShard,
    SafetensorsWriter,
    TensorInfo,
    TensorSpec,
    byte_view,
    encode_header,
    in_file_order,
    is_finite,
    is_whole,
    load_finite,
    load_tensor,
    read_bytes,
    read_header,
    require_finite,
    row_range,
    same_bytes,
    write_tensors,
)

__all__ = [
    "DTYPE_NAMES",
    "FLOAT_DTYPES",
    "TORCH_DTYPES",
    "Checkpoint",
    "RandomAccessShard",
    "SafetensorsWriter",
    "TensorInfo",
    "TensorSpec",
    "byte_view",
    "config_block",
    "encode_header",
    "in_file_order",
    "is_finite",
    "is_whole",
    "load_finite",
    "load_json_object",
    "load_tensor",
    "open_checkpoint",
    "read_bytes",
    "read_header",
    "read_indexed_shards",
    "require_finite",
    "row_range",
    "same_bytes",
    "write_tensors",
]
