"""NF4: weights as 4-bit codes of a table for normally distributed values, with one absmax per block.

    W = NF4_LEVELS[code] * absmax     blocks of consecutive inputs of one output channel (QLoRA, arXiv 2305.14314, §3)

bitsandbytes computes the codes, always on the CPU, so that they equal its own on every device. Dequantizing does not
need bitsandbytes. Double quantization rounds the absmax to 8 bits, with one scale per 256 absmax.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ..errors import QuantError

NESTED_BLOCK_SIZE = 256  # absmax values that share a scale; the only size that bitsandbytes supports

# Quantiles of the normal distribution, scaled to [-1, 1], including zero (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NestedScales:
    """The absmax of all blocks in 8 bits: levels[codes] * scales + offset, with one scale per 256 codes.

    codes: uint8 [blocks]. levels: float32 [256]. scales: float32 [ceil(blocks / 256)].
    """

    codes: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    offset: float

    def absmax(self) -> torch.Tensor:
        """Return the dequantized absmax, float32 [blocks]."""
        scales = self.scales.repeat_interleave(NESTED_BLOCK_SIZE)[: len(self.codes)]
        return self.levels[self.codes.to(torch.int32)] * scales + torch.tensor(self.offset)


def require_bitsandbytes() -> None:
    """Raise QuantError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantError("nf4 needs bitsandbytes, which is not installed", "pip install 'msmodelslim_omni[bnb]'")


def encode_nf4(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a float weight [rows, in] to NF4 on the CPU.

    Returns codes, int8 [rows, in], and absmax, float32 [rows, in / block_size].
    """
    require_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.cpu().contiguous(), blocksize=block_size, quant_type="nf4")
    return unpack_nf4(packed, tuple(weight.shape)), state.absmax.view(len(weight), -1)


def nest_absmax(absmax: torch.Tensor) -> NestedScales:
    """Quantize the absmax of all blocks of a weight to 8 bits."""
    require_bitsandbytes()
    from bitsandbytes.functional import quantize_blockwise

    flat = absmax.cpu().flatten()
    offset = flat.mean()
    codes, state = quantize_blockwise(flat - offset, blocksize=NESTED_BLOCK_SIZE)
    return NestedScales(codes, state.code.clone(), state.absmax, float(offset))


def decode_nf4(codes: torch.Tensor) -> torch.Tensor:
    """Return the NF4 levels of codes: float32, same shape and device."""
    return torch.tensor(NF4_LEVELS, device=codes.device)[codes.to(torch.int32)]


def pack_nf4(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes [out, in] into uint8 [out * in / 2, 1]. The first code of a pair is in the upper half of its byte."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1)


def unpack_nf4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `pack_nf4`: return int8 codes of `shape`."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).view(shape).to(torch.int8)
