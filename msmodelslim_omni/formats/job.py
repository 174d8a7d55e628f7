"""What a format is handed: the finished quantization as lazily loaded tensors, in the checkpoint's order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..numerics import NestedScales, QuantScheme
from ..storage import TensorSpec

FLOAT = "FLOAT"

Data = torch.Tensor | Iterable[memoryview]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its header, its content on demand, and what it is (FLOAT or a scheme's name)."""

    spec: TensorSpec
    load: Callable[[], Data]
    kind: str = FLOAT


@dataclass(frozen=True)
class OutLinear:
    """A quantized Linear. Nothing is read before `qweight`, `scales` or `zeros` is called.

    name: checkpoint name without `.weight`. shape: (out, in). float_dtype: of the checkpoint's weight, e.g. BF16.
    qweight: int8 [out, in], signed. scales: float32 [out, groups]; those of a grouped scheme are exact in float16 and
    in float_dtype. zeros: int8 [out, groups], signed, for an asymmetric scheme: W is near (qweight - zeros) * scales.
    Those of a codebook are codes; nested: what its scales are stored as, where they are quantized too.
    """

    name: str
    scheme: QuantScheme
    shape: tuple[int, int]
    float_dtype: str
    qweight: Callable[[], torch.Tensor]
    scales: Callable[[], torch.Tensor]
    zeros: Callable[[], torch.Tensor] | None = None
    nested: Callable[[], NestedScales] | None = None


@dataclass(frozen=True)
class OutputJob:
    """Everything one format writes.

    items: float tensors and quantized Linears in the checkpoint's order; a Linear's bias is among the floats.
    float_linears: decoder Linears that stay float, by name; float_modules: the same as the library's classes call them.
    ignore_patterns and config_paths: see ModelSpec.
    tied: tensors that are another one and may not be in the files, though loaders have a module for them.
    """

    items: tuple[OutTensor | OutLinear, ...]
    float_linears: tuple[str, ...]
    ignore_patterns: tuple[str, ...]
    config_paths: tuple[tuple[str, ...], ...]
    config: dict[str, Any]
    source: Path
    other_files: tuple[Path, ...]
    tied: tuple[str, ...] = ()
    float_modules: tuple[str, ...] = ()

    @property
    def linears(self) -> list[OutLinear]:
        return [item for item in self.items if isinstance(item, OutLinear)]

    def config_with(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """config.json with this quantization_config wherever a loader looks for it."""
        config = copy.deepcopy(self.config)
        for path in self.config_paths:
            block = config
            for key in path:
                block = block[key]
            block["quantization_config"] = quantization
        return config

    @property
    def quantized_biases(self) -> frozenset[str]:
        return frozenset(f"{linear.name}.bias" for linear in self.linears)
