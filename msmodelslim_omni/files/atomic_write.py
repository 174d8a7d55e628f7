"""Text files that appear whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_aside(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace `path`, itself and not what it may link to. sync: return when the text is on the disk."""
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)  # in a folder of others it might lead elsewhere
    with temporary.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    temporary.replace(path)
