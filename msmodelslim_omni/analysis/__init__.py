"""Sensitivity of the Linears, and a mixed-precision recipe that meets a target size or KL divergence.

run.py is the entry point: it measures sensitivity, allocates bits, writes the recipe and verifies it with a real run.
May import: evaluation, run, calibration, report, plan, processors, statistics, formats, models, recipe, numerics,
runtime, storage, files, errors.
Not here: quantization. run/ runs the recipe like any other recipe.
"""

from __future__ import annotations

from .result import Analysis, exclude_text, round_columns, round_rows, unit_columns, unit_rows
from .run import analyze

__all__ = ["Analysis", "analyze", "exclude_text", "round_columns", "round_rows", "unit_columns", "unit_rows"]
