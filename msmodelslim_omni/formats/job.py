"""The input of a format: the quantized model as lazily loaded tensors, in the order of the source checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..numerics import CacheDtype, NestedScales, QuantScheme
from ..storage import TensorSpec

FLOAT = "FLOAT"

Data = torch.Tensor | Iterable[memoryview]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: its header entry, a function that loads its data, and its kind (FLOAT or a scheme's name)."""

    spec: TensorSpec
    load: Callable[[], Data]
    kind: str = FLOAT


@dataclass(frozen=True)
class OutLinear:
    """A quantized Linear. Nothing is read before `qweight`, `scales`, `zeros` or `nested` is called.

    name: checkpoint name without `.weight`. shape: (out, in). float_dtype: dtype of the float weight, for example BF16.
    qweight: int8 [out, in], signed; for a codebook scheme, codes. scales: float32 [out, groups]; for a grouped scheme,
    exactly representable in float16 and in float_dtype. zeros: int8 [out, groups], signed, for an asymmetric scheme:
    W is approximately (qweight - zeros) * scales. nested: the quantized scales, for a scheme with double quantization.
    input_global: float32 [1], for a scheme that stores a global scale of its input.
    """

    name: str
    scheme: QuantScheme
    shape: tuple[int, int]
    float_dtype: str
    qweight: Callable[[], torch.Tensor]
    scales: Callable[[], torch.Tensor]
    zeros: Callable[[], torch.Tensor] | None = None
    nested: Callable[[], NestedScales] | None = None
    input_global: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class OutputJob:
    """All data that a format needs to write one checkpoint.

    items: float tensors and quantized Linears in the order of the source; biases of Linears are float tensors.
    float_linears: checkpoint names of the decoder Linears that stay float; float_modules: their module names in the
    transformers classes. ignore_patterns and config_paths: see ModelSpec.
    tied: names of tensors that share the data of another tensor and may be absent from the files, although the loaders
    have a module for them. kv_cache: number format of the rounded KV cache; its scales are among the items.
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
    kv_cache: CacheDtype | None = None

    @property
    def linears(self) -> list[OutLinear]:
        return [item for item in self.items if isinstance(item, OutLinear)]

    def config_with(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """A copy of config.json with this quantization_config at every place where a loader looks for it."""
        config = copy.deepcopy(self.config)
        for path in self.config_paths:
            block = config
            for key in path:
                block = block[key]
            block["quantization_config"] = quantization
        return config

    @property
    def quantized_biases(self) -> frozenset[str]:
        """Names of the biases of quantized Linears, whether or not they exist."""
        return frozenset(f"{linear.name}.bias" for linear in self.linears)
