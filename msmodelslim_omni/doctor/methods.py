"""The table of the formats that config.json declares, and what is looked up in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .findings import Finding, make_finding
from .method import KEY, Method
from .method_awq import AWQ
from .method_bitsandbytes import BITSANDBYTES
from .method_compressed_tensors import COMPRESSED_TENSORS
from .quantization import Declared

METHODS: dict[str, Method] = {
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "compressed-tensors": COMPRESSED_TENSORS,
}

# msModelSlim's format has a description file instead of a block in config.json.
_ASCEND_SUFFIXES = {"weight_offset", "deq_scale"}


def declared_quantization(block: Any, has_description: bool, stored: set[str]) -> Declared:
    """Parse the declared quantization.

    block: quantization_config of config.json. stored: suffixes of the tensors; the format is guessed from them if block
    is not an object.
    """
    if has_description:
        return Declared("ascend")
    if not isinstance(block, dict):
        return Declared(_guess_format(stored))
    name = block.get("quant_method")
    if isinstance(name, str) and name in METHODS:
        return METHODS[name].declare(block)
    return Declared(str(name)[:60] if name else "")


def _guess_format(stored: set[str]) -> str:
    found = [name for name, method in METHODS.items() if stored & method.suffixes]
    # Both others store weight_scale.
    if stored & _ASCEND_SUFFIXES and found in ([], ["compressed-tensors"]):
        return "ascend"
    return found[0] if found else ""


def check_block(block: Any, declared: Declared) -> Iterator[Finding]:
    """Check the fields of quantization_config that a loader reads."""
    if not isinstance(block, dict):
        yield make_finding("quantization_field", f"config.json: {KEY}", f"is {str(block)[:80]!r}, not an object")
        return
    name = block.get("quant_method")
    if name is None:
        yield make_finding("quantization_config_no_method", f"config.json: {KEY}", "has no quant_method")
    elif not isinstance(name, str) or name not in METHODS:
        yield make_finding("quantization_method_unknown", f"config.json: {KEY}.quant_method", f"is {str(name)[:80]!r}")
    else:
        yield from METHODS[name].check(block, declared)
