"""analyze: measurements compared with direct computation, held-out samples, and both kinds of choice end to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from command import DATA, CommandResult, command, files, quant, write_index
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny_omni import make_tiny_omni
from tiny_layer import SPEC, Sample, build, layer_weights, output, record, sample, token_counts

from msmodelslim_omni.analysis.holdout import split_holdout
from msmodelslim_omni.analysis.holdout import write_index as write_part
from msmodelslim_omni.analysis.mixed_recipe import FLOAT, FP8, W4, W8, W8A16
from msmodelslim_omni.analysis.proposal import Proposal, Proposer
from msmodelslim_omni.analysis.result import Round, as_markdown, exclude_text, missed_estimates
from msmodelslim_omni.analysis.rounds import best_round, kl_per_damage, next_for_kl
from msmodelslim_omni.analysis.run import _split_dataset, analyze
from msmodelslim_omni.analysis.sensitivity import (
    UnitSensitivity,
    measure_unit,
    tail_statistics,
)
from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.calibration.samples import load_calib_set
from msmodelslim_omni.calibration.stream import Captured
from msmodelslim_omni.calibration.token_roles import token_importance
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files import parse_size
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type
from msmodelslim_omni.models.attention import AttentionRecord
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.models.spec import LinearGroup
from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_weight, quantized_matmul
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.plan.plan import LayerPlan, Step, make_plan
from msmodelslim_omni.processors.work import LayerWork
from msmodelslim_omni.recipe.loading import load_recipe
from msmodelslim_omni.recipe.processors import AwqConfig, IterSmoothConfig, LinearQuantConfig
from msmodelslim_omni.report.fidelity import Interval
from msmodelslim_omni.run.damage import quantized_modules
from msmodelslim_omni.run.emulation import EmulatedLinear
from msmodelslim_omni.runtime.progress import Progress
from msmodelslim_omni.statistics import run_layer
from msmodelslim_omni.storage.checkpoint import open_checkpoint

# --- one layer, compared with direct computation -------------------------------------------------------------

OMNI = MODEL_TYPES["Qwen2.5-Omni-7B"]
INT4, INT8 = QuantScheme(4, None, "minmax", 32), QuantScheme(8, 8)
SAMPLES = [sample(tokens=40, seed=1), sample(tokens=24, seed=2)]
GROUPS = {group.name: group for group in SPEC.groups}


def step(config: dict[str, Any]) -> Step:
    kinds = {"linear_quant": LinearQuantConfig, "awq": AwqConfig, "iter_smooth": IterSmoothConfig}
    return Step(config["type"], kinds[config["type"]].model_validate(config), frozenset(SPEC.linears))


INT4_WEIGHT = {"scope": "per_group", "dtype": "int4", "ext": {"group_size": 32}}
INT4_STEP = step({"type": "linear_quant", "qconfig": {"weight": INT4_WEIGHT}})
INT8_STEP = step({"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}})


def layer_plan(scheme: QuantScheme, *steps: Step) -> LayerPlan:
    return LayerPlan(0, dict.fromkeys(SPEC.linears, scheme), steps)


PLAIN = {INT4.name: layer_plan(INT4, INT4_STEP), INT8.name: layer_plan(INT8, INT8_STEP)}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in layer_weights().items()}


@pytest.fixture(scope="module")
def captured(weights: dict[str, torch.Tensor]) -> Captured:
    """Statistics with every token, and a probe with every sample."""
    importance = token_importance("balanced", token_counts(SAMPLES))
    probe = LayerProbe(build(weights), {"self_attn", "mlp"}, importance)
    for watched in SAMPLES:
        probe.watch(watched.inputs, watched.modality)
    return Captured(record(weights, SAMPLES, grams=True), importance, probe)


def measured(weights: dict[str, torch.Tensor], captured: Captured, group: LinearGroup) -> UnitSensitivity:
    names = {linear: f"layers.0.{linear}" for linear in group.linears}
    return measure_unit((group,), names, weights, PLAIN, SPEC, captured)[0]


def weights_in_h(weights: dict[str, torch.Tensor], group: LinearGroup) -> torch.Tensor:
    """The weight of each token of the samples in H of the group's input."""
    layer = build(weights)
    attention = AttentionRecord(layer)
    parts = []
    for watched in SAMPLES:
        lengths = run_layer(layer, watched.inputs)[0].norm(dim=1)
        by_group = {True: 1 / lengths, False: torch.ones_like(lengths)}[group.adds_to_residual]
        parts.append(1 + attention.received() if group == SPEC.value_group else by_group)
        attention.forget()
    attention.remove()
    return torch.cat(parts)


def relative(error: torch.Tensor, signal: torch.Tensor) -> float:
    return float(error.double().norm() / signal.double().norm())


@pytest.mark.parametrize("group", SPEC.groups, ids=lambda group: group.name)
def test_errors_of_a_linear_match_its_stored_inputs(
    weights: dict[str, torch.Tensor], captured: Captured, group: LinearGroup
) -> None:
    stats = captured.stats[group.name]
    for linear in measured(weights, captured, group).linears:
        weight = weights[f"{linear.name.removeprefix('layers.0.')}.weight"]
        in_h = weights_in_h(weights, group)
        for scheme in (INT4, INT8):
            rounded = quantize_weight(weight, scheme)
            exact = stats.rows @ weight.T
            error = quantized_matmul(stats.rows, rounded) - exact
            if scheme is INT4:
                exact, error = exact * in_h.sqrt()[:, None], error * in_h.sqrt()[:, None]
            assert linear.output_error[scheme.name].overall == pytest.approx(relative(error, exact), rel=1e-3)
            assert set(linear.output_error[scheme.name].by_modality) == set(MODALITIES)
            for index, name in enumerate(MODALITIES):
                rows = stats.row_modality == index
                direct = relative(error[rows], exact[rows])
                assert linear.output_error[scheme.name].by_modality[name] == pytest.approx(direct, rel=1e-3)
            direct = relative(dequantize(rounded) - weight, weight)
            assert linear.weight_error[scheme.name] == pytest.approx(direct, rel=1e-4)
        assert (linear.kurtosis, linear.outlier_share) == tail_statistics(stats.rows)
        assert linear.shape == tuple(weight.shape)


def noise_by_hand(changed: list[tuple[torch.Tensor, torch.Tensor]], samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of |e|² / |h|² over the tokens of each modality. changed: pairs of changed and true outputs."""
    ratio = torch.cat([((a - b)[0].double().norm(dim=1) / b[0].double().norm(dim=1)) ** 2 for a, b in changed])
    modality = torch.cat([sample.modality for sample in samples])
    return {name: float(ratio[modality == index].mean()) for index, name in enumerate(MODALITIES)}


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_noise_of_mlp_is_that_of_its_layer(weights: dict[str, torch.Tensor], captured: Captured, name: str) -> None:
    """The error of the MLP is the error of the layer, because the MLP is the last block."""
    group = GROUPS[name]
    rounded = {
        f"{linear}.weight": dequantize(quantize_weight(weights[f"{linear}.weight"], INT4)) for linear in group.linears
    }
    pairs = [(output({**weights, **rounded}, sample), output(weights, sample)) for sample in SAMPLES]
    direct = noise_by_hand(pairs, SAMPLES)
    unit = measured(weights, captured, group)
    assert unit.noise[INT4.name] == pytest.approx(direct, rel=1e-3) and unit.damage == {}
    assert (unit.layer, unit.group, unit.name) == (0, name, f"layer 0 {name}")


def test_noise_of_attention_is_that_behind_the_mlp_of_its_layer(
    weights: dict[str, torch.Tensor], captured: Captured
) -> None:
    """Also with int8 activations, computed with modules inserted into a second layer."""
    for name in ("qkv", "o"):
        unit = measured(weights, captured, GROUPS[name])
        changed = build(weights)
        for linear in GROUPS[name].linears:
            rounded = quantize_weight(weights[f"{linear}.weight"], INT8)
            child = EmulatedLinear(rounded, weights.get(f"{linear}.bias"))
            setattr(changed.self_attn, linear.removeprefix("self_attn."), child)
        pairs = [(run_layer(changed, watched.inputs), output(weights, watched)) for watched in SAMPLES]
        assert unit.noise[INT8.name] == pytest.approx(noise_by_hand(pairs, SAMPLES), rel=1e-2)


def test_probe_does_not_change_the_layer(weights: dict[str, torch.Tensor], captured: Captured) -> None:
    before = dict(captured.probe._layer.named_modules())
    noise = measured(weights, captured, GROUPS["qkv"]).noise
    assert dict(captured.probe._layer.named_modules()) == before
    assert measured(weights, captured, GROUPS["qkv"]).noise == noise
    unchanged = captured.probe.changes("mlp", {}, is_last=True)
    assert set(captured.probe.noise(unchanged).values()) == {0.0}
    outputs = captured.probe.changed_outputs(unchanged)
    assert all(torch.equal(a, output(weights, b)) for a, b in zip(outputs, SAMPLES, strict=True))


@pytest.mark.parametrize("group", SPEC.groups, ids=lambda group: group.name)
@pytest.mark.parametrize("kind", ["awq", "iter_smooth"])
@pytest.mark.usefixtures("all_steps")
def test_scaled_and_smoothed_modules_take_unscaled_inputs(
    weights: dict[str, torch.Tensor], captured: Captured, group: LinearGroup, kind: str
) -> None:
    """Except for rounding, the modules compute the output of the float Linear from the inputs of the float layer."""
    scheme, first, last = {
        "awq": (INT4, step({"type": "awq", "n_grid": 6}), INT4_STEP),
        "iter_smooth": (INT8, step({"type": "iter_smooth", "alpha": "auto"}), INT8_STEP),
    }[kind]
    plan = layer_plan(scheme, first, last)
    work = LayerWork(0, SPEC, plan.schemes, weights, captured.stats, captured.importance, probe=captured.probe)
    rows = captured.stats[group.name].rows
    for linear, module in quantized_modules(work, plan, (group,)).items():
        exact = torch.nn.functional.linear(rows, weights[f"{linear}.weight"], weights.get(f"{linear}.bias"))
        assert relative(module(rows) - exact, exact) < (0.2 if scheme == INT4 else 0.1)
    names = {linear: linear for linear in group.linears}
    unit, _ = measure_unit((group,), names, weights, {scheme.name: plan}, SPEC, captured)
    plain = measured(weights, captured, group).noise[scheme.name]
    assert sum(unit.noise[scheme.name].values()) <= 1.05 * sum(plain.values())


def test_tails_by_hand() -> None:
    """99 values are 1 and one is -10: E[x²] = 1.99, E[x⁴] = 100.99; only one value is beyond 6 * 1.41."""
    rows = torch.ones(10, 10)
    rows[3, 4] = -10
    kurtosis, share = tail_statistics(rows)
    assert kurtosis == pytest.approx(100.99 / 1.99**2 - 3, rel=1e-5)
    assert share == pytest.approx(0.01)
    assert tail_statistics(1e18 * rows)[0] == pytest.approx(kurtosis, rel=1e-5)  # x⁴ overflows float32
    assert tail_statistics(torch.zeros(2, 2)) == (0.0, 0.0)
    normal = torch.randn((400, 100), generator=torch.Generator().manual_seed(0))
    assert abs(tail_statistics(normal)[0]) < 0.1 and tail_statistics(normal)[1] == 0.0


# --- sizes and held-out samples ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4.2GiB", int(4.2 * 2**30)), ("4.2GB", 4_200_000_000), ("900MiB", 900 << 20), ("1 KiB", 1024),
        ("12345", 12345), ("7b", 7), (" 2 tib ", 2 << 40), ("1e3", 1000),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "4.2", "four", "4.2XB", "-1GB", "0", "0.5", "nan", "inf", "1e400", "4 2 GB"]
)
def test_invalid_sizes(text: str) -> None:
    if text == "4.2":
        assert parse_size(text) == 4  # bytes
        return
    with pytest.raises(QuantError, match="is not a size"):
        parse_size(text)


MANY = st.lists(st.frozensets(st.sampled_from(MODALITIES), min_size=1), min_size=5, max_size=30)


@settings(max_examples=150, deadline=None)
@given(MANY, st.integers(0, 3))
def test_holdout_keeps_every_modality_in_calibration(modalities: list[frozenset[str]], seed: int) -> None:
    every = frozenset[str]().union(*modalities)
    try:
        holdout = split_holdout(modalities, seed)
    except QuantError as error:
        assert "each is the only one of some modality" in error.message
        return
    assert sorted((*holdout.calibration, *holdout.held_out)) == list(range(len(modalities)))
    assert holdout == split_holdout(modalities, seed)
    assert frozenset[str]().union(*(modalities[i] for i in holdout.calibration)) == every
    evaluated = frozenset[str]().union(*(modalities[i] for i in holdout.held_out))
    assert evaluated | set(holdout.not_evaluated) == every and not evaluated & set(holdout.not_evaluated)


def test_a_fifth_is_held_out() -> None:
    text, image = frozenset({"text"}), frozenset({"text", "image"})
    holdout = split_holdout([text] * 18 + [image] * 2, 0)
    assert len(holdout.held_out) == 4 and sum(i >= 18 for i in holdout.held_out) == 1
    assert holdout.not_evaluated == ()
    assert split_holdout([text] * 18 + [image] * 2, 1) != holdout
    assert split_holdout([text] * 9 + [image], 0).not_evaluated == ("image",)
    with pytest.raises(QuantError, match="4 samples, too few") as caught:
        split_holdout([text] * 4, 0)
    assert "--eval_dataset" in caught.value.hint


def test_index_of_a_part_has_the_same_samples(tmp_path: Path) -> None:
    calib = load_calib_set("calibVideos", "Describe.", OMNI)
    chosen = [0, len(calib.samples) - 1, *(i for i, s in enumerate(calib.samples) if s.use_audio_in_video)]
    part = load_calib_set(str(write_part(calib, chosen, tmp_path / "part.jsonl")), "unused", OMNI)
    assert len(part.samples) == len(chosen) > 3
    for copy, i in zip(part.samples, chosen, strict=True):
        original = calib.samples[i]
        assert copy.use_audio_in_video == original.use_audio_in_video
        assert [f.resolve() for f in original.files()] == copy.files()
        texts = [[p["text"] for m in s.messages for p in m["content"] if p["type"] == "text"] for s in (copy, original)]
        assert texts[0] == texts[1]


# --- rounds --------------------------------------------------------------------------------------------------


def make_round(size: int, kl: float) -> Round:
    return Round("x", {}, 0.1, 0.1, size, size, 0.1, Interval(kl, kl, kl))


def test_estimates_beyond_a_factor_of_two_are_named() -> None:
    """0.1 nats are estimated."""
    within, below, above = (make_round(10, kl) for kl in (0.19, 0.04, 0.21))
    first, second = missed_estimates([below, within, above])
    assert "round 1: the KL is 0.04000, and 0.10000 was estimated" in first and "round 3: the KL is 0.21000" in second


def test_best_round_is_the_smallest_within_the_kl_else_that_of_least_kl() -> None:
    rounds = [make_round(10, 0.5), make_round(30, 0.1), make_round(20, 0.2), make_round(40, 0.05)]
    assert (
        best_round(rounds, 0.25) == 2
        and best_round(rounds, 0.15) == 1
        and best_round(rounds, 0.01) == 3
        and best_round(rounds, None) == 3
    )


def test_exclude_is_yaml() -> None:
    for patterns in ([], ["a.*"], ["a.{1,2}.*", "b"]):
        assert yaml.safe_load(exclude_text(patterns)) == {"exclude": patterns}


def test_kl_per_damage_is_that_of_the_last_round() -> None:
    proposals = [Proposal({}, "", damage, 0.0, {}) for damage in (0.2, 0.1, 0.0)]
    tried = [(p, make_round(1, kl)) for p, kl in zip(proposals, (0.4, 0.3, 0.1), strict=True)]
    assert [kl_per_damage(tried[:n]) for n in (1, 2, 3)] == pytest.approx([2.0, 3.0, 0.0])


def test_search_ends_where_a_round_measures_no_kl() -> None:
    tried = [(Proposal({}, "", damage, 0.0, {}), make_round(1, kl)) for damage, kl in ((0.2, 0.4), (0.1, 0.0))]
    assert next_for_kl(cast(Proposer, None), [], tried, 0.3) is None


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "small", layers=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples: six with text only, two images and two sounds."""
    texts = [{"text": f"A {'very ' * n}long question.", "answer": f"It is {n} long."} for n in range(10, 70, 10)]
    image, audio = str(DATA / "images" / "notice_zh.png"), str(DATA / "audio" / "three_beeps.wav")
    media = [{"image": image, "text": f"Read line {n}.", "answer": "A notice."} for n in range(2)]
    media += [{"audio": audio, "text": f"How many, {n}?", "answer": "Three."} for n in range(2)]
    return write_index(tmp_path_factory.mktemp("data"), *texts, *media)


def run(model: Path, index: object, *words: object) -> CommandResult:
    return command("analyze", "--model_path", model, "--dataset", index, "--device", "cpu", *words)


def proposer(model: Path) -> Proposer:
    checkpoint = open_checkpoint(model)
    return Proposer(derive_model_type(checkpoint.config), checkpoint, "x")


def test_analysis_without_a_choice(small: Path, index: Path, tmp_path: Path) -> None:
    answer = run(small, index, "--save_path", tmp_path / "out").done()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["analysis.json", "analysis.md"]
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert analysis["choice"] is None and analysis["samples"] == 10
    assert set(analysis["tokens_by_modality"]) == {"text", "image", "audio"}
    assert len(analysis["units"]) == 8 and sum(len(unit["linears"]) for unit in analysis["units"]) == 14
    damages = [unit["damage"][W4.name] for unit in analysis["units"]]
    assert damages == sorted(damages, reverse=True) and damages[-1] > 0
    for unit in analysis["units"]:
        assert unit["damage"][W8.name] < unit["damage"][W4.name]
        assert set(unit["noise"][W4.name]) == {"text", "image", "audio"}
        assert unit["size"][W4.name] < unit["size"][W8.name] < unit["size"][FLOAT]
    page = (tmp_path / "out" / "analysis.md").read_text(encoding="utf-8")
    assert "exclude:" in page and "thinker.model.layers" in answer.out and analysis["exclude"][0] in page
    # A recipe accepts the pattern list unchanged, and the list selects the most sensitive units.
    expected, left = [], sum(damages) / 2
    for unit, damage in zip(analysis["units"], damages, strict=True):
        if left > 0:
            expected += [linear["name"] for linear in unit["linears"]]
        left -= damage
    plan = make_plan(
        load_recipe(excluding(tmp_path, analysis["exclude"])), derive_model_type(open_checkpoint(small).config),
        open_checkpoint(small),
    )  # fmt: skip
    assert {linear.name for linear in plan.linears if linear.scheme is None} == set(expected)


def test_pattern_measures_only_matching_units(small: Path, texts: Path, tmp_path: Path) -> None:
    """A layer without a matching unit only passes the samples on: the figures are those of the whole analysis."""
    whole = {unit.name: unit for unit in analyze(small, str(texts), device="cpu").units}
    patterns = ("*.layers.1.*.down_proj", "*.layers.1.self_attn.k_proj")
    words = [word for pattern in patterns for word in ("--pattern", pattern)]
    answer = run(small, texts, *words, "--save_path", tmp_path / "out").done()
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert {f"layer {unit['layer']} {unit['group']}" for unit in analysis["units"]} == {"layer 1 down", "layer 1 qkv"}
    for unit in analysis["units"]:
        same = whole[f"layer {unit['layer']} {unit['group']}"]
        assert unit["damage"][W4.name] == same.damage[W4.name]
        assert [linear["name"] for linear in unit["linears"]] == list(same.names)
    assert analysis["patterns"] == list(patterns)
    scope = "Only units with a Linear that matches `*.layers.1.*.down_proj`, `*.layers.1.self_attn.k_proj`"
    assert scope in answer.out and scope in (tmp_path / "out" / "analysis.md").read_text()
    (first,) = analyze(small, str(texts), device="cpu", patterns=["*.layers.0.*.o_proj"]).units
    assert first.damage == whole["layer 0 o"].damage


def test_steps_between_int4_and_float(small: Path, texts: Path, tmp_path: Path) -> None:
    """Each is measured as in an analysis of its own."""
    words = ("--pattern", "*.layers.1.*.down_proj", "--steps", "fp8,W8A16", "--steps", "w8a8")
    answer = run(small, texts, *words, "--save_path", tmp_path / "out").done()
    (unit,) = json.loads((tmp_path / "out" / "analysis.json").read_text())["units"]
    assert list(unit["damage"]) == [W4.name, W8.name, W8A16.name, FP8.name]
    assert min(unit["damage"].values()) > 0 and max(unit["damage"], key=unit["damage"].__getitem__) == W4.name
    assert set(unit["size"]) == {*unit["damage"], FLOAT}
    assert "W8A16 damage" in answer.out and "| fp8 damage |" in (tmp_path / "out" / "analysis.md").read_text()
    (alone,) = analyze(small, str(texts), device="cpu", patterns=["*.layers.1.*.down_proj"]).units
    assert {scheme: unit["damage"][scheme] for scheme in alone.damage} == alone.damage
    message = run(small, texts, "--steps", "w8a61").fault()
    assert "unknown step 'w8a61' between int4 and float. Known: w8a8, w8a16, fp8. Did you mean" in message


@pytest.mark.full
def test_recipe_with_w8a16(small: Path, index: Path, tmp_path: Path) -> None:
    sizes = proposer(small)
    target = sizes.smallest_size() + (sizes.largest_size() - sizes.smallest_size()) // 5
    words = ("--target_size", target, "--steps", "w8a16", "--save_path", tmp_path / "out")
    run(small, index, *words).done()
    choice = choice_of(tmp_path / "out")
    chosen = choice["rounds"][choice["chosen"] - 1]
    assert chosen["linears"][W8A16.name] > 0 and W8.name not in chosen["linears"]
    assert chosen["measured_bytes"] == chosen["predicted_bytes"] <= target
    assert examine(tmp_path / "out" / "model", small).codes() == set()


def test_pattern_that_matches_nothing_is_an_error_with_near_ones(small: Path, texts: Path, tmp_path: Path) -> None:
    out = ("--save_path", tmp_path / "out")
    message = run(small, texts, "--pattern", "*.o_proj", "--pattern", "*.dwn_proj", *out).fault()
    assert "pattern '*.dwn_proj' matches no Linear of the decoder" in message and "'*.down_proj'" in message
    message = run(small, texts, "--pattern", "*.o_proj", "--max_kl", 1, *out).fault()
    assert "pattern limits the ranking, and a recipe needs all units" in message
    assert not (tmp_path / "out").exists()


def excluding(folder: Path, patterns: list[str]) -> Path:
    step = {"type": "linear_quant", "qconfig": {"act": {}, "weight": {}}, "exclude": patterns}
    spec = {"process": [step], "save": [{"type": "compressed_tensors"}]}
    path = folder / "exclude.yaml"
    path.write_text(json.dumps({"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def for_size(small: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Any]:
    """Target size, output folder and analysis, for a third of the way from all int4 to all float."""
    sizes = proposer(small)
    target = sizes.smallest_size() + (sizes.largest_size() - sizes.smallest_size()) // 3
    save = tmp_path_factory.mktemp("runs") / "size"
    answer = run(small, index, "--target_size", target, "--save_path", save, "--json").done()
    return target, save, answer.json


def test_target_size_is_met_and_the_estimated_bytes_are_exact(for_size: tuple[int, Path, Any], small: Path) -> None:
    target, save, analysis = for_size
    choice = analysis["choice"]
    first, second = choice["rounds"]
    assert first["linears"] == {W4.name: 14} and first["measured_bytes"] == proposer(small).smallest_size()
    for trial in (first, second):
        assert trial["predicted_bytes"] == trial["measured_bytes"]
        assert trial["bound"] <= trial["damage"] + 1e-12
    assert 0.9 * target < second["measured_bytes"] <= target
    assert second["damage"] < first["damage"]
    assert second["measured_kl"]["value"] < first["measured_kl"]["value"]
    expected = first["measured_kl"]["value"] * second["damage"] / first["damage"]
    assert second["predicted_kl"] == pytest.approx(expected) and first["predicted_kl"] == first["damage"]
    assert choice["chosen"] == 2 and choice["satisfied"] and choice["target_size"] == target
    assert {"analysis.json", "analysis.md", "calibration.jsonl", "heldout.jsonl", "model", "recipe.yaml"} == {
        entry.name for entry in save.iterdir()
    }
    page = (save / "analysis.md").read_text(encoding="utf-8")
    assert "2 for the size*" in page and W8.name in page


def test_recipe_reproduces_the_model(for_size: tuple[int, Path, Any], small: Path, tmp_path: Path) -> None:
    _, save, analysis = for_size
    assert examine(save / "model", small).codes() == set()
    quant(small, tmp_path / "again", "--config_path", save / "recipe.yaml").done()
    again, kept = files(tmp_path / "again"), files(save / "model")
    assert "eval/eval_report.json" in kept
    # Except the model card, which contains the results of the evaluation.
    assert {n: c for n, c in again.items() if n != "README.md"} == {
        n: c for n, c in kept.items() if n != "README.md" and not n.startswith("eval/")
    }
    plan = make_plan(
        load_recipe(save / "recipe.yaml"), derive_model_type(open_checkpoint(small).config), open_checkpoint(small)
    )
    counts = analysis["choice"]["rounds"][1]["linears"]
    schemes = [linear.scheme.name if linear.scheme else FLOAT for linear in plan.linears]
    assert {scheme: schemes.count(scheme) for scheme in set(schemes)} == counts
    parts = [len(load_calib_set(str(save / f"{part}.jsonl"), "x", OMNI).samples) for part in ("calibration", "heldout")]
    assert parts == [8, 2] and analysis["samples"] == 8


class StopAtEvent(Progress):
    """Simulates Ctrl-C at the first event that begins with a text; `layers 1` is a step, other texts are messages."""

    def __init__(self, text: str) -> None:
        self._text = text

    def say(self, text: str) -> None:
        if text.startswith(self._text):
            raise KeyboardInterrupt

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self.say(f"{phase} {done}")


def test_interrupted_analysis_resumes_with_the_same_result(
    for_size: tuple[int, Path, Any], small: Path, index: Path, tmp_path: Path
) -> None:
    """Stopped after the first measured layer, after the first round, and after the evaluation of the second."""
    target, save, analysis = for_size
    out = tmp_path / "out"
    options: dict[str, Any] = {"device": "cpu", "target_size": target, "save_path": out}
    for event in ("layers 1", "round 2: for the size", "round 2: KL"):
        with pytest.raises(KeyboardInterrupt):
            analyze(small, str(index), progress=StopAtEvent(event), **options)
    with pytest.raises(QuantError, match="belongs to another analysis: --seed was 0, is 1"):
        analyze(small, str(index), seed=1, **options)
    messages: list[str] = []

    class Messages(Progress):
        def say(self, text: str) -> None:
            messages.append(text)

    analyze(small, str(index), progress=Messages(), **options)
    assert {"resuming the interrupted analysis", "the first 2 layers are measured"} <= set(messages)
    assert any("finished already" in text for text in messages)  # the second model was quantized before the stop
    resumed = json.loads((out / "analysis.json").read_text())
    assert resumed["units"] == analysis["units"]
    assert resumed["choice"]["rounds"] == analysis["choice"]["rounds"]
    assert (out / "recipe.yaml").read_text() == (save / "recipe.yaml").read_text().replace(str(save), str(out))
    assert sorted(entry.name for entry in out.iterdir()) == sorted(entry.name for entry in save.iterdir())


def test_overwrite_starts_an_interrupted_analysis_again(small: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        analyze(small, str(texts), device="cpu", save_path=out, patterns=["*.o_proj"], progress=StopAtEvent("layers 1"))
    messages: list[str] = []

    class Messages(Progress):
        def say(self, text: str) -> None:
            messages.append(text)

    options: dict[str, Any] = {"max_samples": 2, "save_path": out, "overwrite": True, "patterns": ["*.o_proj"]}
    analyze(small, str(texts), device="cpu", progress=Messages(), **options)
    assert not [text for text in messages if "resuming" in text]
    assert json.loads((out / "analysis.json").read_text())["samples"] == 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with text only, so that no tower runs."""
    questions = ({"text": f"A {'very ' * n}long question.", "answer": f"It is {n} long."} for n in range(10, 60, 10))
    return write_index(tmp_path_factory.mktemp("texts"), *questions)


def choice_of(folder: Path) -> Any:
    return json.loads((folder / "analysis.json").read_text(encoding="utf-8"))["choice"]


def kl_of(trial: Any) -> float:
    return float(trial["measured_kl"]["value"])


@pytest.mark.full
def test_max_kl_is_met_or_reported(small: Path, texts: Path, tmp_path: Path) -> None:
    """A KL that all int4 meets, then half of the KL of all int4, then a KL that no recipe meets."""
    words = ("--eval_dataset", texts, "--save_path", tmp_path / "out", "--overwrite")
    answer = run(small, texts, "--max_kl", 100, *words).done()
    (first,) = choice_of(tmp_path / "out")["rounds"]
    assert first["linears"] == {W4.name: 14} and "1 all int4*" in answer.out

    max_kl = kl_of(first) / 2
    run(small, texts, "--max_kl", max_kl, *words).done()
    choice = choice_of(tmp_path / "out")
    chosen = choice["rounds"][choice["chosen"] - 1]
    assert choice["satisfied"] and kl_of(chosen) <= max_kl < kl_of(choice["rounds"][0])
    assert 2 <= len(choice["rounds"]) <= 4 and choice["eval_dataset"] == str(texts)
    within = [trial["measured_bytes"] for trial in choice["rounds"] if kl_of(trial) <= max_kl]
    assert chosen["measured_bytes"] == min(within)

    answer = run(small, texts, "--max_kl", 1e-12, *words)
    assert answer.code == 1 and "none of the tested recipes has a KL of at most" in answer.err
    assert "Traceback" not in answer.err
    choice = choice_of(tmp_path / "out")
    kls = [kl_of(trial) for trial in choice["rounds"]]
    assert not choice["satisfied"] and kls[choice["chosen"] - 1] == min(kls)
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert "**No recipe" in (tmp_path / "out" / "analysis.md").read_text(encoding="utf-8")


# --- bad input -----------------------------------------------------------------------------------------------


def test_contradictory_or_invalid_arguments(small: Path, index: Path, tmp_path: Path) -> None:
    answer = run(small, index, "--target_size", "1GB", "--max_kl", 0.1, "--save_path", tmp_path / "out")
    assert answer.code == 2 and "exclude each other" in answer.err
    with pytest.raises(QuantError, match="exclude each other"):
        analyze(small, str(index), target_size=1, max_kl=0.1, save_path=tmp_path / "out")
    for words, message in (
        (("--target_size", "4.2 elephants"), "'4.2 elephants' is not a size"),
        (("--max_kl", 0), "max_kl is 0.0"),
        (("--max_kl", "nan"), "max_kl is nan"),
        (("--eval_dataset", index), "no recipe is requested"),
    ):
        assert message in run(small, index, *words, "--save_path", tmp_path / "out").fault()
    assert "save_path is missing" in run(small, index, "--max_kl", 0.1).fault()
    assert not (tmp_path / "out").exists()


def test_target_sizes_that_no_recipe_reaches(small: Path, index: Path, tmp_path: Path) -> None:
    sizes, words = proposer(small), ("--save_path", tmp_path / "out")
    message = run(small, index, "--target_size", sizes.smallest_size() - 1, *words).fault()
    assert f"every Linear in int4, is {sizes.smallest_size()} bytes" in message
    message = run(small, index, "--target_size", "900GB", *words).fault()
    assert "nothing would be quantized" in message and str(sizes.largest_size()) in message
    assert list((tmp_path / "out").iterdir()) == []


def test_folders_that_cannot_be_written(small: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in run(small, index, "--save_path", tmp_path / "file").fault()
    assert "inside one another" in run(small, index, "--save_path", small / "out").fault()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "is not empty" in run(small, index, "--save_path", tmp_path / "full").fault()
    message = run(small, index, "--save_path", tmp_path / "full", "--overwrite").fault()
    assert "contains 'thesis.txt', which is not an output of analyze" in message
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
    assert "cannot be written" in run(small, index, "--save_path", "/proc/nothing").fault()


def test_unusable_datasets(small: Path, index: Path, tmp_path: Path) -> None:
    few = write_index(tmp_path / "few", *({"text": f"Question {n}?"} for n in range(4)))
    words = ("--max_kl", 0.1, "--save_path", tmp_path / "out")
    assert "4 samples, too few" in run(small, few, *words).fault()
    assert "2 samples, too few" in run(small, index, "--max_samples", 2, *words).fault()
    assert "does not exist" in run(small, index, "--eval_dataset", tmp_path / "none", *words).fault()
    assert "does not exist" in run(small, tmp_path / "none", *words).fault()


def test_modalities_without_evaluation_samples_are_reported(index: Path, texts: Path, tmp_path: Path) -> None:
    assert _split_dataset(OMNI, str(index), str(texts), None, 0, tmp_path).not_evaluated == ("audio", "image")
    assert _split_dataset(OMNI, str(index), str(index), None, 0, tmp_path).not_evaluated == ()
    one_sound = write_index(tmp_path, *map(json.loads, index.read_text(encoding="utf-8").splitlines()[:-1]))
    assert _split_dataset(OMNI, str(one_sound), None, None, 0, tmp_path).not_evaluated == ("audio",)
    few = _split_dataset(OMNI, str(index), None, 6, 1, tmp_path)
    sizes = [len(load_calib_set(part, "x", OMNI).samples) for part in (few.calibration, few.evaluation)]
    assert sizes == [4, 2] or sizes == [5, 1]


def test_failed_analysis_restores_its_folder(small: Path, texts: Path, tmp_path: Path) -> None:
    """A failed run keeps only the earlier files, so that the same command works again. No save_path: no files."""
    before = sorted(tmp_path.iterdir())
    analysis = analyze(small, str(texts), device="cpu", max_samples=1)
    page = as_markdown(replace(analysis, warnings=("a warning",)))
    assert "- a warning" in page and page.count("\n| `thinker.model.layers.") == 14
    assert sorted(tmp_path.iterdir()) == before
    unusable = str(write_index(tmp_path / "none", {"image": "a.png"}))
    with pytest.raises(QuantError, match="does not exist"):
        analyze(small, unusable, device="cpu", save_path=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    analyze(small, str(texts), device="cpu", max_samples=1, patterns=["*.o_proj"], save_path=tmp_path / "out")
    earlier = files(tmp_path / "out")
    with pytest.raises(QuantError, match="the smallest"):
        analyze(small, str(texts), device="cpu", target_size=1, save_path=tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == earlier and set(earlier) == {"analysis.json", "analysis.md"}
