"""Tensors on disk: safetensors files and checkpoints of several shards. Input is never trusted.

safetensors_io.py reads headers and tensors and writes files; checkpoint.py opens a checkpoint folder; direct_io.py
writes large files past the page cache.
May import: files, errors.
Left out on purpose: what the tensors mean; see models and formats.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, config_block, follow_index, load_json_object, open_checkpoint
from .safetensors_io import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    TORCH_DTYPES,
    PlacedShard,
    SafetensorsWriter,
    TensorInfo,
    TensorSpec,
    byte_view,
    encode_header,
    in_file_order,
    is_whole,
    load_finite,
    load_tensor,
    read_bytes,
    read_header,
    refuse_nonfinite,
    row_range,
    same_bytes,
    write_tensors,
)

__all__ = [
    "DTYPE_NAMES",
    "FLOAT_DTYPES",
    "TORCH_DTYPES",
    "Checkpoint",
    "PlacedShard",
    "SafetensorsWriter",
    "TensorInfo",
    "TensorSpec",
    "byte_view",
    "config_block",
    "encode_header",
    "follow_index",
    "in_file_order",
    "is_whole",
    "load_finite",
    "load_json_object",
    "load_tensor",
    "open_checkpoint",
    "read_bytes",
    "read_header",
    "refuse_nonfinite",
    "row_range",
    "same_bytes",
    "write_tensors",
]
