"""Checks of paths, names and sizes before torch is imported: a typing error is answered in a third of a second.

The rooms check the same values again; nothing here decides how to quantize.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import QuantError
from ..files import check_save_path, find_index, find_model_folder, parse_size
from ..recipe import check_quant_type, needs_samples, resolve_recipe, saver_names


def check_output(save_path: Path, model: Path) -> None:
    """Raise QuantError if save_path overlaps the model, is a file, or lies where nothing can be written."""
    check_save_path(save_path, model)
    existing = next(folder for folder in (save_path, *save_path.absolute().parents) if folder.is_dir())
    if not os.access(existing, os.W_OK):
        raise QuantError(
            f"save_path {str(save_path)!r} cannot be written: {str(existing)!r} is read-only for you",
            "choose another folder",
        )


def check_quant(
    model: str,
    save_path: str,
    *,
    quant_type: str | None,
    config_path: str | None,
    dataset: str | None,
    save_format: list[str] | None,
    max_memory: str | None,
) -> None:
    """Raise QuantError for the first argument of `quant` that cannot be right."""
    check_output(Path(save_path), find_model_folder(model))
    recipe = None if config_path is None else resolve_recipe(config_path)
    if quant_type is not None:
        check_quant_type(quant_type)
    if recipe is None or needs_samples(recipe):  # a data-free run does not read the dataset
        check_samples(dataset)
    if save_format:
        saver_names(save_format)
    if max_memory is not None:
        parse_size(max_memory)


def check_samples(dataset: str | None) -> None:
    """Raise QuantError if there is no such dataset."""
    if dataset is not None:
        find_index(dataset)
