"""FP8: codes against a table written by hand and torch's cast, scales, errors, and the products of the runtime."""

from __future__ import annotations

import pytest
import torch
from dequantizers import E4M3

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_weight, quantized_matmul, round_act
from msmodelslim_omni.numerics.checks import WeightChecks
from msmodelslim_omni.numerics.float8 import decode_e4m3, e4m3_scales, quantize_act_e4m3, round_e4m3
from msmodelslim_omni.numerics.scheme import QuantScheme

CHANNEL = QuantScheme(8, 8, number="e4m3")
BLOCK = QuantScheme(8, 8, group_size=128, number="e4m3", block_rows=128)


def codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e4m3fn)


def bits(rounded: torch.Tensor) -> list[int]:
    return [int(code) for code in rounded.view(torch.uint8)]


def test_codes_equal_the_table() -> None:
    positive, negative = codes(*range(0x7F)), codes(*range(0x80, 0xFF))
    assert decode_e4m3(positive).tolist() == list(E4M3)
    assert decode_e4m3(negative).tolist() == [-value for value in E4M3]
    assert torch.equal(decode_e4m3(positive), positive.to(torch.float32))  # torch's own cast
    assert bits(round_e4m3(torch.tensor(E4M3))) == list(range(0x7F))


def test_ties_round_to_even_codes() -> None:
    values = torch.tensor(E4M3, dtype=torch.float64)
    middles = (values[:-1] + values[1:]) / 2
    expected = [code + code % 2 for code in range(len(middles))]
    assert bits(round_e4m3(middles.to(torch.float32))) == expected
    below, above = (torch.nextafter(middles.float(), torch.tensor(end)) for end in (-torch.inf, torch.inf))
    assert bits(round_e4m3(below)) == list(range(len(middles)))
    assert bits(round_e4m3(above)) == list(range(1, len(middles) + 1))


def test_rounding_equals_torch_on_many_floats() -> None:
    # Every 8th value of the upper 16 bits of a float32 with an exponent around the range of the codes.
    words = torch.arange(0x3A00, 0x4400, dtype=torch.int32)
    x = torch.cat([(words << 16) | offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    x = torch.cat([x, -x])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(round_e4m3(x.clone()).view(torch.uint8), expected.view(torch.uint8))


def test_no_value_becomes_nan() -> None:
    x = torch.tensor([448.0, 463.9, 464.0, 480.0, 1e30, torch.inf, -torch.inf, -449.0])
    assert bits(round_e4m3(x)) == [0x7E] * 6 + [0xFE] * 2


def test_scales_are_exact_in_both_half_types() -> None:
    absmax = torch.tensor([448.0, 0.3, 1e-9, 0.0, 5.0e5])
    scales = e4m3_scales(absmax, WeightChecks())
    assert scales[0] == 1.0 and scales[2] == 2.0**-14 and scales[3] == 1.0
    assert scales[1] == torch.tensor(0.3 / 448).bfloat16()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scales.to(dtype).float(), scales)
    with pytest.raises(QuantError, match="requires a scale above 65280"):
        e4m3_scales(torch.tensor([3e7]), WeightChecks())


def test_channels_by_hand() -> None:
    weight = torch.tensor([[448.0, -17.0, 0.3, 0.001], [-0.875, 0.4375, 0.01, 0.0], [0.0, 0.0, 0.0, 0.0]])
    linear = quantize_weight(weight, CHANNEL)
    # 17 is between 16 and 18, nearest even mantissa; 0.3 is between 0.28125 and 0.3125; 0.001 is 0.51 of 2^-9.
    assert linear.scales.flatten().tolist() == [1.0, 2.0**-9, 1.0]
    assert linear.qweight.dtype == torch.float8_e4m3fn
    assert dequantize(linear)[0].tolist() == [448.0, -16.0, 0.3125, 0.001953125]
    # Row 1 in steps of its scale: -448, 224, 5.12 (between 5 and 5.5), 0.
    assert linear.qweight[1].float().tolist() == [-448.0, 224.0, 5.0, 0.0]
    assert bits(linear.qweight[2]) == [0, 0, 0, 0]
    error = (dequantize(linear) - weight).norm() / weight.norm()
    assert linear.error == pytest.approx(float(error), rel=1e-6)


def test_blocks_by_hand() -> None:
    weight = torch.zeros(130, 256)
    weight[0, 0], weight[127, 127], weight[5, 200], weight[129, 255] = 448.0, 17.0, 3.5, -896.0
    linear = quantize_weight(weight, BLOCK)
    assert linear.scales.shape == (130, 2)
    assert linear.scales[:128].unique(dim=0).tolist() == [[1.0, 2.0**-7]]
    assert linear.scales[128:].unique(dim=0).tolist() == [[1.0, 2.0]]  # a short block; one of zeros
    assert dequantize(linear).nonzero().tolist() == weight.nonzero().tolist()
    assert [float(dequantize(linear)[place]) for place in ((0, 0), (127, 127), (5, 200), (129, 255))] == [
        448.0, 16.0, 3.5, -896.0,
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK])
def test_mse_is_no_worse_per_scale(scheme: QuantScheme) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    searched = QuantScheme(8, 8, "mse", scheme.group_size, number="e4m3", block_rows=scheme.block_rows)
    plain, best = quantize_weight(weight, scheme), quantize_weight(weight, searched)
    size = scheme.block_rows or 1

    def errors(linear: object) -> torch.Tensor:
        squares = (dequantize(linear) - weight).square()  # type: ignore[arg-type]
        return squares.view(256 // size, size, 256 // (scheme.group_size or 256), -1).sum(dim=(1, 3))

    assert (errors(best) <= errors(plain) * (1 + 1e-5)).all()
    assert best.error is not None and plain.error is not None and best.error < plain.error


def test_nan_in_the_weight_is_refused() -> None:
    for scheme in (CHANNEL, BLOCK):
        weight = torch.zeros(128, 128)
        weight[3, 4] = torch.nan
        with pytest.raises(QuantError, match="holds NaN or Inf"):
            quantize_weight(weight, scheme)


def test_activations_by_hand() -> None:
    q, s = quantize_act_e4m3(torch.tensor([[896.0, 34.0, -0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert s.flatten().tolist() == [2.0, pytest.approx(1 / (448 * 512))]
    assert q.tolist() == [[448.0, 16.0, -0.3125, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK])
def test_product_of_the_runtime(scheme: QuantScheme) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((200, 256), (3, 7, 256), (200,)))
    linear = quantize_weight(weight, scheme)
    groups = 256 // (scheme.group_size or 256)
    by_group = x.unflatten(-1, (groups, -1))
    s = by_group.abs().amax(-1, keepdim=True) / 448
    rounded = ((by_group / s).to(torch.float8_e4m3fn).float() * s).flatten(-2)
    assert torch.equal(round_act(x, scheme), rounded)
    exact = rounded.double() @ dequantize(linear).double().T + bias.double()
    assert (quantized_matmul(x, linear, bias) - exact).abs().max() < 1e-4
    assert (quantized_matmul(x, linear, bias) - (x @ weight.T + bias)).abs().max() > 0.01  # both were rounded
