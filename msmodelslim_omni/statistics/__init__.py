"""Statistics of the inputs of Linears, collected by calibration: channel maxima, sample rows, and H = X^T X.

capture.py records them during the forward pass. gram.py stores H within a memory budget, spilled.py on disk.
May import: models, runtime, errors.
Not here: the use of the statistics; see processors.
"""

from __future__ import annotations

from .capture import (
    InputRecorder,
    InputStats,
    choose_rows,
    evenly_spaced,
    is_ordinary,
    merge_stats,
    relative_weights,
    rows_per_modality,
    run_layer,
)
from .gram import FLUSH_TOKENS, Gram, GramForm, choose_form
from .spilled import SpilledMatrix

__all__ = [
    "FLUSH_TOKENS",
    "Gram",
    "GramForm",
    "InputRecorder",
    "InputStats",
    "SpilledMatrix",
    "choose_form",
    "choose_rows",
    "evenly_spaced",
    "is_ordinary",
    "merge_stats",
    "relative_weights",
    "rows_per_modality",
    "run_layer",
]
