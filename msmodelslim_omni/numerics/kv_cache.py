"""Keys and values of attention, rounded to 8 bits as a runtime stores them in its cache, with calibrated scales.

    int8:  q = clamp(round(x / s), -128, 127), x ≈ q s      s per channel of k_proj and v_proj      (vLLM-Ascend's C8)
    fp8:   q = e4m3(x / s), x ≈ q s                         s per layer, one for keys, one for values            (vLLM)

Keys are cached after the rotary embedding, which turns channels i and i + d / 2 of a head together by an angle that
grows with the position. So both channels get the largest length that the pair has: their own largest values would hold
for the positions of the calibration samples only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .float8 import E4M3_MAX, decode_e4m3, round_e4m3

CacheDtype = Literal["int8", "fp8"]

_SMALLEST_SCALE = 2.0**-14  # a normal number of float16
_LARGEST_SCALE = 65280.0


@dataclass(frozen=True)
class CacheScales:
    """The scales of one layer, float32 and exact in bfloat16: [1] for fp8, [kv heads * d] for int8."""

    dtype: CacheDtype
    key: torch.Tensor
    value: torch.Tensor


def pair_lengths(key: torch.Tensor) -> torch.Tensor:
    """The length of the pair of each channel. key: [..., d] after the rotary embedding. Returns the same shape."""
    first, second = key.chunk(2, dim=-1)
    return torch.cat([torch.hypot(first, second)] * 2, dim=-1)


def cache_scales(dtype: CacheDtype, key_peaks: torch.Tensor, value_peaks: torch.Tensor) -> CacheScales:
    """Scales that cover the largest pair_lengths of the keys and the largest |value|, both [kv heads, d]."""
    return CacheScales(dtype, _scales(dtype, key_peaks), _scales(dtype, value_peaks))


def _scales(dtype: CacheDtype, peaks: torch.Tensor) -> torch.Tensor:
    s = peaks.flatten() / 127 if dtype == "int8" else peaks.amax().reshape(1) / E4M3_MAX
    return s.to(torch.bfloat16).to(torch.float32).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)


def round_cached(x: torch.Tensor, scales: torch.Tensor, dtype: CacheDtype) -> torch.Tensor:
    """What attention reads from the cache. x: keys or values, [batch, kv heads, tokens, d]; scales: see CacheScales."""
    wide = x.to(torch.float32)
    if dtype == "fp8":
        return decode_e4m3(round_e4m3(wide / scales)).mul_(scales).to(x.dtype)
    s = scales.view(1, x.shape[1], 1, x.shape[3])
    return (wide / s).round_().clamp_(-128, 127).mul_(s).to(x.dtype)
