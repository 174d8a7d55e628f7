"""Statistics that add, the choice of rows, and the recorder against plain hooks on a real layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_layer import SPEC, build, layer_weights, record, sample, token_counts

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.statistics.capture import (
    ROWS_PER_MODALITY,
    InputRecorder,
    InputStats,
    choose_rows,
    input_stats,
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


def test_stats_by_hand() -> None:
    x = torch.tensor([[1.0, -5.0], [-3.0, 2.0], [0.5, 0.5], [-9.0, 0.0]])
    modality = torch.tensor([0, 0, 3, 2], dtype=torch.int8)
    stats = input_stats(x, modality, torch.tensor([1, 3]))
    assert stats.absmax.tolist() == [[3.0, 5.0], [0.0, 0.0], [9.0, 0.0], [0.5, 0.5]]
    assert stats.abssum.tolist() == [[4.0, 7.0], [0.0, 0.0], [9.0, 0.0], [0.5, 0.5]]
    assert stats.count.tolist() == [2, 0, 1, 1]
    assert stats.rows.tolist() == [[-3.0, 2.0], [-9.0, 0.0]]
    assert stats.row_modality.tolist() == [0, 2]
    assert stats.present() == [0, 2, 3]


@given(st.integers(0, 2**31), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_two_halves_merge_into_the_whole(seed: int, tokens: int, data: Any) -> None:
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


def test_chosen_rows_by_hand() -> None:
    # 9 text tokens over two samples, 3 wanted: the first, the middle and the last; the one image token always.
    modalities = [torch.tensor([0, 0, 1, 0, 0], dtype=torch.int8), torch.zeros(5, dtype=torch.int8)]
    assert [rows.tolist() for rows in choose_rows(modalities, 3)] == [[0, 2], [0, 4]]


@given(st.lists(st.lists(st.integers(0, 3), max_size=60), min_size=1, max_size=6), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_rows_are_bounded_spread_and_the_same_each_time(samples: list[list[int]], limit: int) -> None:
    modalities = [torch.tensor(sample, dtype=torch.int8) for sample in samples]
    chosen = choose_rows(modalities, limit)
    assert [c.tolist() for c in chosen] == [c.tolist() for c in choose_rows(modalities, limit)]
    everything = [m for sample in samples for m in sample]
    kept = [m for sample, rows in zip(samples, chosen, strict=True) for m in (sample[r] for r in rows)]
    for modality in range(4):
        assert kept.count(modality) == min(limit, everything.count(modality))
    for tokens, rows in zip(samples, chosen, strict=True):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert all(0 <= row < len(tokens) for row in rows)


def test_rows_are_spread_over_all_samples() -> None:
    modalities = [torch.full((1000,), 3, dtype=torch.int8) for _ in range(8)]
    counts = [len(rows) for rows in choose_rows(modalities)]
    assert sum(counts) == ROWS_PER_MODALITY
    assert max(counts) - min(counts) <= 1


def test_a_modality_cannot_drown_another() -> None:
    modalities = [torch.tensor([3] * 5000 + [2] * 10, dtype=torch.int8)]
    (rows,) = choose_rows(modalities)
    assert int((modalities[0][rows] == 2).sum()) == 10


# --- the recorder --------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> torch.nn.Module:
    return build(layer_weights())


def test_recorder_sees_what_every_linear_of_a_group_reads(layer: torch.nn.Module) -> None:
    samples = [sample(tokens=9, seed=1), sample(tokens=14, seed=2)]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in SPEC.linears}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, arguments, name=name: seen[name].append(arguments[0][0].clone())
        )
        for name in SPEC.linears
    ]
    recorder = InputRecorder(layer, SPEC)
    for one in samples:
        recorder.begin(one.modality, torch.arange(len(one.modality)))
        run_layer(layer, one.inputs)
    stats = recorder.finish()
    for hook in hooks:
        hook.remove()

    assert set(stats) == {"qkv", "o", "gate_up", "down"}
    modality = torch.cat([one.modality for one in samples])
    for group in SPEC.groups:
        for linear in group.linears:
            true = torch.cat(seen[linear])
            assert_equal(stats[group.name], input_stats(true, modality, all_rows(true)))


def test_recorder_keeps_only_the_chosen_rows(layer: torch.nn.Module) -> None:
    one = sample(tokens=8)
    recorder = InputRecorder(layer, SPEC)
    recorder.begin(one.modality, torch.tensor([2, 5]))
    run_layer(layer, one.inputs)
    stats = recorder.finish()["down"]
    assert stats.rows.shape == (2, SPEC.shapes["mlp.down_proj.weight"][1])
    assert stats.row_modality.tolist() == one.modality[[2, 5]].tolist()
    assert stats.count.tolist() == [2, 2, 2, 2]  # but all tokens are counted


def test_removed_recorder_records_nothing(layer: torch.nn.Module) -> None:
    recorder = InputRecorder(layer, SPEC)
    recorder.remove()
    run_layer(layer, sample().inputs)
    assert recorder.finish() == {}


def test_run_layer_gives_the_hidden_states(layer: torch.nn.Module) -> None:
    one = sample(tokens=5)
    out = run_layer(layer, one.inputs)
    assert out.shape == one.inputs.hidden.shape
    assert not out.requires_grad


# --- the second moment of the inputs -------------------------------------------------------------------------


def test_recorder_keeps_the_second_moment_of_each_modality(layer: torch.nn.Module) -> None:
    """Exact, by modality, and together that of all tokens."""
    samples = [sample(tokens=90, seed=1), sample(tokens=31, seed=2), sample(tokens=2, seed=3)]
    stats = record(layer_weights(), samples, grams=True)
    modality = torch.cat([one.modality for one in samples])
    assert token_counts(samples) == [32, 32, 30, 29]
    for group in SPEC.groups:
        mine = stats[group.name]
        x = mine.rows.double()  # every token
        assert set(mine.grams) == {0, 1, 2, 3}
        for index, gram in mine.grams.items():
            part = x[modality == index]
            assert gram.tokens == len(part)
            assert (gram.matrix - part.T @ part).abs().max() < 1e-5 * (part.T @ part).abs().max()
        whole = mine.gram(dict.fromkeys(range(4), 1.0))
        assert whole.tokens == len(x)
        assert (whole.matrix - x.T @ x).abs().max() < 1e-5 * (x.T @ x).abs().max()


def test_few_tokens_are_kept_as_the_second_moment(layer: torch.nn.Module) -> None:
    stats = record(layer_weights(), [sample(tokens=9, seed=1), sample(tokens=14, seed=2)], grams=True)["down"]
    factors = [gram.factor for gram in stats.grams.values()]
    assert all(gram.matrix is None and gram.error == 0.0 for gram in stats.grams.values())
    for index, factor in enumerate(factors):
        assert torch.equal(factor, stats.rows[stats.row_modality == index])


def test_samples_may_be_kept_out_of_the_second_moment(layer: torch.nn.Module) -> None:
    """Those that are to judge what is made of it; all else counts them."""
    inside, outside = sample(tokens=90, seed=1), sample(tokens=12, seed=2)
    recorder = InputRecorder(layer, SPEC, token_counts([inside]))
    for one in (inside, outside):
        recorder.begin(one.modality, torch.arange(len(one.modality)), in_gram=one is inside)
        run_layer(layer, one.inputs)
    mine, alone = recorder.finish()["qkv"], record(layer_weights(), [inside], grams=True)["qkv"]
    assert [gram.tokens for gram in mine.grams.values()] == token_counts([inside])
    assert torch.equal(mine.gram(dict.fromkeys(range(4), 1.0)).matrix, alone.gram(dict.fromkeys(range(4), 1.0)).matrix)
    assert int(mine.count.sum()) == len(mine.rows) == 102


def test_no_second_moment_where_nobody_asks_for_it(layer: torch.nn.Module) -> None:
    assert all(stats.grams == {} for stats in record(layer_weights(), [sample()]).values())


def by_hand() -> InputStats:
    """Two text tokens and one video token."""
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [4.0, -1.0]])
    stats = input_stats(x, torch.tensor([0, 0, 3], dtype=torch.int8), all_rows(x))
    text, video = Gram(x[:2].T @ x[:2], None, 2), Gram(x[2:].T @ x[2:], None, 1)
    return replace(stats, grams={0: text, 3: video})


def test_second_moment_by_importance_by_hand() -> None:
    # Text: [[10, 2], [2, 4]], video: [[16, -4], [-4, 1]].
    stats = by_hand()
    assert stats.gram({0: 0.5, 3: 2.0}).matrix.tolist() == [[37.0, -7.0], [-7.0, 4.0]]
    only = stats.gram({0: 0.0, 3: 1.0})
    assert only.matrix.tolist() == [[16.0, -4.0], [-4.0, 1.0]] and only.tokens == 1
    assert stats.grams[0].matrix.tolist() == [[10.0, 2.0], [2.0, 4.0]]


def test_mean_magnitude_by_importance_by_hand() -> None:
    # Sums of |x|: text (4, 2) over 2 tokens, video (4, 1) over 1.
    stats = by_hand()
    assert stats.mean_abs({0: 1 / 3, 3: 1 / 3}).tolist() == pytest.approx([8 / 3, 1.0])
    assert stats.mean_abs({0: 0.25, 3: 0.5}).tolist() == pytest.approx([3.0, 1.0])  # the mean of the two means
    assert stats.mean_abs({0: 0.0, 3: 1.0}).tolist() == [4.0, 1.0]
    assert stats.mean_abs({0: 5.0, 3: 5.0}).tolist() == pytest.approx([8 / 3, 1.0])  # only their ratio counts


def test_divided_inputs_by_hand() -> None:
    divided = by_hand().divided(torch.tensor([2.0, 0.5]))
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
def test_the_first_linear_that_nan_or_inf_reaches_is_named(poisoned: str, first: str, bad: float) -> None:
    """1e38 is a number; only what comes of it is not."""
    weights = layer_weights(torch.float32)
    weights[poisoned][..., :] = bad
    layer, one = build(weights), sample()
    recorder = InputRecorder(layer, SPEC)
    recorder.begin(one.modality, torch.arange(len(one.modality)))
    with pytest.raises(QuantError, match=rf"^{re.escape(first)}: NaN or Inf in the activations") as caught:
        run_layer(layer, replace(one.inputs, hidden=one.inputs.hidden * 1e3))
    assert "float model" in caught.value.hint
