"""Smoothing: the folds are exact, no modality is worse than plain rounding, and skipped groups are recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_layer import CONFIG, HEAD_DIM, SPEC, W8A8, build, layer_work, output, record, sample, tensors

from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.models.spec import LayerSpec, LinearGroup, Subgraph
from msmodelslim_omni.numerics.arithmetic import quantize_weight, quantized_matmul
from msmodelslim_omni.numerics.checks import WeightChecks
from msmodelslim_omni.processors import fold, smooth
from msmodelslim_omni.processors.fold import repeat_for_query_heads
from msmodelslim_omni.processors.work import LayerWork, SmoothingRecord
from msmodelslim_omni.recipe.processors import IterSmoothConfig, SmoothQuantConfig
from msmodelslim_omni.statistics.capture import InputStats, input_stats, relative_weights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL = frozenset(SPEC.linears)
KINDS = (("norm-linear",), ("ov",), ("up-down",), ("norm-linear", "ov", "up-down"))
GROUPS = {"norm-linear": ("qkv", "gate_up"), "ov": ("o",), "up-down": ("down",)}
FACTOR_ERROR = 2.0**-19  # of factors: two pow, log, exp and divisions have at most 17 float32 roundings, 17 / 2^24
AUDIO, VIDEO = MODALITIES.index("audio"), MODALITIES.index("video")


def iter_smooth(*kinds: str, alpha: float | str = 0.5) -> IterSmoothConfig:
    kinds = kinds or KINDS[-1]
    return IterSmoothConfig.model_validate({"type": "iter_smooth", "alpha": alpha, "enable_subgraph_type": kinds})


def alone(group: LinearGroup) -> Subgraph:
    return Subgraph(group.name, (group,))


def records(work: LayerWork) -> dict[str, SmoothingRecord]:
    return {record.group: record for record in work.smoothing}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- the folds are exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", KINDS)
def test_float_function_is_unchanged(dtype: torch.dtype, kinds: tuple[str, ...]) -> None:
    work = layer_work(dtype)
    smoothed = smooth.apply(work, iter_smooth(*kinds), ALL)
    smoothed_groups = {name for name, record in records(smoothed).items() if record.alpha is not None}
    assert smoothed_groups == {group for kind in kinds for group in GROUPS[kind]}  # all groups were folded
    unseen = sample(seed=7)  # not a calibration sample
    assert relative(output(tensors(smoothed), unseen), output(work.weights, unseen)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_biases_keep_their_dtype_and_pair_with_the_weights(dtype: torch.dtype) -> None:
    work = layer_work(dtype)
    smoothed = smooth.apply(work, iter_smooth(), ALL)
    for norm, linears in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        before, after = work.weights[f"{norm}.weight"], smoothed.weights[f"{norm}.weight"]
        assert after.dtype == dtype
        assert not torch.equal(before, after)
        for linear in linears:
            name = f"{linear}.weight"
            # The rows of v_proj and up_proj are also divided by the factors of the Linear after them.
            old = before.double() * work.weights[name].double()
            new = after.double() * smoothed.tensor(name).double()
            rows = (new.abs().sum(1) / old.abs().sum(1))[:, None]
            torch.testing.assert_close(new / rows, old, rtol=2e-6, atol=1e-12)
    assert smoothed.weights["self_attn.v_proj.bias"].dtype == dtype
    assert smoothed.tensor("self_attn.q_proj.weight").dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_times_weight_is_unchanged_up_to_float32_rounding(dtype: torch.dtype) -> None:
    work = layer_work(dtype)
    smoothed = smooth.apply(work, iter_smooth("norm-linear"), ALL)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        old = work.weights["input_layernorm.weight"].double() * work.weights[name].double()
        new = smoothed.weights["input_layernorm.weight"].double() * smoothed.tensor(name).double()
        torch.testing.assert_close(new, old, rtol=3e-7, atol=0)


def test_changed_names_the_changed_tensors_and_no_others() -> None:
    work = layer_work()
    smoothed = smooth.apply(work, iter_smooth("up-down"), ALL)
    assert smoothed.changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    for name, tensor in work.weights.items():
        assert (smoothed.tensor(name) is tensor) == (name not in smoothed.changed)
    for name in work.weights:  # processors never write in place
        assert torch.equal(work.weights[name], layer_work().weights[name])


def test_changed_includes_every_changed_tensor() -> None:
    work = layer_work()
    smoothed = smooth.apply(work, iter_smooth(), ALL)
    differing = {n for n, t in work.weights.items() if not torch.equal(t.float(), smoothed.tensor(n).float())}
    assert differing <= smoothed.changed
    assert "self_attn.v_proj.bias" in differing
    assert "input_layernorm.weight" in differing


def test_query_heads_of_a_key_value_head_share_factors() -> None:
    work = layer_work(torch.float32)
    smoothed = smooth.apply(work, iter_smooth("ov"), ALL)
    name = "self_attn.o_proj.weight"
    columns = (smoothed.tensor(name) / work.weights[name]).median(dim=0).values  # [4 heads x 16]
    heads = columns.view(4, HEAD_DIM)
    torch.testing.assert_close(heads[0], heads[1])
    torch.testing.assert_close(heads[2], heads[3])
    assert not torch.allclose(heads[0], heads[2], rtol=0.01)
    rows = (work.weights["self_attn.v_proj.weight"] / smoothed.tensor("self_attn.v_proj.weight")).median(1)
    torch.testing.assert_close(rows.values, heads[::2].flatten(), rtol=1e-5, atol=0)


def test_query_head_helpers_by_hand() -> None:
    # 2 key-value heads of 2 channels, each read by 2 query heads: 8 inputs of o_proj, 4 channels of v_proj.
    group = LinearGroup("o", ("o",), "v", "ov", repeat=2, head_dim=2)
    per_input = torch.tensor([1.0, 5.0, 3.0, 2.0, 7.0, 0.0, 6.0, 9.0])
    assert fold.max_over_query_heads(per_input, alone(group)).tolist() == [3.0, 5.0, 7.0, 9.0]
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert repeat_for_query_heads(factors, alone(group)).tolist() == [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]
    plain = LinearGroup("g", ("a",), "norm", "norm-linear")
    assert fold.max_over_query_heads(per_input, alone(plain)).tolist() == per_input.tolist()
    assert repeat_for_query_heads(factors, alone(plain)).tolist() == factors.tolist()


def test_zero_norm_weights_and_dead_channels() -> None:
    work = layer_work()
    weights = dict(work.weights)
    weights["input_layernorm.weight"] = weights["input_layernorm.weight"].clone()
    weights["input_layernorm.weight"][[0, 5]] = 0.0
    for linear in ("q", "k", "v"):
        name = f"self_attn.{linear}_proj.weight"
        weights[name] = weights[name].clone()
        weights[name][:, 9] = 0.0  # no Linear reads channel 9
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].clone()
    weights["mlp.up_proj.weight"][17] = 0.0  # channel 17 of down_proj's input is always zero
    work = replace(work, weights=weights, stats=record(weights, [sample()]))
    smoothed = smooth.apply(work, iter_smooth(), ALL)
    assert {r.alpha for r in records(smoothed).values()} == {0.5}
    assert all(torch.isfinite(tensor).all() for tensor in tensors(smoothed).values())
    assert smoothed.weights["input_layernorm.weight"][[0, 5]].tolist() == [0.0, 0.0]
    assert torch.equal(smoothed.weights["input_layernorm.weight"][9], weights["input_layernorm.weight"][9])
    assert not smoothed.tensor("mlp.up_proj.weight")[17].any()
    unseen = sample(seed=3)
    assert relative(output(tensors(smoothed), unseen), output(weights, unseen)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_previous_linear_that_stays_float_is_divided_by_powers_of_two(dtype: torch.dtype) -> None:
    work = layer_work(dtype)
    schemes = {name: W8A8 for name in SPEC.linears if name not in ("mlp.gate_proj", "mlp.up_proj")}
    work = replace(work, schemes=schemes)
    smoothed = smooth.apply(work, iter_smooth("up-down"), frozenset({"mlp.down_proj"}))
    assert records(smoothed)["down"].alpha == 0.5
    up, before = smoothed.tensor("mlp.up_proj.weight"), work.weights["mlp.up_proj.weight"]
    assert up.dtype == dtype
    ratio = before.float() / up.float()
    # Smaller values are subnormal in float16, where dividing by a power of two rounds too.
    mantissas, exponents = torch.frexp(ratio[before.float().abs() > 2**-12])
    assert (mantissas == 0.5).all()
    assert exponents.unique().numel() > 1
    assert relative(output(tensors(smoothed), sample()), output(work.weights, sample())) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_previous_linear_with_a_bias_stays_exact(dtype: torch.dtype) -> None:
    """The bias and weight of a v_proj that stays float are both divided without rounding."""
    weights = layer_work(dtype).weights
    for kind in ("weight", "bias"):
        weights[f"self_attn.v_proj.{kind}"] = weights[f"self_attn.v_proj.{kind}"].clone()
        weights[f"self_attn.v_proj.{kind}"][[1, 19]] *= 64  # channels worth smoothing
    schemes = {name: W8A8 for name in SPEC.linears if name not in SPEC.groups[0].linears}
    work = LayerWork(0, SPEC, schemes, weights, record(weights, [sample()]))
    smoothed = smooth.apply(work, iter_smooth("ov"), frozenset({"self_attn.o_proj"}))
    assert records(smoothed)["o"].alpha == 0.5
    for kind in ("weight", "bias"):
        assert smoothed.tensor(f"self_attn.v_proj.{kind}").dtype == dtype
    assert relative(output(tensors(smoothed), sample()), output(work.weights, sample())) < 1e-5


@given(
    st.lists(st.floats(-300, 300, width=16), min_size=4, max_size=4),
    st.lists(st.floats(2**-14, 2**14), min_size=4, max_size=4),
    st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_divide_rounded(values: list[float], factors: list[float], dtype: torch.dtype) -> None:
    vector = torch.tensor(values).to(dtype)
    s, divided = fold._divide_rounded(vector, torch.tensor(factors))
    assert divided.dtype == dtype
    assert torch.isfinite(divided).all() and torch.isfinite(s).all() and (s > 0).all()
    torch.testing.assert_close(divided.double() * s.double(), vector.double(), rtol=2e-7, atol=0)


# --- statistics after smoothing ------------------------------------------------------------------------------


def test_stats_match_the_new_inputs() -> None:
    calibration = sample()
    work = layer_work(samples=[calibration])
    smoothed = smooth.apply(work, iter_smooth("norm-linear"), ALL)
    again = record(tensors(smoothed), [calibration])
    assert smoothed.stats is not None
    for group in ("qkv", "gate_up"):
        torch.testing.assert_close(smoothed.stats[group].rows, again[group].rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(smoothed.stats[group].absmax, again[group].absmax, rtol=1e-4, atol=1e-5)
        assert torch.equal(smoothed.stats[group].count, again[group].count)
        assert torch.equal(smoothed.stats[group].row_modality, again[group].row_modality)
    assert smoothed.stats["down"] is not work.stats or smoothed.stats["down"] == work.stats["down"]


def test_smoothing_twice_stays_exact() -> None:
    work = layer_work()
    twice = smooth.apply(smooth.apply(work, iter_smooth(alpha=0.3), ALL), iter_smooth(alpha="auto"), ALL)
    assert relative(output(tensors(twice), sample()), output(work.weights, sample())) < 1e-5


# --- the choice ----------------------------------------------------------------------------------------------


def norm_layer(
    x: torch.Tensor, modality: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.float32
) -> LayerWork:
    """A norm and one Linear; `x` is the Linear's input."""
    group = LinearGroup("g", ("linear",), "norm", "norm-linear")
    spec = LayerSpec((group,), {"norm.weight": (x.shape[1],), "linear.weight": tuple(weight.shape)})
    weights = {"norm.weight": torch.ones(x.shape[1], dtype=dtype), "linear.weight": weight.to(dtype)}
    stats = input_stats(x, modality, torch.arange(len(x)))
    return LayerWork(0, spec, {"linear": W8A8}, weights, {"g": stats})


def output_error(stats: InputStats, weight: torch.Tensor, modality: int) -> float:
    x = stats.rows[stats.row_modality == modality]
    exact = x @ weight.float().T
    error = quantized_matmul(x, quantize_weight(weight, W8A8)) - exact
    token_weights = relative_weights(exact)[:, None].sqrt()
    return float((error * token_weights).norm() / (exact * token_weights).norm())


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_outlier_channel_is_smoothed_away() -> None:
    x = normal(64, 32, seed=1)
    x[:, 4] *= 200
    work = norm_layer(x, torch.zeros(64, dtype=torch.int8), normal(16, 32, seed=2))
    smoothed = smooth.apply(work, iter_smooth("norm-linear", alpha="auto"), frozenset({"linear"}))
    (record,) = smoothed.smoothing
    assert record.gain < 0.5
    assert record.alpha is not None and "peak" in record.reason
    assert smoothed.stats is not None and work.stats is not None
    before = output_error(work.stats["g"], work.weights["linear.weight"], 0)
    after = output_error(smoothed.stats["g"], smoothed.tensor("linear.weight"), 0)
    assert after / before == pytest.approx(record.gain, rel=1e-4)  # the reported gain is the real gain
    assert smoothed.weights["norm.weight"][4] < smoothed.weights["norm.weight"][5] / 5


def one_sided(sign: int) -> tuple[LayerWork, torch.Tensor, torch.Tensor]:
    """Video tokens with an outlier in channel 0, and audio tokens that are zero in channel 0.

    Dividing channel 0 helps video. It makes the weights of channel 0 larger, so that all other weights of a row get a
    coarser scale, which hurts audio. sign -1 omits the audio tokens.
    """
    video = normal(200, 32, seed=3)
    video[:, 0] *= 300
    audio = 0.01 * normal(200, 32, seed=4)
    audio[:, 0] = 0.0
    audio[:, 1:] += normal(200, 31, seed=5).sign()
    weight = normal(24, 32, seed=6)
    weight[:, 0] *= 3
    rows = video if sign < 0 else torch.cat([video, audio])
    modality = torch.full((len(rows),), VIDEO, dtype=torch.int8)
    modality[200:] = AUDIO
    return norm_layer(rows, modality, weight), video, audio


def test_worst_modality_decides() -> None:
    """A candidate is accepted for video only and rejected if it makes audio worse."""
    config = SmoothQuantConfig.model_validate({"type": "smooth_quant", "alpha": 0.5})
    video_only, _, _ = one_sided(-1)
    (record,) = smooth.apply(video_only, config, frozenset({"linear"})).smoothing
    assert record.alpha == 0.5 and record.gain < 0.9

    both, _, _ = one_sided(1)
    rejected = smooth.apply(both, config, frozenset({"linear"}))
    (record,) = rejected.smoothing
    assert (record.alpha, record.gain) == (None, 1.0)
    assert "unchanged" in record.reason and "0.5" in record.reason
    assert rejected.weights is both.weights and not rejected.changed
    assert rejected.stats is both.stats


def test_rejection_is_due_to_audio() -> None:
    """The rejected candidate helps video and hurts audio."""
    both, _, _ = one_sided(1)
    group, weight = both.spec.groups[0], both.weights["linear.weight"]
    assert both.stats is not None
    stats = both.stats["g"]
    members = [stats.row_modality == m for m in stats.sampled()]
    candidates = list(smooth._candidates(stats, weight.abs().amax(0), alone(group), (0.5,), 1e-5))
    assert len(candidates) == 2  # A as the maximum, and balanced over the modalities
    for candidate in candidates:
        factors = repeat_for_query_heads(candidate.factors, alone(group))
        of_rows = smooth.output_errors(stats.rows, weight, W8A8, [factors], WeightChecks())
        signals, plain, errors = sums = smooth.sums_by_modality(of_rows, members)
        assert (signals > 0).all()
        by_modality = dict(zip(stats.present(), (errors / plain).tolist(), strict=True))
        assert by_modality[VIDEO] < 1 < by_modality[AUDIO]
        assert smooth.worst_ratio([sums[[2, 1, 0]]]) == pytest.approx(by_modality[AUDIO] ** 0.5)


def test_auto_is_never_worse_than_a_fixed_alpha() -> None:
    work = layer_work()
    auto = records(smooth.apply(work, iter_smooth("norm-linear", alpha="auto"), ALL))["qkv"]
    assert auto.alpha in smooth.ALPHA_GRID
    for alpha in smooth.ALPHA_GRID:
        fixed = records(smooth.apply(work, iter_smooth("norm-linear", alpha=alpha), ALL))["qkv"]
        assert fixed.alpha in (alpha, None)
        assert auto.gain <= fixed.gain + 1e-9


def test_alpha_by_hand() -> None:
    # A = (4, 16), W = (1, 4). alpha 0.5: s = (2, 2), no smoothing. alpha 1: s = A = (4, 16), divided by its geometric
    # mean 8: (0.5, 2). alpha 0: s = 1 / W = (1, 1/4), divided by 1/2: (2, 0.5).
    x = torch.tensor([[4.0, -1.0], [-2.0, 16.0]])
    weight = torch.tensor([[1.0, 0.5], [-0.5, -4.0]])
    work = norm_layer(x, torch.zeros(2, dtype=torch.int8), weight)
    assert work.stats is not None
    candidates = smooth._candidates(
        work.stats["g"], weight.abs().amax(0), work.spec.subgraphs[0], (0.0, 0.5, 1.0), 1e-5
    )
    for candidate, expected in zip(candidates, ([2.0, 0.5], [1.0, 1.0], [0.5, 2.0]), strict=True):
        assert candidate.factors.tolist() == pytest.approx(expected, rel=FACTOR_ERROR)


def test_factors_use_the_weights_of_all_linears_of_a_group() -> None:
    group = LinearGroup("g", ("a", "b"), "norm", "norm-linear")
    stats = input_stats(torch.ones(1, 2), torch.zeros(1, dtype=torch.int8), torch.arange(1))
    weights = {"a.weight": torch.tensor([[1.0, 1.0]]), "b.weight": torch.tensor([[16.0, 0.5]])}
    peaks = smooth._column_peaks(LayerWork(0, SPEC, {}, weights), alone(group))
    (candidate,) = smooth._candidates(stats, peaks, alone(group), (0.5,), 1e-5)
    # 1 / sqrt(16) and 1, divided by their geometric mean 1/2
    assert candidate.factors.tolist() == pytest.approx([0.5, 2.0], rel=FACTOR_ERROR)


def test_group_that_no_candidate_improves_is_unchanged() -> None:
    """Plain rounding is exact here (every scale is 1), so that any change adds error."""
    x = 127 * normal(32, 16, seed=1).sign()
    weight = (10 * normal(8, 16, seed=2)).round()
    weight[:, 5] = 127
    work = norm_layer(x, torch.zeros(32, dtype=torch.int8), weight)
    smoothed = smooth.apply(work, iter_smooth("norm-linear", alpha="auto"), frozenset({"linear"}))
    (record,) = smoothed.smoothing
    assert (record.alpha, record.gain) == (None, 1.0)
    assert "plain rounding" in record.reason
    assert smoothed.weights is work.weights


def test_absent_modalities_do_not_count() -> None:
    """A modality without tokens has no weight and causes no division by zero."""
    x = normal(64, 32, seed=1)
    x[:, 4] *= 200
    work = norm_layer(x, torch.full((64,), AUDIO, dtype=torch.int8), normal(16, 32, seed=2))
    (record,) = smooth.apply(work, iter_smooth(alpha="auto"), frozenset({"linear"})).smoothing
    assert record.gain < 0.5


# --- selected groups -----------------------------------------------------------------------------------------


def test_smooth_quant_is_norm_to_linear_only() -> None:
    config = SmoothQuantConfig.model_validate({"type": "smooth_quant"})
    smoothed = smooth.apply(layer_work(), config, ALL)
    assert set(records(smoothed)) == {"qkv", "gate_up"}
    assert records(smoothed)["qkv"].alpha == 0.5


def test_only_enabled_subgraph_types_are_smoothed() -> None:
    assert set(records(smooth.apply(layer_work(), iter_smooth("ov", "up-down"), ALL))) == {"o", "down"}


def test_partly_selected_group_is_recorded_and_unchanged() -> None:
    work = layer_work()
    linears = ALL - {"self_attn.k_proj"}
    smoothed = smooth.apply(work, iter_smooth("norm-linear"), linears)
    assert records(smoothed)["qkv"] == SmoothingRecord(
        "qkv", None, 1.0, "the recipe selects only some Linears of the group"
    )
    assert records(smoothed)["gate_up"].alpha == 0.5
    assert smoothed.weights["input_layernorm.weight"] is work.weights["input_layernorm.weight"]


def test_group_with_a_float_member_is_recorded_and_unchanged() -> None:
    work = layer_work()
    schemes = {name: W8A8 for name in SPEC.linears if name != "mlp.gate_proj"}
    smoothed = smooth.apply(replace(work, schemes=schemes), iter_smooth("norm-linear"), ALL)
    record = records(smoothed)["gate_up"]
    assert record.alpha is None
    assert "mlp.gate_proj stays float" in record.reason
    assert smoothed.tensor("mlp.up_proj.weight") is work.weights["mlp.up_proj.weight"]


def test_unselected_group_is_not_recorded() -> None:
    smoothed = smooth.apply(layer_work(), iter_smooth(), frozenset({"mlp.down_proj"}))
    assert set(records(smoothed)) == {"down"}


def test_layer_is_from_transformers() -> None:
    assert type(build(layer_work().weights)).__name__ == "Qwen2_5OmniDecoderLayer"
    text = CONFIG["thinker_config"]["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (4, 2)
