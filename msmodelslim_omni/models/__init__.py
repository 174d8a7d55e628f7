"""Model types: the names, shapes and library classes of each supported model.

A model type is one ModelSpec (data) with a module of functions, and one line in registry.py's table. spec.py and
inputs.py define the interfaces. transformers is imported here only, inside functions.
May import: storage, files, errors.
Left out on purpose: quantization. A ModelSpec names the Linears; recipes decide what happens to them.
"""

from __future__ import annotations

from .inputs import MODALITIES, LayerInput, MediaLimits, MediaProcessor, ModelInputs
from .registry import MODEL_TYPES, derive_model_type, named_model_type
from .running import RunnableModel, Running, Speaking, SpeakingModel
from .spec import LayerSpec, LinearGroup, ModelSpec, Part, Renaming, renamed

__all__ = [
    "MODALITIES",
    "MODEL_TYPES",
    "LayerInput",
    "LayerSpec",
    "LinearGroup",
    "MediaLimits",
    "MediaProcessor",
    "ModelInputs",
    "ModelSpec",
    "Part",
    "Renaming",
    "RunnableModel",
    "Running",
    "Speaking",
    "SpeakingModel",
    "derive_model_type",
    "named_model_type",
    "renamed",
]
