"""The plan of a run: all decisions that are made before a weight is read.

plan.py assigns a scheme to every Linear; keep.py says which ones may stay in a better one; admission.py refuses
checkpoints that cannot be quantized; peak_memory.py estimates the memory of a run and fits it to --max_memory.
May import: processors, compatibility, statistics, formats, models, recipe, numerics, runtime, storage, errors.
Not here: samples and tensors. A plan is made from the recipe, config.json and safetensors headers only.
"""

from __future__ import annotations

from .admission import check_all_tensors, declared_scheme, quantization_of, refuse_quantized
from .keep import Keep
from .peak_memory import (
    TUNED_POSITIONS,
    TUNED_TOKENS,
    backlog_bytes,
    card_memory,
    fit_budget,
    fit_card,
    gram_disk_bytes,
    own_text_length,
    own_texts,
    peak_memory,
    refit_budget,
    room_for_layers,
    with_own_texts,
)
from .plan import LayerPlan, QuantPlan, make_plan

__all__ = [
    "TUNED_POSITIONS",
    "TUNED_TOKENS",
    "Keep",
    "LayerPlan",
    "QuantPlan",
    "backlog_bytes",
    "card_memory",
    "check_all_tensors",
    "declared_scheme",
    "fit_budget",
    "fit_card",
    "gram_disk_bytes",
    "make_plan",
    "own_text_length",
    "own_texts",
    "peak_memory",
    "quantization_of",
    "refit_budget",
    "refuse_quantized",
    "room_for_layers",
    "with_own_texts",
]
