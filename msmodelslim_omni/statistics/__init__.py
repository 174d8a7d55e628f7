"""Statistics of the inputs of Linears, collected by calibration: channel maxima, sample rows, and H = X^T X.

capture.py records them during the forward pass. gram.py stores H within a memory budget.
May import: models, runtime, errors.
Not here: the use of the statistics; see processors.
"""

from __future__ import annotations

from .capture import ROWS_PER_MODALITY, InputRecorder, InputStats, choose_rows, run_layer
from .gram import Gram, choose_form

__all__ = ["ROWS_PER_MODALITY", "Gram", "InputRecorder", "InputStats", "choose_form", "choose_rows", "run_layer"]
