"""Operations on a finished quantized checkpoint: read, convert to another format, generate, inspect.

reader.py opens a checkpoint of any format; the other files are one operation each.
May import: run and every room under it.
Left out on purpose: checks of damage (see doctor) and accuracy (see evaluation).
"""

from __future__ import annotations

from .export import export
from .generate import Source, generate, open_source
from .inspect import inspect_checkpoint
from .reader import identify, is_quantized, load_linear

__all__ = [
    "Source",
    "export",
    "generate",
    "identify",
    "inspect_checkpoint",
    "is_quantized",
    "load_linear",
    "open_source",
]
