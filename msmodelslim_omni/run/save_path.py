"""Checks and file operations on save_path, the folder that receives the outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import QuantError
from ..report import human_bytes

WORK_FOLDER = ".msmodelslim_work"  # inside save_path
REPORT_NAME = "quant_report.json"  # every output has this file


def check_save_path(save_path: Path, model_path: Path) -> None:
    """Raise QuantError if save_path is a file or overlaps the checkpoint folder."""
    target, source = save_path.resolve(), model_path.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise QuantError(
            f"save_path {str(save_path)!r} and model_path {str(model_path)!r} lie inside one another",
            "choose a folder outside the checkpoint",
        )
    for existing in (target, *target.parents):
        if existing.exists():
            if not existing.is_dir():
                raise QuantError(f"save_path {str(save_path)!r}: {str(existing)!r} is a file", "choose a folder")
            return


def check_disk_space(save_path: Path, needed: int) -> None:
    """Raise QuantError if the disk cannot hold `needed` bytes. Files of a stopped run count as free space."""
    # By blocks: an unfinished file has its full length from the start.
    written = sum(f.stat().st_blocks * 512 for f in (save_path / WORK_FOLDER).rglob("*") if f.is_file())
    existing = next(path for path in (save_path, *save_path.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    free = usage.free if usage.total else needed  # not a disk, such as /proc: the error of writing says why
    if needed > free + written:
        raise QuantError(
            f"{str(save_path)!r} needs {human_bytes(needed)}, but only {human_bytes(free + written)} are free",
            "free some space, choose another disk, or write one format only (--save_format)",
        )


def foreign_entries(folder: Path, names: list[str]) -> list[str]:
    """The names in a folder that are not an output of this tool; empty if the folder itself is an output."""
    if (folder / REPORT_NAME).is_file():
        return []
    return [name for name in names if not (folder / name / REPORT_NAME).is_file()]


def move_output(source: Path, target: Path) -> None:
    """Move a finished output into place. config.json goes last: until then no loader accepts the folder."""
    if not source.is_dir():
        return  # moved before the run was killed
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == "config.json", entry.name)):
        entry.replace(target / entry.name)
    source.rmdir()


def remove(entry: Path) -> None:
    """Delete a file, a link or a whole folder, if it exists."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
