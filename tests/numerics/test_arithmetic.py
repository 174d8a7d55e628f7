"""The arithmetic, compared with values computed by hand and with plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics import arithmetic
from msmodelslim_omni.numerics.arithmetic import (
    QuantizedLinear,
    dequantize,
    linear_rows,
    map_row_blocks,
    quantize_act,
    quantize_weight,
    quantized_matmul,
    relative_error,
    relative_norms,
    row_blocks,
    storable_scales,
    weight_error,
)
from msmodelslim_omni.numerics.checks import WeightChecks
from msmodelslim_omni.numerics.scheme import QuantScheme

MINMAX = QuantScheme(8, 8, "minmax")
MSE = QuantScheme(8, 8, "mse")
SYM4 = QuantScheme(4, None, "minmax", 4, symmetric=True)  # groups of 4 inputs, for values computed by hand
ASYM4 = QuantScheme(4, None, "minmax", 4, symmetric=False)
INT4 = (SYM4, ASYM4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_error(row: torch.Tensor, scale: float) -> float:
    """Return sum((w - s q)^2) of one row, computed in Python floats."""
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
    quantized = quantize_weight(torch.full((1, 4), 1e-45), scheme)  # absmax / 127 underflows to 0 in float32
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
def test_scale_is_absmax_over_127_rounded_to_bfloat16(dtype: torch.dtype) -> None:
    weight = normal(50, 33).to(dtype)
    quantized = quantize_weight(weight, MINMAX)
    exact = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(quantized.scales, exact.to(torch.bfloat16).float())
    assert torch.equal(quantized.qweight.float(), (weight.float() / quantized.scales).round().clamp(-127, 127))


@pytest.mark.parametrize("scheme", [MINMAX, MSE])
def test_scales_of_channels_are_equal_in_every_format(scheme: QuantScheme) -> None:
    weight = normal(64, 48) * torch.logspace(-20, 20, 64)[:, None]
    scales = quantize_weight(weight, scheme).scales
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    in_range = (scales >= 2.0**-17) & (scales < 65504)
    assert in_range.sum() > 5
    assert torch.equal(scales[in_range].to(torch.float16).float(), scales[in_range])


def test_rounded_scale_does_not_clip() -> None:
    # 254.9 / 127 = 2.0071 rounds to 2 in bfloat16, and 254.9 / 2 = 127.45 to 127: within half a step. The tie is at
    # 2.0078; 255 / 127 is above it.
    quantized = quantize_weight(torch.tensor([[254.9, 3.0], [-255.0, 3.0]]), MINMAX)
    assert quantized.scales.tolist() == [[2.0], [2.015625]]
    assert quantized.qweight.tolist() == [[127, 2], [-127, 1]]


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
def test_half_weight_is_quantized_in_float32(dtype: torch.dtype, scheme: QuantScheme) -> None:
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


def test_result_does_not_depend_on_row_blocks() -> None:
    weight = normal(5, 700_000)  # one row per block
    assert [(block.start, block.stop) for block in row_blocks(weight)] == [(i, i + 1) for i in range(5)]
    quantized = quantize_weight(weight, MINMAX)
    for i in range(5):
        row = quantize_weight(weight[i : i + 1], MINMAX)
        assert torch.equal(quantized.qweight[i : i + 1], row.qweight)
        assert torch.equal(quantized.scales[i : i + 1], row.scales)


def test_blocks_cover_every_row_once() -> None:
    weight = torch.empty((2500, 1000))
    rows = [row for block in row_blocks(weight) for row in range(2500)[block]]
    assert rows == list(range(2500))
    assert len(row_blocks(weight)) == 4
    assert len(row_blocks(weight, 1 << 20)) == 3
    assert map_row_blocks(lambda block: block.start, torch.empty((2500, 1000))) == [786 * i for i in range(4)]


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


def test_mse_is_close_to_a_fine_grid_search() -> None:
    weight = normal(12, 64)
    weight[:, 0] = 6.0  # an outlier; in some rows clipping it lowers the error
    scales, clipped = quantize_weight(weight, MSE).scales, 0
    for row, scale in zip(weight, scales, strict=True):
        full = row.abs().max().item() / 127
        stored = (full * torch.arange(0.5, 1.001, 0.001)).to(torch.bfloat16).tolist()
        best = min(loop_error(row, candidate) for candidate in stored)
        error = loop_error(row, scale.item())
        clipped += error < loop_error(row, stored[-1])
        assert error <= min(1.15 * best, loop_error(row, stored[-1]))
    assert clipped >= 2


def test_mse_by_hand() -> None:
    # One 127 and 20000 values 0.5. For q = (127, 1, 1, ...), (127 - 127 s)^2 + 20000 (0.5 - s)^2 has its minimum at
    # s = (127^2 + 20000 * 0.5) / (127^2 + 20000) = 0.72321, in bfloat16 0.72266; at s = 1, 0.5 rounds to 0 and the
    # error is 5000.
    weight = torch.full((1, 20001), 0.5)
    weight[0, 0] = 127.0
    assert quantize_weight(weight, MINMAX).scales.item() == 1.0
    assert loop_error(weight[0], 1.0) == 5000
    scale = quantize_weight(weight, MSE).scales.item()
    assert scale == 185 / 256
    assert loop_error(weight[0], scale) < 2300


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mse_keeps_an_exact_row(sign: float) -> None:
    weight = sign * torch.arange(-127.0, 128.0)[None] / 64
    quantized = quantize_weight(weight, MSE)
    assert torch.equal(dequantize(quantized), weight)


# --- int4 groups ------------------------------------------------------------------------------------------


def test_symmetric_groups_by_hand() -> None:
    # max(7 / 7, 8 / 8) = 1, and 3.4, -2.6 round to 3, -3. max(14 / 7, 4 / 8) = 2, and 5 / 2 rounds to even.
    quantized = quantize_weight(torch.tensor([[7.0, -8.0, 3.4, -2.6, 14.0, 5.0, -4.0, 0.0]]), SYM4)
    assert quantized.scales.tolist() == [[1.0, 2.0]]
    assert quantized.qweight.tolist() == [[7, -8, 3, -3, 7, 2, -2, 0]]
    assert quantized.zeros is None
    assert dequantize(quantized).tolist() == [[7.0, -8.0, 3.0, -3.0, 14.0, 4.0, -4.0, 0.0]]


def test_symmetric_scale_is_the_smallest_without_clipping() -> None:
    # 8 requires 8 / 7; -8 requires only -8 / -8, because the lowest code is used too.
    assert quantize_weight(torch.tensor([[-8.0, 0.0, 0.0, 1.0]]), SYM4).scales.item() == 1.0
    assert quantize_weight(torch.tensor([[-4.0, 0.0, 0.0, 7.0]]), SYM4).scales.item() == 1.0
    assert quantize_weight(torch.tensor([[8.0, 0.0, 0.0, 1.0]]), SYM4).scales.item() == pytest.approx(8 / 7, rel=2**-8)


def test_asymmetric_groups_by_hand() -> None:
    # (10 + 5) / 15 = 1, z = round(-8 + 5) = -3. (14 + 16) / 15 = 2, z = round(-8 + 8) = 0.
    quantized = quantize_weight(torch.tensor([[-5.0, 10.0, 0.0, 2.4, 14.0, -16.0, 5.0, 1.5]]), ASYM4)
    assert quantized.scales.tolist() == [[1.0, 2.0]]
    assert quantized.zeros is not None and quantized.zeros.tolist() == [[-3, 0]]
    assert quantized.zeros.dtype == torch.int8
    assert quantized.qweight.tolist() == [[-8, 7, -3, -1, 7, -8, 2, 1]]
    assert dequantize(quantized).tolist() == [[-5.0, 10.0, 0.0, 2.0, 14.0, -16.0, 4.0, 2.0]]


def test_groups_of_one_sign_by_hand() -> None:
    # The range is extended to zero: s = 15 / 15, z is the lowest or highest code, 7.5 rounds to 8.
    weight = torch.tensor([[15.0, 7.5, 3.0, 1.0, -15.0, -7.5, -3.0, -1.0]])
    quantized = quantize_weight(weight, ASYM4)
    assert quantized.scales.tolist() == [[1.0, 1.0]]
    assert quantized.zeros is not None and quantized.zeros.tolist() == [[-8, 7]]
    assert quantized.qweight.tolist() == [[7, 0, -5, -7, -8, -1, 4, 6]]
    assert dequantize(quantized).tolist() == [[15.0, 8.0, 3.0, 1.0, -15.0, -8.0, -3.0, -1.0]]


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_groups_of_one_sign_do_not_collapse(scheme: QuantScheme, sign: float, method: Any) -> None:
    wide = replace(scheme, group_size=64, weight_method=method)
    weight = sign * torch.linspace(0.02, 1.0, 64)[None]
    quantized = quantize_weight(weight, wide)
    # A symmetric scheme has seven levels above zero and eight below.
    assert quantized.qweight.unique().numel() >= (7 if scheme.symmetric else 12)
    zero = 0 if quantized.zeros is None else quantized.zeros.item()
    assert -8 <= zero <= 7
    assert (dequantize(quantized) * sign >= 0).all()


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
def test_group_of_zeros_is_exact(scheme: QuantScheme, method: Any) -> None:
    weight = torch.tensor([[0.0] * 4 + [7.0, -8.0, 0.0, 0.0]])
    quantized = quantize_weight(weight, replace(scheme, weight_method=method))
    assert quantized.scales[0, 0] == 1.0
    assert torch.equal(dequantize(quantized), weight)


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -250.0])
def test_constant_group_uses_one_level(scheme: QuantScheme, value: float) -> None:
    quantized = quantize_weight(torch.full((2, 4), value), scheme)
    assert quantized.qweight.unique().numel() == 1
    torch.testing.assert_close(dequantize(quantized), torch.full((2, 4), value), rtol=2**-8, atol=0)


@pytest.mark.parametrize("scheme", INT4)
def test_groups_are_independent(scheme: QuantScheme) -> None:
    """The integers of a group do not depend on other groups or rows."""
    weight = normal(6, 24)
    quantized = quantize_weight(weight, scheme)
    for row in range(6):
        for group in range(6):
            columns = slice(4 * group, 4 * group + 4)
            single = quantize_weight(weight[row : row + 1, columns], scheme)
            assert torch.equal(quantized.qweight[row, columns], single.qweight[0])
            assert quantized.scales[row, group] == single.scales[0, 0]


def test_int4_result_does_not_depend_on_row_blocks() -> None:
    weight = normal(3, 700_000)
    quantized = quantize_weight(weight, ASYM4)
    assert quantized.zeros is not None and quantized.scales.shape == quantized.zeros.shape == (3, 175_000)
    last = quantize_weight(weight[2:], ASYM4)
    assert last.zeros is not None
    assert torch.equal(quantized.qweight[2:], last.qweight) and torch.equal(quantized.scales[2:], last.scales)
    assert torch.equal(quantized.zeros[2:], last.zeros)
    rows = linear_rows(quantized, slice(2, 3))
    assert torch.equal(dequantize(rows), dequantize(last))
    difference = (weight.double() - dequantize(quantized).double()).norm() / weight.double().norm()
    assert weight_error(weight, quantized) == pytest.approx(difference.item(), rel=1e-5)


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_refused_in_groups(scheme: QuantScheme, bad: float) -> None:
    weight = normal(4, 8)
    weight[1, 6] = bad
    with pytest.raises(QuantError, match="NaN or Inf"):
        quantize_weight(weight, scheme)


def test_dequantize_with_zeros_by_hand() -> None:
    q = torch.tensor([[1, -8, 7, 0], [2, 2, 2, 2]], dtype=torch.int8)
    zeros = torch.tensor([[1, -2], [-8, 2]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    linear = QuantizedLinear(q, scales, replace(ASYM4, group_size=2), zeros)
    assert dequantize(linear).tolist() == [[0.0, -4.5, 18.0, 4.0], [10.0, 10.0, 0.0, 0.0]]
    # With float activations, nothing else is rounded.
    x = torch.tensor([[1.0, 0.0, 0.25, 0.125]])
    assert quantized_matmul(x, linear, torch.tensor([1.0, 2.0])).tolist() == [[6.0, 12.0]]


GROUPS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8)


@given(st.lists(GROUPS, min_size=1, max_size=3), st.sampled_from(INT4))
@settings(max_examples=200, deadline=None)
def test_int4_minmax_is_within_half_a_step(rows: list[list[float]], scheme: QuantScheme) -> None:
    """The limit is half a step, plus the clipping that results from rounding the scale for storage."""
    weight = torch.tensor(rows, dtype=torch.float32)
    quantized = quantize_weight(weight, scheme)
    grouped = weight.double().view(len(rows), 2, 4)
    low, high = grouped.amin(2), grouped.amax(2)
    if scheme.symmetric:
        exact, steps = torch.maximum(high / 7, low / -8), 8
    else:
        exact, steps = (high.clamp_min(0) - low.clamp_max(0)) / 15, 15
    s = quantized.scales.double()
    limit = s / 2 + steps * (exact - s).clamp_min(0)
    error = (grouped - dequantize(quantized).double().view_as(grouped)).abs()
    assert (error <= limit.unsqueeze(2) * (1 + 1e-5) + 1e-30).all()
    assert quantized.qweight.min() >= -8 and quantized.qweight.max() <= 7
    if quantized.zeros is not None:
        assert quantized.zeros.min() >= -8 and quantized.zeros.max() <= 7


@given(st.lists(st.floats(2.0**-40, 65504.0, width=32), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_stored_scales_are_equal_in_every_format(scales: list[float]) -> None:
    exact = torch.tensor(scales)
    stored = storable_scales(exact, WeightChecks())
    assert torch.equal(stored.to(torch.float16).float(), stored)
    assert torch.equal(stored.to(torch.bfloat16).float(), stored)
    assert (stored > 0).all() and stored.dtype == torch.float32
    # Eight bits, or steps of 2^-24 in float16's subnormal range; smaller scales become 2^-24.
    limit = torch.maximum(exact.double() * 2.0**-8, torch.tensor(2.0**-24, dtype=torch.float64))
    assert ((stored.double() - exact.double()).abs() <= limit).all()


def test_stored_scales_by_hand() -> None:
    # 1 + 2^-8 is halfway between two bfloat16 values and rounds to the even one; 3 * 2^-25 is 1.5 subnormal steps.
    scales = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-8, 3 * 2**-25, 5 * 2**-25, 2**-30, 65504.0])
    expected = [1.0, 1 + 2**-7, 1.0, 2 * 2**-24, 2 * 2**-24, 2**-24, 65280.0]
    assert storable_scales(scales, WeightChecks()).tolist() == expected


@pytest.mark.parametrize("scheme", INT4)
def test_tiny_int4_weights_stay_finite(scheme: QuantScheme) -> None:
    weight = torch.tensor([[1e-9, -1e-9, 1e-12, 0.0], [3e-8, -6e-8, 2e-7, 0.0], [1e-45, 0.0, 0.0, 0.0]])
    quantized = quantize_weight(weight, scheme)
    assert (quantized.scales >= 2.0**-24).all()
    assert ((dequantize(quantized) - weight).abs() <= 2.0**-24).all()


@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_scale_beyond_float16_is_refused(scheme: QuantScheme, method: Any) -> None:
    with pytest.raises(QuantError, match="65504") as caught:
        quantize_weight(torch.tensor([[1e6, 0.0, 0.0, 1.0]]), replace(scheme, weight_method=method))
    assert "exclude" in caught.value.hint


# --- the clip search of groups -------------------------------------------------------------------------------


def best_clip_loss(row: torch.Tensor, symmetric: bool, h: Callable[[torch.Tensor], float]) -> tuple[float, float]:
    """Return the least loss over all clipped ranges of one group, and the loss of the full range.

    Scales and codes are computed element by element in float32, so that ties round to the same side on every processor.
    """
    losses = []
    for share in arithmetic._GROUP_SHRINKS:
        low, high = row.amin() * share, row.amax() * share
        if symmetric:
            scale, zero = storable_scales(torch.maximum(high / 7, low / -8), None), torch.tensor(0.0)
        else:
            low, high = low.clamp_max(0.0), high.clamp_min(0.0)
            scale = storable_scales((high - low) / 15, None)
            zero = (-8 - low / scale).round().clamp(-8, 7)
        codes = ((row / scale).round() + zero).clamp(-8, 7)
        losses.append(h((codes - zero) * scale - row))
    return min(losses), losses[0]


IMPORTANCE = ("none", "inputs", "blocks")


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_the_best_of_its_grid(kind: str, symmetric: bool) -> None:
    """Compared with a loop over rows, groups and clips. The loss is the sum of d d, the sum of h d d, or d H d."""
    size, groups = 16, 3
    weight = normal(10, groups * size, seed=3)
    weight[::2, ::size] *= 4  # outliers, which are worth clipping or not
    x = normal(40, groups, size, seed=4) * torch.rand((groups, size), generator=torch.Generator().manual_seed(5)) ** 3
    blocks = torch.einsum("tgi,tgj->gij", x, x)
    inputs = blocks.diagonal(dim1=1, dim2=2)
    importance = {"none": None, "inputs": inputs, "blocks": blocks}[kind]
    scheme = QuantScheme(4, None, "mse", size, symmetric)
    clipped = quantize_weight(weight, scheme, importance)
    plain = quantize_weight(weight, replace(scheme, weight_method="minmax"), importance)
    assert not torch.equal(clipped.scales, plain.scales)

    def loss(group: int) -> Callable[[torch.Tensor], float]:
        h = {"none": torch.eye(size), "inputs": inputs[group].diag(), "blocks": blocks[group]}[kind].double()
        return lambda d: float(d.double() @ h @ d.double())

    for row in range(10):
        for group in range(groups):
            columns = slice(group * size, group * size + size)
            least, full_range = best_clip_loss(weight[row, columns], symmetric, loss(group))
            for quantized, expected in ((clipped, least), (plain, full_range)):
                error = dequantize(quantized)[row, columns] - weight[row, columns]
                assert loss(group)(error) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scheme", INT4)
def test_mse_of_groups_is_never_worse_than_minmax(scheme: QuantScheme) -> None:
    weight = torch.cat([normal(40, 32), normal(40, 32, seed=1) ** 3, torch.eye(32)])
    weight[:20, ::16] = 4.0
    wide = replace(scheme, group_size=16)
    errors = [
        (dequantize(quantize_weight(weight, s)) - weight).double().view(-1, 2, 16).square().sum(2)
        for s in (wide, replace(wide, weight_method="mse"))
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[1][:20] < 0.95 * errors[0][:20]).sum() >= 5


def test_clip_search_follows_the_importance() -> None:
    """An outlier with zero importance is clipped to improve the other weights; one with all importance is not."""
    weight = torch.cat([torch.tensor([2.0]), torch.linspace(-1, 1, 15)])[None]
    scheme = QuantScheme(4, None, "mse", 16, symmetric=True)
    others = torch.ones(1, 16)
    others[0, 0] = 0.0
    full, clipped, kept = (
        quantize_weight(weight, s, h)
        for s, h in ((replace(scheme, weight_method="minmax"), None), (scheme, others), (scheme, 1 - others))
    )
    assert clipped.scales.item() < 0.8 * full.scales.item()
    errors = [(dequantize(q) - weight)[0, 1:].square().sum().item() for q in (full, clipped)]
    assert errors[1] < 0.7 * errors[0]
    assert abs(dequantize(kept)[0, 0].item() - 2.0) <= abs(dequantize(full)[0, 0].item() - 2.0) < 0.02


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "name", "low"),
    [
        (QuantScheme(8, 8), "W8A8_DYNAMIC", -127),
        (QuantScheme(4, None, "gptq", 128, symmetric=False), "W4A16_G128", -8),
        (QuantScheme(4, None, "minmax", 32), "W4A16_G32_SYM", -8),
    ],
)
def test_names_and_ranges_of_schemes(scheme: QuantScheme, name: str, low: int) -> None:
    assert scheme.name == name
    assert scheme.weight_range[0] == low


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
    # The integers of a token do not depend on other tokens.
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


def test_matmul_equals_the_integer_product() -> None:
    x, weight, bias = normal(2, 3, 20), normal(7, 20, seed=1), normal(7, seed=2)
    linear = quantize_weight(weight, MINMAX)
    product = quantized_matmul(x, linear, bias)
    for token, out in zip(x.reshape(-1, 20), product.reshape(-1, 7), strict=True):
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
    assert weight_error(weight, replace(linear, squares=None)) == pytest.approx(difference.item(), rel=1e-5)


def test_float32_for_any_default_dtype() -> None:
    weight = normal(20, 300)
    expected = quantize_weight(weight, MINMAX)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(quantize_weight(weight, MINMAX).qweight, expected.qweight)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scheme", [MINMAX, MSE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_also_computes_the_weight_error(dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight = normal(40, 50_000).to(dtype)  # several blocks
    linear = quantize_weight(weight, scheme)
    assert linear.error == pytest.approx(weight_error(weight, replace(linear, squares=None)), rel=1e-6)
    assert linear_rows(linear, slice(0, 3)).error is None


def test_relative_error_by_hand() -> None:
    assert relative_error(16.0, 25.0) == 0.8
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0) == math.inf


def test_relative_norms_add_in_float64() -> None:
    squares = torch.tensor([[1e-6], [4e-6]]).expand(2, 1 << 20)
    blocks = [squares[:, :1000], squares[:, 1000:]]
    expected = math.sqrt(float(squares[0, 0]) / float(squares[1, 0]))
    assert relative_norms([blocks, blocks[:1]]) == pytest.approx([expected, expected], rel=1e-12)
