"""Pack 4-bit integers into int32 words in the two orders that runtimes use, and unpack them.

A word has eight nibbles; nibble i is bits 4i to 4i+3. Signed integers -8..7 are stored as 0..15, by adding 8. For
example, the integers -8 -7 -6 -5 -4 -3 -2 -1 of eight consecutive channels are stored as 0 1 2 3 4 5 6 7. The resulting
words, highest nibble first:

    plain order: nibble i holds channel i,                       0x76543210 = 1985229328
    GEMM order:  nibble i holds channel (0,2,4,6,1,3,5,7)[i],    0x75316420 = 1966171168

If the highest nibble is 8 or more, the int32 word is negative: eight integers 7, stored as 15, give 0xFFFFFFFF = -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PER_WORD = 8
BYTES_PER_WORD = 4  # integers of 8 bits per word

_PLAIN_ORDER = range(PER_WORD)
# The order of AutoAWQ, whose kernel extracts two half-precision numbers from a word at a time.
_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Columns are processed in blocks of about this many integers, to keep their int32 copies small.
_BLOCK_ELEMENTS = 1 << 20


def pack_gemm(q: torch.Tensor) -> torch.Tensor:
    """Pack in AutoAWQ's layout: word [k, c] holds output channels 8c to 8c+7, in GEMM order, of input (or group) k.

    q: int8 [out, k] in [-8, 7], out a multiple of 8 -> int32 [k, out / 8].
    """
    return _packed_rows(q, _GEMM_ORDER).t().contiguous()


def pack_plain(q: torch.Tensor, axis: int) -> torch.Tensor:
    """Pack in the layout of compressed-tensors: eight consecutive integers along `axis` in plain order.

    Unused nibbles of an incomplete last word are zero.

    q: int8 [rows, columns] in [-8, 7] -> int32 [rows, ceil(columns / 8)] for axis 1, [ceil(rows / 8), columns] for 0.
    """
    if axis == 1:
        return _packed_rows(q.t(), _PLAIN_ORDER).t().contiguous()
    return _packed_rows(q, _PLAIN_ORDER)


def _packed_rows(q: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Pack eight rows into each word: int8 [rows, k] -> int32 [ceil(rows / 8), k], in the memory order of `q`."""
    words = -(-q.shape[0] // PER_WORD)
    transposed = q.stride(0) < q.stride(1)
    packed = torch.zeros((q.shape[1], words) if transposed else (words, q.shape[1]), dtype=torch.int32, device=q.device)
    packed = packed.t() if transposed else packed
    step = max(1, _BLOCK_ELEMENTS // max(1, q.shape[0]))
    for first in range(0, q.shape[1], step):
        columns = slice(first, first + step)
        for nibble, channel in enumerate(order):
            rows = q[channel::PER_WORD, columns]  # [words or words - 1, step]
            packed[: rows.shape[0], columns] |= (rows.to(torch.int32) + 8) << (4 * nibble)
    return packed


def unpack_gemm(words: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_gemm. words: int32 [k, out / 8] -> int8 [out, k] in [-8, 7]."""
    return _unpacked_rows(words.t(), _GEMM_ORDER, PER_WORD * words.shape[1]).contiguous()


def unpack_plain(words: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """The inverse of pack_plain. size: number of integers along `axis`; nibbles beyond them are dropped.

    words: int32 [rows, ceil(size / 8)] -> int8 [rows, size] for axis 1, [ceil(size / 8), columns] -> [size, columns]
    for 0; in [-8, 7].
    """
    if axis == 1:
        return _unpacked_rows(words.t(), _PLAIN_ORDER, size).t().contiguous()
    return _unpacked_rows(words, _PLAIN_ORDER, size).contiguous()


def pack_bytes(q: torch.Tensor) -> torch.Tensor:
    """Pack int8 [rows, columns] in the layout of compressed-tensors: integer + 128, four columns in each word.

    Byte j of word c is column 4c + j: [1, -2, 127, 0] is stored as 81 7E FF 80, the word 0x80FF7E81. Unused bytes of an
    incomplete last word are zero. Returns int32 [rows, ceil(columns / 4)].
    """
    columns = q.shape[1]
    stored = torch.zeros((q.shape[0], -(-columns // BYTES_PER_WORD) * BYTES_PER_WORD), dtype=torch.uint8)
    torch.bitwise_xor(q.view(torch.uint8), 128, out=stored[:, :columns])  # adds 128 modulo 256
    return stored.view(torch.int32)


def unpack_bytes(words: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of pack_bytes. words: int32 [rows, ceil(size / 4)] -> int8 [rows, size]."""
    return words.contiguous().view(torch.uint8)[:, :size].bitwise_xor(128).view(torch.int8)


def pack_row_pairs(q: torch.Tensor) -> torch.Tensor:
    """Pack int8 [rows, columns] in [-8, 7], two rows per byte: row 2r below row 2r + 1, in two's complement.

    The rows 1 and -2 are stored as E1. Returns int8 [rows / 2, columns].
    """
    return (q[::2] & 15) | (q[1::2] << 4)


def unpack_row_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_row_pairs. packed: int8 [rows / 2, columns] -> int8 [rows, columns]."""
    low = (packed << 4) >> 4  # an arithmetic shift keeps the sign
    return torch.stack([low, packed >> 4], dim=1).flatten(0, 1)


def _unpacked_rows(words: torch.Tensor, order: Sequence[int], size: int) -> torch.Tensor:
    """Unpack eight rows from each word: int32 [ceil(size / 8), k] -> int8 [size, k], in the memory order of `words`."""
    columns = words.shape[1]
    transposed = words.stride(0) < words.stride(1)
    q = torch.empty((columns, size) if transposed else (size, columns), dtype=torch.int8, device=words.device)
    q = q.t() if transposed else q
    step = max(1, _BLOCK_ELEMENTS // max(1, size))
    for first in range(0, columns, step):
        block = words[:, first : first + step]  # [words, step]
        for nibble, channel in enumerate(order):
            rows = q[channel::PER_WORD, first : first + step]  # [words or words - 1, step]
            rows.copy_(((block[: rows.shape[0]] >> (4 * nibble)) & 15).sub_(8))
    return q
