"""Plain files: safe reading of untrusted input, atomic writes, digests, files shipped with the package.

May import: errors. No torch, so that the command starts fast.
Not here: tensors; see storage.
"""

from __future__ import annotations

from .atomic_write import write_atomically
from .datasets import dataset_names, find_index
from .digests import file_digest, file_sha256, value_digest
from .model_folder import find_model_folder
from .read_ahead import read_ahead
from .resources import shipped_folder
from .save_path import WORK_FOLDER, check_save_path
from .scratch_folder import scratch_folder
from .sizes import parse_size
from .untrusted import call_with_timeout, open_regular, parse_json, read_regular

__all__ = [
    "WORK_FOLDER",
    "call_with_timeout",
    "check_save_path",
    "dataset_names",
    "file_digest",
    "file_sha256",
    "find_index",
    "find_model_folder",
    "open_regular",
    "parse_json",
    "parse_size",
    "read_ahead",
    "read_regular",
    "scratch_folder",
    "shipped_folder",
    "value_digest",
    "write_atomically",
]
