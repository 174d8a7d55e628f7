"""read_ahead: reads up to a limit, and never blocks or fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from msmodelslim_omni.files.read_ahead import read_ahead

MIB = 1 << 20


def bytes_read() -> int:
    """Bytes that this process has read from files and pipes so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/io")
@pytest.mark.parametrize(("max_bytes", "expected"), [(64 * MIB, 11 * MIB), (4 * MIB, 4 * MIB)])
def test_shards_are_read_up_to_the_limit(max_bytes: int, expected: int, tmp_path: Path) -> None:
    for name, size in (("a", 8), ("b", 3)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size * MIB))
    (tmp_path / "other.bin").write_bytes(bytes(16 * MIB))
    before = bytes_read()
    read_ahead(tmp_path, max_bytes).join(60)
    assert expected <= bytes_read() - before < expected + MIB


def test_pipe_or_missing_folder_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for folder in (tmp_path, tmp_path / "missing"):
        thread = read_ahead(folder)
        thread.join(10)
        assert not thread.is_alive()
