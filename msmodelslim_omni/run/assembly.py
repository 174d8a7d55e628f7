"""QuantPlan and finished layers -> the tensors that a format writes, loaded lazily, in the checkpoint's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from ..formats import OutLinear, OutputJob, OutTensor, cache_shapes
from ..numerics import QuantizedLinear
from ..plan import QuantPlan
from ..storage import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    byte_view,
    load_finite,
    read_bytes,
    require_finite,
)

# Unchanged tensors are copied through a buffer of this size, so that a large embedding does not fill memory.
_COPY_BYTES = 16 << 20

# Unchanged tensors are copied in pieces of this size; a stopped run repeats at most one piece.
PIECE_BYTES = 256 << 20

Item = OutTensor | OutLinear


def make_job(plan: QuantPlan) -> OutputJob:
    """The job of every format: sizes of all tensors, and contents of unchanged tensors. See `finished_items`."""
    schemes = {linear.name: linear for linear in plan.linears if linear.scheme is not None}
    items: list[Item] = []
    for name, info in plan.checkpoint.tensors.items():
        linear = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            items.append(float_item(info))
            continue
        assert linear.scheme is not None
        zeros = None if linear.scheme.symmetric else _unknown
        nested = _unknown if linear.scheme.double_quant else None
        input_global = _unknown if linear.scheme.stores_input_scale else None
        items.append(
            OutLinear(
                linear.name, linear.scheme, linear.shape, info.dtype, _unknown, _unknown, zeros, nested, input_global
            )
        )
    items += [OutTensor(spec, _unknown) for spec in _cache_specs(plan)]
    floats = tuple(linear.name for linear in plan.linears if linear.scheme is None)
    return OutputJob(
        items=tuple(items),
        float_linears=floats,
        float_modules=plan.model.loaders.modules_of(floats),
        ignore_patterns=plan.model.ignore_patterns,
        config_paths=plan.model.config_paths,
        config=plan.checkpoint.config,
        source=plan.checkpoint.path,
        other_files=tuple(plan.checkpoint.other_files()),
        tied=tuple(plan.model.family.tied_tensors(plan.checkpoint.config)),
        kv_cache=plan.kv_cache,
    )


def _cache_specs(plan: QuantPlan) -> list[TensorSpec]:
    """The scales of the KV cache, in the dtype of each layer's k_proj."""
    shapes, tensors = cache_shapes(plan.kv_cache, plan.layer_spec.key_width), plan.checkpoint.tensors
    return [
        TensorSpec(plan.model.layer_name(layer.index, name), tensors[_key_weight(plan, layer.index)].dtype, shape)
        for layer in plan.layers
        for name, shape in shapes.items()
    ]


def _key_weight(plan: QuantPlan, layer: int) -> str:
    return plan.model.layer_name(layer, "self_attn.k_proj.weight")


def _unknown() -> NoReturn:
    raise ValueError("this layer is not finished; only its sizes are known")


@dataclass(frozen=True)
class Units:
    """The items of an output in the units in which they are finished: decoder layers, and pieces of all other items."""

    layers: tuple[tuple[Item, ...], ...]
    others: tuple[tuple[Item, ...], ...]


def units(plan: QuantPlan, job: OutputJob) -> Units:
    """Assign every item to one unit. Tensors that no layer computes are in `others`, whatever their name."""
    layer_of = {
        plan.model.layer_name(layer.index, relative): position
        for position, layer in enumerate(plan.layers)
        for relative in (*plan.layer_spec.shapes, *cache_shapes(plan.kv_cache, plan.layer_spec.key_width))
    }
    layers: list[list[Item]] = [[] for _ in plan.layers]
    others: list[Item] = []
    for item in job.items:
        position = layer_of.get(f"{item.name}.weight" if isinstance(item, OutLinear) else item.spec.name)
        (others if position is None else layers[position]).append(item)
    return Units(tuple(tuple(items) for items in layers), in_pieces(others))


def in_pieces(items: Sequence[Item]) -> tuple[tuple[Item, ...], ...]:
    """Split consecutive items into pieces of about PIECE_BYTES."""
    pieces: list[list[Item]] = []
    size = PIECE_BYTES
    for item in items:
        if size >= PIECE_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(item)
        size += item.shape[0] * item.shape[1] if isinstance(item, OutLinear) else item.spec.nbytes
    return tuple(tuple(piece) for piece in pieces)


def finished_items(
    items: Iterable[Item], quantized: Mapping[str, QuantizedLinear], changed: Mapping[str, torch.Tensor]
) -> list[Item]:
    """A layer's items with contents. quantized: by Linear. changed: float tensors by name. Other items are copied."""
    filled: list[Item] = []
    for item in items:
        if isinstance(item, OutLinear):
            filled.append(_finished_linear(item, quantized[item.name]))
        elif item.spec.name in changed:
            filled.append(_finished_float(item, changed[item.spec.name]))
        else:
            filled.append(item)
    return filled


def _finished_linear(item: OutLinear, linear: QuantizedLinear) -> OutLinear:
    zeros, nested, input_global = linear.zeros, linear.nested, linear.input_global
    return replace(
        item,
        qweight=lambda: linear.qweight.cpu(),
        scales=lambda: linear.scales.cpu(),
        zeros=None if zeros is None else lambda: zeros.cpu(),
        nested=None if nested is None else lambda: nested,
        input_global=None if input_global is None else lambda: input_global.cpu(),
    )


def _finished_float(item: OutTensor, tensor: torch.Tensor) -> OutTensor:
    assert DTYPE_NAMES[tensor.dtype] == item.spec.dtype and tuple(tensor.shape) == item.spec.shape
    return replace(item, load=lambda: tensor.cpu())


def float_item(info: TensorInfo) -> OutTensor:
    """A float tensor with the source's bytes."""
    spec = TensorSpec(info.name, info.dtype, info.shape)
    if info.nbytes <= _COPY_BYTES:
        return OutTensor(spec, lambda: load_finite(info))
    return OutTensor(spec, lambda: _chunks(info))


def _chunks(info: TensorInfo) -> Iterator[memoryview]:
    buffer = torch.empty(min(_COPY_BYTES, info.nbytes), dtype=torch.uint8)
    view = byte_view(buffer)
    for first in range(0, info.nbytes, _COPY_BYTES):
        size = min(_COPY_BYTES, info.nbytes - first)
        read_bytes(info, first, view[:size])
        require_finite(buffer[:size].view(TORCH_DTYPES[info.dtype]), info)
        yield view[:size]
