"""Reads the first gigabytes of a checkpoint into the page cache while torch is being imported.

This module must not import torch: the import takes most of the time that the read-ahead uses.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from .untrusted import open_regular

# About as much as a disk reads during the imports. It covers the layers that are needed first.
_MAX_BYTES = 3 << 30
_BUFFER_BYTES = 4 << 20


def read_ahead(folder: Path, max_bytes: int = _MAX_BYTES) -> threading.Thread:
    """Start reading in a daemon thread and return the thread. I/O errors are ignored: the actual read reports them."""
    thread = threading.Thread(target=_read, args=(folder, max_bytes), daemon=True)
    thread.start()
    return thread


def _read(folder: Path, max_bytes: int) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with suppress(OSError):
        for path in sorted(folder.glob("*.safetensors")):
            with open_regular(path) as stream:
                while max_bytes > 0 and (count := stream.readinto(buffer)):
                    max_bytes -= count
