"""Accuracy: a float and a quantized checkpoint side by side on the same samples, layer by layer.

run.py is the entry point. stem_pair.py and layer_walk.py run both models; scoring.py and figures.py hold the metrics;
speech.py lets the complete models speak.
May import: quantized, run, calibration, report, statistics, models, numerics, runtime, storage, files, errors.
Omitted on purpose: benchmarks and generation quality. This room measures the changes that quantization causes.
"""

from __future__ import annotations

from .run import default_save_path, evaluate

__all__ = [
    "default_save_path",
    "evaluate",
]
