"""Accuracy: a float checkpoint and a quantized one side by side on the same samples, layer by layer.

run.py is the entry point; scoring.py holds the metrics, side_by_side.py runs both models.
May import: quantized, run, calibration, report and every room under them.
Left out on purpose: benchmarks and generation quality. It measures what quantization changed.
"""

from __future__ import annotations

from .run import default_save_path, evaluate

__all__ = [
    "default_save_path",
    "evaluate",
]
