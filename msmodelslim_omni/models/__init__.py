"""Model types: tensor names, shapes and transformers classes of each supported model.

A model type is one ModelSpec (data), a module of functions, and one line in the table of registry.py. spec.py,
inputs.py and running.py define the interfaces. Only this package imports transformers, inside functions.
May import: storage, files, errors.
Not here: quantization. A ModelSpec names the Linears; the recipe decides how to quantize them.
"""

from __future__ import annotations

from .attention import AttentionRecord, attention_apart, pass_cache_through
from .inputs import (
    JOINED_TOKENS,
    MODALITIES,
    ClipSize,
    FrameChoice,
    LayerInput,
    MediaLimits,
    MediaProcessor,
    ModelInputs,
    Stem,
    can_join,
    cut_arguments,
    join_samples,
)
from .log_mel import log_mel
from .registry import MODEL_TYPES, derive_model_type, find_model_type
from .running import ModelRunner, RunnableModel, SpeakingModel, SpeechSupport, Spoken
from .spec import (
    LayerSpec,
    LinearGroup,
    ModelSpec,
    Part,
    Renaming,
    RoutedBlock,
    Subgraph,
    apply_renaming,
    is_recomputed_buffer,
)

__all__ = [
    "JOINED_TOKENS",
    "MODALITIES",
    "MODEL_TYPES",
    "AttentionRecord",
    "ClipSize",
    "FrameChoice",
    "LayerInput",
    "LayerSpec",
    "LinearGroup",
    "MediaLimits",
    "MediaProcessor",
    "ModelInputs",
    "ModelRunner",
    "ModelSpec",
    "Part",
    "Renaming",
    "RoutedBlock",
    "RunnableModel",
    "SpeakingModel",
    "SpeechSupport",
    "Spoken",
    "Stem",
    "Subgraph",
    "apply_renaming",
    "attention_apart",
    "can_join",
    "cut_arguments",
    "derive_model_type",
    "find_model_type",
    "is_recomputed_buffer",
    "join_samples",
    "log_mel",
    "pass_cache_through",
]
