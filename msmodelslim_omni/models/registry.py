"""Table of the supported model types. A new model type needs one module in this package and a line here."""

from __future__ import annotations

from typing import Any

from ..errors import QuantError, nearest
from . import qwen2_5_omni, qwen2_5_vl, qwen3_omni, qwen3_vl
from .spec import ModelSpec

MODEL_TYPES: dict[str, ModelSpec] = {
    "Qwen2.5-Omni-7B": qwen2_5_omni.model_spec("Qwen2.5-Omni-7B"),
    "Qwen2.5-Omni-3B": qwen2_5_omni.model_spec("Qwen2.5-Omni-3B"),
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl.model_spec("Qwen2.5-VL-7B-Instruct"),
    "Qwen2.5-VL-3B-Instruct": qwen2_5_vl.model_spec("Qwen2.5-VL-3B-Instruct"),
    qwen3_omni.INSTRUCT: qwen3_omni.model_spec(qwen3_omni.INSTRUCT),
    qwen3_omni.THINKING: qwen3_omni.model_spec(qwen3_omni.THINKING),
    qwen3_omni.CAPTIONER: qwen3_omni.model_spec(qwen3_omni.CAPTIONER),
    "Qwen3-VL-4B-Instruct": qwen3_vl.model_spec("Qwen3-VL-4B-Instruct"),
    "Qwen3-VL-8B-Instruct": qwen3_vl.model_spec("Qwen3-VL-8B-Instruct"),
    "Qwen3-VL-32B-Instruct": qwen3_vl.model_spec("Qwen3-VL-32B-Instruct"),
}

# Alternative names that users may give.
MODEL_TYPE_ALIASES = {
    "Qwen2.5-VL-7B": "Qwen2.5-VL-7B-Instruct",
    "Qwen2.5-VL-3B": "Qwen2.5-VL-3B-Instruct",
    "Qwen3-Omni-30B-A3B": qwen3_omni.INSTRUCT,
    "Qwen3-VL-4B": "Qwen3-VL-4B-Instruct",
    "Qwen3-VL-8B": "Qwen3-VL-8B-Instruct",
    "Qwen3-VL-32B": "Qwen3-VL-32B-Instruct",
}


def find_model_type(name: str) -> ModelSpec:
    """Look up a model type by name or alias. Raises QuantError with the list of known names."""
    full_name = MODEL_TYPE_ALIASES.get(name, name)
    if full_name not in MODEL_TYPES:
        raise QuantError(
            f"unknown model_type {name!r}. Known: {', '.join(MODEL_TYPES)}.{nearest(name, MODEL_TYPES)}",
            "omit --model_type to derive it from config.json",
        )
    return MODEL_TYPES[full_name]


def derive_model_type(config: dict[str, Any]) -> ModelSpec:
    """Derive the model type from config.json: by its published shape, else the first type of its architecture.

    The first type is also returned if the shape cannot be read; the code that needs the shape reports that error.
    """
    hf_model_type = config.get("model_type")
    candidates = [spec for spec in MODEL_TYPES.values() if spec.hf_model_type == hf_model_type]
    if not candidates:
        known = sorted({spec.hf_model_type for spec in MODEL_TYPES.values()})
        raise QuantError(
            f"config.json has model_type {hf_model_type!r}; supported: {', '.join(known)}",
            "give the folder of the complete model; thinker-only checkpoints are not supported",
        )
    try:
        shape = candidates[0].family.published_model_type(config)
    except QuantError:
        shape = ""
    return next((spec for spec in candidates if spec.model_type == shape), candidates[0])
