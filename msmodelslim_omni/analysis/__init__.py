"""Sensitivity of the Linears, and a mixed-precision recipe that meets a target size or KL divergence.

run.py is the entry point: measure sensitivity, allocate bits, write the recipe, verify it by a real run.
May import: evaluation and every room under it.
Left out on purpose: quantization itself. The recipe is run by run/ like any other.
"""

from __future__ import annotations

from .result import ROUND_COLUMNS, UNIT_COLUMNS, Analysis, exclude_text, round_rows, unit_rows
from .run import analyze

__all__ = ["ROUND_COLUMNS", "UNIT_COLUMNS", "Analysis", "analyze", "exclude_text", "round_rows", "unit_rows"]
