"""Checks of a quantized checkpoint: whether it loads, and whether its weights are correct.

examine.py runs all checks; codes.py is the table of findings; each other file is one group of checks.
To add a rule, write a check that yields `make_finding(code, ...)` and add the code to codes.py.
May import: run, compatibility, formats, models, numerics, storage, files, errors.
Omitted on purpose: accuracy (see evaluation) and starting a runtime. names.py emulates the rules of the loaders.
"""

from __future__ import annotations

from .examine import examine
from .findings import Diagnosis

__all__ = [
    "Diagnosis",
    "examine",
]
