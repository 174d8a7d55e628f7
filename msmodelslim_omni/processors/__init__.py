"""Quantization methods for the tensors of one layer: smoothing, AWQ, GPTQ, rounding.

A processor is one module with `needs` and `apply`, and one line in the table of registry.py. work.py defines LayerWork,
the layer that one processor passes to the next.
May import: statistics, models, recipe, numerics, runtime, errors.
Not here: files and formats.
"""

from __future__ import annotations

from .registry import PROCESSORS
from .work import LayerWork, SmoothingRecord

__all__ = ["PROCESSORS", "LayerWork", "SmoothingRecord"]
