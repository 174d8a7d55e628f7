"""AWQ: the search finds the minimum of its grid, the folds are exact, and the reported gain is the real gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_layer import (
    HEAD_DIM,
    SPEC,
    Sample,
    build,
    layer_weights,
    output,
    received_attention,
    record,
    sample,
    tensors,
    work_of,
)

from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.models.spec import LayerSpec, LinearGroup, Subgraph
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import awq, gptq, linear_quant
from msmodelslim_omni.processors.awq import search_losses, squared_outputs
from msmodelslim_omni.processors.gptq import factorize, relative_damping
from msmodelslim_omni.processors.rounding import cholesky_for_gptq, round_group
from msmodelslim_omni.processors.work import LayerWork, SmoothingRecord
from msmodelslim_omni.recipe.processors import AwqConfig, LinearQuantConfig
from msmodelslim_omni.statistics.capture import input_stats
from msmodelslim_omni.statistics.gram import Gram

GPTQ = QuantScheme(4, None, "gptq", 32, symmetric=False)
MINMAX, MSE = replace(GPTQ, weight_method="minmax"), replace(GPTQ, weight_method="mse")
SYM = replace(MINMAX, symmetric=True)
METHODS = pytest.mark.parametrize("scheme", [MINMAX, MSE, GPTQ, SYM], ids=["minmax", "mse", "gptq", "sym"])
ALL = frozenset(SPEC.linears)
GROUPS = {group.name: group for group in SPEC.groups}
KINDS = {"norm-linear": ("qkv", "gate_up"), "ov": ("o",), "up-down": ("down",)}
AUDIO, VIDEO = MODALITIES.index("audio"), MODALITIES.index("video")
SAMPLES = [sample(tokens=40, seed=1), sample(tokens=60, seed=2)]


@pytest.fixture(autouse=True)
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the few tokens of these tests, linear_quant would compare GPTQ with the clip search; see test_judge.py."""
    monkeypatch.setattr(gptq, "ENOUGH_TOKENS", 0)


def config(*kinds: str, n_grid: int = 20) -> AwqConfig:
    kinds = kinds or tuple(KINDS)
    return AwqConfig.model_validate({"type": "awq", "n_grid": n_grid, "enable_subgraph_type": kinds})


def linear_quant_of(scheme: QuantScheme) -> LinearQuantConfig:
    weight = {"scope": "per_group", "dtype": "int4", "symmetric": scheme.symmetric, "method": scheme.weight_method}
    weight["ext"] = {"group_size": scheme.group_size}
    return LinearQuantConfig.model_validate({"type": "linear_quant", "qconfig": {"weight": weight}})


def outlier_work(
    scheme: QuantScheme, dtype: torch.dtype = torch.bfloat16, samples: list[Sample] = SAMPLES
) -> LayerWork:
    """A layer in which the input of every group has outlier channels."""
    weights = layer_weights(dtype)
    for name, channels in (("self_attn.v_proj", (5, 20)), ("mlp.up_proj", (7, 61))):
        weights[f"{name}.weight"][list(channels)] *= 64
    return work_of(weights, samples, scheme)


def alone(group: LinearGroup) -> Subgraph:
    return Subgraph(group.name, (group,))


def records(work: LayerWork) -> dict[str, SmoothingRecord]:
    return {record.group: record for record in work.smoothing}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the search, compared with a direct loop -----------------------------------------------------------------


def tokens_of(weights: dict[str, torch.Tensor], group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a group, [tokens, in] float64, and the modality of each token."""
    stats = record(weights, SAMPLES)[group.name]
    return stats.rows.double(), stats.row_modality


def balanced(modality: torch.Tensor) -> torch.Tensor:
    """The weight of each token if every modality has the same weight; the weights of all tokens sum to one."""
    counts = modality.long().bincount(minlength=len(MODALITIES))
    return 1 / (counts[modality.long()] * (counts > 0).sum()).double()


def error_weights(weights: dict[str, torch.Tensor], group: LinearGroup, modality: torch.Tensor) -> torch.Tensor:
    """The weight of each token's error: `balanced`, and 1 / |h| with the layer's output h if it is added to h.

    In front of v_proj, with the attention that the token receives.
    """
    if group == SPEC.value_group:
        return balanced(modality) * (1 + received_attention(weights, SAMPLES)).double()
    if not group.adds_to_residual:
        return balanced(modality)
    lengths = torch.cat([output(weights, each)[0] for each in SAMPLES]).double().norm(dim=1)
    return balanced(modality) / lengths


def storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.bfloat16).to(torch.float16).double()


def fake_quantized(weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Nearest rounding in groups of 32, in float64: s = range / 15 and a zero point; symmetric: max / 7 or -min / 8."""
    grouped = weight.view(len(weight), -1, 32)
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    if scheme.symmetric:
        s = storable(torch.maximum(high / 7, -low / 8))
        return ((grouped / s).round().clamp(-8, 7) * s).flatten(1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    s = storable((high - low) / 15)
    zero = (-low / s).round()
    return (((grouped / s).round() + zero).clamp(0, 15) - zero).mul(s).flatten(1)


def shared(per_input: torch.Tensor, group: LinearGroup) -> torch.Tensor:
    """The mean over the query heads that read one key-value head, repeated for each of these heads."""
    heads = per_input.view(-1, group.repeat, group.head_dim).mean(1, keepdim=True)
    return heads.expand(-1, group.repeat, -1).flatten()


def autoawq_scales(
    x: torch.Tensor, weight_of_token: torch.Tensor, weights: list[torch.Tensor], group: LinearGroup, n_grid: int
) -> list[torch.Tensor]:
    """The identity, then the scales of AutoAWQ for each ratio with and without duo scaling: [in] each."""
    x_mean = shared((x.abs() * weight_of_token[:, None]).sum(0), group)
    stacked = torch.cat(weights)
    magnitude = stacked.abs().view(len(stacked), -1, 32)
    w_mean = shared((magnitude / (magnitude.amax(2, keepdim=True) + 1e-6)).flatten(1).mean(0), group)
    all_scales = [torch.ones_like(x_mean)]
    for step in range(n_grid + 1):
        ratio = step / n_grid
        with_duo = x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)
        for scales in (with_duo, x_mean.pow(ratio)) if step else (with_duo,):
            scales = scales.clamp_min(1e-4)
            all_scales.append(scales / (scales.max() * scales.min()).sqrt())
    return all_scales


def direct_loss(
    x: torch.Tensor,
    weight_of_token: torch.Tensor,
    weights: list[torch.Tensor],
    scales: torch.Tensor,
    scheme: QuantScheme,
) -> float:
    """The weighted squared error of the outputs relative to their energy, summed over the Linears."""
    total = 0.0
    for weight in weights:
        exact = x @ weight.T
        error = (x / scales) @ fake_quantized(weight * scales, scheme).T - exact
        total += float(
            (error.square() * weight_of_token[:, None]).sum() / (exact.square() * weight_of_token[:, None]).sum()
        )
    return total


@pytest.mark.parametrize("scheme", [MINMAX, SYM], ids=["asym", "sym"])
@pytest.mark.parametrize("name", GROUPS)
def test_search_finds_the_minimum_of_a_direct_loop_over_the_grid(name: str, scheme: QuantScheme) -> None:
    """Computes the scales, their losses and the best one from the tokens in float64 with the formula of AutoAWQ."""
    group, work = GROUPS[name], outlier_work(scheme, torch.float32)
    assert work.stats is not None
    weights = [work.weights[f"{linear}.weight"].float() for linear in group.linears]
    candidates = list(awq._grid(work, alone(group), scheme, 10))
    gram = work.stats[name].gram(work.importance)
    losses = search_losses(candidates, alone(group), weights, squared_outputs(gram, weights), scheme, gram, None)

    x, modality = tokens_of(work.weights, group)
    doubles, share = [weight.double() for weight in weights], balanced(modality)
    scales = autoawq_scales(x, share, doubles, group, 10)
    assert len(candidates) == len(scales) == 1 + 11 + 10
    of_errors = error_weights(work.weights, group, modality)
    expected_losses = [direct_loss(x, of_errors, doubles, s, scheme) for s in scales]
    for number, expected in enumerate(scales):
        factors = awq.repeat_for_query_heads(candidates[number].factors, alone(group)).double()
        torch.testing.assert_close(factors, expected, rtol=1e-4, atol=0)
        assert losses[number] == pytest.approx(expected_losses[number], rel=0.02)

    scaled = awq.apply(work, config(group.subgraph, n_grid=10), frozenset(group.linears))
    chosen = min(range(len(expected_losses)), key=expected_losses.__getitem__)
    assert chosen != 0
    record_of_group = records(scaled)[name]
    gain = (expected_losses[chosen] / expected_losses[0]) ** 0.5
    if "refined" in record_of_group.reason:  # better than every grid point
        assert record_of_group.gain < 1.01 * gain
        return
    if record_of_group.alpha != candidates[chosen].ratio:  # two grid points may be equally good
        ratios = [i for i, c in enumerate(candidates) if c.ratio == record_of_group.alpha]
        assert min(expected_losses[i] for i in ratios) < 1.01 * expected_losses[chosen]
    assert record_of_group.gain == pytest.approx(gain, rel=0.02)


def test_search_with_gptq_weights_errors_by_the_pivots() -> None:
    """The loss is the sum of L_ii^2 d_i^2, with L of the damped H in rounding order, in float64."""
    group, work = GROUPS["gate_up"], outlier_work(GPTQ, torch.float32)
    assert work.stats is not None
    weights = [work.weights[f"{linear}.weight"].float() for linear in group.linears]
    candidates = list(awq._grid(work, alone(group), GPTQ, 5))
    gram = work.stats["gate_up"].gram(work.importance)
    cholesky = factorize(gram)
    losses = search_losses(candidates, alone(group), weights, squared_outputs(gram, weights), GPTQ, gram, cholesky)

    x, modality = tokens_of(work.weights, group)
    h = (x * balanced(modality)[:, None]).T @ x
    damped = h + relative_damping(gram.tokens, len(h)) * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = cholesky.order
    pivots = torch.empty(len(h), dtype=torch.float64)
    pivots[order] = torch.linalg.cholesky(damped[order][:, order]).diagonal().square()
    for number, candidate in enumerate(candidates):
        scales, total = awq.repeat_for_query_heads(candidate.factors, alone(group)).double(), 0.0
        for weight in (w.double() for w in weights):
            change = fake_quantized(weight * scales, GPTQ) / scales - weight
            total += float((change.square() @ pivots).sum() / ((weight @ h) * weight).sum())
        assert losses[number] == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("n_grid", [1, 7, 20])
def test_identity_is_always_in_the_grid(n_grid: int) -> None:
    work = outlier_work(MINMAX)
    for group in SPEC.groups:
        candidates = list(awq._grid(work, alone(group), MINMAX, n_grid))
        assert torch.equal(candidates[0].factors, torch.ones_like(candidates[0].factors))
        assert candidates[0].name == "identity"
        assert len(candidates) == 2 + 2 * n_grid
        assert {candidate.ratio for candidate in candidates} == {step / n_grid for step in range(n_grid + 1)}
        assert all((c.factors > 0).all() and torch.isfinite(c.factors).all() for c in candidates)


def test_search_over_sampled_rows_estimates_the_loss_of_all_rows() -> None:
    """The search uses only some output channels of a large Linear; their losses are close to those of all channels."""
    x = normal(300, 64, seed=1)
    x[:, [3, 40]] *= 30
    gram = Gram(x.T @ x, None, 300)
    weights = [normal(8192, 64, seed=2)]
    group = LinearGroup("g", ("a",), "norm", "norm-linear")
    candidates = [awq.Candidate(r, False, x.abs().mean(0).pow(r)) for r in (0.0, 0.25, 0.5, 0.75)]
    losses = search_losses(candidates, alone(group), weights, squared_outputs(gram, weights), MINMAX, gram, None)
    doubles = weights[0].double()
    for number, candidate in enumerate(candidates):
        scales = candidate.factors.double()
        error = ((x.double() / scales) @ fake_quantized(doubles * scales, MINMAX).T - x.double() @ doubles.T).square()
        assert losses[number] == pytest.approx(float(error.sum() / (x.double() @ doubles.T).square().sum()), rel=0.05)


# --- the folds are exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [(torch.bfloat16, MINMAX), (torch.bfloat16, GPTQ), (torch.float16, MINMAX), (torch.float32, MSE)],
    ids=["bfloat16-minmax", "bfloat16-gptq", "float16-minmax", "float32-mse"],
)
def test_float_function_is_unchanged(dtype: torch.dtype, scheme: QuantScheme) -> None:
    """Up to float32 rounding, although norms and biases keep their stored dtype."""
    work, unseen = outlier_work(scheme, dtype), sample(seed=7)
    exact = output(work.weights, unseen)
    for kind, groups in KINDS.items():
        scaled = awq.apply(work, config(kind, n_grid=5), ALL)
        assert {n for n, r in records(scaled).items() if r.alpha is not None} == set(groups)
        assert relative(output(tensors(scaled), unseen), exact) < 1e-5
    together = awq.apply(work, config(n_grid=5), ALL)
    assert relative(output(tensors(together), unseen), exact) < 1e-5
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert together.weights[f"{norm}.weight"].dtype == dtype
        assert not torch.equal(together.weights[f"{norm}.weight"], work.weights[f"{norm}.weight"])
    assert together.weights["self_attn.v_proj.bias"].dtype == dtype
    differing = {n for n, t in work.weights.items() if not torch.equal(t.float(), together.tensor(n).float())}
    assert differing <= together.changed


def test_query_heads_of_a_key_value_head_share_the_factors_of_o() -> None:
    work = outlier_work(MINMAX, torch.float32)
    scaled = awq.apply(work, config("ov"), ALL)
    columns = (scaled.tensor("self_attn.o_proj.weight") / work.weights["self_attn.o_proj.weight"]).median(0).values
    heads = columns.view(4, HEAD_DIM)
    torch.testing.assert_close(heads[0], heads[1])
    torch.testing.assert_close(heads[2], heads[3])
    assert not torch.allclose(heads[0], heads[2], rtol=0.01)
    rows = (work.weights["self_attn.v_proj.weight"] / scaled.tensor("self_attn.v_proj.weight")).median(1).values
    torch.testing.assert_close(rows, heads[::2].flatten(), rtol=1e-5, atol=0)
    bias = work.weights["self_attn.v_proj.bias"] / scaled.weights["self_attn.v_proj.bias"]
    torch.testing.assert_close(bias, rows, rtol=1e-4, atol=0)


@METHODS
def test_statistics_match_the_scaled_layer(scheme: QuantScheme) -> None:
    """The next processor sees the current inputs: rows, sums, and H or its factor."""
    scaled = awq.apply(outlier_work(scheme), config(), ALL)
    again = work_of(tensors(scaled), SAMPLES, scheme)
    assert scaled.stats is not None and again.stats is not None
    for name in GROUPS:
        kept, true = scaled.stats[name], again.stats[name]
        torch.testing.assert_close(kept.rows, true.rows, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(kept.abssum, true.abssum, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kept.absmax, true.absmax, rtol=1e-3, atol=1e-4)
        assert (name in scaled.cholesky_factors) == (scheme.weight_method == "gptq")
        if name not in scaled.cholesky_factors:
            kept_gram, true_gram = kept.gram(scaled.importance), true.gram(again.importance)
            assert relative(kept_gram.diagonal(), true_gram.diagonal()) < 1e-3


# --- the choice ----------------------------------------------------------------------------------------------


def group_error(work: LayerWork, quantized: Mapping[str, Any], group: LinearGroup, exact: LayerWork) -> float:
    """The squared error of the outputs of a group relative to their energy, from its rows weighted by importance."""
    assert work.stats is not None and exact.stats is not None
    before, now = exact.stats[group.name].rows.double(), work.stats[group.name].rows.double()
    share = error_weights(exact.weights, group, exact.stats[group.name].row_modality)[:, None]
    total = 0.0
    for linear in group.linears:
        true = before @ exact.weights[f"{linear}.weight"].double().T
        error = now @ dequantize(quantized[linear]).double().T - true
        total += float((error.square() * share).sum() / (true.square() * share).sum())
    return total


@METHODS
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.usefixtures("all_steps")
def test_outlier_channels_are_scaled_and_the_error_falls(name: str, scheme: QuantScheme) -> None:
    group, work = GROUPS[name], outlier_work(scheme)
    scaled = awq.apply(work, config(group.subgraph), frozenset(group.linears))
    assert records(scaled)[name].alpha is not None and 0 < records(scaled)[name].gain < 0.97
    rounding = linear_quant_of(scheme)
    with_awq = linear_quant.apply(scaled, rounding, frozenset(group.linears)).quantized
    without = linear_quant.apply(work, rounding, frozenset(group.linears)).quantized
    ratio = (group_error(scaled, with_awq, group, work) / group_error(work, without, group, work)) ** 0.5
    assert ratio < 0.97
    if scheme.weight_method == "minmax":
        assert ratio == pytest.approx(records(scaled)[name].gain, rel=0.02)  # the reported gain is the real gain


def test_layer_that_rounds_exactly_is_unchanged() -> None:
    """Every weight is already a code, and every group uses the full range, so that any change adds error."""
    weights = layer_weights(torch.float32)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            codes = torch.randint(-8, 8, tensor.shape, generator=torch.Generator().manual_seed(4)).float()
            codes[:, ::32], codes[:, 1::32] = -8, 7
            weights[name] = codes / 64
    work = work_of(weights, SAMPLES, MINMAX)
    scaled = awq.apply(work, config(), ALL)
    assert scaled.weights is work.weights and not scaled.changed
    for name in GROUPS:
        assert (records(scaled)[name].alpha, records(scaled)[name].gain) == (None, 1.0)
        assert "the identity is best" in records(scaled)[name].reason
        assert "tokens" in records(scaled)[name].reason  # how H is stored


def test_partly_selected_group_is_recorded_and_unchanged() -> None:
    work = outlier_work(MINMAX)
    scaled = awq.apply(work, config("norm-linear"), ALL - {"self_attn.k_proj"})
    assert records(scaled)["qkv"] == SmoothingRecord(
        "qkv", None, 1.0, "the recipe selects only some Linears of the group"
    )
    assert records(scaled)["gate_up"].alpha is not None
    assert scaled.weights["input_layernorm.weight"] is work.weights["input_layernorm.weight"]
    assert set(records(scaled)) == {"qkv", "gate_up"}


def test_group_with_a_float_member_is_recorded_and_unchanged() -> None:
    work = outlier_work(MINMAX)
    schemes = {name: MINMAX for name in SPEC.linears if name != "mlp.gate_proj"}
    scaled = awq.apply(replace(work, schemes=schemes), config("norm-linear"), ALL)
    assert records(scaled)["gate_up"].alpha is None
    assert "mlp.gate_proj stays float" in records(scaled)["gate_up"].reason


def factors_of_two_modalities(weight_of: Mapping[int, float]) -> torch.Tensor:
    """The factors of a group with audio tokens that are large in channel 2 and video tokens that are in channel 9."""
    x = normal(400, 32, seed=3)
    modality = torch.tensor([AUDIO, VIDEO] * 200, dtype=torch.int8)
    x[::2, 2] *= 50
    x[1::2, 9] *= 50
    group = LinearGroup("g", ("linear",), "norm", "norm-linear")
    spec = LayerSpec((group,), {"norm.weight": (32,), "linear.weight": (24, 32)})
    weights = {"norm.weight": torch.ones(32), "linear.weight": normal(24, 32, seed=5)}
    grams = {m: Gram(part.T @ part, None, 200) for m, part in ((AUDIO, x[::2]), (VIDEO, x[1::2]))}
    stats = replace(input_stats(x, modality, torch.arange(400)), grams=grams)
    work = LayerWork(0, spec, {"linear": MINMAX}, weights, {"g": stats}, weight_of)
    scaled = awq.apply(work, config("norm-linear"), frozenset({"linear"}))
    assert scaled.smoothing[0].alpha is not None
    return 1 / scaled.weights["norm.weight"]


def test_modalities_count_by_their_weights() -> None:
    audio = factors_of_two_modalities({AUDIO: 1 / 200, VIDEO: 0.0})
    video = factors_of_two_modalities({AUDIO: 0.0, VIDEO: 1 / 200})
    both = factors_of_two_modalities({AUDIO: 1 / 400, VIDEO: 1 / 400})
    assert audio[2] > 2 * audio[9] and video[9] > 2 * video[2]
    assert 0.6 < both[2] / both[9] < 1.6
    others = [factors[torch.arange(32).remainder(7) == 3].median() for factors in (audio, video, both)]
    assert audio[2] > 2 * others[0] and video[9] > 2 * others[1] and both[2] > 2 * others[2]


# --- the probe decides ---------------------------------------------------------------------------------------


class FakeProbe:
    """A probe that returns error 0 for one given rounding and 1 for any other, and records its calls."""

    def __init__(self, preferred: dict[str, torch.Tensor]) -> None:
        self.preferred = preferred
        self.calls: list[tuple[str, dict[str, torch.Tensor]]] = []

    def block_errors(self, block: str, candidates: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
        return [self._error(block, weights) for weights in candidates]

    def _error(self, block: str, weights: Mapping[str, torch.Tensor]) -> float:
        self.calls.append((block, dict(weights)))
        return 0.0 if all(torch.equal(self.preferred[name], tensor) for name, tensor in weights.items()) else 1.0


def unscaled_rounding(work: LayerWork) -> dict[str, torch.Tensor]:
    """Every Linear, rounded without scaling by the method of the layer and dequantized."""
    assert work.stats is not None
    dequantized = {}
    for group in SPEC.groups:
        gram = work.stats[group.name].gram(work.importance)
        weights = {linear: work.weights[f"{linear}.weight"].float() for linear in group.linears}
        schemes = {linear: work.schemes[linear] for linear in group.linears}
        rounded = round_group(weights.items(), schemes, gram, cholesky_for_gptq(schemes, gram))
        dequantized |= {f"{linear}.weight": dequantize(quantized) for linear, quantized in rounded.items()}
    return dequantized


@METHODS
def test_probe_may_prefer_the_identity(scheme: QuantScheme) -> None:
    work = outlier_work(scheme)
    probe = FakeProbe(unscaled_rounding(work))
    scaled = awq.apply(replace(work, probe=probe), config("norm-linear"), ALL)
    assert {block for block, _ in probe.calls} == {"self_attn", "mlp"}
    for name in ("qkv", "gate_up"):
        assert (records(scaled)[name].alpha, records(scaled)[name].gain) == (None, 1.0)
    assert scaled.weights is work.weights
    # The probe gets rounded weights in the scale of the float layer.
    for _, weights in probe.calls:
        assert all(relative(tensor, work.weights[name]) < 0.3 for name, tensor in weights.items())


def test_probe_may_prefer_the_second_best_of_the_search() -> None:
    """The probe also measures the best candidate of the search, and prefers the second best."""
    work = outlier_work(MINMAX)
    recording = FakeProbe(unscaled_rounding(work))
    awq.apply(replace(work, probe=recording), config("norm-linear"), frozenset(GROUPS["qkv"].linears))
    assert len(recording.calls) == 3
    first, second = (record_with(work, FakeProbe(weights)) for _, weights in recording.calls[1:])
    assert first.alpha is not None and second.alpha is not None
    assert first.reason != second.reason
    assert "measured on the output of self_attn" in second.reason
    assert first.gain == second.gain == 0.0  # from the probe


def record_with(work: LayerWork, probe: FakeProbe) -> SmoothingRecord:
    scaled = awq.apply(replace(work, probe=probe), config("norm-linear"), frozenset(GROUPS["qkv"].linears))
    return records(scaled)["qkv"]


def layer_probe(work: LayerWork) -> LayerProbe:
    probe = LayerProbe(build(work.weights), {"self_attn", "mlp"}, work.importance)
    for watched in SAMPLES:
        probe.watch(watched.inputs, watched.modality)
    return probe


@METHODS
def test_true_block_error_is_less_than_that_of_unscaled_rounding(scheme: QuantScheme) -> None:
    work = outlier_work(scheme)
    probe = layer_probe(work)
    for name in ("qkv", "gate_up"):
        group = GROUPS[name]
        scaled = awq.apply(replace(work, probe=probe), config("norm-linear"), frozenset(group.linears))
        factors = scaled.weight(group.linears[0]) / work.weights[f"{group.linears[0]}.weight"].float()
        rounded = linear_quant.apply(scaled, linear_quant_of(scheme), frozenset(group.linears)).quantized
        back = {f"{linear}.weight": dequantize(rounded[linear]) / factors.median(0).values for linear in group.linears}
        plain = {name: tensor for name, tensor in unscaled_rounding(work).items() if name in back}
        of_scaled, of_plain = probe.block_errors(group.block, [back, plain])
        ratio = (of_scaled / of_plain) ** 0.5
        assert records(scaled)[name].alpha is not None  # outliers this large make scaling worthwhile
        assert ratio == pytest.approx(records(scaled)[name].gain, rel=1e-3)
        assert ratio < 0.98


@METHODS
def test_factors_folded_into_rows_do_not_count_as_block_error(
    scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`down` is scaled before gate and up, `o` before q, k and v: the block error includes both sides of the folds."""
    errors_of: dict[str, list[float]] = {}
    real = awq._block_error

    def recording(work: LayerWork, part: Subgraph, *rest: Any) -> float:
        errors_of.setdefault(part.name, []).append(error := real(work, part, *rest))
        return error

    monkeypatch.setattr(awq, "_block_error", recording)
    work = replace(outlier_work(scheme), probe=layer_probe(outlier_work(scheme)))
    scaled = awq.apply(work, config(), ALL)
    assert all(record.alpha is not None for record in scaled.smoothing)
    together = {name: errors[0] for name, errors in errors_of.items()}  # of the identity
    for name in KINDS["norm-linear"]:
        errors_of.clear()
        awq.apply(work, config("norm-linear"), frozenset(GROUPS[name].linears))
        assert together[name] == pytest.approx(errors_of[name][0], rel=0.2)


# --- rounding afterwards -------------------------------------------------------------------------------------


@METHODS
def test_current_weights_are_rounded(scheme: QuantScheme) -> None:
    """Also if the search already rounded the weights, or a later fold divided their rows."""
    work = replace(outlier_work(scheme), probe=layer_probe(outlier_work(scheme)))
    scaled = awq.apply(work, config(), ALL)
    assert all(record.alpha is not None for record in scaled.smoothing)
    quantized = linear_quant.apply(scaled, linear_quant_of(scheme), ALL).quantized
    assert set(quantized) == ALL
    for linear in SPEC.linears:
        assert relative(dequantize(quantized[linear]), scaled.weight(linear)) < 0.3, linear
        assert quantized[linear].scheme == scheme
    rounded = {**tensors(scaled), **{f"{linear}.weight": dequantize(q) for linear, q in quantized.items()}}
    plain = {**work.weights, **unscaled_rounding(outlier_work(MINMAX))}
    errors = [relative(output(weights, SAMPLES[1]), output(work.weights, SAMPLES[1])) for weights in (rounded, plain)]
    assert errors[0] < 0.8 * errors[1]


@METHODS
@pytest.mark.parametrize("second", ["ov", "norm-linear"])
def test_second_awq_continues_from_the_first(second: str, scheme: QuantScheme) -> None:
    work = replace(outlier_work(scheme), probe=layer_probe(outlier_work(scheme)))
    twice = awq.apply(awq.apply(work, config("norm-linear"), ALL), config(second), ALL)
    assert relative(output(tensors(twice), SAMPLES[0]), output(work.weights, SAMPLES[0])) < 1e-5
    quantized = linear_quant.apply(twice, linear_quant_of(scheme), ALL).quantized
    for linear in SPEC.linears:
        assert relative(dequantize(quantized[linear]), twice.weight(linear)) < 0.3, linear


def test_too_few_tokens_for_gptq_are_reported() -> None:
    few = [sample(tokens=1, seed=3)]
    work = work_of(layer_weights(), few, GPTQ)
    done = linear_quant.apply(awq.apply(work, config(n_grid=4), ALL), linear_quant_of(GPTQ), ALL)
    notes = {note.split(":")[0]: note for note in done.notes}
    assert set(notes) == set(GROUPS)
    assert notes["qkv"] == (
        "qkv: 1 tokens are too few for GPTQ on 64 inputs (it needs 2); rounded to the nearest level with a clip search"
        " instead"
    )
    assert "on 96 inputs (it needs 3)" in notes["down"]
    assert not done.cholesky_factors
    enough = linear_quant.apply(work_of(layer_weights(), [sample(24)], GPTQ), linear_quant_of(GPTQ), ALL)
    assert enough.notes == () and set(enough.quantized) == ALL


def test_h_beyond_float32_does_not_end_the_run() -> None:
    work = work_of(layer_weights(), [sample(24)], GPTQ)
    assert work.stats is not None
    infinite = {
        name: replace(s, grams=s.divided(torch.full_like(s.absmax[0], 1e-20)).grams) for name, s in work.stats.items()
    }
    done = awq.apply(replace(work, stats=infinite), config(n_grid=4), ALL)
    assert {record.alpha for record in done.smoothing} == {None}  # the identity
    done = linear_quant.apply(done, linear_quant_of(GPTQ), ALL)
    assert set(done.quantized) == ALL
    assert [note.split(":")[0] for note in done.notes] == [group.name for group in SPEC.groups]
    assert all("has no Cholesky factor in float32" in note and "clip search" in note for note in done.notes)
    clipped = linear_quant.apply(replace(work, stats=None), linear_quant_of(GPTQ), ALL)  # by the weights alone
    for linear in SPEC.linears:
        assert torch.equal(done.quantized[linear].qweight, clipped.quantized[linear].qweight), linear
