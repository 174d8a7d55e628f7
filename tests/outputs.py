"""Outputs of the tiny model in several formats, data-free to save time, and functions that damage a copy."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from msmodelslim_omni.run.pipeline import quantize

# One Linear stays float in one layer, so that the lists of float Linears are tested too.
FLOAT_LINEAR = "thinker.model.layers.1.mlp.down_proj"
LINEARS = 4 * 7 - 1

INT8 = "{act: {scope: per_token, dtype: int8}, weight: {scope: per_channel, dtype: int8}}"
INT4 = "{weight: {scope: per_group, dtype: int4, symmetric: SYMMETRIC, ext: {group_size: 64}}}"
FP8 = "{act: {dtype: fp8_e4m3}, weight: {dtype: fp8_e4m3}}"
FP8_BLOCK = "{act: {scope: per_group, dtype: fp8_e4m3}, weight: {scope: per_block, dtype: fp8_e4m3}}"

RECIPE = """apiversion: multimodal_vlm_modelslim_v1
metadata: {config_id: test}
spec:
  process:
    - {type: linear_quant, qconfig: QCONFIG, include: ["*"], exclude: ["*FLOAT_LINEAR"]}
  save: [{type: compressed_tensors}]
"""


def write_recipe(folder: Path, name: str, qconfig: str, float_linear: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("QCONFIG", qconfig).replace("FLOAT_LINEAR", float_linear), encoding="utf-8")
    return path


@functools.cache
def quantize_all(model: Path, folder: Path, float_linear: str = FLOAT_LINEAR) -> dict[str, Path]:
    """Quantize once for all tests, which must not change the outputs.

    `ascend` and `int8` hold the same integers; so do `awq` and `packed` (asymmetric). `symmetric` is packed int4.
    """
    folder.mkdir()
    recipes = {
        "int8": (INT8, ["ascendv1_saver", "compressed_tensors"]),
        "int4": (INT4.replace("SYMMETRIC", "False"), ["awq", "compressed_tensors"]),
        "symmetric": (INT4.replace("SYMMETRIC", "True"), ["compressed_tensors"]),
    }
    for name, (qconfig, savers) in recipes.items():
        recipe = write_recipe(folder, name, qconfig, float_linear)
        quantize(model, folder / name, config_path=str(recipe), save_format=savers, device="cpu")
    return {
        "ascend": folder / "int8" / "ascendv1_saver",
        "int8": folder / "int8" / "compressed_tensors",
        "awq": folder / "int4" / "awq",
        "packed": folder / "int4" / "compressed_tensors",
        "symmetric": folder / "symmetric",
    }


# --- damage --------------------------------------------------------------------------------------------------


def weights_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_file(folder))


def edited(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint in `target`, with its tensors modified by `change`."""
    shutil.copytree(folder, target)
    tensors = load_file(weights_file(target))
    change(tensors)
    save_file(tensors, weights_file(target), {"format": "pt"})
    return target


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def replaced(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value.clone()

    return change


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
