"""Additive statistics, the choice of rows, and the recorder, compared with plain hooks on a real layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from growth import elements_computed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_layer import SPEC, Sample, build, layer_weights, received_attention, record, sample, token_counts

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.runtime.budget import DEFAULT_BUDGET
from msmodelslim_omni.runtime.team import UNSPLIT
from msmodelslim_omni.statistics.capture import (
    ROWS,
    InputRecorder,
    InputStats,
    choose_rows,
    input_stats,
    relative_weights,
    run_layer,
)
from msmodelslim_omni.statistics.gram import Gram


def all_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x))


def assert_equal(a: InputStats, b: InputStats) -> None:
    assert torch.equal(a.absmax, b.absmax)
    torch.testing.assert_close(a.abssum, b.abssum)
    assert torch.equal(a.count, b.count)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.row_modality, b.row_modality)


# --- statistics ----------------------------------------------------------------------------------------------


def test_stats_of_one_sample() -> None:
    x = torch.tensor([[1.0, -5.0], [-3.0, 2.0], [0.5, 0.5], [-9.0, 0.0]])
    modality = torch.tensor([0, 0, 3, 2], dtype=torch.int8)
    stats = input_stats(x, modality, torch.tensor([1, 3]))
    assert stats.absmax.tolist() == [[3.0, 5.0], [0.0, 0.0], [9.0, 0.0], [0.5, 0.5]]
    assert stats.abssum.tolist() == [[4.0, 7.0], [0.0, 0.0], [9.0, 0.0], [0.5, 0.5]]
    assert stats.count.tolist() == [2, 0, 1, 1]
    assert stats.rows.tolist() == [[-3.0, 2.0], [-9.0, 0.0]]
    assert stats.row_modality.tolist() == [0, 2]
    assert stats.present() == [0, 2, 3]
    assert not input_stats(x, modality, torch.tensor([1, 3]), with_sums=False).abssum.any()


@given(st.integers(0, 2**31), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_statistics_of_two_parts_merge(seed: int, tokens: int, data: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens, 5), generator=generator)
    modality = torch.randint(0, len(MODALITIES), (tokens,), generator=generator).to(torch.int8)
    cut = data.draw(st.integers(0, tokens))
    parts = [input_stats(p, m, all_rows(p)) for p, m in ((x[:cut], modality[:cut]), (x[cut:], modality[cut:]))]
    assert_equal(parts[0].merged(parts[1]), input_stats(x, modality, all_rows(x)))


def test_rows_are_copies() -> None:
    x = torch.ones(2, 3)
    stats = input_stats(x, torch.zeros(2, dtype=torch.int8), all_rows(x))
    x.zero_()
    assert stats.rows.tolist() == [[1.0] * 3] * 2


# --- the choice of rows --------------------------------------------------------------------------------------


def test_few_tokens_are_all_kept() -> None:
    modalities = [torch.tensor([0, 1, 1, 3], dtype=torch.int8), torch.tensor([2], dtype=torch.int8)]
    assert [rows.tolist() for rows in choose_rows(modalities)] == [[0, 1, 2, 3], [0]]


def test_chosen_rows_of_two_samples() -> None:
    # Of 9 text tokens in two samples, 3 are kept: the first, the middle and the last. The only image token is kept.
    modalities = [torch.tensor([0, 0, 1, 0, 0], dtype=torch.int8), torch.zeros(5, dtype=torch.int8)]
    assert [rows.tolist() for rows in choose_rows(modalities, 3)] == [[0, 2], [0, 4]]


@given(st.lists(st.lists(st.integers(0, 3), max_size=60), min_size=1, max_size=6), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_chosen_rows_are_bounded_and_deterministic(samples: list[list[int]], limit: int) -> None:
    modalities = [torch.tensor(sample, dtype=torch.int8) for sample in samples]
    chosen = choose_rows(modalities, limit)
    assert [c.tolist() for c in chosen] == [c.tolist() for c in choose_rows(modalities, limit)]
    all_tokens = [m for sample in samples for m in sample]
    kept = [m for sample, rows in zip(samples, chosen, strict=True) for m in (sample[r] for r in rows)]
    for modality in range(4):
        assert kept.count(modality) == min(limit, all_tokens.count(modality))
    for tokens, rows in zip(samples, chosen, strict=True):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert all(0 <= row < len(tokens) for row in rows)


def test_rows_are_spread_evenly_over_all_samples() -> None:
    modalities = [torch.full((1000,), 3, dtype=torch.int8) for _ in range(8)]
    counts = [len(rows) for rows in choose_rows(modalities)]
    assert sum(counts) == ROWS
    assert max(counts) - min(counts) <= 1


def test_large_modality_does_not_displace_a_small_one() -> None:
    modalities = [torch.tensor([3] * 5000 + [2] * 10, dtype=torch.int8)]
    (rows,) = choose_rows(modalities)
    assert int((modalities[0][rows] == 2).sum()) == 10


# --- the recorder --------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> torch.nn.Module:
    return build(layer_weights())


def test_recording_a_sample_does_not_cost_more_with_more_samples(layer: torch.nn.Module) -> None:
    """Every sample keeps one row. Joined once a sample, the rows would be copied as often as there are samples."""
    short = sample(tokens=2, seed=1)

    def elements_per_sample(count: int) -> float:
        def run() -> None:
            recorder = InputRecorder(layer, SPEC)
            for _ in range(count):
                recorder.begin(short.modality, torch.zeros(1, dtype=torch.int64))
                run_layer(layer, short.inputs)
            assert len(recorder.finish()["qkv"].rows) == count

        return elements_computed(run) / count

    assert elements_per_sample(64) < 1.1 * elements_per_sample(16)


def test_recorded_input_equals_the_input_of_every_linear(layer: torch.nn.Module) -> None:
    samples = [sample(tokens=9, seed=1), sample(tokens=14, seed=2)]
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in SPEC.linears}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, arguments, name=name: inputs[name].append(arguments[0][0].clone())
        )
        for name in SPEC.linears
    ]
    recorder = InputRecorder(layer, SPEC)
    for each in samples:
        recorder.begin(each.modality, torch.arange(len(each.modality)))
        run_layer(layer, each.inputs)
    stats = recorder.finish()
    for hook in hooks:
        hook.remove()

    assert set(stats) == {"qkv", "o", "gate_up", "down"}
    modality = torch.cat([each.modality for each in samples])
    for group in SPEC.groups:
        for linear in group.linears:
            x = torch.cat(inputs[linear])
            assert_equal(stats[group.name], input_stats(x, modality, all_rows(x), with_sums=False))


def test_recorder_keeps_only_the_chosen_rows(layer: torch.nn.Module) -> None:
    eight = sample(tokens=8)
    recorder = InputRecorder(layer, SPEC)
    recorder.begin(eight.modality, torch.tensor([2, 5]))
    run_layer(layer, eight.inputs)
    stats = recorder.finish()["down"]
    assert stats.rows.shape == (2, SPEC.shapes["mlp.down_proj.weight"][1])
    assert stats.row_modality.tolist() == eight.modality[[2, 5]].tolist()
    assert stats.count.tolist() == [2, 2, 2, 2]  # all tokens are counted


def test_removed_recorder_records_nothing(layer: torch.nn.Module) -> None:
    recorder = InputRecorder(layer, SPEC)
    recorder.remove()
    run_layer(layer, sample().inputs)
    assert recorder.finish() == {}


def test_run_layer_returns_the_hidden_states(layer: torch.nn.Module) -> None:
    five = sample(tokens=5)
    out = run_layer(layer, five.inputs)
    assert out.shape == five.inputs.hidden.shape
    assert not out.requires_grad


# --- H of the inputs -----------------------------------------------------------------------------------------


def test_recorder_keeps_h_of_each_modality(layer: torch.nn.Module) -> None:
    """H of each modality is exact, and the sum over modalities is H of all tokens.

    Behind o and down, each token is weighted by 1 / |h| with the layer's output h; in front of q, k and v by the
    attention that it receives.
    """
    samples = [sample(tokens=90, seed=1), sample(tokens=31, seed=2), sample(tokens=2, seed=3)]
    stats = record(layer_weights(), samples, grams=True)
    modality = torch.cat([each.modality for each in samples])
    assert token_counts(samples) == [32, 32, 30, 29]
    for group in SPEC.groups:
        group_stats = stats[group.name]
        x = group_stats.rows.double()  # every token
        for index in range(4):
            assert torch.allclose(group_stats.abssum[index].double(), x[modality == index].abs().sum(dim=0))
        if group.name in ("o", "down"):
            x *= root_weights(layer, samples).double()
        if group.name == "qkv":
            x *= (1 + received_attention(layer_weights(), samples)).sqrt()[:, None].double()
        assert set(group_stats.grams) == {0, 1, 2, 3}
        for index, gram in group_stats.grams.items():
            part = x[modality == index]
            assert gram.tokens == len(part)
            assert (gram.matrix - part.T @ part).abs().max() < 1e-5 * (part.T @ part).abs().max()
        total = group_stats.gram(dict.fromkeys(range(4), 1.0))
        assert total.tokens == len(x)
        assert (total.matrix - x.T @ x).abs().max() < 1e-5 * (x.T @ x).abs().max()


def root_weights(layer: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """1 / sqrt(|h|) of all tokens, [tokens, 1], with the layer's output h."""
    return torch.cat([run_layer(layer, each.inputs)[0].norm(dim=1) for each in samples]).rsqrt()[:, None]


def test_relative_weights_by_hand() -> None:
    out = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0], [600.0, 800.0]])
    assert relative_weights(out).tolist() == pytest.approx([0.2, 1.0, 1.0, 0.001])  # at least a thousandth of 1000
    assert bool(torch.isfinite(relative_weights(torch.zeros(2, 2))).all())


def test_few_tokens_are_stored_as_the_factor(layer: torch.nn.Module) -> None:
    samples = [sample(tokens=9, seed=1), sample(tokens=14, seed=2)]
    stats = record(layer_weights(), samples, grams=True)["down"]
    expected = stats.rows * root_weights(layer, samples)
    factors = [gram.factor for gram in stats.grams.values()]
    assert all(gram.matrix is None for gram in stats.grams.values())
    for index, factor in enumerate(factors):
        torch.testing.assert_close(factor, expected[stats.row_modality == index])


def test_held_out_samples_do_not_enter_h(layer: torch.nn.Module) -> None:
    """Held-out samples evaluate the result of H. All other statistics include them."""
    inside, outside = sample(tokens=90, seed=1), sample(tokens=12, seed=2)
    recorder = InputRecorder(layer, SPEC, token_counts([inside]))
    for each in (inside, outside):
        recorder.begin(each.modality, torch.arange(len(each.modality)), in_gram=each is inside)
        recorder.end(run_layer(layer, each.inputs))
    both, only = recorder.finish()["qkv"], record(layer_weights(), [inside], grams=True)["qkv"]
    assert [gram.tokens for gram in both.grams.values()] == token_counts([inside])
    assert torch.equal(both.gram(dict.fromkeys(range(4), 1.0)).matrix, only.gram(dict.fromkeys(range(4), 1.0)).matrix)
    assert int(both.count.sum()) == len(both.rows) == 102


@pytest.mark.parametrize("importance", [{0: 0.2, 1: 0.5, 2: 1.0, 3: 0.1}, {0: 0.0, 1: 1.0, 2: 0.0, 3: 2.0}])
def test_one_weighted_h_if_one_per_modality_does_not_fit(layer: torch.nn.Module, importance: dict[int, float]) -> None:
    samples = [sample(tokens=200, seed=1), sample(tokens=300, seed=2)]
    width = layer_weights()["mlp.down_proj.weight"].shape[1]
    budget = replace(DEFAULT_BUDGET, matrix=4 * width**2)
    combined, separate = (
        run_recorder(InputRecorder(layer, SPEC, token_counts(samples), *arguments), layer, samples)["down"]
        for arguments in ((budget, UNSPLIT, importance), ())
    )
    assert not combined.grams and combined.weighted is not None and len(separate.grams) > 1
    found, expected = combined.gram(importance), separate.gram(importance)
    assert found.tokens == expected.tokens
    assert float((found.matrix - expected.matrix).abs().max()) < 1e-5 * float(expected.matrix.abs().max())


def run_recorder(recorder: InputRecorder, layer: torch.nn.Module, samples: list[Sample]) -> dict[str, InputStats]:
    for each in samples:
        recorder.begin(each.modality, torch.arange(len(each.modality)))
        recorder.end(run_layer(layer, each.inputs))
    return recorder.finish()


def test_h_is_not_collected_by_default(layer: torch.nn.Module) -> None:
    assert all(stats.grams == {} for stats in record(layer_weights(), [sample()]).values())


def small_stats() -> InputStats:
    """The statistics of two text tokens and one video token."""
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [4.0, -1.0]])
    stats = input_stats(x, torch.tensor([0, 0, 3], dtype=torch.int8), all_rows(x))
    text, video = Gram(x[:2].T @ x[:2], None, 2), Gram(x[2:].T @ x[2:], None, 1)
    return replace(stats, grams={0: text, 3: video})


def test_h_weighted_by_importance() -> None:
    # Text: [[10, 2], [2, 4]], video: [[16, -4], [-4, 1]].
    stats = small_stats()
    assert stats.gram({0: 0.5, 3: 2.0}).matrix.tolist() == [[37.0, -7.0], [-7.0, 4.0]]
    only = stats.gram({0: 0.0, 3: 1.0})
    assert only.matrix.tolist() == [[16.0, -4.0], [-4.0, 1.0]] and only.tokens == 1
    assert stats.grams[0].matrix.tolist() == [[10.0, 2.0], [2.0, 4.0]]


def test_mean_magnitude_weighted_by_importance() -> None:
    # Sums of |x|: text (4, 2) over 2 tokens, video (4, 1) over 1.
    stats = small_stats()
    assert stats.mean_abs({0: 1 / 3, 3: 1 / 3}).tolist() == pytest.approx([8 / 3, 1.0])
    assert stats.mean_abs({0: 0.25, 3: 0.5}).tolist() == pytest.approx([3.0, 1.0])  # the mean of the two means
    assert stats.mean_abs({0: 0.0, 3: 1.0}).tolist() == [4.0, 1.0]
    assert stats.mean_abs({0: 5.0, 3: 5.0}).tolist() == pytest.approx([8 / 3, 1.0])  # only their ratio matters


def test_statistics_of_divided_inputs() -> None:
    divided = small_stats().divided(torch.tensor([2.0, 0.5]))
    assert divided.absmax[0].tolist() == [1.5, 4.0] and divided.abssum[0].tolist() == [2.0, 4.0]
    assert divided.rows.tolist() == [[0.5, 4.0], [-1.5, 0.0], [2.0, -2.0]]
    assert divided.grams[0].matrix.tolist() == [[2.5, 2.0], [2.0, 16.0]]


# --- NaN and Inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poisoned", "first"),
    [
        ("input_layernorm.weight", "self_attn.q_proj"),
        ("self_attn.v_proj.weight", "self_attn.o_proj"),
        ("post_attention_layernorm.weight", "mlp.gate_proj"),
        ("mlp.up_proj.weight", "mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("bad", [torch.nan, 1e38])
def test_error_names_the_first_linear_with_nan_or_inf(poisoned: str, first: str, bad: float) -> None:
    """1e38 itself is finite, but the activations overflow."""
    weights = layer_weights(torch.float32)
    weights[poisoned][..., :] = bad
    layer, calib = build(weights), sample()
    recorder = InputRecorder(layer, SPEC)
    recorder.begin(calib.modality, torch.arange(len(calib.modality)))
    with pytest.raises(QuantError, match=rf"^{re.escape(first)}: NaN or Inf in the input activations") as caught:
        recorder.end(run_layer(layer, replace(calib.inputs, hidden=calib.inputs.hidden * 1e3)))
    assert "float model" in caught.value.hint
