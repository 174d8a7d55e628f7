"""AutoAWQ's format, as doctor reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..models import ModelSpec
from .findings import Finding
from .method import Method, field_fault, is_name_list
from .names import Loader, awq_loaders
from .quantization import Declared, integer, name_list


def _declare(block: dict[str, Any]) -> Declared:
    zero_point = block.get("zero_point")
    return Declared(
        "awq",
        bits=integer(block.get("bits", block.get("w_bit"))),
        group_size=integer(block.get("group_size", block.get("q_group_size"))),
        grouped=True,
        symmetric=not zero_point if isinstance(zero_point, bool) else None,
        entries=name_list(block.get("modules_to_not_convert")),
        symmetric_key="zero_point",
    )


def _check(block: dict[str, Any], declared: Declared) -> Iterator[Finding]:
    if declared.bits is None:
        yield field_fault("bits", block.get("bits"), "4")
    if declared.group_size is None:
        yield field_fault("group_size", block.get("group_size"), "a number")
    if not isinstance(block.get("zero_point"), bool):
        yield field_fault("zero_point", block.get("zero_point"), "true")
    if str(block.get("version", "gemm")).lower() != "gemm":
        yield field_fault("version", block.get("version"), "gemm")
    entries = block.get("modules_to_not_convert")
    if entries is not None and not is_name_list(entries):
        yield field_fault("modules_to_not_convert", entries, "a list of names")


def _loaders(model: ModelSpec, declared: Declared, stored: Collection[str]) -> list[Loader]:
    return awq_loaders(model, declared.entries, stored)


AWQ = Method(("gemm",), frozenset({"qweight", "qzeros"}), _declare, _check, _loaders)
