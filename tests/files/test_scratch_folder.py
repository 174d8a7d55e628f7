"""Folders for temporary files, of processes that end, that run, and that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msmodelslim_omni.files import scratch_folder

HOLDER = """
import sys
from pathlib import Path
from msmodelslim_omni.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), ".work_") as folder:
    (folder / "states").write_text("gigabytes")
    print(folder, flush=True)
    sys.stdin.read()
"""


def hold(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_is_removed_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, ".work_") as folder:
        (folder / "states").write_text("x")
        assert folder.parent == tmp_path and folder.name.startswith(".work_")
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path, ".work_"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / ".work_of_somebody").mkdir()  # no lock file: not known to be abandoned
    process, held = hold(tmp_path)
    with scratch_folder(tmp_path, ".work_") as own:
        assert (held / "states").is_file()  # its process runs
        with scratch_folder(tmp_path, ".work_"):
            assert own.is_dir()
    process.send_signal(how)
    process.wait()
    assert (held / "states").is_file()
    with scratch_folder(tmp_path, ".other_"):
        assert held.is_dir()
    with scratch_folder(tmp_path, ".work_"):
        assert not held.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [".work_of_somebody"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    kept, parent = tmp_path / "kept", tmp_path / "parent"
    kept.mkdir()
    (kept / "lock").write_text("")
    parent.mkdir()
    (parent / ".work_link").symlink_to(kept)
    with scratch_folder(parent, ".work_"):
        pass
    assert (kept / "lock").is_file() and (parent / ".work_link").is_symlink()
