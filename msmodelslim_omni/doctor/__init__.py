"""Checks of a quantized checkpoint: does it load, and are the weights what they should be.

examine.py runs all checks; codes.py is the table of findings; each other file is one group of checks.
A new rule is a check that yields `found(code, ...)`, and a line in codes.py.
May import: run, formats, models, numerics, storage, files, errors.
Left out on purpose: accuracy (see evaluation) and starting a runtime. Loader rules are emulated in names.py.
"""

from __future__ import annotations

from .examine import examine
from .findings import Diagnosis

__all__ = [
    "Diagnosis",
    "examine",
]
