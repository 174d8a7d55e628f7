"""H of the tokens: every question to it against the tokens themselves, in whatever form it is held."""

from __future__ import annotations

from collections.abc import Sequence

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
    weighted_sum,
    sketch_rows,
)

IN = 24
CPU = torch.device("cpu")


def rows_of(counts: Sequence[int], in_features: int) -> list[int] | None:
    return sketch_rows(counts, in_features, DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, width: int = IN, seed: int = 0) -> torch.Tensor:
    """Correlated, with one channel far larger than the others and one that is always zero."""
    x = normal(count, width, seed=seed) @ normal(width, width, seed=1000) + 0.5
    x[:, 3] *= 40
    x[:, 5] = 0.0
    return x


def close(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    """To `rel` of the largest entry."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= rel * float(expected.abs().max())


def built(parts: list[torch.Tensor], rows: int | None, seed: int = 0) -> Gram:
    builder = GramBuilder(parts[0].shape[1], rows, CPU, seed)
    for part in parts:
        builder.add(part)
    return builder.finish()


def quadratic(gram: Gram) -> torch.Tensor:
    """H itself, whatever holds it."""
    return gram.matrix.double() if gram.matrix is not None else gram.factor.double().T @ gram.factor.double()


# --- questions to H ------------------------------------------------------------------------------------------


@FORMS
def test_output_error_is_that_of_the_outputs(form: Form) -> None:
    x, delta = tokens(50), 0.1 * normal(7, IN, seed=1)
    direct = (x.double() @ delta.double().T).square().sum(dim=0)  # [rows of delta]
    found = form(x).output_error(delta)
    assert found.shape == (7,)
    torch.testing.assert_close(found.double(), direct, rtol=1e-5, atol=0)


@FORMS
def test_diagonal_is_the_channels_energy(form: Form) -> None:
    x = tokens(50)
    close(form(x).diagonal(), x.double().square().sum(0))
    assert form(x).diagonal()[5] == 0
    assert form(x).in_features == IN


@FORMS
@pytest.mark.parametrize("size", [1, 8, IN])
def test_diagonal_blocks_are_those_of_the_groups(form: Form, size: int) -> None:
    x = tokens(50)
    h = x.double().T @ x.double()
    expected = torch.stack([h[i : i + size, i : i + size] for i in range(0, IN, size)])
    close(form(x).diagonal_blocks(size), expected)


@FORMS
def test_rescaled_is_of_the_divided_tokens(form: Form) -> None:
    x, factors = tokens(50), torch.rand(IN, generator=torch.Generator().manual_seed(2)) * 9 + 0.1
    before = quadratic(form(x))
    gram = form(x)
    rescaled = gram.rescaled(factors)
    divided = x.double() / factors.double()
    close(quadratic(rescaled), divided.T @ divided)
    assert rescaled.tokens == 50 and torch.equal(quadratic(gram), before)


@FORMS
def test_combined_weighs_each_part(form: Form) -> None:
    parts, weights = [tokens(30, seed=1), tokens(9, seed=2), tokens(4, seed=3)], [0.5, 2.0, 3.25]
    grams = [form(part) for part in parts]
    whole = weighted_sum(grams, weights)
    expected = sum(w * p.double().T @ p.double() for w, p in zip(weights, parts, strict=True))
    close(quadratic(whole), expected)
    assert whole.tokens == 43
    for gram, part in zip(grams, parts, strict=True):  # what is weighted_sum stays as it was
        close(quadratic(gram), part.double().T @ part.double())


def test_combined_error_is_that_of_the_worst_part() -> None:
    parts = [Gram(None, tokens(5), 5), Gram(None, tokens(5), 50, error=0.25)]
    assert weighted_sum(parts, [1.0, 1.0]).error == 0.25


# --- adding up -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_matrix_is_the_sum_over_samples_of_any_length(lengths: list[int], seed: int) -> None:
    parts = [tokens(length, seed=seed + i) for i, length in enumerate(lengths)]
    gram = built(parts, None)
    x = torch.cat(parts).double()
    assert gram.tokens == len(x) and gram.error == 0.0
    close(gram.matrix, x.T @ x, rel=1e-6)
    assert torch.equal(gram.matrix, gram.matrix.T)


@pytest.mark.parametrize("width", [gram_module._TILE - 1, 2 * gram_module._TILE, 2 * gram_module._TILE + 40])
def test_matrix_of_several_tiles_and_flushes(width: int) -> None:
    count = gram_module._FLUSH_ROWS + 300
    x = normal(count, width)
    gram = built(list(torch.split(x, 700)), None)
    close(gram.matrix, x.double().T @ x.double())
    assert torch.equal(gram.matrix, gram.matrix.T)


def test_order_of_the_samples_matters_only_to_the_last_bits() -> None:
    parts = [tokens(30, seed=1), tokens(50, seed=2), tokens(8, seed=3)]
    close(built(parts, None).matrix, quadratic(built(parts[::-1], None)), rel=1e-6)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_tokens_that_fit_are_kept_as_they_are(lengths: list[int], spare: int) -> None:
    parts = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    gram = built(parts, sum(lengths) + spare)
    assert gram.error == 0.0 and gram.tokens == sum(lengths)
    assert torch.equal(gram.factor[: sum(lengths)], torch.cat(parts))
    assert not gram.factor[sum(lengths) :].any()
    assert f"{gram.tokens} tokens" in gram.kind and "sketch" not in gram.kind


def test_building_does_not_change_the_tokens() -> None:
    x = tokens(40)
    before = x.clone()
    built([x], None)
    built([x], 7)
    assert torch.equal(x, before)


# --- the sketch ----------------------------------------------------------------------------------------------


def test_sketch_by_hand() -> None:
    """Three rows, seven tokens: token t is in row t mod 3 with a sign; the first three keep theirs."""
    x = torch.eye(7)
    gram = built([x[:2], x[2:6], x[6:]], 3)
    assert gram.factor.abs().tolist() == [[1, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0]]
    assert (gram.factor[:, :3] == torch.eye(3)).all()
    assert gram.tokens == 7


def test_sketch_is_near_and_says_how_near() -> None:
    """4000 tokens in 1000 rows: quadratic forms are right to some percent, and more rows are nearer."""
    x = tokens(4000)
    delta = normal(60, IN, seed=9)
    direct = (x.double() @ delta.double().T).square().sum(0)
    spread = []
    for rows in (250, 1000, 3999):
        gram = built(list(torch.split(x, 333)), rows)
        found = gram.output_error(delta).double()
        spread.append(float(((found - direct) / direct).square().mean().sqrt()))
        true = x.double().square().sum(0)
        assert gram.error == pytest.approx(float((gram.diagonal().double() - true).norm() / true.norm()), abs=1e-6)
        assert f"sketch of 4000 tokens in {rows} rows, error of its diagonal {gram.error:.1%}" in gram.kind
    assert spread[1] < 0.2 and spread[2] < spread[1] < spread[0]


def test_sketch_is_right_on_average() -> None:
    x = tokens(300)
    h = x.double().T @ x.double()
    found = [quadratic(built([x], 100, seed)) for seed in range(200)]
    mean = torch.stack(found).mean(0)
    one = float((found[0] - h).norm() / h.norm())
    assert float((mean - h).norm() / h.norm()) < 0.25 * one


def test_sketch_is_the_same_each_time_and_however_samples_are_cut() -> None:
    x = tokens(500)
    once, again = built(list(torch.split(x, 77)), 64), built(list(torch.split(x, 77)), 64)
    assert torch.equal(once.factor, again.factor) and once.error == again.error
    torch.testing.assert_close(once.factor, built([x], 64).factor)
    assert not torch.equal(once.factor, built([x], 64, seed=1).factor)


# --- which form ----------------------------------------------------------------------------------------------


def test_a_matrix_where_tokens_are_many_and_it_fits() -> None:
    assert rows_of([3584, 0, 0, 0], 3584) is None
    assert rows_of([900, 800, 80, 20], 3584) is None
    assert rows_of([20_000, 9_000, 4_000, 50_000], 3584) is None


def test_tokens_where_they_are_fewer_than_half_the_inputs() -> None:
    assert rows_of([100, 0, 50, 3], 3584) == [100, 0, 50, 3]
    assert rows_of([1791, 0, 0, 0], 3584) == [1791, 0, 0, 0]


def test_tokens_or_a_sketch_where_no_matrix_fits() -> None:
    width = 18944
    assert 4 * width**2 > DEFAULT_BUDGET.matrix
    room = DEFAULT_BUDGET.factor // (4 * width)
    assert rows_of([500, 300, 0, 0], width) == [500, 300, 0, 0]
    rows = rows_of([30_000, 100, 40_000, 0], width)
    assert rows is not None
    # The few are exact; what is left is shared by the others.
    assert rows[1] == 100 and rows[3] == 0
    assert abs(rows[0] - rows[2]) <= 1
    assert room - 2 <= sum(rows) <= room


@given(st.lists(st.integers(0, 10**5), min_size=4, max_size=4), st.sampled_from([64, 3584, 18944, 10**6, 10**8]))
@settings(max_examples=200, deadline=None)
def test_rows_fit_and_leave_no_modality_out(counts: list[int], width: int) -> None:
    rows = rows_of(counts, width)
    if rows is None:
        assert 2 * sum(counts) >= width and 4 * width**2 <= DEFAULT_BUDGET.matrix
        return
    assert all((row > 0) == (count > 0) and row <= count for row, count in zip(rows, counts, strict=True))
    present = sum(1 for count in counts if count)
    assert 4 * width * sum(rows) <= max(DEFAULT_BUDGET.factor, 4 * width * present)
    if 4 * width * sum(counts) <= DEFAULT_BUDGET.factor:
        assert rows == counts
