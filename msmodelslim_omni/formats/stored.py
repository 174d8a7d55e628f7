"""What a format finds again in a checkpoint: the way back from `linear_tensors`, from headers alone.

A reader names every fault it finds and goes on, since one caller stops at the first and another lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..storage import FLOAT_DTYPES, TensorInfo
from .job import OutLinear

FLOATS = tuple(sorted(FLOAT_DTYPES))

Parts = dict[str, TensorInfo]


@dataclass(frozen=True)
class StoredLinear:
    """A quantized Linear as it lies on disk: its content on demand, and its tensors by the end of their names."""

    linear: OutLinear
    parts: Parts

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


@dataclass(frozen=True)
class PartFault:
    """What is wrong with the tensors of one Linear, by its checkpoint name."""

    linear: str
    message: str


@dataclass(frozen=True)
class StoredLinears:
    """Every whole quantized Linear by name, and what is wrong with the others."""

    linears: dict[str, StoredLinear]
    faults: tuple[PartFault, ...]


def group_parts(tensors: Mapping[str, TensorInfo], endings: tuple[str, ...]) -> dict[str, Parts]:
    """Tensors called `<linear>.<ending>`, by Linear and ending, in the order of the Linears' first tensors.

    An ending may have a dot in it (`weight.absmax`).
    """
    grouped: dict[str, Parts] = {}
    for name, info in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), None)
        if ending is not None and (linear := name.removesuffix(f".{ending}")):
            grouped.setdefault(linear, {})[ending] = info
    return grouped


def describe_missing_parts(parts: Parts, required: tuple[str, ...]) -> str:
    """`weight_scale is missing`, or an empty string."""
    missing = [ending for ending in required if ending not in parts]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""


def describe_wrong_part(parts: Parts, expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> str:
    """The first part whose dtype or shape is not an expected one; an empty string if all are."""
    for ending, (dtypes, shape) in expected.items():
        info = parts[ending]
        if info.dtype not in dtypes:
            return f"{ending} is {info.dtype}, not {' or '.join(dtypes)}"
        if info.shape != shape:
            return f"{ending} has shape {list(info.shape)}, not {list(shape)}"
    return ""
