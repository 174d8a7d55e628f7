"""The table of output formats. To add a format, add its module here and its saver in recipe/schema.py."""

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
