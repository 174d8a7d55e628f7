"""The model types: a new one is one file here and its lines in these tables."""

from __future__ import annotations

from typing import Any

from ..errors import QuantError, nearest
from . import qwen2_5_omni, qwen2_5_vl
from .spec import ModelSpec

MODEL_TYPES: dict[str, ModelSpec] = {
    "Qwen2.5-Omni-7B": qwen2_5_omni.model_spec("Qwen2.5-Omni-7B"),
    "Qwen2.5-Omni-3B": qwen2_5_omni.model_spec("Qwen2.5-Omni-3B"),
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl.model_spec("Qwen2.5-VL-7B-Instruct"),
    "Qwen2.5-VL-3B-Instruct": qwen2_5_vl.model_spec("Qwen2.5-VL-3B-Instruct"),
}

# Other names under which users know a model type.
MODEL_TYPE_ALIASES = {
    "Qwen2.5-VL-7B": "Qwen2.5-VL-7B-Instruct",
    "Qwen2.5-VL-3B": "Qwen2.5-VL-3B-Instruct",
}


def named_model_type(name: str) -> ModelSpec:
    """The model type a user names. Raises QuantError listing what exists."""
    full_name = MODEL_TYPE_ALIASES.get(name, name)
    if full_name not in MODEL_TYPES:
        raise QuantError(
            f"unknown model_type {name!r}. Known: {', '.join(MODEL_TYPES)}.{nearest(name, MODEL_TYPES)}",
            "leave --model_type out to derive it from config.json",
        )
    return MODEL_TYPES[full_name]


def derive_model_type(config: dict[str, Any]) -> ModelSpec:
    """The model type of a config.json: the one of its published shape, else the first of its architecture.

    A config.json without a readable shape has the first too: what needs the shape says what is wrong with it.
    """
    hf_model_type = config.get("model_type")
    candidates = [spec for spec in MODEL_TYPES.values() if spec.hf_model_type == hf_model_type]
    if not candidates:
        known = sorted({spec.hf_model_type for spec in MODEL_TYPES.values()})
        raise QuantError(
            f"config.json has model_type {hf_model_type!r}; supported: {', '.join(known)}",
            "thinker-only checkpoints are not read either: give the folder of the whole model",
        )
    try:
        shape = candidates[0].family.shape_name(config)
    except QuantError:
        shape = ""
    return next((spec for spec in candidates if spec.model_type == shape), candidates[0])
