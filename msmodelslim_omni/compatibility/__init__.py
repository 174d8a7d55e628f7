"""Which runtime loads which output: one table as data, and the texts that are made from it.

table.py is the data and is edited when a format, scheme, family or runtime is added; usage.py makes commands and
snippets, matrix.py the table of the documentation.
May import: models.
Not here: the examination of a checkpoint (see doctor).
"""

from __future__ import annotations

from .table import PROOFS, RUNTIMES, Loads, loads_in
from .usage import (
    DEQUANTIZE_NOTE,
    REPOSITORY,
    answering_class,
    class_uses,
    describe_readers,
    image_request,
    load_snippet,
    serve_commands,
    speaking_class,
)

__all__ = [
    "DEQUANTIZE_NOTE",
    "PROOFS",
    "REPOSITORY",
    "RUNTIMES",
    "Loads",
    "answering_class",
    "class_uses",
    "describe_readers",
    "image_request",
    "load_snippet",
    "loads_in",
    "serve_commands",
    "speaking_class",
]
