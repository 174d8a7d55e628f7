"""Mixed recipes: exact and short patterns, the chosen schemes, and checkpoints with two schemes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import edit_config, edited, without

from msmodelslim_omni.analysis.mixed_recipe import (
    FLOAT,
    FP8,
    W4,
    W8,
    W8A16,
    Grid,
    patterns,
    recipe_text,
)
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import FORMATS
from msmodelslim_omni.formats.shards import output_files
from msmodelslim_omni.models import qwen2_5_omni
from msmodelslim_omni.models.spec import ModelSpec
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.plan.plan import QuantPlan, make_plan
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe.loading import load_recipe, parse_recipe
from msmodelslim_omni.recipe.patterns import matches
from msmodelslim_omni.run.assembly import make_job
from msmodelslim_omni.run.pipeline import quantize
from msmodelslim_omni.storage.checkpoint import open_checkpoint

MODEL: ModelSpec = qwen2_5_omni.model_spec("Qwen2.5-Omni-7B")
QKV, OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
GATE_UP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
GROUPS = (QKV, OUT, GATE_UP, DOWN)
LAYER = "thinker.model.layers."


def grid(layers: int) -> Grid:
    return Grid(MODEL.layer_prefix, layers, GROUPS)


def names_of(where: Grid, *units: tuple[int, tuple[str, ...]]) -> list[str]:
    return [where.name(layer, linear) for layer, group in units for linear in group]


# --- patterns ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.data())
def test_patterns_match_exactly_the_chosen_linears(layers: int, data: st.DataObject) -> None:
    where = grid(layers)
    units = [(layer, group) for layer in range(layers) for group in GROUPS]
    chosen = set(names_of(where, *data.draw(st.lists(st.sampled_from(units), unique=True))))
    globs = patterns(where, chosen)
    assert {name for name in where.names() if matches(name, globs)} == chosen
    assert len(globs) <= len(GROUPS) + 1


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([], []),
        ([(i, DOWN) for i in range(12)], ["layers.*.mlp.down_proj"]),
        ([(i, QKV) for i in range(12)], ["layers.*.self_attn.{q,k,v}_proj"]),
        ([(3, GATE_UP), (11, GATE_UP)], ["layers.{3,11}.mlp.{gate,up}_proj"]),
        ([(1, group) for group in GROUPS], ["layers.1.*"]),
        ([(i, group) for i in range(12) for group in GROUPS], ["layers.*"]),
        (
            [(i, DOWN) for i in range(12)] + [(2, group) for group in GROUPS[:3]] + [(5, OUT)],
            ["layers.*.mlp.down_proj", "layers.2.*", "layers.5.self_attn.o_proj"],
        ),
    ],
)
def test_patterns_are_few(units: list[tuple[int, tuple[str, ...]]], expected: list[str]) -> None:
    ends = {"layers.*": "layers.*.*"}
    assert patterns(grid(12), names_of(grid(12), *units)) == [f"thinker.model.{ends.get(e, e)}" for e in expected]


# --- recipes -------------------------------------------------------------------------------------------------

SOME = {
    "int4": {},
    "int8": {(i, group): W8.name for i in range(4) for group in GROUPS},
    "int4 and int8": {(0, DOWN): W8.name, (3, QKV): W8.name},
    "int4 and float": {(1, GATE_UP): FLOAT},
    "int8 and float": {(i, g): FLOAT if g == OUT else W8.name for i in range(4) for g in GROUPS},
    "all three": {(0, DOWN): W8.name, (1, DOWN): W8.name, (2, QKV): FLOAT, (3, GATE_UP): W8.name, (3, OUT): FLOAT},
    "every step": {(0, DOWN): W8.name, (1, DOWN): W8A16.name, (2, QKV): FP8.name, (3, OUT): FLOAT},
}


def schemes_of(units: dict[tuple[int, tuple[str, ...]], str], layers: int = 4) -> dict[str, str]:
    where = grid(layers)
    given = {where.name(layer, linear): s for (layer, group), s in units.items() for linear in group}
    return {name: given.get(name, W4.name) for name in where.names()}


def plan_of(text: str, tiny: Path, **options: Any) -> QuantPlan:
    return make_plan(parse_recipe(text), MODEL, open_checkpoint(tiny), **options)


@pytest.mark.parametrize("name", SOME)
def test_recipe_gives_every_linear_its_scheme(name: str, tiny: Path, tmp_path: Path) -> None:
    schemes = schemes_of(SOME[name])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(grid(4), schemes, 'a "quoted" set', ["Made by a test.", ""]), encoding="utf-8")
    recipe = load_recipe(path)
    plan = make_plan(recipe, MODEL, open_checkpoint(tiny))
    assert {linear.name: linear.scheme.name if linear.scheme else FLOAT for linear in plan.linears} == schemes
    assert plan.warnings == () and plan.dataset == 'a "quoted" set'
    for layer in plan.layers:
        by_step = {(step.processor, linear) for step in layer.steps for linear in step.linears}
        for linear in plan.layer_spec.linears:
            scheme = schemes[MODEL.layer_name(layer.index, linear)]
            assert (("awq", linear) in by_step) == (scheme == W4.name)
            assert (("iter_smooth", linear) in by_step) == (scheme == W8.name)


def test_recipe_needs_a_quantized_linear() -> None:
    with pytest.raises(ValueError, match="every Linear stays float"):
        recipe_text(grid(2), dict.fromkeys(grid(2).names(), FLOAT), "x")


@pytest.mark.parametrize("saver", ["awq", "ascendv1_saver"])
def test_other_formats_refuse_mixed_recipes(saver: str, tiny: Path) -> None:
    text = recipe_text(grid(4), schemes_of(SOME["int4 and int8"]), "x")
    with pytest.raises(QuantError, match=f"{saver} cannot store this recipe's result"):
        plan_of(text, tiny, save_formats=[saver])


# --- the checkpoint ------------------------------------------------------------------------------------------

DATA_FREE = """apiversion: multimodal_vlm_modelslim_v1
spec:
  process:
    - {type: linear_quant, qconfig: {act: {}, weight: {}}, include: ["*down_proj", "*layers.2.*"],
       exclude: ["*layers.1.*"]}
    - {type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4, symmetric: SYMMETRIC}},
       exclude: ["*layers.{1,3}.self_attn.o_proj"]}
  save: [{type: compressed_tensors, part_file_size: 0}]
"""


@pytest.fixture(scope="module", params=["True", "False"])
def mixed(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantPlan, Path]:
    """A data-free checkpoint with both schemes and floats; the schemes of down_proj and o_proj vary by layer."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "recipe.yaml").write_text(DATA_FREE.replace("SYMMETRIC", request.param), encoding="utf-8")
    quantize(tiny, folder / "out", config_path=str(folder / "recipe.yaml"), device="cpu")
    return make_plan(load_recipe(folder / "recipe.yaml"), MODEL, open_checkpoint(tiny)), folder / "out"


def test_output_files_gives_the_exact_file_sizes(mixed: tuple[QuantPlan, Path]) -> None:
    plan, folder = mixed
    estimated = output_files(FORMATS["compressed_tensors"], make_job(plan), 0)
    written = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    reports = {"quant_report.json", "quant_report.md", "recipe.yaml"}
    assert estimated == {name: size for name, size in written.items() if name in estimated}
    assert set(written) - reports - set(estimated) <= {n for n in written if n.endswith((".md", ".html"))}


def test_output_files_gives_the_exact_shard_sizes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msmodelslim_omni.formats.shards.GB", 1 << 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(DATA_FREE.replace("SYMMETRIC", "True").replace("part_file_size: 0", "part_file_size: 3"))
    quantize(tiny, tmp_path / "out", config_path=str(path), device="cpu")
    plan = make_plan(load_recipe(path), MODEL, open_checkpoint(tiny))
    estimated = output_files(FORMATS["compressed_tensors"], make_job(plan), 3)
    assert sum(name.endswith(".safetensors") for name in estimated) > 2
    assert estimated == {name: (tmp_path / "out" / name).stat().st_size for name in estimated}


def test_config_has_a_group_for_each_scheme(mixed: tuple[QuantPlan, Path]) -> None:
    _, folder = mixed
    config = open_checkpoint(folder).config
    settings = config["quantization_config"]
    assert settings == config["thinker_config"]["quantization_config"]
    assert settings["format"] == "mixed-precision"
    int4, int8 = settings["config_groups"].values()
    assert (int4["format"], int4["weights"]["num_bits"], int4["input_activations"]) == ("pack-quantized", 4, None)
    assert (int8["format"], int8["weights"]["num_bits"]) == ("int-quantized", 8)
    assert int8["targets"] == [
        r"re:.*\.layers\.(0|2|3)\.mlp\.down_proj$",
        *(rf"re:.*\.layers\.(2)\.mlp\.{kind}_proj$" for kind in ("gate", "up")),
        *(rf"re:.*\.layers\.(2)\.self_attn\.{kind}_proj$" for kind in "koqv"),
    ]
    assert r"re:.*\.layers\.(1)\.mlp\.down_proj$" in int4["targets"]
    assert settings["ignore"][-2:] == [rf"re:.*\.layers\.{i}\.self_attn\.o_proj$" for i in (1, 3)]
    assert "Linear" not in int4["targets"] + int8["targets"]


def test_linears_with_one_scheme_in_all_layers_have_one_target(tiny: Path) -> None:
    units = {(i, DOWN): W8.name for i in range(4)} | {(1, QKV): FLOAT}
    job = make_job(plan_of(recipe_text(grid(4), schemes_of(units), "x"), tiny))
    settings = FORMATS["compressed_tensors"].json_files(job, [])["config.json"]["quantization_config"]
    int4, int8 = settings["config_groups"].values()
    assert int8["targets"] == [r"re:.*\.layers\.\d+\.mlp\.down_proj$"]
    assert len(int4["targets"]) == 6 and all(r"\.layers\.\d+\." in target for target in int4["targets"])


def test_reader_gives_the_schemes_and_weights(mixed: tuple[QuantPlan, Path], tiny: Path) -> None:
    plan, folder = mixed
    checkpoint, source = open_quantized(folder), open_checkpoint(tiny)
    schemes = {linear.name: linear.scheme for linear in plan.linears if linear.scheme is not None}
    assert {name: stored.linear.scheme for name, stored in checkpoint.linears.items()} == schemes
    assert len({scheme.name for scheme in schemes.values()}) == 2
    for name, scheme in schemes.items():
        weight = source.load(f"{name}.weight").float()
        error = float((dequantize(checkpoint.load_linear(name)) - weight).norm() / weight.norm())
        assert error < (0.02 if scheme.weight_bits == 8 else 0.2), name


def test_doctor_finds_no_faults(mixed: tuple[QuantPlan, Path], tiny: Path) -> None:
    assert examine(mixed[1], tiny).codes() == set()


def test_export_refuses_formats_for_one_scheme(mixed: tuple[QuantPlan, Path], tmp_path: Path) -> None:
    _, folder = mixed
    with pytest.raises(QuantError, match="awq cannot hold"):
        export(folder, tmp_path / "awq", "awq")
    export(folder, tmp_path / "same", "compressed_tensors", part_file_size=0)
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (folder / weights).read_bytes()
    assert open_checkpoint(tmp_path / "same").config == open_checkpoint(folder).config


def test_generate_answers(mixed: tuple[QuantPlan, Path]) -> None:
    answer = command("generate", mixed[1], "--text", "Hello", "--max_new_tokens", 3, "--device", "cpu").done()
    assert "3 tokens" in answer.err


def test_two_int8_groups_are_refused(mixed: tuple[QuantPlan, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed[1], tmp_path / "copy"))

    def change(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_2"] = groups["group_1"]

    edit_config(folder, change)
    with pytest.raises(QuantError, match="two groups with the same bits"):
        open_quantized(folder)


def test_linear_with_a_missing_tensor_is_named(mixed: tuple[QuantPlan, Path], tmp_path: Path) -> None:
    name = f"{LAYER}0.mlp.gate_proj"
    broken = edited(mixed[1], tmp_path / "copy", without(f"{name}.weight_scale"))
    with pytest.raises(QuantError, match=f"{name}: weight_scale is missing"):
        open_quantized(broken)
    assert torch.is_tensor(open_quantized(mixed[1]).load_linear(name).qweight)
