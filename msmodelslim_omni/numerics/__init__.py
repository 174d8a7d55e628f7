"""Quantize and dequantize: pure functions on tensors.

scheme.py defines schemes, arithmetic.py computes with them, checks.py holds limits, float8.py rounds to FP8, float4.py
to NVFP4, nf4.py wraps the NF4 codebook of bitsandbytes, kv_cache.py rounds keys and values. products.py multiplies in
bfloat16 on demand.
May import: runtime, errors.
Not here: files, model names, logging, and the search for smoothing scales; see processors.
"""

from __future__ import annotations

from .arithmetic import (
    QuantizedLinear,
    code_values,
    dequantize,
    grouped_rounding_error,
    linear_rows,
    quantize_tokens,
    quantize_weight,
    quantized_matmul,
    relative_error,
    relative_norms,
    round_act,
    row_blocks,
    row_squares,
    storable_scales,
    weight_error,
    weight_squares,
)
from .checks import WeightChecks
from .float4 import GLOBAL_SCALE, NVFP4_GROUP, input_global_scale
from .kv_cache import CacheDtype, CacheScales, cache_scales, pair_lengths, round_cached
from .nf4 import NESTED_BLOCK_SIZE, NF4_LEVELS, NestedScales, pack_nf4, require_bitsandbytes, unpack_nf4
from .products import make_reducible, reduced_products, widen_on_use
from .scheme import QuantScheme

__all__ = [
    "GLOBAL_SCALE",
    "NESTED_BLOCK_SIZE",
    "NF4_LEVELS",
    "NVFP4_GROUP",
    "CacheDtype",
    "CacheScales",
    "NestedScales",
    "QuantScheme",
    "QuantizedLinear",
    "WeightChecks",
    "cache_scales",
    "code_values",
    "dequantize",
    "grouped_rounding_error",
    "input_global_scale",
    "linear_rows",
    "make_reducible",
    "pack_nf4",
    "pair_lengths",
    "quantize_tokens",
    "quantize_weight",
    "quantized_matmul",
    "reduced_products",
    "relative_error",
    "relative_norms",
    "require_bitsandbytes",
    "round_act",
    "round_cached",
    "row_blocks",
    "row_squares",
    "storable_scales",
    "unpack_nf4",
    "weight_error",
    "weight_squares",
    "widen_on_use",
]
