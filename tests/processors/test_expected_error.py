"""The expected rounding error: by hand, against measured errors, and its minimum."""

from __future__ import annotations

import pytest
import torch

from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_weight, quantized_matmul
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors.expected_error import ExpectedErrors, refine
from msmodelslim_omni.statistics.capture import input_stats

W8A8 = QuantScheme(8, 8)
INT4 = QuantScheme(4, None, "minmax", 32, symmetric=False)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_w8a8_by_hand() -> None:
    # One token x = (6, 8), one output row w = (1, 2): y = 22. Factors (2, 1): x / s = (3, 8), w * s = (2, 2).
    # Rounding of the token: 8² * (2² + 2²) = 512; of the weight: (3² + 8²) * 2² = 292. Sum 804.
    # Without factors: 8² * (1 + 4) = 320; (36 + 64) * 2² = 400. Sum 720.
    x = torch.tensor([[6.0, 8.0]])
    stats = input_stats(x, torch.zeros(1, dtype=torch.int8), torch.arange(1))
    errors = ExpectedErrors.of_tokens([(stats, [torch.tensor([[1.0, 2.0]])])], W8A8)
    assert errors.ratios(torch.tensor([2.0, 1.0])).tolist() == pytest.approx([804 / 720])
    assert float(errors.worst_ratio(torch.tensor([2.0, 1.0]))) == pytest.approx((804 / 720) ** 0.5)
    assert float(errors.worst_ratio(torch.ones(2))) == 1.0


def test_asymmetric_groups_by_hand() -> None:
    # Two groups of two inputs with importance (1, 4), (9, 16); one row (-1, 2), (3, 1). Half ranges 1.5 and 1.5.
    # Plain: 1.5² * (1 + 4) + 1.5² * (9 + 16) = 67.5. With factors (1, 1, 1, 2) the second group has the row (3, 2) and
    # the importance (9, 4): 11.25 + 29.25.
    scheme = QuantScheme(4, None, "minmax", 2, symmetric=False)
    importance, weight = torch.tensor([1.0, 4.0, 9.0, 16.0]), torch.tensor([[-1.0, 2.0, 3.0, 1.0]])
    errors = ExpectedErrors.of_importance(importance, [weight], torch.tensor([1.0]), scheme)
    assert errors.ratios(torch.tensor([1.0, 1.0, 1.0, 2.0])).tolist() == pytest.approx([40.5 / 67.5])


def test_expected_error_is_near_the_measured_one() -> None:
    x, weight = normal(400, 96, seed=1), normal(64, 96, seed=2)
    x[:, 5] *= 20
    factors = torch.ones(96)
    factors[5] = 12.0
    stats = input_stats(x, torch.zeros(400, dtype=torch.int8), torch.arange(400))
    errors = ExpectedErrors.of_tokens([(stats, [weight])], W8A8)

    def measured(s: torch.Tensor) -> float:
        exact = x @ weight.T
        error = quantized_matmul(x / s, quantize_weight(weight * s, W8A8)) - exact
        return float((error.square().sum(1) / exact.norm(dim=1)).sum())

    assert float(errors.worst_ratio(factors)) ** 2 == pytest.approx(
        measured(factors) / measured(torch.ones(96)), rel=0.1
    )


def test_refined_factors_have_less_error_of_rounding() -> None:
    x, weight = normal(300, 96, seed=3), normal(64, 96, seed=4)
    x[:, :4] *= torch.tensor([30.0, 15.0, 8.0, 4.0])
    importance = x.square().sum(dim=0)
    errors = ExpectedErrors.of_importance(importance, [weight], torch.tensor([1.0]), INT4)
    factors = refine(errors, torch.ones(96), lambda s: s)
    assert torch.equal(factors, refine(errors, torch.ones(96), lambda s: s))  # repeatable

    def measured(s: torch.Tensor) -> float:
        change = dequantize(quantize_weight(weight * s, INT4)) / s - weight
        return float((change.square() @ importance).sum())

    assert measured(factors) < 0.7 * measured(torch.ones(96))
    assert float(errors.worst_ratio(factors)) ** 2 == pytest.approx(
        measured(factors) / measured(torch.ones(96)), rel=0.2
    )


def test_modalities_are_separate_and_the_worst_one_counts() -> None:
    x, weight = normal(60, 32, seed=5), normal(16, 32, seed=6)
    x[30:, 0] *= 50
    modality = torch.zeros(60, dtype=torch.int8)
    modality[30:] = 1
    errors = ExpectedErrors.of_tokens([(input_stats(x, modality, torch.arange(60)), [weight])], W8A8)
    factors = torch.ones(32)
    factors[0] = 4.0
    without, with_outlier = errors.ratios(factors).tolist()
    assert with_outlier < 1 < without
    assert float(errors.worst_ratio(factors)) == pytest.approx(without**0.5)
    refined = errors.ratios(refine(errors, torch.ones(32), lambda s: s))
    assert float(refined.square().sum()) < 2.0
