"""Checks of the scales of a rounded KV cache: declared as the loaders read it, complete, positive, offsets zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from ..errors import QuantError
from ..formats import cache_shapes, declared_cache
from ..models import ModelSpec
from ..numerics import CacheDtype
from ..storage import FLOAT_DTYPES, load_tensor
from .findings import Finding, make_finding
from .headers import Folder
from .linears import Shapes
from .method import KEY


def kv_cache_of(settings: Any) -> CacheDtype | None:
    """The declared number format; None if there is none, or one that check_cache_fields reports."""
    with suppress(QuantError):
        return declared_cache(settings) if isinstance(settings, dict) else None
    return None


def check_cache_fields(settings: Any) -> Iterator[Finding]:
    """Report a kv_cache_scheme that no loader reads."""
    try:
        if isinstance(settings, dict):
            declared_cache(settings)
    except QuantError as error:
        where = f"config.json: {KEY}.kv_cache_scheme"
        yield make_finding("quantization_field", where, f"{error.message}; {error.hint}")


def cache_tensor_shapes(model: ModelSpec, config: dict[str, Any], kv_cache: CacheDtype | None) -> Shapes:
    """Shapes by name of the tensors that hold the scales, for all layers."""
    if kv_cache is None:
        return {}
    shapes = cache_shapes(kv_cache, model.family.layer_spec(config).key_width)
    layers = range(model.family.num_layers(config))
    return {model.layer_name(index, name): shape for index in layers for name, shape in shapes.items()}


def check_cache(folder: Folder, shapes: Shapes) -> Iterator[Finding]:
    """Report scales that are zero or negative, and offsets that are not zero. shapes: see cache_tensor_shapes."""
    for name in shapes:
        info = folder.tensors.get(name)
        if info is None or info.dtype not in FLOAT_DTYPES or not info.numel:
            continue  # another finding
        values = load_tensor(info).to(torch.float32)
        if name.endswith("_offset"):
            if nonzero := int(values.ne(0).sum()):
                yield make_finding("offset_not_zero", name, f"{nonzero} of {info.numel} are not zero")
            continue
        for code, mask in (("scale_zero", values == 0), ("scale_negative", values < 0)):
            if count := int(mask.sum()):
                yield make_finding(code, name, f"{count} of {info.numel} scales of the KV cache")
