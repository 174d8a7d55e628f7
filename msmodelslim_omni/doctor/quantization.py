"""The quantization that a checkpoint declares, in config.json or in msModelSlim's description file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Names of a longer list are ignored beyond this number.
MAX_ENTRIES = 5_000


@dataclass(frozen=True)
class DeclaredGroup:
    """A config group of compressed-tensors: its bits, its form (linears.py), and the targets that select its Linears.

    bits and form are None if the group does not declare them.
    """

    bits: int | None
    form: str | None
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Declared:
    """The declared quantization; None means not declared.

    format: awq, compressed-tensors, bitsandbytes, ascend, the name of another method, or empty.
    entries: names of Linears that stay float (modules_to_not_convert, llm_int8_skip_modules, ignore); None without a
    list. groups: of compressed-tensors. If they have different bits, bits is None; group_size, grouped and symmetric
    come from the first group with strategy `group`. nested: whether bitsandbytes' scales are quantized to 8 bits.
    where, bits_key, symmetric_key: keys of config.json that findings name.
    """

    format: str
    bits: int | None = None
    group_size: int | None = None
    grouped: bool = False
    symmetric: bool | None = None
    entries: tuple[str, ...] | None = None
    groups: tuple[DeclaredGroup, ...] = ()
    nested: bool | None = None
    where: str = "quantization_config"
    bits_key: str = "bits"
    symmetric_key: str = "symmetric"


def integer(value: Any) -> int | None:
    return value if type(value) is int else None


def name_list(value: Any) -> tuple[str, ...] | None:
    """Return the non-empty strings of a list; None if the value is not a list or has no such string."""
    if not isinstance(value, list):
        return None
    return tuple(entry for entry in value[:MAX_ENTRIES] if isinstance(entry, str) and entry) or None
