"""The index file of a dataset: a path, or the name of a shipped dataset."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import QuantError, nearest
from .resources import shipped_folder

INDEX_SUFFIXES = (".jsonl", ".json", ".txt")
# `owner/name`, as datasets of a hub are called.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HINT = "give an index.json, an index.jsonl, a folder that contains one, or a .txt file with one prompt per line"


def find_index(dataset: str) -> Path:
    """Path of the index file. dataset: a path, or the name of a folder in lab_calib/.

    Raises QuantError if the path does not exist, is a media file, or is a folder without exactly one index.
    """
    candidates = [Path(dataset)]
    if Path(dataset).name == dataset:
        candidates.append(shipped_folder("lab_calib") / dataset)
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        if _HUB_NAME.fullmatch(dataset):
            raise QuantError(
                f"dataset {dataset!r} does not exist here; datasets of a hub are not downloaded",
                f"hf download --repo-type dataset {dataset} --local-dir {Path(dataset).name}, then write an index.jsonl"
                " that names its files; docs/calibration.md shows one",
            )
        shipped = dataset_names(shipped_folder("lab_calib"))
        raise QuantError(
            f"dataset {dataset!r} does not exist. Shipped: {', '.join(shipped)}.{nearest(dataset, shipped)}", _HINT
        )
    if not path.is_dir():
        if path.suffix.lower() not in INDEX_SUFFIXES:
            raise QuantError(
                f"dataset {dataset!r} is not an index: its suffix is {path.suffix or 'missing'!r}",
                f'{_HINT}; a line of an index is e.g. {{"image": "cat.png", "text": "What is it?"}}',
            )
        return path
    indices = _indices(path)
    if len(indices) != 1:
        contents = "both index.json and index.jsonl" if indices else "neither index.jsonl nor index.json"
        raise QuantError(f"dataset folder {str(path)!r} contains {contents}", "give the path of the index file")
    return indices[0]


def dataset_names(folder: Path) -> list[str]:
    """The folders in a folder that contain an index; pip adds a __pycache__, for example."""
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and _indices(path))


def _indices(folder: Path) -> list[Path]:
    return [folder / name for name in ("index.jsonl", "index.json") if (folder / name).is_file()]
