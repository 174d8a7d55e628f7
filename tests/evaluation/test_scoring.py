"""Scores, drift and bootstrap intervals against figures computed by hand, definitions, and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.evaluation.bootstrap import RESAMPLES, Bootstrap
from msmodelslim_omni.evaluation.figures import Measurements, compute_fidelity, fidelity_by_modality
from msmodelslim_omni.evaluation.scoring import (
    LogitScorer,
    Scores,
    common_prefix_and_suffix,
    concatenate_scores,
    drift_figures,
    drift_sums,
    ordinary_drift,
    scored_positions,
)
from msmodelslim_omni.evaluation.stem_pair import Sample


def score(z: torch.Tensor, y: torch.Tensor, targets: list[int], block: int | None = None) -> Scores:
    scorer = LogitScorer(torch.tensor(targets))
    for first in range(0, z.shape[1], block or z.shape[1]):
        last = first + (block or z.shape[1])
        scorer.add(first, z[:, first:last], y[:, first:last])
    return scorer.finish()


# --- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_scores_of_three_tokens_by_hand(block: int) -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2. Shifted logits count the same."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    scores = score(p.double().log() + 7, q.double().log() - 100, [1], block)
    assert scores.kl.item() == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert scores.nll_float.item() == pytest.approx(math.log(4), rel=1e-12)
    assert scores.nll_quant.item() == pytest.approx(math.log(2), rel=1e-12)
    assert (scores.likeliest_float.item(), scores.likeliest_quant.item()) == (0, 1)
    assert scores.shared_top.item() == 1  # there are only three tokens


def test_shared_top_by_hand() -> None:
    """The top tokens are 9..5 and 7..3; 7, 6 and 5 are in both."""
    z = torch.arange(10.0)
    y = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 3, 4.0])
    assert score(z[None], y[None], [0]).shared_top.item() == pytest.approx(3 / 5)


def test_equal_logits_are_ordered_by_token() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    for block in (1, 2, 3, 4):
        assert score(z, z, [0], block).likeliest_float.item() == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4), vocabulary=st.integers(1, 40), block=st.integers(1, 45),
    scale=st.sampled_from([0.01, 1, 90]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_scores_of_any_blocks_agree_with_the_definition(
    rows: int, vocabulary: int, block: int, scale: float, seed: int
) -> None:
    """At scale 90, exp of the logits overflows float32, and probabilities underflow."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocabulary, generator=random) * scale
    y = z + torch.randn(rows, vocabulary, generator=random) * scale / 10
    targets = torch.randint(vocabulary, (rows,), generator=random)
    scores = score(z, y, targets.tolist(), block)
    p, q = z.double().log_softmax(1), y.double().log_softmax(1)
    torch.testing.assert_close(scores.kl, (p.exp() * (p - q)).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.nll_float, -p.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.nll_quant, -q.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    assert scores.likeliest_float.tolist() == z.argmax(1).tolist()
    assert scores.likeliest_quant.tolist() == y.argmax(1).tolist()
    k = min(5, vocabulary)
    tops = [set(row) for row in z.topk(k).indices.tolist()], [set(row) for row in y.topk(k).indices.tolist()]
    assert scores.shared_top.tolist() == [len(a & b) / k for a, b in zip(*tops, strict=True)]


def test_equal_logits_have_zero_divergence() -> None:
    z = torch.randn(7, 1000) * 10
    scores = score(z, z.clone(), [3] * 7, 64)
    assert scores.kl.tolist() == [0.0] * 7 and scores.shared_top.tolist() == [1.0] * 7
    assert torch.equal(scores.nll_float, scores.nll_quant)


# --- positions -----------------------------------------------------------------------------------------------

MODALITY = torch.tensor([0, 0, 1, 1, 0, 3, 0, 0], dtype=torch.int8)


@pytest.mark.parametrize(
    ("answer", "positions", "expected"),
    [
        (None, "auto", [0, 3, 5, 6]),  # each precedes a text token
        (None, "text", [0, 3, 5, 6]),
        (None, "answer", []),
        ((6, 8), "auto", [5, 6]),
        ((6, 8), "answer", [5, 6]),
        ((6, 8), "text", [0, 3, 5, 6]),
    ],
)
def test_scored_positions(answer: tuple[int, int] | None, positions: str, expected: list[int]) -> None:
    assert scored_positions(MODALITY, answer, positions).tolist() == expected


def test_template_tokens_do_not_count() -> None:
    assert scored_positions(MODALITY, None, "auto", (2, 1)).tolist() == [3, 5]
    assert scored_positions(MODALITY, None, "text", (2, 1)).tolist() == [0, 3, 5, 6]
    assert scored_positions(MODALITY, (6, 8), "auto", (2, 1)).tolist() == [5, 6]
    prompts = [torch.tensor(tokens) for tokens in ([1, 2, 3, 9, 5, 6], [1, 2, 4, 4, 5, 6], [1, 2, 7, 5, 6])]
    assert common_prefix_and_suffix(prompts) == (2, 2)
    assert common_prefix_and_suffix(prompts[:2]) == (2, 2)
    assert common_prefix_and_suffix(prompts[:1]) == common_prefix_and_suffix([]) == (0, 0)
    assert common_prefix_and_suffix([prompts[0], prompts[0]]) == (0, 0)  # no token would remain
    assert common_prefix_and_suffix([prompts[0], torch.tensor([1, 2, 5, 6])]) == (0, 0)


# --- drift ---------------------------------------------------------------------------------------------------


def test_drift_by_hand() -> None:
    float_states = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    quant_states = torch.tensor([[3.0, 5.0], [2.0, 0.0], [0.0, 0.0]])
    sums = drift_sums(float_states, quant_states, torch.tensor([0, 1, 1]), 3)
    assert sums[0].tolist() == pytest.approx([1, 25, 29 / (5 * math.sqrt(34)), 1, 1, 25, 0])
    # A right angle; two zero vectors have cosine 1. Beside a token of zeros, which is the median, any other is massive.
    assert sums[1].tolist() == pytest.approx([8, 4, 0 + 1, 2, 0, 0, 1])
    assert sums[2].tolist() == [0] * 7
    assert drift_figures(sums[0] + sums[1])[0] == pytest.approx(math.sqrt(9 / 29))
    assert drift_figures(sums[2]) == (0.0, 1.0)
    assert drift_figures(drift_sums(float_states[2:], quant_states[:1], torch.tensor([0]), 1)[0]) == (math.inf, 0.0)


def test_drift_of_ordinary_tokens_by_hand() -> None:
    # Lengths 3, 2, 30, 1000, 2: the median is 3, and only 1000 is more than ten times as long.
    float_states = torch.diag(torch.tensor([3.0, 2.0, 30.0, 1000.0, 2.0]))
    sums = drift_sums(float_states, float_states + torch.eye(5), torch.zeros(5), 1)[0]
    assert drift_figures(sums)[0] == pytest.approx(math.sqrt(5 / (917 + 1000**2)))
    assert ordinary_drift(sums) == (pytest.approx(math.sqrt(4 / 917)), 1)


def test_equal_states_have_exactly_zero_drift() -> None:
    states = torch.randn(50, 333) * 100
    assert drift_figures(drift_sums(states, states.clone(), torch.zeros(50), 1)[0]) == (0.0, 1.0)


# --- intervals -----------------------------------------------------------------------------------------------


def test_intervals_agree_with_resampling_in_a_loop() -> None:
    """Drawing samples one by one gives equal percentiles, within the precision of 1000 resamples."""
    random = np.random.default_rng(1)
    counts = random.integers(1, 50, 40).astype(float)
    sums = counts * random.gamma(2.0, 0.1, 40)
    interval = Bootstrap(40, 0).ratio(sums, counts)
    assert interval.value == pytest.approx(sums.sum() / counts.sum())
    drawn = []
    for _ in range(4000):
        chosen = random.integers(0, 40, 40)
        drawn.append(sums[chosen].sum() / counts[chosen].sum())
    width = np.percentile(drawn, 97.5) - np.percentile(drawn, 2.5)
    assert abs(interval.low - np.percentile(drawn, 2.5)) < 0.1 * width
    assert abs(interval.high - np.percentile(drawn, 97.5)) < 0.1 * width


def test_intervals_of_two_samples_by_hand() -> None:
    """A resample has one sample twice with probability 1/4 each, so the ends are the figures of the single samples."""
    interval = Bootstrap(2, 5).ratio(np.array([1.0, 6.0]), np.array([1.0, 2.0]))
    assert (interval.value, interval.low, interval.high) == (pytest.approx(7 / 3), 1.0, 3.0)


def test_one_sample_has_no_width_and_seeds_repeat() -> None:
    interval = Bootstrap(1, 0).ratio(np.array([3.0]), np.array([2.0]))
    assert (interval.value, interval.low, interval.high) == (1.5, 1.5, 1.5)
    values = np.arange(20.0), np.ones(20)
    assert Bootstrap(20, 3).ratio(*values) == Bootstrap(20, 3).ratio(*values) != Bootstrap(20, 4).ratio(*values)
    assert Bootstrap(20, 3)._counts.shape == (RESAMPLES, 20)


def test_samples_without_a_position_leave_the_interval_finite() -> None:
    # A quarter of the resamples draw the second sample alone.
    interval = Bootstrap(2, 0).ratio(np.array([0.5, 0.0]), np.array([2.0, 0.0]))
    assert (interval.value, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_exponentials_stay_finite() -> None:
    assert math.isfinite(Bootstrap(1, 0).ratio(np.array([1e6]), np.array([1.0]), exponential=True).high)


# --- figures -------------------------------------------------------------------------------------------------


def sample(modality: list[int], answer: tuple[int, int] | None = None) -> Sample:
    return Sample("here", torch.arange(len(modality)), torch.tensor(modality, dtype=torch.int8), answer)


def make_measurements() -> Measurements:
    """Three samples: text with an answer, an image with an answer, an image and audio without an answer."""

    def scores(kl: list[float], likeliest_float: list[int], likeliest_quant: list[int]) -> Scores:
        values: list[Any] = [torch.tensor(v, dtype=torch.float64) for v in (kl, kl, kl, [2 * k for k in kl])]
        return Scores(*values, torch.tensor(likeliest_float), torch.tensor(likeliest_quant))

    hidden = torch.zeros(3, 4, 7, dtype=torch.float64)
    hidden[:, 0, :4] = torch.tensor([1.0, 100.0, 1.0, 1])
    hidden[1, 1, :4] = torch.tensor([25.0, 100.0, 0.5, 1])
    return Measurements(
        samples=[sample([0] * 5, (3, 5)), sample([0, 1, 0, 0], (2, 4)), sample([0, 1, 2])],
        scores=concatenate_scores([scores([0.1, 0.2], [5, 6], [5, 0]), scores([0.3, 0.4, 1.0], [1, 2, 3], [1, 2, 0])]),
        sample=torch.tensor([0, 0, 1, 1, 2]),
        targets=torch.tensor([5, 6, 1, 2, 9]),
        in_answer=torch.tensor([True, True, True, True, False]),
        hidden=hidden,
        embedding=torch.tensor([[0.0, 1, 1, 1], [4, 16, 1, 1], [0, 0, 0, 0]], dtype=torch.float64),
    )


def test_fidelity_by_hand() -> None:
    fidelity = compute_fidelity(make_measurements(), range(3), None, 0)
    assert (fidelity.samples, fidelity.positions, fidelity.answered) == (3, 5, 2)
    assert fidelity.kl_mean.value == pytest.approx(2.0 / 5)
    assert fidelity.kl_p99 == pytest.approx(0.4 + 0.96 * 0.6)
    assert fidelity.top1.value == pytest.approx(3 / 5)
    assert fidelity.perplexity_quant.value == pytest.approx(math.exp(2 * fidelity.kl_mean.value))
    assert fidelity.exact_float is not None and fidelity.exact_quant is not None and fidelity.exact_change is not None
    assert (fidelity.exact_float.value, fidelity.exact_quant.value, fidelity.exact_change.value) == (1.0, 0.5, -0.5)
    assert fidelity.exact_change.low == -1.0 and fidelity.exact_change.high == 0.0  # paired: no resample improves
    assert fidelity.hidden_error == pytest.approx(math.sqrt(28 / 400))
    assert fidelity.hidden_cosine == pytest.approx(3.5 / 4)
    assert (fidelity.embedding_error, fidelity.embedding_cosine) == (pytest.approx(math.sqrt(4 / 17)), 1.0)


def test_fidelity_by_modality() -> None:
    fidelities = fidelity_by_modality(make_measurements(), 0)
    assert list(fidelities) == ["text", "image", "audio"]
    assert [(part.samples, part.positions, part.answered) for part in fidelities.values()] == [
        (1, 2, 1),
        (2, 3, 1),
        (1, 1, 0),
    ]
    assert fidelities["text"].kl_mean.value == pytest.approx(0.15)
    assert fidelities["image"].kl_mean.value == pytest.approx(1.7 / 3)
    assert fidelities["image"].hidden_error == pytest.approx(0.5)  # of the image tokens
    assert fidelities["audio"].hidden_error == 0.0 and fidelities["audio"].exact_float is None
    assert fidelities["text"].exact_change is not None and fidelities["text"].exact_change.value == -1.0
