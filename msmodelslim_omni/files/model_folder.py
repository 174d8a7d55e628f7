"""The folder of a model: a path, or the name of a model on a hub that is already in the local cache.

Nothing is downloaded. A hub name that is not in the cache is answered with the command that downloads it.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import QuantError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model_folder(name: str | Path) -> Path:
    """The folder that `name` means: `name` itself if it exists, else the cached snapshot of a hub name.

    Raises QuantError if there is neither, or if the folder has no config.json.
    """
    if str(name) == "":
        raise QuantError("the path of the model is empty", "give the folder that contains config.json")
    path = Path(name)
    if not path.exists():
        if not _HUB_NAME.fullmatch(str(name)):
            raise QuantError(f"model_path {str(name)!r} does not exist", "give the folder that contains config.json")
        cached = _cached_snapshot(str(name))
        if cached is None:
            folder = path.name
            raise QuantError(
                f"model_path {str(name)!r} does not exist, and no model of this name is in the local hub cache",
                f"download it: `hf download {name} --local-dir {folder}`"
                f" or `modelscope download --model {name} --local_dir {folder}`; then give {folder}",
            )
        return cached
    if not path.is_dir() or not (path / "config.json").is_file():
        raise QuantError(
            f"model_path {str(path)!r} is not a checkpoint: it has no config.json",
            "give the folder that contains config.json and the safetensors files",
        )
    return path


def _cached_snapshot(name: str) -> Path | None:
    """The snapshot of a model in the cache of huggingface_hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache  # reads folders only, opens no connection

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid name of a repository
        return None
    return Path(config).parent if isinstance(config, str) else None
