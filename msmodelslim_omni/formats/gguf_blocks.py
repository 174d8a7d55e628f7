"""The blocks of 32 weights in which GGUF (llama.cpp, ggml) stores quantized weights, from this package's integers.

Q8_0: float16 d, then 32 int8: w = q d. Q4_0: float16 d, then 16 bytes: w = (c - 8) d. Q4_1: float16 d and m, then 16
bytes: w = c d + m. A byte holds the code of weight i in its lower and that of weight i + 16 in its upper half. Scales
per channel or per 64 or 128 inputs are repeated for every block.

Example, Q4_0 with d = 1: weight 0 is -8 and weight 16 is 7, whose codes 0 and 15 are the byte F0.
"""

from __future__ import annotations

import torch

from ..numerics import QuantScheme

BLOCK = 32
BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2, "Q4_1": 4 + BLOCK // 2}


def block_type(scheme: QuantScheme) -> str:
    """The type of block that holds the integers of a scheme; an empty string if there is none."""
    if scheme.number != "int" or scheme.codebook is not None:
        return ""
    if scheme.weight_bits == 8:
        return "Q8_0"
    if scheme.group_size is None or scheme.group_size % BLOCK:
        return ""
    return "Q4_0" if scheme.symmetric else "Q4_1"


def pack_blocks(kind: str, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Pack integers int8 [out, in], with scales and zeros [out, groups]: uint8 [out, in / 32 * bytes of a block]."""
    rows, columns = q.shape
    d, m = block_constants(kind, scales, zeros)
    repeats = columns // BLOCK // scales.shape[1]
    parts = [x.repeat_interleave(repeats, dim=1).unsqueeze(2) for x in (d, m) if x is not None]  # [out, blocks, 1]
    constants = [part.contiguous().view(torch.uint8) for part in parts]  # [out, blocks, 2]
    blocks = q.view(rows, -1, BLOCK)
    if kind == "Q8_0":
        codes = blocks.contiguous().view(torch.uint8)
    else:
        unsigned = (blocks.to(torch.int16) + 8).to(torch.uint8)
        codes = unsigned[..., : BLOCK // 2] | (unsigned[..., BLOCK // 2 :] << 4)
    return torch.cat([*constants, codes], dim=2).flatten(1)


def block_constants(
    kind: str, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and, for Q4_1, m of each group, float16. W = (q - z) s = c s - (z + 8) s with the code c = q + 8."""
    m = None if kind != "Q4_1" or zeros is None else (-(zeros.to(torch.float32) + 8) * scales).to(torch.float16)
    return scales.to(torch.float16), m


def block_loss(kind: str, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> tuple[float, float]:
    """The squares of what the stored weights differ from (q - z) s by, and of these weights, summed."""
    d, m = block_constants(kind, scales, zeros)
    groups = q.view(len(q), scales.shape[1], -1).to(torch.float32)
    weight = (groups - (0 if zeros is None else zeros.to(torch.float32).unsqueeze(2))) * scales.unsqueeze(2)
    stored = d.to(torch.float32).unsqueeze(2) * (groups if m is None else groups + 8)
    stored = stored if m is None else stored + m.to(torch.float32).unsqueeze(2)
    return float((stored - weight).square().sum()), float(weight.square().sum())
