"""The arithmetic against numbers worked by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.arithmetic import (
    QuantizedLinear,
    dequantize,
    quantize_act,
    quantize_weight,
    quantized_matmul,
    relative_error,
    row_blocks,
    squared_norm,
    weight_error,
)
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.scheme import QuantScheme

MINMAX = QuantScheme(8, 8, "minmax")
MSE = QuantScheme(8, 8, "mse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_error(row: torch.Tensor, scale: float) -> float:
    """sum((w - s q)^2) of one row in Python's doubles."""
    q = [max(-127, min(127, round(w / scale))) for w in row.tolist()]
    return sum((w - scale * i) ** 2 for w, i in zip(row.tolist(), q, strict=True))


# --- weights -------------------------------------------------------------------------------------------------


def test_weight_by_hand() -> None:
    # Row 0: absmax 254 -> s 2; 3 / 2 and 5 / 2 round to even. Row 1: absmax 63.5 -> s 0.5.
    weight = torch.tensor([[254.0, 3.0, 5.0, -254.0], [0.25, -63.5, 0.75, 1.0]])
    quantized = quantize_weight(weight, MINMAX)
    assert quantized.qweight.tolist() == [[127, 2, 2, -127], [0, -127, 2, 2]]
    assert quantized.qweight.dtype == torch.int8
    assert quantized.scales.tolist() == [[2.0], [0.5]]
    assert quantized.scales.dtype == torch.float32
    assert dequantize(quantized).tolist() == [[254.0, 4.0, 4.0, -254.0], [0.0, -63.5, 1.0, 1.0]]


@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_row_of_zeros_has_scale_one(scheme: QuantScheme) -> None:
    quantized = quantize_weight(torch.tensor([[0.0] * 4, [127.0, 0.0, -1.0, 0.0]]), scheme)
    assert quantized.scales.tolist() == [[1.0], [1.0]]
    assert quantized.qweight.tolist() == [[0] * 4, [127, 0, -1, 0]]


@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_subnormal_rows_stay_finite(scheme: QuantScheme) -> None:
    quantized = quantize_weight(torch.full((1, 4), 1e-45), scheme)  # absmax / 127 is 0 in float32
    assert quantized.scales.item() > 0
    assert torch.isfinite(dequantize(quantized)).all()


@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_minus_128_is_never_used(scheme: QuantScheme) -> None:
    weight = normal(64, 40)
    weight[:, 0] = -weight.abs().amax(dim=1) * 3
    quantized = quantize_weight(weight, scheme)
    assert int(quantized.qweight.min()) == -127
    assert int(quantized.qweight.max()) <= 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_absmax_over_127_in_float32(dtype: torch.dtype) -> None:
    weight = normal(50, 33).to(dtype)
    scales = quantize_weight(weight, MINMAX).scales
    assert torch.equal(scales, weight.float().abs().amax(dim=1, keepdim=True) / 127)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_weight_is_not_modified(dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight = normal(16, 24).to(dtype)
    before = weight.clone()
    quantized = quantize_weight(weight, scheme)
    weight_error(weight, quantized)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_half_source_is_worked_in_float32(dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight = normal(16, 24).to(dtype)
    half, full = quantize_weight(weight, scheme), quantize_weight(weight.float(), scheme)
    assert torch.equal(half.qweight, full.qweight)
    assert torch.equal(half.scales, full.scales)


def test_non_contiguous_weight() -> None:
    weight = normal(24, 16)
    assert torch.equal(
        quantize_weight(weight.T, MINMAX).qweight, quantize_weight(weight.T.contiguous(), MINMAX).qweight
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    weight = normal(4, 8)
    weight[2, 5] = bad
    with pytest.raises(QuantError, match="NaN or Inf"):
        quantize_weight(weight, MINMAX)


def test_blocks_of_rows_give_what_one_block_gives() -> None:
    weight = normal(5, 700_000)  # one row a block
    assert [(block.start, block.stop) for block in row_blocks(weight)] == [(i, i + 1) for i in range(5)]
    whole = quantize_weight(weight, MINMAX)
    for i in range(5):
        row = quantize_weight(weight[i : i + 1], MINMAX)
        assert torch.equal(whole.qweight[i : i + 1], row.qweight)
        assert torch.equal(whole.scales[i : i + 1], row.scales)


def test_blocks_cover_every_row_once() -> None:
    weight = torch.empty((2500, 1000), device="meta")
    rows = [row for block in row_blocks(weight) for row in range(2500)[block]]
    assert rows == list(range(2500))
    assert len(row_blocks(weight)) == 3


@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_minmax_is_within_half_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    quantized = quantize_weight(weight, MINMAX)
    error = (weight.double() - quantized.qweight.double() * quantized.scales.double()).abs()
    limit = quantized.scales.double() / 2 * (1 + 1e-4) + 1e-37
    assert (error <= limit).all()
    assert quantized.qweight.abs().max() <= 127


# --- the clip search -----------------------------------------------------------------------------------------


def test_mse_is_never_worse_than_minmax() -> None:
    weight = torch.cat([normal(40, 30), normal(40, 30, seed=1) ** 3, torch.eye(30)])
    for row, plain, clipped in zip(
        weight, quantize_weight(weight, MINMAX).scales, quantize_weight(weight, MSE).scales, strict=True
    ):
        assert loop_error(row, clipped.item()) <= loop_error(row, plain.item()) * (1 + 1e-5)


def test_mse_finds_about_what_a_fine_grid_finds() -> None:
    weight = normal(12, 64)
    weight[:, 0] = 6.0  # an outlier that is cheap to clip
    found = quantize_weight(weight, MSE).scales
    for row, scale in zip(weight, found, strict=True):
        full = row.abs().max().item() / 127
        best = min(loop_error(row, full * (0.5 + 0.001 * i)) for i in range(501))
        mine = loop_error(row, scale.item())
        assert mine < loop_error(row, full)
        assert mine <= 1.1 * best


def test_mse_by_hand() -> None:
    # One 127 and 20000 times 0.5. With q = (127, 1, 1, ...) the error (127 - 127 s)^2 + 20000 (0.5 - s)^2 is least at
    # s = (127^2 + 20000 * 0.5) / (127^2 + 20000); at s = 1, 0.5 rounds to 0 and the error is 5000.
    weight = torch.full((1, 20001), 0.5)
    weight[0, 0] = 127.0
    assert quantize_weight(weight, MINMAX).scales.item() == 1.0
    assert loop_error(weight[0], 1.0) == 5000
    scale = quantize_weight(weight, MSE).scales.item()
    assert scale == pytest.approx(26129 / 36129, rel=1e-5)
    assert loop_error(weight[0], scale) < 2300


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mse_keeps_an_exact_row(sign: float) -> None:
    weight = sign * torch.arange(-127.0, 128.0)[None] / 64
    quantized = quantize_weight(weight, MSE)
    assert torch.equal(dequantize(quantized), weight)


# --- activations ---------------------------------------------------------------------------------------------


def test_act_by_hand() -> None:
    x = torch.tensor([[254.0, 1.0, 3.0, -254.0], [0.0, 0.0, 0.0, 0.0], [-63.5, 0.25, 0.75, 1.0]])
    q, s = quantize_act(x)
    assert s.tolist() == [[2.0], [1.0], [0.5]]
    assert q.tolist() == [[127, 0, 2, -127], [0, 0, 0, 0], [-127, 0, 2, 2]]


def test_act_scale_is_per_token_and_input_is_kept() -> None:
    x = normal(2, 5, 16)
    before = x.clone()
    q, s = quantize_act(x)
    assert s.shape == (2, 5, 1)
    assert torch.equal(s, x.abs().amax(-1, keepdim=True) / 127)
    assert torch.equal(x, before)
    assert torch.equal(q, q.round()) and q.abs().max() == 127
    # One token alone gets the same integers: no other token has a say.
    assert torch.equal(quantize_act(x[1, 2])[0], q[1, 2])


@pytest.mark.parametrize(("bits", "qmax"), [(8, 127), (4, 7)])
def test_act_bits(bits: int, qmax: int) -> None:
    q, s = quantize_act(torch.tensor([[-2.0, 1.0, 0.1]]), bits)
    assert q[0, 0] == -qmax
    assert s.item() == pytest.approx(2 / qmax)


# --- the product ---------------------------------------------------------------------------------------------


def test_matmul_by_hand() -> None:
    linear = QuantizedLinear(torch.tensor([[1, 2], [-3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2.0]]), MINMAX)
    x = torch.tensor([[127.0, -127.0]])  # s_x = 1, q_x = (127, -127)
    expected = [[127 * (1 - 2) * 0.5 + 10, 127 * (-3 - 4) * 2.0 + 20]]
    assert quantized_matmul(x, linear, torch.tensor([10.0, 20.0])).tolist() == expected
    assert quantized_matmul(x, linear).tolist() == [[expected[0][0] - 10, expected[0][1] - 20]]


def test_matmul_is_the_integer_product() -> None:
    x, weight, bias = normal(2, 3, 20), normal(7, 20, seed=1), normal(7, seed=2)
    linear = quantize_weight(weight, MINMAX)
    got = quantized_matmul(x, linear, bias)
    for token, out in zip(x.reshape(-1, 20), got.reshape(-1, 7), strict=True):
        s_x = token.abs().max().item() / 127
        q_x = (token / (token.abs().max() / 127)).round().to(torch.int64)
        for channel in range(7):
            accumulated = sum(int(a) * int(b) for a, b in zip(q_x, linear.qweight[channel], strict=True))
            exact = accumulated * s_x * linear.scales[channel].item() + bias[channel].item()
            assert out[channel].item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_matmul_uses_the_schemes_act_bits() -> None:
    linear = QuantizedLinear(torch.tensor([[1, 0]], dtype=torch.int8), torch.tensor([[1.0]]), QuantScheme(8, 4))
    x = torch.tensor([[0.4, 7.0]])  # 4 bits: s = 1, 0.4 rounds to 0
    assert quantized_matmul(x, linear).item() == 0.0


# --- errors --------------------------------------------------------------------------------------------------


def test_weight_error_by_hand() -> None:
    # Dequantized (3, 0) for (3, 4): |(0, 4)| / |(3, 4)| = 4 / 5.
    linear = QuantizedLinear(torch.tensor([[3, 0]], dtype=torch.int8), torch.tensor([[1.0]]), MINMAX)
    assert weight_error(torch.tensor([[3.0, 4.0]]), linear) == pytest.approx(0.8)


def test_weight_error_over_several_blocks() -> None:
    weight = normal(3, 600_000)
    linear = quantize_weight(weight, MINMAX)
    difference = (weight.double() - dequantize(linear).double()).norm() / weight.double().norm()
    assert weight_error(weight, linear) == pytest.approx(difference.item(), rel=1e-5)


def test_relative_error_by_hand() -> None:
    assert relative_error(16.0, 25.0) == 0.8
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) == math.inf


def test_squared_norm_adds_in_float64() -> None:
    x = torch.full((1 << 20, 1), 1e-3)
    assert squared_norm(x).dtype == torch.float64
    assert squared_norm(x).item() == pytest.approx((1 << 20) * float(x[0] ** 2), rel=1e-12)
