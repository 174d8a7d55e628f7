"""Atomic writes of text files: the text goes to a temporary file, which then replaces the target."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str, *, sync: bool = False) -> None:
    """Write `text` to `path` atomically. If `path` is a symlink, replace the link, not its target.

    sync: flush the text to disk before the rename.
    """
    temporary = path.with_name(path.name + ".partial")
    temporary.unlink(missing_ok=True)  # it may be a symlink if others can write to the folder
    with temporary.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    temporary.replace(path)
