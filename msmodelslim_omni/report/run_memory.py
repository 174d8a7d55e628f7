"""Estimated memory of a model at run time, from sizes only: its weights by purpose, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..models import ModelSpec

_CACHE_TOKENS = 1000
_CACHE_BYTES = 2  # per key or value; runtimes store them in 16 bits, or 8 if the checkpoint has scales for them


@dataclass(frozen=True)
class RunMemory:
    """Memory in bytes, without activations and without memory that the runtime reserves for itself.

    text_*: weights needed for text output, which are the weights that vLLM loads; all_*: speech weights included.
    *_float: the float model; *_now: this model. cache: KV cache of 1000 tokens of any modality; cache_now: the same if
    this model rounds it to 8 bits.
    """

    text_float: int
    text_now: int
    all_float: int
    all_now: int
    cache: int
    cache_now: int | None = None


def run_memory(
    model: ModelSpec, config: dict[str, Any], sizes: Iterable[tuple[str, int, int]], kv_cache: str = ""
) -> RunMemory:
    """Estimate the memory at run time.

    sizes: name, float bytes and current bytes of each part. kv_cache: number format of a rounded KV cache.
    """
    speech_parts = {part.name for part in model.parts if part.prefix and part.prefix.startswith(model.speech_prefixes)}
    text_float = text_now = speech_float = speech_now = 0
    for name, before, now in sizes:
        if name in speech_parts:
            speech_float, speech_now = speech_float + before, speech_now + now
        else:
            text_float, text_now = text_float + before, text_now + now
    per_token = model.family.num_layers(config) * model.family.layer_spec(config).cache_width
    return RunMemory(
        text_float,
        text_now,
        text_float + speech_float,
        text_now + speech_now,
        _CACHE_TOKENS * per_token * _CACHE_BYTES,
        _CACHE_TOKENS * per_token if kv_cache else None,
    )
