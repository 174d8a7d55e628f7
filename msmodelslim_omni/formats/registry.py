"""The output formats: a new one is one file here and a line in this table (and its saver in recipe.py)."""

from __future__ import annotations

from . import (
    ascend,
    awq,
    bitsandbytes,
    compressed_tensors,
)
from .format import Format

FORMATS: dict[str, Format] = {
    "ascendv1_saver": ascend,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed_tensors": compressed_tensors,
}
