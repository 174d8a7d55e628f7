"""Checks on the folder that receives outputs, before anything is computed."""

from __future__ import annotations

from pathlib import Path

from ..errors import QuantError

WORK_FOLDER = ".msmodelslim_work"  # inside save_path: the unfinished outputs of a run


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
