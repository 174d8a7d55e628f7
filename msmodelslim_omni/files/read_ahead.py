"""Reads a checkpoint's first gigabytes into the page cache while the libraries are still being imported.

No torch here: it would take most of the time that this is to make use of.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from .untrusted import open_regular

# What a disk yields in the seconds of the imports; the layers that are read first lie in it.
_MOST = 3 << 30
_BUFFER = 4 << 20


def read_ahead(folder: Path, most: int = _MOST) -> threading.Thread:
    """Begin, and return at once. Faults are left to whoever opens the files in earnest; the memory is one buffer."""
    thread = threading.Thread(target=_read, args=(folder, most), daemon=True)
    thread.start()
    return thread


def _read(folder: Path, most: int) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    with suppress(OSError):
        for path in sorted(folder.glob("*.safetensors")):
            with open_regular(path) as stream:
                while most > 0 and (count := stream.readinto(buffer)):
                    most -= count
