"""Plain files: open untrusted input, replace a file atomically, digests, the files shipped with the package.

May import: errors. No torch, so that the command starts fast.
Left out on purpose: tensors; see storage.
"""

from __future__ import annotations

from .atomic_write import write_aside
from .digests import file_digest, value_digest
from .read_ahead import read_ahead
from .resources import shipped_folder
from .untrusted import open_regular, parse_json, read_regular, within_seconds

__all__ = [
    "file_digest",
    "open_regular",
    "parse_json",
    "read_ahead",
    "read_regular",
    "shipped_folder",
    "value_digest",
    "within_seconds",
    "write_aside",
]
