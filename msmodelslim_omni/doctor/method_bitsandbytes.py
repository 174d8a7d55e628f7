"""bitsandbytes' format, as doctor reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..models import ModelSpec
from .findings import Finding
from .method import Method, field_fault, is_name_list
from .names import Loader, bitsandbytes_loaders
from .quantization import Declared, name_list


def _declare(block: dict[str, Any]) -> Declared:
    return Declared(
        "bitsandbytes",
        bits=4 if block.get("load_in_4bit") is True else 8 if block.get("load_in_8bit") is True else None,
        entries=name_list(block.get("llm_int8_skip_modules")),
        nested=block.get("bnb_4bit_use_double_quant") is True,
        bits_key="load_in_4bit",
    )


def _check(block: dict[str, Any], declared: Declared) -> Iterator[Finding]:
    expected = {"load_in_4bit": (True,), "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_quant_storage": ("uint8", None)}
    for key, values in expected.items():
        if block.get(key) not in values:
            yield field_fault(key, block.get(key), str(values[0]))
    entries = block.get("llm_int8_skip_modules")
    if entries is not None and not is_name_list(entries):
        yield field_fault("llm_int8_skip_modules", entries, "a list of names")


def _loaders(model: ModelSpec, declared: Declared, stored: Collection[str]) -> list[Loader]:
    return bitsandbytes_loaders(model, declared.entries or ())


BITSANDBYTES = Method(("nf4",), frozenset({"weight.absmax"}), _declare, _check, _loaders)
