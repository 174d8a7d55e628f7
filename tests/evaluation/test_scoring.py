"""Scores of two models' logits, drift and intervals: against hand-made figures, definitions, and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.evaluation.bootstrap import RESAMPLES, Bootstrap
from msmodelslim_omni.evaluation.figures import Measured, by_modality, fidelity
from msmodelslim_omni.evaluation.scoring import (
    LogitScorer,
    Scores,
    drift,
    drift_figures,
    frame,
    joined,
    scored_positions,
)
from msmodelslim_omni.evaluation.side_by_side import Sample


def score(z: torch.Tensor, y: torch.Tensor, targets: list[int], block: int | None = None) -> Scores:
    scorer = LogitScorer(torch.tensor(targets))
    for first in range(0, z.shape[1], block or z.shape[1]):
        last = first + (block or z.shape[1])
        scorer.add(first, z[:, first:last], y[:, first:last])
    return scorer.finish()


# --- one position by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
def test_three_tokens_by_hand(block: int) -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2. Logits may be shifted at will."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = score(p.double().log() + 7, q.double().log() - 100, [1], block)
    assert found.kl.item() == pytest.approx(0.25 * math.log(2), rel=1e-12)
    assert found.nll_float.item() == pytest.approx(math.log(4), rel=1e-12)
    assert found.nll_quant.item() == pytest.approx(math.log(2), rel=1e-12)
    assert (found.likeliest_float.item(), found.likeliest_quant.item()) == (0, 1)
    assert found.shared_top.item() == 1  # there are but three tokens


def test_shared_top_by_hand() -> None:
    """Tops are 9..5 and 7..3: 7, 6 and 5 are in both."""
    z = torch.arange(10.0)
    y = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 3, 4.0])
    assert score(z[None], y[None], [0]).shared_top.item() == pytest.approx(3 / 5)


def test_of_equal_logits_the_lower_token_is_first() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    for block in (1, 2, 3, 4):
        assert score(z, z, [0], block).likeliest_float.item() == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4), vocabulary=st.integers(1, 40), block=st.integers(1, 45),
    scale=st.sampled_from([0.01, 1, 90]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_any_blocks_agree_with_the_definition(rows: int, vocabulary: int, block: int, scale: float, seed: int) -> None:
    """Scale 90: exp of such logits would overflow float32, and probabilities underflow."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocabulary, generator=random) * scale
    y = z + torch.randn(rows, vocabulary, generator=random) * scale / 10
    targets = torch.randint(vocabulary, (rows,), generator=random)
    found = score(z, y, targets.tolist(), block)
    p, q = z.double().log_softmax(1), y.double().log_softmax(1)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.nll_float, -p.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.nll_quant, -q.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    assert found.likeliest_float.tolist() == z.argmax(1).tolist()
    assert found.likeliest_quant.tolist() == y.argmax(1).tolist()
    k = min(5, vocabulary)
    tops = [set(row) for row in z.topk(k).indices.tolist()], [set(row) for row in y.topk(k).indices.tolist()]
    assert found.shared_top.tolist() == [len(a & b) / k for a, b in zip(*tops, strict=True)]


def test_a_model_against_itself() -> None:
    z = torch.randn(7, 1000) * 10
    found = score(z, z.clone(), [3] * 7, 64)
    assert found.kl.tolist() == [0.0] * 7 and found.shared_top.tolist() == [1.0] * 7
    assert torch.equal(found.nll_float, found.nll_quant)


# --- positions -----------------------------------------------------------------------------------------------

MODALITY = torch.tensor([0, 0, 1, 1, 0, 3, 0, 0], dtype=torch.int8)


@pytest.mark.parametrize(
    ("answer", "positions", "expected"),
    [
        (None, "auto", [0, 3, 5, 6]),  # each before a token of text
        (None, "text", [0, 3, 5, 6]),
        (None, "answer", []),
        ((6, 8), "auto", [5, 6]),
        ((6, 8), "answer", [5, 6]),
        ((6, 8), "text", [0, 3, 5, 6]),
    ],
)
def test_scored_positions(answer: tuple[int, int] | None, positions: str, expected: list[int]) -> None:
    assert scored_positions(MODALITY, answer, positions).tolist() == expected


def test_what_the_template_puts_around_a_prompt_does_not_count() -> None:
    assert scored_positions(MODALITY, None, "auto", (2, 1)).tolist() == [3, 5]
    assert scored_positions(MODALITY, None, "text", (2, 1)).tolist() == [0, 3, 5, 6]
    assert scored_positions(MODALITY, (6, 8), "auto", (2, 1)).tolist() == [5, 6]
    prompts = [torch.tensor(tokens) for tokens in ([1, 2, 3, 9, 5, 6], [1, 2, 4, 4, 5, 6], [1, 2, 7, 5, 6])]
    assert frame(prompts) == (2, 2)
    assert frame(prompts[:2]) == (2, 2)
    assert frame(prompts[:1]) == frame([]) == (0, 0)
    assert frame([prompts[0], prompts[0]]) == (0, 0)  # nothing would be left
    assert frame([prompts[0], torch.tensor([1, 2, 5, 6])]) == (0, 0)


# --- drift ---------------------------------------------------------------------------------------------------


def test_drift_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, 5.0], [2.0, 0.0], [0.0, 0.0]])
    sums = drift(exact, other, torch.tensor([0, 1, 1]), 3)
    assert sums[0].tolist() == pytest.approx([1, 25, 29 / (5 * math.sqrt(34)), 1])
    assert sums[1].tolist() == pytest.approx([8, 4, 0 + 1, 2])  # right angle; two zero vectors are alike
    assert sums[2].tolist() == [0, 0, 0, 0]
    assert drift_figures(sums[0] + sums[1])[0] == pytest.approx(math.sqrt(9 / 29))
    assert drift_figures(sums[2]) == (0.0, 1.0)
    assert drift_figures(drift(exact[2:], other[:1], torch.tensor([0]), 1)[0]) == (math.inf, 0.0)


def test_no_drift_is_exactly_none() -> None:
    states = torch.randn(50, 333) * 100
    assert drift_figures(drift(states, states.clone(), torch.zeros(50), 1)[0]) == (0.0, 1.0)


# --- intervals -----------------------------------------------------------------------------------------------


def test_intervals_against_resampling_by_loop() -> None:
    """The same percentiles, to the precision of 1000 resamples, as drawing samples one by one, in another order."""
    random = np.random.default_rng(1)
    counts = random.integers(1, 50, 40).astype(float)
    sums = counts * random.gamma(2.0, 0.1, 40)
    found = Bootstrap(40, 0).ratio(sums, counts)
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    drawn = []
    for _ in range(4000):
        chosen = random.integers(0, 40, 40)
        drawn.append(sums[chosen].sum() / counts[chosen].sum())
    width = np.percentile(drawn, 97.5) - np.percentile(drawn, 2.5)
    assert abs(found.low - np.percentile(drawn, 2.5)) < 0.1 * width
    assert abs(found.high - np.percentile(drawn, 97.5)) < 0.1 * width


def test_intervals_of_two_samples_by_hand() -> None:
    """Both once with probability 1/2, either one twice with 1/4: the ends are the two samples' own figures."""
    found = Bootstrap(2, 5).ratio(np.array([1.0, 6.0]), np.array([1.0, 2.0]))
    assert (found.value, found.low, found.high) == (pytest.approx(7 / 3), 1.0, 3.0)


def test_one_sample_has_no_width_and_seeds_repeat() -> None:
    alone = Bootstrap(1, 0).ratio(np.array([3.0]), np.array([2.0]))
    assert (alone.value, alone.low, alone.high) == (1.5, 1.5, 1.5)
    values = np.arange(20.0), np.ones(20)
    assert Bootstrap(20, 3).ratio(*values) == Bootstrap(20, 3).ratio(*values) != Bootstrap(20, 4).ratio(*values)
    assert Bootstrap(20, 3)._times.shape == (RESAMPLES, 20)


def test_exponentials_end_where_float64_does() -> None:
    assert math.isfinite(Bootstrap(1, 0).ratio(np.array([1e6]), np.array([1.0]), exponential=True).high)


# --- figures -------------------------------------------------------------------------------------------------


def sample(modality: list[int], answer: tuple[int, int] | None = None) -> Sample:
    return Sample("here", torch.arange(len(modality)), torch.tensor(modality, dtype=torch.int8), answer)


def measured() -> Measured:
    """Three samples: text answered, an image answered, an image with sound without answer."""

    def scores(kl: list[float], likeliest_float: list[int], likeliest_quant: list[int]) -> Scores:
        values: list[Any] = [torch.tensor(v, dtype=torch.float64) for v in (kl, kl, kl, [2 * k for k in kl])]
        return Scores(*values, torch.tensor(likeliest_float), torch.tensor(likeliest_quant))

    hidden = torch.zeros(3, 4, 4, dtype=torch.float64)
    hidden[:, 0] = torch.tensor([1.0, 100.0, 1.0, 1])
    hidden[1, 1] = torch.tensor([25.0, 100.0, 0.5, 1])
    return Measured(
        samples=[sample([0] * 5, (3, 5)), sample([0, 1, 0, 0], (2, 4)), sample([0, 1, 2])],
        scores=joined([scores([0.1, 0.2], [5, 6], [5, 0]), scores([0.3, 0.4, 1.0], [1, 2, 3], [1, 2, 0])]),
        sample=torch.tensor([0, 0, 1, 1, 2]),
        targets=torch.tensor([5, 6, 1, 2, 9]),
        in_answer=torch.tensor([True, True, True, True, False]),
        hidden=hidden,
        embedding=torch.tensor([[0.0, 1, 1, 1], [4, 16, 1, 1], [0, 0, 0, 0]], dtype=torch.float64),
    )


def test_figures_by_hand() -> None:
    found = fidelity(measured(), range(3), None, 0)
    assert (found.samples, found.positions, found.answered) == (3, 5, 2)
    assert found.kl_mean.value == pytest.approx(2.0 / 5)
    assert found.kl_p99 == pytest.approx(0.4 + 0.96 * 0.6)
    assert found.top1.value == pytest.approx(3 / 5)
    assert found.perplexity_quant.value == pytest.approx(math.exp(2 * found.kl_mean.value))
    assert found.exact_float is not None and found.exact_quant is not None and found.exact_change is not None
    assert (found.exact_float.value, found.exact_quant.value, found.exact_change.value) == (1.0, 0.5, -0.5)
    assert found.exact_change.low == -1.0 and found.exact_change.high == 0.0  # paired: no resample gains
    assert found.hidden_error == pytest.approx(math.sqrt(28 / 400))
    assert found.hidden_cosine == pytest.approx(3.5 / 4)
    assert (found.embedding_error, found.embedding_cosine) == (pytest.approx(math.sqrt(4 / 17)), 1.0)


def test_figures_by_modality() -> None:
    found = by_modality(measured(), 0)
    assert list(found) == ["text", "image", "audio"]
    assert [(part.samples, part.positions, part.answered) for part in found.values()] == [
        (1, 2, 1),
        (2, 3, 1),
        (1, 1, 0),
    ]
    assert found["text"].kl_mean.value == pytest.approx(0.15)
    assert found["image"].kl_mean.value == pytest.approx(1.7 / 3)
    assert found["image"].hidden_error == pytest.approx(0.5)  # of its own tokens
    assert found["audio"].hidden_error == 0.0 and found["audio"].exact_float is None
    assert found["text"].exact_change is not None and found["text"].exact_change.value == -1.0
