"""What doctor must know of a format that config.json declares by its quant_method: a Method, one file each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ..models import ModelSpec
from .findings import Finding, make_finding
from .names import Loader
from .quantization import Declared

KEY = "quantization_config"

Block = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """The rules of one quant_method. The methods are listed in methods.py.

    forms: the forms of its quantized Linears, see linears.FORMS. suffixes: of tensors that tell the format where the
    block is missing. declare: reads the block. check: yields a finding for each field that a loader refuses. loaders:
    those that read the format, from the model, the block, and the names of the quantized Linears. patterns: entries of
    the block that a loader tries as regular expressions.
    """

    forms: tuple[str, ...]
    suffixes: frozenset[str]
    declare: Callable[[Block], Declared]
    check: Callable[[Block, Declared], Iterator[Finding]]
    loaders: Callable[[ModelSpec, Declared, Collection[str]], list[Loader]]
    patterns: Callable[[Declared], list[str]] = lambda declared: list(declared.entries or ())


def field_fault(place: str, value: Any, expected: object) -> Finding:
    return make_finding("quantization_field", f"config.json: {KEY}.{place}", f"is {str(value)[:80]!r}, not {expected}")


def is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
