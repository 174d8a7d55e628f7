"""Smoothing and AWQ behind the norm that feeds the router and all experts: one vector of powers of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msmodelslim_omni.models import qwen3_omni as omni
from msmodelslim_omni.models.inputs import LayerInput
from msmodelslim_omni.models.spec import LayerSpec, Subgraph
from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_weight
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import awq, fold, smooth
from msmodelslim_omni.processors.expected_error import ExpectedErrors
from msmodelslim_omni.processors.work import FEWEST_EXPERT_TOKENS, LayerWork
from msmodelslim_omni.recipe.processors import AwqConfig, IterSmoothConfig, SmoothQuantConfig
from msmodelslim_omni.statistics.capture import InputRecorder, InputStats, input_stats, run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

W8A8, INT4 = QuantScheme(8, 8), QuantScheme(4, None, "minmax", 32, symmetric=True)
NORM, ROUTER, OUTLIERS = "post_attention_layernorm", "mlp.gate", (3, 77, 200)
TOKENS = 400
NAME = "mlp.experts.*.gate_up"


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen3_omni: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen3_omni)


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoint) -> LayerSpec:
    return omni.layer_spec(checkpoint.config)


@pytest.fixture(scope="module")
def shared(spec: LayerSpec) -> Subgraph:
    return next(part for part in spec.subgraphs if part.float_readers)


def weights_with_outliers(checkpoint: Checkpoint, spec: LayerSpec, dtype: torch.dtype, gain: float) -> dict[str, Any]:
    """A layer with random matrices and a norm of ones, but for some channels with `gain`.

    The columns of all readers of these channels are divided by it.
    """
    weights = {name: checkpoint.load(omni.LAYER_PREFIX.format(index=0) + name).float() for name in spec.shapes}
    gains = torch.ones(256)
    gains[list(OUTLIERS)] = gain
    weights[f"{NORM}.weight"] = gains
    generator = torch.Generator().manual_seed(0)
    for name in spec.shapes:
        if name == f"{ROUTER}.weight" or name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = torch.randn(spec.shapes[name], generator=generator) / 16 / gains
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def layer_of(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    return omni.build_layer(checkpoint.config, 0, {name: tensor.float() for name, tensor in tensors.items()})


def states(seed: int) -> LayerInput:
    hidden = torch.randn(1, TOKENS, 256, generator=torch.Generator().manual_seed(seed))
    rotary = (torch.ones(1, TOKENS, 64), torch.zeros(1, TOKENS, 64))
    return LayerInput(hidden, {"position_embeddings": rotary, "attention_mask": None})


def work_of(
    checkpoint: Checkpoint, spec: LayerSpec, scheme: QuantScheme, dtype: torch.dtype = torch.bfloat16, gain: float = 32
) -> LayerWork:
    weights = weights_with_outliers(checkpoint, spec, dtype, gain)
    layer = layer_of(checkpoint, weights)
    recorder = InputRecorder(layer, spec, [TOKENS, 0, 0, 0], importance={0: 1.0 / TOKENS})
    recorder.begin(torch.zeros(TOKENS, dtype=torch.int8), torch.arange(0, TOKENS, 2))
    recorder.end(run_layer(layer, states(1)))
    return LayerWork(0, spec, dict.fromkeys(spec.linears, scheme), weights, recorder.finish(), importance={0: 1.0})


def folded(work: LayerWork) -> dict[str, torch.Tensor]:
    return {name: work.tensor(name) for name in work.weights}


def iter_smooth(alpha: float | str = "auto") -> IterSmoothConfig:
    kinds = ("norm-linear",)
    return IterSmoothConfig.model_validate({"type": "iter_smooth", "alpha": alpha, "enable_subgraph_type": kinds})


AWQ = AwqConfig.model_validate({"type": "awq", "n_grid": 8, "enable_subgraph_type": ("norm-linear",)})


def test_subgraphs_hold_every_group_once_and_the_experts_together(spec: LayerSpec) -> None:
    parts = spec.subgraphs
    assert sorted(linear for part in parts for linear in part.linears) == sorted(spec.linears)
    assert [part.name for part in parts[:4]] == ["qkv", "o", NAME, "mlp.experts.0.down"]
    assert parts[2].float_readers == (ROUTER,) and parts[2].previous == NORM and len(parts[2].groups) == 8
    assert not any(part.float_readers for part in parts if part.name != NAME)
    assert [part.is_tunable for part in parts[:4]] == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["smooth_quant", "iter_smooth", "awq"])
def test_routing_and_experts_are_the_same_to_the_last_bit(
    method: str, dtype: torch.dtype, checkpoint: Checkpoint, spec: LayerSpec
) -> None:
    linears = frozenset(spec.linears)
    work = work_of(checkpoint, spec, INT4 if method == "awq" else W8A8, dtype)
    if method == "awq":
        done = awq.apply(work, AWQ, linears)
    else:
        config = SmoothQuantConfig(type="smooth_quant") if method == "smooth_quant" else iter_smooth()
        done = smooth.apply(work, config, linears)
    record = next(record for record in done.smoothing if record.group == NAME)
    assert record.alpha is not None and record.gain < 0.8, record
    factors = work.weights[f"{NORM}.weight"].float() / done.weights[f"{NORM}.weight"].float()
    assert (torch.frexp(factors).mantissa == 0.5).all()  # powers of two
    assert factors[list(OUTLIERS)].min() > 2 * factors.median()
    assert done.weights[f"{ROUTER}.weight"].dtype == dtype
    assert {f"{NORM}.weight", f"{ROUTER}.weight"} <= done.changed
    before, after = layer_of(checkpoint, work.weights), layer_of(checkpoint, folded(done))
    x = states(2).hidden
    with torch.inference_mode():
        routers = [layer.mlp.gate(layer.post_attention_layernorm(x)) for layer in (before, after)]
        assert torch.equal(*routers)
        assert torch.equal(*(layer.mlp(layer.post_attention_layernorm(x)) for layer in (before, after)))
    assert [t.tolist() for t in before.mlp.routed] == [t.tolist() for t in after.mlp.routed]


@pytest.mark.parametrize("method", ["smooth", "awq"])
def test_without_outliers_nothing_changes(method: str, checkpoint: Checkpoint, spec: LayerSpec) -> None:
    """The factors that rounding to powers of two leaves are 1, or bring nothing."""
    work = work_of(checkpoint, spec, W8A8 if method == "smooth" else INT4, gain=1)
    experts = frozenset(linear for linear in spec.linears if "experts" in linear)
    done = smooth.apply(work, iter_smooth(), experts) if method == "smooth" else awq.apply(work, AWQ, experts)
    (record,) = done.smoothing
    assert record.group == NAME and record.gain > 0.97
    assert record.alpha is not None or done.changed == frozenset()


def test_error_of_all_experts_by_hand() -> None:
    # As in test_expected_error: token (6, 8) and row (1, 2) have y = 22, and 720 becomes 804 with the factors (2, 1).
    # A second expert has the token (2, 1) and the row (3, 1), y = 7: 2² * 10 + 5 * 3² = 85; with the factors, token
    # (1, 1) and row (6, 1): 1 * 37 + 2 * 36 = 109. Each is divided by y², and every token counts alike.
    def stats(*token: float) -> InputStats:
        return input_stats(torch.tensor([token]), torch.zeros(1, dtype=torch.int8), torch.arange(1))

    inputs = [
        (stats(6.0, 8.0), [torch.tensor([[1.0, 2.0]])]),
        (stats(2.0, 1.0), [torch.tensor([[3.0, 1.0]])]),
    ]
    errors = ExpectedErrors.of_tokens(inputs, W8A8)
    expected = (804 / 22**2 + 109 / 7**2) / (720 / 22**2 + 85 / 7**2)
    assert errors.ratios(torch.tensor([2.0, 1.0])).tolist() == pytest.approx([expected])


def test_full_comparison_adds_the_errors_of_the_experts(
    checkpoint: Checkpoint, spec: LayerSpec, shared: Subgraph
) -> None:
    """The gain in the record, from all tokens and experts in float64."""
    work = work_of(checkpoint, spec, W8A8)
    done = smooth.apply(work, iter_smooth(0.5), frozenset(shared.linears))
    (record,) = done.smoothing
    assert work.stats is not None and done.stats is not None
    total = {"gate_proj": [0.0, 0.0, 0.0], "up_proj": [0.0, 0.0, 0.0]}
    for group in shared.groups:
        before, after = work.stats[group.name].rows, done.stats[group.name].rows
        for linear in group.linears:
            exact = before.double() @ work.weights[f"{linear}.weight"].double().T
            inverse = 1 / exact.norm(dim=1, keepdim=True)
            sums = total[linear.rpartition(".")[2]]
            for place, (x, weight) in enumerate(
                ((before, work.weights[f"{linear}.weight"].float()), (after, done.weight(linear)))
            ):
                scale = x.abs().amax(dim=1, keepdim=True) / 127
                rounded = (x / scale).round().double() * scale.double()
                output = rounded @ dequantize(quantize_weight(weight, W8A8)).double().T
                sums[place] += float(((output - exact).square() * inverse).sum())
            sums[2] += float((exact.square() * inverse).sum())
    plain, smoothed = (sum(sums[i] / sums[2] for sums in total.values()) for i in (0, 1))
    assert record.gain == pytest.approx((smoothed / plain) ** 0.5, rel=0.02)


def test_loss_of_awq_adds_the_errors_of_the_experts(checkpoint: Checkpoint, spec: LayerSpec, shared: Subgraph) -> None:
    """The gain in the record: Σ h_c Δw_oc² over all experts, in float64. The tiny weights are sampled completely."""
    work = work_of(checkpoint, spec, INT4)
    done = awq.apply(work, AWQ, frozenset(shared.linears))
    (record,) = done.smoothing
    assert work.stats is not None and record.alpha is not None
    factors = work.weights[f"{NORM}.weight"].double() / done.weights[f"{NORM}.weight"].double()
    errors, signals = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for group in shared.groups:
        rows = work.stats[group.name].gram({0: 1.0})
        for place, linear in enumerate(group.linears):
            weight = work.weights[f"{linear}.weight"].double()
            signals[place] += rows.output_error(weight.float()).double().sum()
            for number, s in enumerate((torch.ones_like(factors), factors)):
                change = dequantize(quantize_weight((weight * s).float(), INT4)).double() / s - weight
                errors[number, place] += (change.square() @ rows.diagonal().double()).sum()
    plain, scaled = (errors / signals).sum(dim=1)
    assert record.gain == pytest.approx(float((scaled / plain).sqrt()), rel=0.01)


def test_experts_without_tokens_get_the_same_factors(checkpoint: Checkpoint, spec: LayerSpec, shared: Subgraph) -> None:
    """They count for nothing in the search, but read the same norm."""
    work = work_of(checkpoint, spec, W8A8)
    assert work.stats is not None
    of_few = work.stats["mlp.experts.2.gate_up"]
    few = replace(of_few, count=of_few.count.clamp_max(FEWEST_EXPERT_TOKENS - 1))
    stats = {name: value for name, value in work.stats.items() if not name.startswith("mlp.experts.5.")}
    work = replace(work, stats={**stats, "mlp.experts.2.gate_up": few})
    done = smooth.apply(work, iter_smooth(), frozenset(shared.linears))
    (record,) = done.smoothing
    assert record.alpha is not None
    columns = [done.fold(linear).columns for linear in shared.linears]
    assert all(c is not None and torch.equal(c, columns[0]) for c in columns)
    none = replace(work, stats={name: few for name in stats if name.startswith("mlp.experts.")})
    (record,) = smooth.apply(none, iter_smooth(), frozenset(shared.linears)).smoothing
    assert record.alpha is None and record.reason == "fewer than 32 tokens reached any expert"


def test_partly_selected_experts_are_recorded_and_unchanged(
    checkpoint: Checkpoint, spec: LayerSpec, shared: Subgraph
) -> None:
    work = work_of(checkpoint, spec, W8A8)
    done = smooth.apply(work, iter_smooth(), frozenset(shared.linears[:-1]))
    (record,) = done.smoothing
    assert record.alpha is None and record.reason == "the recipe selects only some Linears of the group"
    assert done.changed == frozenset()
    schemes = {name: W8A8 for name in spec.linears if name not in shared.groups[3].linears}
    done = smooth.apply(replace(work, schemes=schemes), iter_smooth(), frozenset(shared.linears))
    (record,) = done.smoothing
    assert record.reason == f"{NAME} stays float, and scaling would round it" and done.changed == frozenset()


def test_channels_that_leave_the_range_of_a_dtype_stay() -> None:
    # float16: 2^-24 is the smallest number, 65504 the largest. 3 * 2^-24 / 2 cannot be stored, and neither can 120000.
    norm = torch.tensor([1.0, 3 * 2.0**-24, 1.0, 1.0, 1.0]).half()
    router = torch.tensor([[1.0, 1.0, 60000.0, 0.5, 1.0], [0.0, 1.0, 1.0, 3.0, 1.0]]).half()
    factors = torch.tensor([11.7, 6.0, 6.0, 0.9, 3.0])  # of which the median is 6
    powers = fold._exact_powers(factors, norm, [router])
    assert powers.tolist() == [2.0, 1.0, 1.0, 0.125, 0.5]
    powers = fold._exact_powers(factors / torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0]), norm, [router])  # now it is 11.7
    assert powers.tolist() == [1.0, 1.0, 1.0, 2.0**-4, 0.25]


def test_a_rarely_used_expert_keeps_a_row(checkpoint: Checkpoint, spec: LayerSpec) -> None:
    """With few chosen tokens, an expert may get none of them; its first token of the sample is kept instead."""
    layer = layer_of(checkpoint, weights_with_outliers(checkpoint, spec, torch.float32, 1))
    recorder = InputRecorder(layer, spec)
    recorder.begin(torch.zeros(TOKENS, dtype=torch.int8), torch.tensor([7]))
    recorder.end(run_layer(layer, states(3)))
    stats = recorder.finish()
    routed = layer.get_submodule("mlp").routed
    experts = [stats[group.name] for group in spec.groups if group.expert is not None and group.linears[0][-9] == "g"]
    assert len(experts) == 8 and all(len(of_expert.rows) == 1 for of_expert in experts)
    assert sum(7 in tokens.tolist() for tokens in routed) == 2
    work = LayerWork(0, spec, dict.fromkeys(spec.linears, W8A8), layer.state_dict(), stats, importance={0: 1.0})
    assert len(smooth.apply(work, iter_smooth(), frozenset(spec.linears)).smoothing) > 0
