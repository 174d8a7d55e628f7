"""Every method of Gram, in all forms of storage, compared with the tokens themselves."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from grams import FORMS, Form
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.runtime.budget import DEFAULT_BUDGET
from msmodelslim_omni.statistics import gram as gram_module
from msmodelslim_omni.statistics.gram import (
    Gram,
    GramBuilder,
    GramForm,
    choose_form,
    weighted_sum,
)
from msmodelslim_omni.statistics.spilled import Spill, SpilledMatrix

IN = 24
CPU = torch.device("cpu")


def default_form(counts: Sequence[int], in_features: int) -> GramForm:
    return choose_form(counts, in_features, DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, combinable=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, width: int = IN, seed: int = 0) -> torch.Tensor:
    """Correlated tokens. One channel is far larger than the others, and one channel is always zero."""
    x = normal(count, width, seed=seed) @ normal(width, width, seed=1000) + 0.5
    x[:, 3] *= 40
    x[:, 5] = 0.0
    return x


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 1e-5 times the largest entry."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def rounding_bound(x: torch.Tensor) -> torch.Tensor:
    """The largest error of float32 sums of XᵀX in any order: one rounding per token, two in the symmetric result."""
    return (len(x) + 2) * 2.0**-24 * (x.double().abs().T @ x.double().abs())


def build_gram(parts: list[torch.Tensor], rows: int | None) -> Gram:
    builder = GramBuilder(parts[0].shape[1], rows, CPU)
    for part in parts:
        builder.add(part)
    return builder.finish()


def full_matrix(gram: Gram) -> torch.Tensor:
    """H as a float64 matrix [in, in], for every form."""
    if gram.spilled is not None:
        return gram.rows_of_matrix(slice(None)).double()
    return gram.matrix.double() if gram.matrix is not None else gram.factor.double().T @ gram.factor.double()


# --- methods of Gram -----------------------------------------------------------------------------------------


@FORMS
def test_output_error_equals_the_error_of_the_outputs(form: Form) -> None:
    x, delta = tokens(50), 0.1 * normal(7, IN, seed=1)
    direct = (x.double() @ delta.double().T).square().sum(dim=0)  # [rows of delta]
    error = form(x).output_error(delta)
    assert error.shape == (7,)
    torch.testing.assert_close(error.double(), direct, rtol=1e-5, atol=0)


@FORMS
def test_diagonal_is_the_sum_of_squares_per_channel(form: Form) -> None:
    x = tokens(50)
    assert_near(form(x).diagonal(), x.double().square().sum(0))
    assert form(x).diagonal()[5] == 0
    assert form(x).in_features == IN


@FORMS
@pytest.mark.parametrize("size", [1, 8, IN])
def test_diagonal_blocks_equal_h_of_each_group(form: Form, size: int) -> None:
    x = tokens(50)
    h = x.double().T @ x.double()
    expected = torch.stack([h[i : i + size, i : i + size] for i in range(0, IN, size)])
    assert_near(form(x).diagonal_blocks(size), expected)


@FORMS
def test_rescaled_equals_h_of_the_divided_tokens(form: Form) -> None:
    x, factors = tokens(50), torch.rand(IN, generator=torch.Generator().manual_seed(2)) * 9 + 0.1
    before = full_matrix(form(x))
    gram = form(x)
    rescaled = gram.rescaled(factors)
    divided = x.double() / factors.double()
    assert_near(full_matrix(rescaled), divided.T @ divided)
    assert rescaled.tokens == 50 and torch.equal(full_matrix(gram), before)


@FORMS
def test_weighted_sum_of_parts(form: Form) -> None:
    parts, weights = [tokens(30, seed=1), tokens(9, seed=2), tokens(4, seed=3)], [0.5, 2.0, 3.25]
    grams = [form(part) for part in parts]
    total = weighted_sum(grams, weights)
    expected = sum(w * p.double().T @ p.double() for w, p in zip(weights, parts, strict=True))
    assert_near(full_matrix(total), expected)
    assert total.tokens == 43
    for gram, part in zip(grams, parts, strict=True):  # the parts are unchanged
        assert_near(full_matrix(gram), part.double().T @ part.double())


# --- GramBuilder ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_matrix_is_summed_over_samples_of_any_length(lengths: list[int], seed: int) -> None:
    parts = [tokens(length, seed=seed + i) for i, length in enumerate(lengths)]
    gram = build_gram(parts, None)
    x = torch.cat(parts).double()
    assert gram.tokens == len(x)
    assert ((gram.matrix - x.T @ x).abs() <= rounding_bound(x)).all()
    assert torch.equal(gram.matrix, gram.matrix.T)


@pytest.mark.parametrize("width", [gram_module._TILE - 1, 2 * gram_module._TILE, 2 * gram_module._TILE + 40])
def test_matrix_with_several_tiles_and_flushes(width: int) -> None:
    count = gram_module.FLUSH_TOKENS + 300
    x = normal(count, width)
    gram = build_gram(list(torch.split(x, 700)), None)
    assert_near(gram.matrix, x.double().T @ x.double())
    assert torch.equal(gram.matrix, gram.matrix.T)


def test_sample_order_changes_only_the_last_bits() -> None:
    parts = [tokens(30, seed=1), tokens(50, seed=2), tokens(8, seed=3)]
    first, second = (full_matrix(build_gram(order, None)) for order in (parts, parts[::-1]))
    assert ((first - second).abs() <= 2 * rounding_bound(torch.cat(parts))).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_tokens_that_fit_are_stored_unchanged(lengths: list[int], spare: int) -> None:
    parts = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    gram = build_gram(parts, sum(lengths) + spare)
    assert gram.tokens == sum(lengths)
    assert torch.equal(gram.factor[: sum(lengths)], torch.cat(parts))
    assert not gram.factor[sum(lengths) :].any()
    assert gram.kind == f"{gram.tokens} tokens"


def test_builder_does_not_change_the_tokens() -> None:
    x = tokens(40)
    before = x.clone()
    build_gram([x], None)
    build_gram([x], 40)
    assert torch.equal(x, before)


# --- on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [1, 7, IN, 100])
def test_matrix_on_disk_is_the_matrix(strip: int) -> None:
    """Whole tokens are small integers, so that float32 sums are exact in any order."""
    x = torch.randint(-9, 10, (60, IN), generator=torch.Generator().manual_seed(0)).float()
    builder = GramBuilder(IN, None, CPU, Spill(None, strip))
    for part in x.split(11):
        builder.add(part)
    gram = builder.finish()
    assert gram.tokens == 60 and gram.kind == "matrix of 60 tokens, on disk"
    assert torch.equal(full_matrix(gram), x.double().T @ x.double())
    assert torch.equal(gram.diagonal(), x.square().sum(0))


def test_file_on_disk_has_no_name_and_only_its_strips_are_in_memory(tmp_path: Path) -> None:
    size, strip = 3000, 64
    before = resident_bytes()
    builder = GramBuilder(size, None, CPU, Spill(tmp_path, strip))
    builder.add(normal(strip, size))
    gram = builder.finish()
    assert gram.diagonal().min() > 0
    assert not list(tmp_path.iterdir())
    assert resident_bytes() - before < 4 * size * size / 2  # H takes 36 MB


def resident_bytes() -> int:
    """Memory of the process that no file holds, without what the allocator keeps of freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def test_full_disk_is_an_error_before_anything_is_written() -> None:
    with pytest.raises(OSError):
        SpilledMatrix(1 << 24, Spill(None, 1), CPU)  # a petabyte


# --- choice of the form --------------------------------------------------------------------------------------

DOWN_7B = 18944  # inputs of the 7B model's down_proj


def test_matrix_per_modality_for_many_tokens_if_it_fits() -> None:
    for counts in ([3584, 0, 0, 0], [900, 800, 80, 20], [20_000, 9_000, 4_000, 50_000]):
        assert default_form(counts, 3584) == GramForm(None)


def test_tokens_are_stored_if_fewer_than_half_the_inputs() -> None:
    assert default_form([100, 0, 50, 3], 3584) == GramForm((100, 0, 50, 3))
    assert default_form([1791, 0, 0, 0], 3584) == GramForm((1791, 0, 0, 0))


def test_default_budget_keeps_h_exact_at_the_width_of_the_7b() -> None:
    assert default_form([30_000, 100, 40_000, 0], DOWN_7B) == GramForm(None, combined=True)
    assert default_form([5_000, 300, 4_000, 100], DOWN_7B) == GramForm((5_000, 300, 4_000, 100))
    assert default_form([5_000, 300, 4_000, 172], DOWN_7B) == GramForm(None, combined=True)  # half the inputs


def test_one_modality_needs_no_combined_matrix() -> None:
    assert default_form([30_000, 0, 0, 0], DOWN_7B) == GramForm(None)


def test_on_disk_if_no_matrix_fits() -> None:
    """Half of the budget is a strip, the other half the tokens to add. On disk are H and its factorization."""
    budget = 160 << 20
    form = choose_form([30_000, 100, 40_000, 0], DOWN_7B, 448 << 20, budget, combinable=True)
    assert form == GramForm(None, combined=True, strip=budget // (8 * DOWN_7B))
    assert budget - 8 * DOWN_7B < form.nbytes(DOWN_7B, 3) <= budget
    assert form.disk_bytes(DOWN_7B, 3) == 2 * 4 * DOWN_7B**2
    # Without the weights of the modalities: three matrices, their sum and its factorization.
    separate = choose_form([30_000, 100, 40_000, 0], DOWN_7B, 448 << 20, budget)
    assert separate == GramForm(None, strip=budget // (24 * DOWN_7B))
    assert separate.disk_bytes(DOWN_7B, 3) == 5 * 4 * DOWN_7B**2
    assert choose_form([50, 0, 0, 0], 300, 1, 4 * 300 * 50) == GramForm((50, 0, 0, 0))  # the tokens fit
    assert choose_form([50, 0, 0, 0], 300, 4 * 300**2, 1) == GramForm(None)  # only the matrix fits


@given(
    st.lists(st.integers(0, 10**5), min_size=4, max_size=4),
    st.sampled_from([64, 3584, 18944, 10**6, 10**8]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_form_fits_the_budget_and_includes_every_modality(counts: list[int], width: int, combinable: bool) -> None:
    form = choose_form(counts, width, DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, combinable=combinable)
    present = sum(1 for count in counts if count)
    if form.rows is not None:
        assert form.rows == tuple(counts) and form.nbytes(width, present) <= DEFAULT_BUDGET.factor
    elif form.strip is None:
        assert form.nbytes(width, present) <= DEFAULT_BUDGET.matrix
    else:
        assert 1 <= form.strip <= width
        assert form.nbytes(width, present) <= max(DEFAULT_BUDGET.factor, 8 * width * present)
    assert combinable or not form.combined
