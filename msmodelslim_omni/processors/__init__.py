"""Quantization methods on one layer's tensors: smoothing, AWQ, GPTQ, rounding.

A processor is one module with `needs` and `apply`, and one line in registry.py's table. work.py defines LayerWork,
the layer as it is handed from one processor to the next.
May import: statistics, models, recipe, numerics, runtime, errors.
Left out on purpose: files and formats.
"""

from __future__ import annotations

from .registry import PROCESSORS
from .work import LayerWork, SmoothingRecord

__all__ = ["PROCESSORS", "LayerWork", "SmoothingRecord"]
