"""GPTQ: the same integers as the published algorithm, and less output error, on unseen tokens too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from grams import FORMS, Form, as_factor, as_matrix, as_spilled
from ties import assert_rounded

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics.arithmetic import QuantizedLinear, dequantize, quantize_weight
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import gptq
from msmodelslim_omni.processors.gptq import (
    CholeskyFactor,
    NotFactorizable,
    factorize,
    relative_damping,
    round_in_order,
    split_into_parts,
)
from msmodelslim_omni.processors.rounding import (
    TOKENS_PER_INPUT,
    cholesky_for_gptq,
    has_enough_tokens,
    round_group,
)
from msmodelslim_omni.statistics.gram import Gram

ASYM = QuantScheme(4, None, "gptq", 32, symmetric=False)
SYM = replace(ASYM, symmetric=True)
MINMAX, MSE = replace(ASYM, weight_method="minmax"), replace(ASYM, weight_method="mse")
INT8 = QuantScheme(8, 8, "gptq")  # one scale per output channel
SCHEMES = pytest.mark.parametrize("scheme", [ASYM, SYM])
OUT, IN = 48, 320  # two and a half blocks of GPTQ
TIE = 1e-3  # in steps; float32 GPTQ differs from float64 by about 1e-5 steps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0, width: int = IN) -> torch.Tensor:
    """Realistic inputs of a Linear: mostly in a few directions, with channels of very different magnitude."""
    directions = normal(width // 8, width, seed=1000)
    size = normal(width, seed=1001).exp()
    return (normal(count, width // 8, seed=seed) @ directions + normal(count, width, seed=seed + 500)) * size


def output_error(x: torch.Tensor, weight: torch.Tensor, linear: QuantizedLinear) -> float:
    return float((x.double() @ (dequantize(linear).double() - weight.double()).T).square().sum())


def damped(x: torch.Tensor) -> torch.Tensor:
    h = x.double().T @ x.double()
    return h + relative_damping(*x.shape) * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def lower(cholesky: CholeskyFactor) -> torch.Tensor:
    """L in float64, assembled from the blocks of a CholeskyFactor."""
    size = len(cholesky.order)
    matrix = torch.zeros((size, size), dtype=torch.float64)
    first = 0
    for inner, below in zip(cholesky.inner, cholesky.below, strict=True):
        end = first + len(inner)
        matrix[first:end, first:end] = inner.double()
        under = below if cholesky.factor is None else cholesky.factor[:, end:].T @ below
        matrix[end:, first:end] = under.double()
        first = end
    return matrix


def test_damping_by_hand() -> None:
    assert relative_damping(100, 100) == 0.5
    assert relative_damping(2500, 100) == pytest.approx(0.1)  # 25 tokens per input
    assert relative_damping(25, 100) == 1.0 and relative_damping(1, 100) == 1.0
    assert relative_damping(10**6, 100) == 0.02


# --- the factorization ---------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("count", [200, 1000])
def test_factorize_gives_the_cholesky_factor(form: Form, count: int) -> None:
    x = tokens(count)
    cholesky = factorize(form(x))
    ordered = damped(x)[cholesky.order][:, cholesky.order]
    factor = lower(cholesky)
    assert torch.equal(factor, factor.tril())
    error = (factor @ factor.T - ordered).abs() / (ordered.diagonal()[:, None] * ordered.diagonal()).sqrt()
    assert error.max() < 1e-5
    energy = x.double().square().sum(0)[cholesky.order]
    assert (energy[1:] >= energy[:-1] * (1 - 1e-5)).all()  # the largest are last and are rounded first


@FORMS
def test_pivots_are_the_error_that_no_other_input_can_correct(form: Form) -> None:
    """L_ii^2 is the remaining error of input i if the inputs after it, which are rounded before it, are fixed."""
    x = tokens(700)
    cholesky = factorize(form(x))
    order, h = cholesky.order, damped(x)
    exact = torch.linalg.cholesky(h[order][:, order]).diagonal().square()
    torch.testing.assert_close(cholesky.pivots()[order].double(), exact, rtol=1e-3, atol=0)
    assert (cholesky.pivots() <= h.diagonal() * (1 + 1e-5)).all()


@SCHEMES
@FORMS
def test_output_error_is_the_sum_over_pivots(form: Form, scheme: QuantScheme) -> None:
    """The sum of L_ii^2 (w_i - t_i)^2, with w_i the nearest level to its target t_i."""
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    cholesky = factorize(form(x))
    quantized = round_in_order(weight, quantize_weight(weight, scheme), cholesky)
    delta = (dequantize(quantized).double() - weight.double())[:, cholesky.order]
    exact = torch.linalg.cholesky(damped(x)[cholesky.order][:, cholesky.order])
    missed = (delta @ exact) / exact.diagonal()  # level - target, [out, in] sorted by the order
    pivots = cholesky.pivots()[cholesky.order].double()
    true = ((delta @ damped(x)[cholesky.order][:, cholesky.order]) * delta).sum()
    assert float((pivots * missed.square()).sum()) == pytest.approx(float(true), rel=1e-3)
    steps = quantized.scales.repeat_interleave(32, dim=1)[:, cholesky.order]
    integers = quantized.qweight[:, cholesky.order]
    assert_rounded(integers, (integers - missed / steps).clamp(-8, 7), TIE)


@FORMS
def test_rescaled_is_the_factor_of_the_scaled_matrix(form: Form) -> None:
    """X / s has D^-1 (H + damping) D^-1: the damping is scaled too, and the order is unchanged."""
    x, factors = tokens(700), torch.rand(IN, generator=torch.Generator().manual_seed(3)) * 5 + 0.2
    cholesky = factorize(form(x))
    rescaled = cholesky.rescaled(factors)
    expected = (damped(x) / factors.double() / factors.double()[:, None])[cholesky.order][:, cholesky.order]
    factor = lower(rescaled)
    error = (factor @ factor.T - expected).abs() / (expected.diagonal()[:, None] * expected.diagonal()).sqrt()
    assert error.max() < 1e-5
    torch.testing.assert_close(rescaled.pivots(), cholesky.pivots() / factors.square(), rtol=1e-5, atol=0)
    assert torch.equal(lower(cholesky), lower(factorize(form(x))))  # unchanged


def test_rescaled_factor_rounds_like_the_scaled_matrix() -> None:
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    factors = torch.rand(IN, generator=torch.Generator().manual_seed(3)) + 0.5
    order = factorize(as_matrix(x)).order
    grid = quantize_weight(weight * factors, MINMAX)
    rounded = round_in_order(weight * factors, grid, factorize(as_matrix(x)).rescaled(factors))
    h = damped(x) / factors.double() / factors.double()[:, None]
    assert_published(rounded, weight * factors, h, order.flip(0))


# --- compared with the published algorithm -------------------------------------------------------------------


def assert_published(rounded: QuantizedLinear, weight: torch.Tensor, h: torch.Tensor, order: torch.Tensor) -> None:
    """The integers are those of GPTQ as published, in float64: the rounding error of each column over U_ii, with U the
    upper Cholesky factor of H^-1, is subtracted from the columns that follow.

    At a tie the other neighbor is valid too, and its error is the one that is subtracted: the columns that follow
    depend on the choice. h: damped. order: the inputs in rounding order.
    """
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, levels = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.float64)
    group_size = weight.shape[1] // rounded.scales.shape[1]
    for i, channel in enumerate(order.tolist()):
        s = rounded.scales[:, channel // group_size].double()
        z = 0.0 if rounded.zeros is None else rounded.zeros[:, channel // group_size].double()
        levels[:, channel] = (w[:, i] / s + z).clamp(-8, 7)
        error = (w[:, i] - (rounded.qweight[:, channel].double() - z) * s) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
    assert_rounded(rounded.qweight, levels, TIE)


@SCHEMES
@FORMS
@pytest.mark.parametrize("count", [100, 250, 320, 900])
def test_integers_match_the_published_algorithm(form: Form, scheme: QuantScheme, count: int) -> None:
    x, weight = tokens(count), normal(OUT, IN, seed=1)
    cholesky = factorize(form(x))
    grid = quantize_weight(weight, scheme)
    rounded = round_in_order(weight, grid, cholesky)
    assert_published(rounded, weight, damped(x), cholesky.order.flip(0))
    assert torch.equal(rounded.scales, grid.scales)
    assert scheme.symmetric or torch.equal(rounded.zeros, grid.zeros)


# --- output error --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [ASYM, SYM, INT8])
@FORMS
def test_gptq_beats_rounding_to_the_nearest(form: Form, scheme: QuantScheme) -> None:
    x, unseen, weight = tokens(2000), tokens(2000, seed=77), normal(OUT, IN, seed=1)
    grid = quantize_weight(weight, replace(scheme, weight_method="minmax"))
    rounded = round_in_order(weight, grid, factorize(form(x)))
    assert torch.equal(rounded.scales, grid.scales)
    low, high = scheme.weight_range
    assert low <= int(rounded.qweight.min()) and int(rounded.qweight.max()) <= high
    for inputs in (x, unseen):
        assert output_error(inputs, weight, rounded) < 0.6 * output_error(inputs, weight, grid)


def test_few_tokens_do_not_overfit() -> None:
    """The fewest tokens that GPTQ accepts also reduce the error on unseen tokens."""
    x, unseen, weight = tokens(round(TOKENS_PER_INPUT * IN)), tokens(2000, seed=77), normal(OUT, IN, seed=1)
    grid = quantize_weight(weight, MINMAX)
    rounded = round_in_order(weight, grid, factorize(as_factor(x)))
    assert output_error(unseen, weight, rounded) < 0.9 * output_error(unseen, weight, grid)


def levels_of(weight: torch.Tensor, grid: QuantizedLinear) -> torch.Tensor:
    """The weight in steps of an asymmetric grid, plus the zero points: its integers are the nearest to this."""
    grouped = weight.view(*grid.scales.shape, -1)
    return (grouped / grid.scales[..., None] + grid.zeros[..., None]).flatten(1).clamp(-8, 7)


@FORMS
def test_uncorrelated_inputs_are_rounded_to_the_nearest(form: Form) -> None:
    weight = normal(OUT, IN, seed=1)
    grid = quantize_weight(weight, MINMAX)
    x = torch.diag(normal(IN, seed=2).exp())
    assert_rounded(round_in_order(weight, grid, factorize(form(x))).qweight, levels_of(weight, grid), TIE)
    x = normal(20_000, IN, seed=3)
    rounded = round_in_order(weight, grid, factorize(as_matrix(x)))
    assert float((rounded.qweight == grid.qweight).double().mean()) > 0.9
    assert output_error(x, weight, rounded) == pytest.approx(output_error(x, weight, grid), rel=0.05)


# --- unusual inputs ------------------------------------------------------------------------------------------


@FORMS
def test_inputs_that_no_token_reached_are_rounded_to_the_nearest(form: Form) -> None:
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    dead = [0, 5, 127, 128, 319]
    x[:, dead] = 0.0
    grid = quantize_weight(weight, MINMAX)
    cholesky = factorize(form(x))
    rounded = round_in_order(weight, grid, cholesky)
    assert_rounded(rounded.qweight[:, dead], levels_of(weight, grid)[:, dead], TIE)
    assert torch.isfinite(cholesky.pivots()).all() and (cholesky.pivots() > 0).all()
    assert output_error(x, weight, rounded) < 0.6 * output_error(x, weight, grid)


@FORMS
def test_all_zero_inputs_are_rounded_to_the_nearest(form: Form) -> None:
    weight = normal(OUT, IN, seed=1)
    grid = quantize_weight(weight, MINMAX)
    cholesky = factorize(form(torch.zeros(400, IN)))
    assert_rounded(round_in_order(weight, grid, cholesky).qweight, levels_of(weight, grid), TIE)


@FORMS
def test_inputs_of_rank_one(form: Form) -> None:
    """All tokens have the same direction, so that H has rank one plus the damping."""
    x = normal(400, 1, seed=5) * normal(1, IN, seed=6)
    weight = normal(OUT, IN, seed=1)
    grid = quantize_weight(weight, MINMAX)
    rounded = round_in_order(weight, grid, factorize(form(x)))
    assert output_error(x, weight, rounded) < 0.1 * output_error(x, weight, grid)


@FORMS
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_a_few_very_large_activations(form: Form, size: float) -> None:
    """One token is `size` times larger in a few channels, like the first token in real models."""
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    x[0, [7, 90, 200]] += size * x.abs().mean()
    grid = quantize_weight(weight, MINMAX)
    rounded = round_in_order(weight, grid, factorize(form(x)))
    assert output_error(x, weight, rounded) < 0.6 * output_error(x, weight, grid)


@FORMS
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_integers_do_not_depend_on_the_unit_of_the_inputs(form: Form, size: float) -> None:
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    power = 2.0 ** round(math.log2(size))  # scales every step of the factorization exactly
    grid = quantize_weight(weight, MINMAX)
    rounded = round_in_order(weight, grid, factorize(form(x * power)))
    if size > 1:
        assert torch.equal(rounded.qweight, round_in_order(weight, grid, factorize(form(x))).qweight)
    assert output_error(x, weight, rounded) <= output_error(x, weight, grid)


@FORMS
def test_h_beyond_float32_falls_back_to_the_clip_search(form: Form) -> None:
    gram, weight = form(tokens(700) * 1e19), normal(OUT, IN, seed=1)
    with pytest.raises(NotFactorizable, match="H exceeds float32"):
        factorize(gram)
    assert cholesky_for_gptq({"a": ASYM}, gram) is None
    rounded = round_group([("a", weight)], {"a": ASYM}, gram, None)["a"]
    assert torch.equal(rounded.qweight, quantize_weight(weight, MSE).qweight)


def test_indefinite_h_is_not_factorized() -> None:
    h = torch.ones(IN, IN)
    h[0, 1:] = h[1:, 0] = -1e6  # an eigenvalue of -2e7, beyond any damping; H of real tokens has none
    with pytest.raises(NotFactorizable, match="not positive definite"):
        factorize(Gram(h, None, 700))


def test_each_part_is_rounded_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_PART", 32 * 500)
    x, weight = tokens(80, width=32), normal(540, 32, seed=1)
    assert [(rows.start, rows.stop) for rows in split_into_parts(weight)] == [(0, 270), (270, 540)]
    gram = as_matrix(x)
    cholesky = factorize(gram)
    in_parts = round_group([("a", weight)], {"a": ASYM}, gram, cholesky)["a"]
    assert_published(in_parts, weight, damped(x), cholesky.order.flip(0))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2048, 11008), [1024] * 2),
        ((3584, 3584), [3584]),
        ((18944, 3584), [9472] * 2),
        ((29568, 8192), [4928] * 6),
        ((5, 1), [5]),
    ],
)
def test_sizes_of_parts(shape: tuple[int, int], sizes: list[int]) -> None:
    weight = torch.empty(1).expand(shape)  # takes no memory
    assert [len(range(shape[0])[rows]) for rows in split_into_parts(weight)] == sizes


def test_rounding_is_deterministic_and_does_not_change_its_inputs() -> None:
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    for form in (as_matrix, as_factor, as_spilled):
        gram, grid, before = form(x), quantize_weight(weight, ASYM), weight.clone()
        kept = stored(gram).clone()
        first = round_in_order(weight, grid, factorize(gram))
        assert torch.equal(first.qweight, round_in_order(weight, grid, factorize(gram)).qweight)
        assert torch.equal(weight, before)
        assert torch.equal(stored(gram), kept)


def stored(gram: Gram) -> torch.Tensor:
    """H or its factor, as it is stored."""
    if gram.spilled is not None:
        return gram.spilled.read(slice(None))
    return gram.matrix if gram.matrix is not None else gram.factor


# --- rounding a group of Linears -----------------------------------------------------------------------------


def test_gptq_needs_enough_tokens() -> None:
    minimum = round(TOKENS_PER_INPUT * IN)
    assert has_enough_tokens(as_factor(tokens(minimum))) and not has_enough_tokens(as_factor(tokens(minimum - 1)))
    gram = as_factor(tokens(minimum - 1))
    assert cholesky_for_gptq({"a": ASYM}, gram) is None
    assert cholesky_for_gptq({"a": MINMAX}, as_factor(tokens(minimum))) is None
    assert cholesky_for_gptq({"a": ASYM}, None) is None
    assert cholesky_for_gptq({"a": MINMAX, "b": ASYM}, as_factor(tokens(minimum))) is not None


def test_each_linear_is_rounded_by_its_own_method() -> None:
    x = tokens(700)
    weights = {name: normal(OUT, IN, seed=i) for i, name in enumerate(("plain", "clipped", "gptq"))}
    schemes = {"plain": MINMAX, "clipped": MSE, "gptq": ASYM}
    gram = as_matrix(x)
    cholesky = factorize(gram)
    quantized = round_group(weights.items(), schemes, gram, cholesky)
    pivots = cholesky.pivots().view(-1, 32)
    assert torch.equal(quantized["plain"].qweight, quantize_weight(weights["plain"], MINMAX).qweight)
    assert torch.equal(quantized["clipped"].qweight, quantize_weight(weights["clipped"], MSE, pivots).qweight)
    grid = quantize_weight(weights["gptq"], ASYM, pivots)
    assert torch.equal(quantized["gptq"].scales, grid.scales)
    assert torch.equal(quantized["gptq"].qweight, round_in_order(weights["gptq"], grid, cholesky).qweight)


def test_clip_search_minimizes_the_output_error_if_h_is_known() -> None:
    """A clip search with the blocks of H gives less output error than a search on the weight only."""
    x, weight = tokens(700), normal(OUT, IN, seed=1)
    by_weight = round_group([("a", weight)], {"a": MSE}, None, None)["a"]
    by_output = round_group([("a", weight)], {"a": MSE}, as_matrix(x), None)["a"]
    assert torch.equal(by_weight.qweight, quantize_weight(weight, MSE).qweight)
    blocks = as_matrix(x).diagonal_blocks(32)
    assert torch.equal(by_output.qweight, quantize_weight(weight, MSE, blocks).qweight)
    assert output_error(x, weight, by_output) < output_error(x, weight, by_weight)


def test_error_names_the_linear() -> None:
    weight = normal(OUT, IN)
    weight[3, 4] = torch.nan
    with pytest.raises(QuantError, match=r"mlp\.up_proj\.weight: the weight holds NaN or Inf"):
        round_group([("mlp.up_proj", weight)], {"mlp.up_proj": MSE}, None, None)
