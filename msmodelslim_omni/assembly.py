"""QuantPlan and parts -> OutputJob: what a format writes, as lazily loaded tensors in the checkpoint's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .formats.job import OutLinear, OutputJob, OutTensor
from .plan import QuantPlan
from .safetensors_io import (
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    byte_view,
    load_finite,
    load_tensor,
    read_bytes,
    refuse_nonfinite,
)

# Kept tensors are copied through a buffer of this size, so that an embedding of a gigabyte does not fill memory.
_COPY_BYTES = 16 << 20

# What a part holds of a quantized Linear, after its name; `zeros` only of an asymmetric scheme.
PART_TENSORS = ("qweight", "scales", "zeros")

Parts = Callable[[int], dict[str, TensorInfo]]


def make_job(plan: QuantPlan, parts: Parts) -> OutputJob:
    """The job of every format. `parts(layer)`: the tensors of a layer's part by name; asked for layer by layer.

    In a part, `<linear>.` and the names of PART_TENSORS hold a quantized Linear, any other name a changed float tensor.
    """
    schemes = {linear.name: linear for linear in plan.linears if linear.scheme is not None}
    changed: dict[str, TensorInfo] = {}
    for layer in plan.layers:
        changed |= parts(layer.index)
    items: list[OutTensor | OutLinear] = []
    for name, info in plan.checkpoint.tensors.items():
        linear = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            items.append(float_item(changed.get(name), info))
            continue
        assert linear.scheme is not None
        qweight, scales, zeros = (_loader(changed.get(f"{linear.name}.{part}")) for part in PART_TENSORS)
        symmetric = linear.scheme.symmetric
        items.append(
            OutLinear(
                linear.name, linear.scheme, linear.shape, info.dtype, qweight, scales, None if symmetric else zeros
            )
        )
    return OutputJob(
        items=tuple(items),
        float_linears=tuple(linear.name for linear in plan.linears if linear.scheme is None),
        ignore_patterns=plan.model.ignore_patterns,
        config_paths=plan.model.config_paths,
        config=plan.checkpoint.config,
        source=plan.checkpoint.path,
        other_files=tuple(plan.checkpoint.other_files()),
        tied=tuple(plan.model.family.tied_tensors(plan.checkpoint.config)),
    )


def _loader(info: TensorInfo | None) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        if info is None:
            raise ValueError("this part does not exist yet; only sizes may be asked of this job")
        return load_tensor(info)

    return load


def float_item(changed: TensorInfo | None, source: TensorInfo) -> OutTensor:
    """A float tensor: from the part where it was changed, else the source's bytes."""
    info = changed or source
    spec = TensorSpec(source.name, info.dtype, info.shape)
    if info.nbytes <= _COPY_BYTES:
        return OutTensor(spec, lambda: load_finite(info))
    return OutTensor(spec, lambda: _chunks(info))


def _chunks(info: TensorInfo) -> Iterator[memoryview]:
    buffer = torch.empty(min(_COPY_BYTES, info.nbytes), dtype=torch.uint8)
    view = byte_view(buffer)
    for first in range(0, info.nbytes, _COPY_BYTES):
        size = min(_COPY_BYTES, info.nbytes - first)
        read_bytes(info, first, view[:size])
        refuse_nonfinite(buffer[:size].view(TORCH_DTYPES[info.dtype]), info)
        yield view[:size]
