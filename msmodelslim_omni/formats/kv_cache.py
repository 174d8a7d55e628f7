"""The tensors that hold the scales of a rounded KV cache: names, shapes and contents, by number format.

fp8 (compressed-tensors, for vLLM): `<attention>.k_scale`, `.v_scale`, [1]. int8 (msModelSlim's C8, for vLLM-Ascend):
`<attention>.k_proj.kv_cache_scale`, `.kv_cache_offset`, the same of v_proj, [kv heads * d]; the offsets are zero,
because vLLM-Ascend does not subtract them where it reads the cache. All are in the checkpoint's float dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import QuantError
from ..numerics import CacheDtype, CacheScales

ATTENTION = "self_attn"  # of a decoder layer

# Number format -> names of the scales of keys and of values, relative to the layer.
SCALES: dict[CacheDtype, tuple[str, str]] = {
    "fp8": (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"),
    "int8": (f"{ATTENTION}.k_proj.kv_cache_scale", f"{ATTENTION}.v_proj.kv_cache_scale"),
}
_OFFSETS = {"int8": (f"{ATTENTION}.k_proj.kv_cache_offset", f"{ATTENTION}.v_proj.kv_cache_offset")}


def cache_shapes(dtype: CacheDtype | None, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by relative name; none without a rounded cache. width: channels of k_proj."""
    if dtype is None:
        return {}
    shape = (width if dtype == "int8" else 1,)
    return dict.fromkeys((*SCALES[dtype], *_OFFSETS.get(dtype, ())), shape)


def cache_tensors(scales: CacheScales, float_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's tensors by relative name."""
    key, value = SCALES[scales.dtype]
    tensors = {key: scales.key, value: scales.value}
    tensors |= {name: torch.zeros_like(scales.key) for name in _OFFSETS.get(scales.dtype, ())}
    return {name: tensor.to(float_dtype) for name, tensor in tensors.items()}


def stored_scales(dtype: CacheDtype, tensors: Mapping[str, torch.Tensor]) -> CacheScales:
    """The inverse of cache_tensors."""
    key, value = (tensors[name].to(torch.float32) for name in SCALES[dtype])
    return CacheScales(dtype, key, value)


def declared_cache(settings: dict[str, Any]) -> CacheDtype | None:
    """The number format of the rounded KV cache that a quantization_config or a description declares.

    Raises QuantError for one that is not supported.
    """
    scheme = settings.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        fields = [scheme.get(key) for key in ("num_bits", "type", "strategy")]
        if fields != [8, "float", "tensor"] or scheme.get("dynamic") or scheme.get("symmetric") is False:
            raise QuantError(
                f"quantization_config: kv_cache_scheme {' '.join(map(str, fields))[:80]} is not supported",
                "supported is float8 per tensor, static and symmetric",
            )
        return "fp8"
    return "int8" if settings.get("kv_cache_type") == "C8" else None
