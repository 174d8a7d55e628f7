"""Operations on a finished quantized checkpoint: read, convert to another format, generate, inspect.

reader.py opens a checkpoint of any supported format. Every other file is one operation.
May import: run, calibration, report, plan, formats, models, recipe, numerics, runtime, storage, files,
errors.
Omitted on purpose: damage checks (see doctor) and accuracy (see evaluation).
"""

from __future__ import annotations

from .export import export
from .generate import (
    Source,
    check_memory,
    check_speech,
    fill_model,
    generate,
    on_device,
    open_model,
    open_source,
    write_wav,
)
from .gguf import export_gguf
from .inspect import inspect_checkpoint
from .reader import identify, is_quantized, load_cache, load_linear

__all__ = [
    "Source",
    "check_memory",
    "check_speech",
    "export",
    "export_gguf",
    "fill_model",
    "generate",
    "identify",
    "inspect_checkpoint",
    "is_quantized",
    "load_cache",
    "load_linear",
    "on_device",
    "open_model",
    "open_source",
    "write_wav",
]
