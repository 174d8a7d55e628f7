"""Independent readers of the 4-bit and FP8 layouts, written from the descriptions of the formats.

They use numpy and nothing from msmodelslim_omni, so that an error of the writer cannot cancel itself. Words are int32
arrays, scales float32 (exact for float16 and bfloat16). All functions return float32 weights [out, in] or integers.

AutoAWQ GEMM: https://github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py (unpack_awq, AWQ_REVERSE_ORDER).
compressed-tensors: https://github.com/vllm-project/compressed-tensors, pack-quantized (unpack_from_int32) and
float-quantized (weight in float8 e4m3, see the OCP 8-bit Floating Point Specification, 5.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# The values of codes 0x00 to 0x7E, eight mantissas for each exponent; 0x7F is NaN.
E4M3 = (
    0.0, 0.001953125, 0.00390625, 0.005859375, 0.0078125, 0.009765625, 0.01171875, 0.013671875,
    0.015625, 0.017578125, 0.01953125, 0.021484375, 0.0234375, 0.025390625, 0.02734375, 0.029296875,
    0.03125, 0.03515625, 0.0390625, 0.04296875, 0.046875, 0.05078125, 0.0546875, 0.05859375,
    0.0625, 0.0703125, 0.078125, 0.0859375, 0.09375, 0.1015625, 0.109375, 0.1171875,
    0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375,
    0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875,
    0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375,
    1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
    2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75,
    4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5,
    8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0,
    32.0, 36.0, 40.0, 44.0, 48.0, 52.0, 56.0, 60.0,
    64.0, 72.0, 80.0, 88.0, 96.0, 104.0, 112.0, 120.0,
    128.0, 144.0, 160.0, 176.0, 192.0, 208.0, 224.0, 240.0,
    256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0,
)  # fmt: skip

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


def dequantize_packed_bytes(packed: Array, scale: Array, shape: Array) -> Array:
    """packed int32 [out, ceil(in / 4)], scale [out, 1], shape [2] -> weight [out, in]. A byte is an integer + 128."""
    rows, columns = (int(size) for size in shape)
    words, weight = packed.view(np.uint32), np.zeros((rows, columns), np.float32)
    for column in range(columns):
        byte = (words[:, column // 4] >> np.uint32(8 * (column % 4))) & np.uint32(255)
        weight[:, column] = (byte.astype(np.int32) - 128) * scale[:, 0]
    return weight


def float8_values(codes: Array) -> Array:
    """Values of e4m3 codes (uint8): sign, 4 exponent bits with bias 7, 3 mantissa bits; subnormal for exponent 0."""
    sign = np.where(codes >= 128, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.int32) - 7)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where(codes & 127 == 127, np.nan, values).astype(np.float32)


def dequantize_nvfp4(packed: Array, scale: Array, global_scale: float) -> Array:
    """packed uint8 [out, in / 2], scale codes uint8 [out, in / 16], global scale -> weight [out, in]."""
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
    scales = float8_values(scale) / np.float32(global_scale)
    weight = np.zeros((packed.shape[0], 2 * packed.shape[1]), np.float32)
    for column in range(weight.shape[1]):
        codes = packed[:, column // 2] >> 4 if column % 2 else packed[:, column // 2] & 15
        weight[:, column] = np.array(values, np.float32)[codes] * scales[:, column // 16]
    return weight


def round_nvfp4_inputs(x: Array, global_scale: float) -> Array:
    """Activations [tokens, in] as vLLM's kernel rounds them: a scale e4m3(G * absmax / 6) per 16 inputs, relative to G,
    and for each value the nearest of 15; a tie goes to the even code.
    """
    grid, rounded = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), np.float64), np.zeros(x.shape, np.float32)
    e4m3 = np.array(E4M3, np.float64)
    for token in range(x.shape[0]):
        for first in range(0, x.shape[1], 16):
            block = x[token, first : first + 16].astype(np.float64)
            wanted = float(np.abs(block).max()) * global_scale / 6.0
            scale = float(e4m3[_nearest_even(e4m3, wanted)]) / global_scale
            for i, value in enumerate(block):
                level = float(grid[_nearest_even(grid, abs(value) / scale)]) if scale else 0.0
                rounded[token, first + i] = np.float32(np.copysign(level * scale, value))
    return rounded


def _nearest_even(table: Array, value: float) -> int:
    """Index of the nearest entry of an ascending table; of two equally near ones the even index."""
    distance = np.abs(table - value)
    nearest = np.flatnonzero(distance == distance.min())
    return int(nearest[nearest % 2 == 0][0]) if len(nearest) > 1 else int(nearest[0])


def dequantize_float8(codes: Array, scale: Array) -> Array:
    """codes uint8 [out, in], scale [out, 1] or [ceil(out / 128), ceil(in / 128)] -> weight [out, in]."""
    weight = float8_values(codes)
    per_channel = scale.shape == (len(codes), 1)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            weight[row, column] *= scale[row, 0] if per_channel else scale[row // 128, column // 128]
    return weight


def dequantize_w4a8(packed: Array, scale: Array) -> Array:
    """packed int8 [out / 2, in], row 2r in the lower half of a byte and 2r + 1 in the upper; scale [out, 1]."""
    weight = np.zeros((2 * packed.shape[0], packed.shape[1]), np.float32)
    for row in range(weight.shape[0]):
        bits = packed[row // 2].view(np.uint8).astype(np.int32)
        code = (bits >> 4 if row % 2 else bits) & 15
        weight[row] = (code - 16 * (code > 7)) * scale[row, 0]
    return weight


def product_w4a8(x: Array, x_scale: Array, packed: Array, scale: Array, bias: Array) -> Array:
    """The product that this layout implies, of int8 x [tokens, in] in two halves of 4 bits: x = 16 h + l.

    The lower half l is unsigned and multiplied as the signed l - 8; scale_bias, 8 times the row sums, adds what is
    missing, for every x. Returns [tokens, out].
    """
    weight = dequantize_w4a8(packed, scale)  # [out, in]
    high, low = x.astype(np.int32) >> 4, (x.astype(np.int32) & 15) - 8
    shifted = (16 * high + low).astype(np.float64)
    return ((shifted @ weight.T.astype(np.float64) + bias.sum(axis=1)) * x_scale).astype(np.float32)
