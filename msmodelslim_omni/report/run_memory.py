"""What a model asks for at run time, foretold from sizes alone: its weights by what they are for, and the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..models import ModelSpec

_CACHE_TOKENS = 1000
_CACHE_BYTES = 2  # of a key or a value; runtimes keep them in 16 bits


@dataclass(frozen=True)
class RunMemory:
    """Bytes. Activations, and what a runtime sets aside for itself, come on top.

    text_*: the weights that answer in text, which is what vLLM loads; all_*: with those that speak. *_float: of the
    float model; *_now: of this one. cache: keys and values of 1000 tokens, text and media alike.
    """

    text_float: int
    text_now: int
    all_float: int
    all_now: int
    cache: int


def run_memory(model: ModelSpec, config: dict[str, Any], sizes: Iterable[tuple[str, int, int]]) -> RunMemory:
    """sizes: of each part by its name, in bytes, float and now."""
    speaks = {part.name for part in model.parts if part.prefix and part.prefix.startswith(model.speech_prefixes)}
    text_float = text_now = speech_float = speech_now = 0
    for name, before, now in sizes:
        if name in speaks:
            speech_float, speech_now = speech_float + before, speech_now + now
        else:
            text_float, text_now = text_float + before, text_now + now
    per_token = model.family.num_layers(config) * model.family.layer_spec(config).cache_width * _CACHE_BYTES
    return RunMemory(text_float, text_now, text_float + speech_float, text_now + speech_now, _CACHE_TOKENS * per_token)
