"""Plain files: safe reading of untrusted input, atomic writes, digests, files shipped with the package.

May import: no other room. No torch, so that the command starts fast.
Not here: tensors; see storage.
"""

from __future__ import annotations

from .atomic_write import write_atomically
from .digests import file_digest, value_digest
from .read_ahead import read_ahead
from .resources import shipped_folder
from .untrusted import call_with_timeout, open_regular, parse_json, read_regular

__all__ = [
    "call_with_timeout",
    "file_digest",
    "open_regular",
    "parse_json",
    "read_ahead",
    "read_regular",
    "shipped_folder",
    "value_digest",
    "write_atomically",
]
