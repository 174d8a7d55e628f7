"""The quantized Linears of a checkpoint on disk: the results of `Format.read_linears`, and helpers for it.

`read_linears` collects the faults of all Linears, because some callers stop at the first fault and others list all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..numerics import QuantScheme
from ..storage import FLOAT_DTYPES, TensorInfo, load_tensor
from .job import OutLinear

FLOATS = tuple(sorted(FLOAT_DTYPES))

Parts = dict[str, TensorInfo]


@dataclass(frozen=True)
class StoredLinear:
    """A quantized Linear on disk. parts: its tensors by the part of their names after the Linear's name."""

    linear: OutLinear
    parts: Parts

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


@dataclass(frozen=True)
class PartFault:
    """A fault in the tensors of one Linear. linear: its checkpoint name."""

    linear: str
    message: str


@dataclass(frozen=True)
class StoredLinears:
    """The complete quantized Linears by name, and the faults of the other quantized Linears."""

    linears: dict[str, StoredLinear]
    faults: tuple[PartFault, ...]


def group_parts(tensors: Mapping[str, TensorInfo], endings: tuple[str, ...]) -> dict[str, Parts]:
    """Group the tensors named `<linear>.<ending>` by Linear and ending, in the order of each Linear's first tensor.

    An ending may contain a dot (`weight.absmax`).
    """
    grouped: dict[str, Parts] = {}
    for name, info in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), None)
        if ending is not None and (linear := name.removesuffix(f".{ending}")):
            grouped.setdefault(linear, {})[ending] = info
    return grouped


def describe_missing_parts(parts: Parts, required: tuple[str, ...]) -> str:
    """For example `weight_scale is missing`; an empty string if no part is missing."""
    missing = [ending for ending in required if ending not in parts]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""


def describe_wrong_part(parts: Parts, expected: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> str:
    """Describe the first part with an unexpected dtype or shape; an empty string if there is none.

    expected: the allowed dtypes and the shape of each part, by ending.
    """
    for ending, (dtypes, shape) in expected.items():
        info = parts[ending]
        if info.dtype not in dtypes:
            return f"{ending} is {info.dtype}, not {' or '.join(dtypes)}"
        if info.shape != shape:
            return f"{ending} has shape {list(info.shape)}, not {list(shape)}"
    return ""


def stored_per_channel(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    """The Linear of an int8 `weight` [out, in] with one `weight_scale` per output channel, [out, 1]."""
    rows, columns = parts["weight"].shape
    return OutLinear(
        name,
        scheme,
        (rows, columns),
        float_dtype,
        lambda: load_tensor(parts["weight"]),
        lambda: load_tensor(parts["weight_scale"]).to(torch.float32),
    )
