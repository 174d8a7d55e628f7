"""Checks and file operations on save_path, the folder that receives the outputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import QuantError
from ..files import WORK_FOLDER
from ..report import human_bytes
from ..storage import load_json_object

REPORT_NAME = "quant_report.json"  # every output has this file


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


def stored_fingerprint(folder: Path) -> dict[str, str]:
    """The fingerprint of the finished run whose output is in this folder; empty if there is none.

    config.json is moved into place last, so without it the output is not finished.
    """
    if (folder / "config.json").is_file() and (folder / REPORT_NAME).is_file():
        with suppress(QuantError):
            stored = load_json_object(folder / REPORT_NAME).get("fingerprint")
            return stored if isinstance(stored, dict) else {}
    return {}


def is_finished(save_path: Path, outputs: Iterable[Path], fingerprint: Mapping[str, str]) -> bool:
    """Whether the outputs of a run with this fingerprint are in place, and no work folder is left."""
    in_place = all(stored_fingerprint(folder) == fingerprint for folder in outputs)
    return in_place and not (save_path / WORK_FOLDER).exists()


def output_folder(save_path: Path, saver: str, savers: Sequence[str]) -> Path:
    """The final folder of an output: save_path, or with several savers a folder in it."""
    return save_path / saver if len(savers) > 1 else save_path


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
