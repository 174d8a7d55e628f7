"""Independent readers of the 4-bit layouts, written from the descriptions of the formats.

They use numpy and nothing from msmodelslim_omni, so that an error of the writer cannot cancel itself. Words are int32
arrays, scales float32 (exact for float16 and bfloat16). All functions return float32 weights [out, in] or integers.

AutoAWQ GEMM: https://github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py (unpack_awq, AWQ_REVERSE_ORDER).
compressed-tensors: https://github.com/vllm-project/compressed-tensors, pack-quantized (unpack_from_int32).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# The nibble of output channel 8c + j in a word of the GEMM layout, by j.
GEMM_NIBBLE_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)


def nibble(words: Array, index: int) -> Array:
    """Bits 4 * index to 4 * index + 3 of each word, as 0..15."""
    return (words.view(np.uint32) >> np.uint32(4 * index)) & np.uint32(15)


def gemm_codes(words: Array) -> Array:
    """Unpack [k, out / 8] -> [k, out] of 0..15."""
    codes = np.zeros((words.shape[0], 8 * words.shape[1]), np.int32)
    for channel in range(codes.shape[1]):
        codes[:, channel] = nibble(words[:, channel // 8].copy(), GEMM_NIBBLE_OF_CHANNEL[channel % 8])
    return codes


def dequantize_gemm(qweight: Array, qzeros: Array, scales: Array) -> Array:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out] -> weight [out, in]."""
    q, z = gemm_codes(qweight), gemm_codes(qzeros)
    group_size = q.shape[0] // z.shape[0]
    weight = np.zeros(q.shape, np.float32)
    for channel in range(q.shape[0]):
        group = channel // group_size
        weight[channel] = (q[channel] - z[group]) * scales[group]
    return weight.T.copy()


def plain_codes(words: Array, columns: int) -> Array:
    """Unpack along the second axis: [rows, ceil(columns / 8)] -> [rows, columns] of -8..7."""
    codes = np.zeros((words.shape[0], columns), np.int32)
    for column in range(columns):
        codes[:, column] = nibble(words[:, column // 8].copy(), column % 8).astype(np.int32) - 8
    return codes


def dequantize_packed(packed: Array, scale: Array, shape: Array, zero_point: Array | None) -> Array:
    """packed [out, ceil(in / 8)], scale [out, groups], shape [2] and, if asymmetric, zero_point [ceil(out / 8), groups]
    -> weight [out, in].
    """
    rows, columns = (int(size) for size in shape)
    q = plain_codes(packed, columns)
    z = np.zeros((rows, scale.shape[1]), np.int32)
    if zero_point is not None:
        z = plain_codes(zero_point.T.copy(), rows).T
    group_size = columns // scale.shape[1]
    weight = np.zeros((rows, columns), np.float32)
    for column in range(columns):
        group = column // group_size
        weight[:, column] = (q[:, column] - z[:, group]) * scale[:, group]
    return weight
