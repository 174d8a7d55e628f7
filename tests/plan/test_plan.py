"""The plan of the tiny Omni model: a decision for every Linear, and errors before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats.shards import GB
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type, find_model_type, qwen2_5_omni
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.plan.plan import QuantPlan, make_plan
from msmodelslim_omni.recipe.loading import parse_recipe, shipped_recipes
from msmodelslim_omni.recipe.schema import Recipe
from msmodelslim_omni.run.forecast import forecast
from msmodelslim_omni.run.pipeline import quantize
from msmodelslim_omni.runtime.budget import NO_SAMPLES, Extent
from msmodelslim_omni.runtime.device import resolve_device
from msmodelslim_omni.storage.checkpoint import INDEX_NAME, open_checkpoint
from msmodelslim_omni.storage.safetensors_io import read_header

OMNI_7B, OMNI_3B = MODEL_TYPES["Qwen2.5-Omni-7B"], MODEL_TYPES["Qwen2.5-Omni-3B"]
QCONFIG = {"act": {}, "weight": {}}
LAYER = "thinker.model.layers.{}."
SIZE = "expected an integer from 1 to 16777215"


def linear_quant(**keys: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "qconfig": QCONFIG, **keys}


def recipe(*process: dict[str, Any], **spec: Any) -> Recipe:
    """Make a recipe with one processor per line. The first is on line 5."""
    lines = ["apiversion: multimodal_vlm_modelslim_v1", "spec:", *(f"  {k}: {json.dumps(v)}" for k, v in spec.items())]
    lines += ["  save: [{type: ascendv1_saver}]"] * ("save" not in spec)
    lines += ["  process:", *(f"    - {json.dumps(processor)}" for processor in process)]
    return parse_recipe("\n".join(lines) + "\n", Path("my.yaml"))


def plan_of(path: Path, *process: dict[str, Any], **options: Any) -> QuantPlan:
    return make_plan(recipe(*(process or (linear_quant(),))), OMNI_7B, open_checkpoint(path), **options)


def plan_error(path: Path, *process: dict[str, Any], **options: Any) -> QuantError:
    with pytest.raises(QuantError) as caught:
        plan_of(path, *process, **options)
    return caught.value


def quantized(plan: QuantPlan) -> set[str]:
    return {linear.name for linear in plan.linears if linear.scheme is not None}


# --- decisions -----------------------------------------------------------------------------------------


def test_every_linear_of_every_layer_has_a_decision(tiny: Path) -> None:
    plan = plan_of(tiny)
    suffixes = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    suffixes += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert {linear.name for linear in plan.linears} == {
        LAYER.format(i) + suffix for i in range(4) for suffix in suffixes
    }
    assert quantized(plan) == {linear.name for linear in plan.linears}
    assert {linear.scheme.name for linear in plan.linears if linear.scheme} == {"W8A8_DYNAMIC"}
    shapes = {linear.name.rpartition(".")[2]: linear.shape for linear in plan.linears}
    assert shapes["q_proj"] == (256, 256) and shapes["k_proj"] == (128, 256)
    assert shapes["gate_proj"] == (512, 256) and shapes["down_proj"] == (256, 512)
    assert plan.warnings == ()
    assert [layer.index for layer in plan.layers] == [0, 1, 2, 3]


def test_plan_has_the_groups_of_the_layer(tiny: Path) -> None:
    groups = {group.name: group for group in plan_of(tiny).layer_spec.groups}
    assert groups["o"].repeat == 2 and groups["o"].head_dim == 64
    assert groups["down"].previous == "mlp.up_proj"


def test_shipped_recipes_quantize_all_linears_without_warnings(tiny: Path) -> None:
    shipped_for_omni = [r for r in shipped_recipes() if OMNI_7B.model_type in r.metadata.verified_model_types]
    assert len(shipped_for_omni) >= 7
    for shipped in shipped_for_omni:
        plan = make_plan(shipped, OMNI_7B, open_checkpoint(tiny))
        assert len(quantized(plan)) == 28
        assert plan.warnings == ()


def test_excluded_group_stays_float_with_the_reason(tiny: Path) -> None:
    plan = plan_of(tiny, linear_quant(exclude=["*.layers.{0,3}.mlp.down_proj", "*.layers.1.self_attn.{q,k,v}_proj"]))
    floats = {linear.name: linear.reason for linear in plan.linears if linear.scheme is None}
    expected = {LAYER.format(0) + "mlp.down_proj", LAYER.format(3) + "mlp.down_proj"}
    expected |= {LAYER.format(1) + f"self_attn.{x}_proj" for x in "qkv"}
    assert floats == dict.fromkeys(expected, "not selected by the recipe")
    assert "mlp.down_proj" not in plan.layers[0].schemes and "mlp.down_proj" in plan.layers[1].schemes


def test_exclude_takes_precedence_over_include(tiny: Path) -> None:
    plan = plan_of(tiny, linear_quant(include=["*.mlp.*"], exclude=["*down_proj"]))
    assert {name.rpartition(".")[2] for name in quantized(plan)} == {"gate_proj", "up_proj"}


def test_first_linear_quant_that_selects_a_linear_applies(tiny: Path) -> None:
    mse = {"act": {}, "weight": {"method": "mse"}}
    plan = plan_of(tiny, {**linear_quant(include=["*.mlp.*"]), "qconfig": mse}, linear_quant())
    methods = {linear.name.rpartition(".")[2]: linear.scheme.weight_method for linear in plan.linears if linear.scheme}
    assert methods["down_proj"] == methods["gate_proj"] == "mse"
    assert methods["q_proj"] == methods["o_proj"] == "minmax"
    assert [(s.processor, len(s.linears)) for s in plan.layers[0].steps] == [("linear_quant", 3), ("linear_quant", 4)]


def test_steps_have_the_linears_of_each_processor(tiny: Path) -> None:
    smooth = {"type": "iter_smooth", "include": ["*.layers.2.*"], "exclude": ["*down_proj"]}
    plan = plan_of(tiny, {"type": "group", "configs": [smooth, linear_quant()]})
    assert [step.processor for step in plan.layers[0].steps] == ["linear_quant"]
    first, second = plan.layers[2].steps
    assert first.processor == "iter_smooth" and "mlp.down_proj" not in first.linears and len(first.linears) == 6
    assert second.linears == set(plan.layer_spec.linears)


def test_data_free_recipe_has_no_dataset(tiny: Path) -> None:
    assert plan_of(tiny).dataset is None
    smoothed = plan_of(tiny, {"type": "smooth_quant"}, linear_quant())
    assert smoothed.dataset == "calibVideos"
    assert plan_of(tiny, {"type": "smooth_quant"}, linear_quant(), dataset="other").dataset == "other"


def test_dataset_for_a_data_free_recipe_is_a_warning(tiny: Path) -> None:
    plan = plan_of(tiny, dataset="mine")
    assert plan.dataset is None
    assert plan.warnings == ("the recipe is data-free; dataset 'mine' is not read",)


def test_max_samples_overrides_the_recipe(tiny: Path) -> None:
    assert plan_of(tiny, max_samples=3).calibration.max_samples == 3
    assert plan_of(tiny).calibration.max_samples is None


# --- recipes that do not fit the model ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "members", "layer"),
    [("*.layers.2.self_attn.k_proj", "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", 2),
     ("*up_proj", "mlp.gate_proj, mlp.up_proj", 0)],
)  # fmt: skip
def test_split_group_is_refused(tiny: Path, exclude: str, members: str, layer: int) -> None:
    error = plan_error(tiny, linear_quant(exclude=[exclude]))
    assert error.message.startswith(f"my.yaml:4: in layer {layer} {members} would be FLOAT and W8A8_DYNAMIC")
    assert "all of them together" in error.hint


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_a_warning(tiny: Path, key: str) -> None:
    patterns = ["*", "*qproj"] if key == "include" else ["*qproj"]
    plan = plan_of(tiny, linear_quant(**{key: patterns}))
    (warning,) = plan.warnings
    assert warning.startswith(f"my.yaml:5: {key} pattern '*qproj' matches no Linear")
    assert "thinker.model.layers.0.mlp.down_proj" in warning


def test_patterns_match_checkpoint_names(tiny: Path) -> None:
    """Patterns do not match module names, which transformers 5 nests deeper than the saved names."""
    (warning,) = plan_of(tiny, linear_quant(include=["*", "thinker.model.language_model.*"])).warnings
    assert "matches no Linear" in warning


@pytest.mark.parametrize(
    ("pattern", "part", "why"),
    [
        ("*visual*", "visual tower", "towers are kept"),
        ("*audio_tower*", "audio tower", "towers are kept"),
        ("*lm_head", "lm_head", "selects the output token"),
        ("talker.*", "talker", "speech quality"),
        ("thinker.model.embed_tokens", "embedding", "read by row"),
    ],
)
def test_include_of_a_float_part_is_refused(tiny: Path, pattern: str, part: str, why: str) -> None:
    error = plan_error(tiny, linear_quant(include=["*", pattern]))
    assert error.message.startswith(f"my.yaml:5: include pattern {pattern!r} selects ")
    assert f"({part})" in error.message and why in error.message and "keeps float" in error.message
    assert "thinker.model.layers.0" in error.hint


def test_smoothing_after_rounding_is_refused(tiny: Path) -> None:
    error = plan_error(tiny, linear_quant(), {"type": "iter_smooth"})
    assert error.message == "my.yaml:6: iter_smooth comes after linear_quant and would smooth rounded weights"
    assert error.hint == "move it before linear_quant"


@pytest.mark.parametrize("process", [[linear_quant(include=["nothing"])], [{"type": "smooth_quant"}]])
def test_recipe_that_quantizes_nothing_is_refused(tiny: Path, process: list[dict[str, Any]]) -> None:
    error = plan_error(tiny, *process)
    assert error.message == "my.yaml:4: the recipe quantizes nothing"
    assert "include" in error.hint


def test_processor_that_the_model_does_not_support(tiny: Path) -> None:
    model = replace(OMNI_7B, processors=frozenset({"linear_quant"}))
    with pytest.raises(QuantError) as caught:
        make_plan(recipe({"type": "iter_smooth"}, linear_quant()), model, open_checkpoint(tiny))
    assert "my.yaml:5: Qwen2.5-Omni-7B does not support the processor 'iter_smooth'" in caught.value.message
    assert "; supported: linear_quant" in caught.value.message


# --- int4 ----------------------------------------------------------------------------------------------------


def int4(**changes: Any) -> dict[str, Any]:
    """Make a weight block. group_size goes into its ext."""
    group_size = changes.pop("group_size", 128)
    return {"scope": "per_group", "dtype": "int4", "symmetric": False, "method": "gptq", **changes} | {
        "ext": {"group_size": group_size}
    }


def int4_quant(include: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    return {"type": "linear_quant", "include": include or ["*"], "qconfig": {"weight": int4(**changes)}}


AWQ_SAVER = [{"type": "awq"}]


def int4_plan(path: Path, *process: dict[str, Any], save: list[dict[str, Any]] = AWQ_SAVER) -> QuantPlan:
    return make_plan(recipe(*process, save=save), OMNI_7B, open_checkpoint(path))


def int4_error(path: Path, *process: dict[str, Any], save: list[dict[str, Any]] = AWQ_SAVER) -> QuantError:
    with pytest.raises(QuantError) as caught:
        int4_plan(path, *process, save=save)
    return caught.value


def test_int4_scheme_follows_the_recipe(tiny: Path) -> None:
    plan = int4_plan(tiny, {"type": "awq"}, int4_quant(group_size=64))
    schemes = {linear.scheme for linear in plan.linears}
    assert schemes == {QuantScheme(4, None, "gptq", 64, symmetric=False)}
    assert [step.processor for step in plan.layers[0].steps] == ["awq", "linear_quant"]
    assert plan.dataset == "calibVideos" and plan.warnings == ()


@pytest.mark.parametrize(
    ("process", "statistics"),
    [
        ([linear_quant()], ""),
        ([int4_quant(method="minmax")], ""),
        ([int4_quant(method="mse")], ""),
        ([int4_quant(method="gptq")], "gram"),
        ([{"type": "awq"}, int4_quant(method="minmax")], "gram"),
        ([{"type": "smooth_quant"}, linear_quant()], "inputs"),
        ([{"type": "iter_smooth"}, int4_quant()], "gram"),
    ],
)
def test_statistics_follow_the_needs_of_the_processors(
    tiny: Path, process: list[dict[str, Any]], statistics: str
) -> None:
    plan = int4_plan(tiny, *process, save=[{"type": "compressed_tensors"}])
    assert plan.statistics == statistics
    assert (plan.dataset is None) == (statistics == "")


def with_intermediate_size(folder: Path, size: int) -> Path:
    """Change the size of the MLPs of a checkpoint to `size`, the number of inputs of down_proj."""
    edit_config(folder, intermediate_size=size)
    for shard in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        for name, tensor in tensors.items():
            if name.startswith("thinker.model.layers.") and ".mlp." in name:
                tensors[name] = (tensor[:, :size] if "down_proj" in name else tensor[:size]).contiguous()
        safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("size", "group", "hint"),
    [(480, 64, "use 32"), (448, 128, "use 32 or 64"), (500, 32, "no group size divides it; exclude this Linear")],
)
def test_group_size_that_does_not_divide(tiny_copy: Path, size: int, group: int, hint: str) -> None:
    folder = with_intermediate_size(tiny_copy, size)
    error = int4_error(folder, {"type": "awq"}, int4_quant(group_size=group))
    assert error.message == (
        f"my.yaml:6: weight.ext.group_size {group} does not divide in_features {size} of"
        " thinker.model.layers.0.mlp.down_proj"
    )
    assert error.hint == hint


def test_group_size_error_names_the_linear_quant_of_the_linear(tiny_copy: Path) -> None:
    """Of two linear_quant, only the second selects a Linear whose inputs the group size does not divide."""
    folder = with_intermediate_size(tiny_copy, 480)
    first, second = int4_quant(["*.self_attn.*"], group_size=64), int4_quant(["*.mlp.*"], group_size=64)
    assert int4_error(folder, first, second).message.startswith("my.yaml:6: weight.ext.group_size 64")


@pytest.mark.parametrize("scheme", ["all", "one layer"])
def test_awq_before_int8_is_refused(tiny: Path, scheme: str) -> None:
    quants = [linear_quant()] if scheme == "all" else [int4_quant(["*.layers.{0,1,3}.*"]), linear_quant()]
    error = int4_error(tiny, {"type": "awq"}, *quants, save=[{"type": "compressed_tensors"}])
    if scheme == "all":
        assert error.message == (
            "my.yaml:5: awq requires per_group weights, but linear_quant quantizes"
            " thinker.model.layers.0.mlp.down_proj to W8A8_DYNAMIC"
        )
        assert "iter_smooth or smooth_quant" in error.hint
    else:
        assert error.message.endswith("linear_quant quantizes thinker.model.layers.2.mlp.down_proj to W8A8_DYNAMIC")


@pytest.mark.parametrize("other", [{"group_size": 64}, {"symmetric": True}])
def test_awq_that_searches_for_another_scheme_is_refused(tiny: Path, other: dict[str, Any]) -> None:
    error = int4_error(tiny, {"type": "awq", "weight_qconfig": int4(**other)}, int4_quant())
    assert error.message == "my.yaml:5: weight_qconfig differs from the scheme of linear_quant, W4A16_G128"
    assert "remove weight_qconfig" in error.hint
    assert int4_plan(tiny, {"type": "awq", "weight_qconfig": int4(method="minmax")}, int4_quant()).warnings == ()


def test_awq_after_rounding_is_refused(tiny: Path) -> None:
    error = int4_error(tiny, int4_quant(), {"type": "awq"})
    assert error.message == "my.yaml:6: awq comes after linear_quant and would smooth rounded weights"
    assert error.hint == "move it before linear_quant"


@pytest.mark.parametrize(
    ("saver", "quant", "words"),
    [
        ("ascendv1_saver", int4_quant(), "ascendv1_saver cannot store this recipe's result"),
        ("awq", int4_quant(symmetric=True), "set symmetric: false, or save as compressed_tensors"),
        ("awq", linear_quant(), "awq supports int4 weights per group with float activations, not W8A8_DYNAMIC"),
    ],
)
def test_saver_that_cannot_store_the_scheme(tiny: Path, saver: str, quant: dict[str, Any], words: str) -> None:
    error = int4_error(tiny, quant, save=[{"type": saver}])
    assert error.message.startswith("my.yaml:3: ") and words in error.message
    both = int4_error(tiny, quant, save=[{"type": "compressed_tensors"}, {"type": saver}])
    assert words in both.message


def test_save_format_that_cannot_store_the_scheme(tiny: Path) -> None:
    with pytest.raises(QuantError, match="ascendv1_saver cannot store this recipe's result"):
        make_plan(recipe(int4_quant(), save=AWQ_SAVER), OMNI_7B, open_checkpoint(tiny), save_formats=["ascendv1_saver"])
    assert plan_of(tiny, int4_quant(), save_formats=["awq"]).savers[0].type == "awq"


# --- savers --------------------------------------------------------------------------------------------------


def test_save_formats_override_the_recipe_and_keep_its_settings(tiny: Path) -> None:
    saver = [{"type": "ascendv1_saver", "part_file_size": 7}]
    plan = make_plan(
        recipe(linear_quant(), save=saver),
        OMNI_7B,
        open_checkpoint(tiny),
        save_formats=["compressed_tensors", "ascendv1_saver", "compressed_tensors"],
    )
    assert [(s.type, s.part_file_size) for s in plan.savers] == [("compressed_tensors", 4), ("ascendv1_saver", 7)]


def test_unknown_save_format(tiny: Path) -> None:
    error = plan_error(tiny, save_formats=["gguf"])
    assert error.message == "unknown save_format 'gguf'. Known: ascendv1_saver, compressed_tensors, awq, bitsandbytes."
    assert "Did you mean 'compressed_tensors'" in plan_error(tiny, save_formats=["compressedtensor"]).message


def test_save_formats_as_other_tools_spell_them(tiny: Path) -> None:
    made = plan_of(tiny, save_formats=["compressed-tensors,ascendv1", "Compressed_Tensors"])
    assert [saver.type for saver in made.savers] == ["compressed_tensors", "ascendv1_saver"]


# --- checkpoint and config.json ----------------------------------------------------------------------


def edit_config(folder: Path, **text: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, remove: str = "", **new: torch.Tensor) -> None:
    """Rewrite the shard that holds `remove` or a name in `new`, else the first. Names in `new` use __ for dots."""
    index = json.loads((folder / INDEX_NAME).read_text())
    names = {name.replace("__", "."): tensor for name, tensor in new.items()}
    touched = next((name for name in (remove, *names) if name in index["weight_map"]), None)
    shard = index["weight_map"][touched] if touched else next(iter(index["weight_map"].values()))
    tensors = safetensors.torch.load_file(folder / shard)
    tensors.pop(remove, None)
    index["weight_map"].pop(remove, None)
    safetensors.torch.save_file({**tensors, **names}, folder / shard, {"format": "pt"})
    index["weight_map"].update(dict.fromkeys(names, shard))
    (folder / INDEX_NAME).write_text(json.dumps(index))


Q2 = "thinker.model.layers.2.self_attn.q_proj.weight"
VISUAL = "thinker.visual.blocks.0.attn.q.weight"


@pytest.mark.parametrize("name", [Q2, VISUAL, "talker.thinker_to_talker_proj.weight", "thinker.lm_head.weight"])
def test_missing_tensor_is_named(tiny_copy: Path, name: str) -> None:
    edit_tensors(tiny_copy, remove=name)
    error = plan_error(tiny_copy)
    assert error.message == f"{tiny_copy}: tensor {name} is missing"
    assert "incomplete" in error.hint


def test_missing_layer_is_named_and_counted(tiny_copy: Path) -> None:
    edit_config(tiny_copy, num_hidden_layers=5)
    message = plan_error(tiny_copy).message
    assert "12 tensors: thinker.model.layers.4.input_layernorm.weight" in message
    assert message.endswith(", ... are missing")


def test_buffer_that_only_transformers_4_saves_is_optional(tiny_copy: Path) -> None:
    name = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
    assert name in open_checkpoint(tiny_copy).tensors
    edit_tensors(tiny_copy, remove=name)
    assert plan_of(tiny_copy).warnings == ()


def test_wrong_shape_is_named_with_both_shapes(tiny_copy: Path) -> None:
    edit_tensors(tiny_copy, **{Q2.replace(".", "__"): torch.zeros(256, 128)})
    error = plan_error(tiny_copy)
    assert error.message == f"{tiny_copy}: {Q2} has shape [256, 128], config.json implies [256, 256] (mismatches: 1)"
    assert "different models" in error.hint


def test_surplus_tensor_in_a_layer_is_refused(tiny_copy: Path) -> None:
    edit_tensors(tiny_copy, thinker__model__layers__0__self_attn__q_norm__weight=torch.zeros(4))
    message = plan_error(tiny_copy).message
    assert "tensor thinker.model.layers.0.self_attn.q_norm.weight is not part of the model that config.json" in message


def test_rotary_buffer_in_a_layer_is_a_warning(tiny_copy: Path, tmp_path: Path) -> None:
    name = "thinker.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tiny_copy, **{name.replace(".", "__"): torch.ones(8)})
    assert plan_of(tiny_copy).warnings == (f"tensor {name} is unknown to this model; copied unchanged",)
    out = tmp_path / "out"
    quantize(tiny_copy, out, config_path="qwen2_5_omni_w8a8_minmax", save_format=["compressed_tensors"], device="cpu")
    assert torch.equal(open_checkpoint(out).load(name), torch.ones(8))
    assert [finding.code for finding in examine(out, source=tiny_copy).findings if finding.code] == []


def test_surplus_layer_is_refused(tiny_copy: Path) -> None:
    edit_config(tiny_copy, num_hidden_layers=3)
    assert "12 tensors: thinker.model.layers.3." in plan_error(tiny_copy).message


def test_surplus_tensor_elsewhere_is_a_warning(tiny_copy: Path) -> None:
    edit_tensors(tiny_copy, extra__head__weight=torch.zeros(4))
    assert plan_of(tiny_copy).warnings == ("tensor extra.head.weight is unknown to this model; copied unchanged",)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtype_that_cannot_be_quantized(tiny_copy: Path, dtype: torch.dtype) -> None:
    edit_tensors(tiny_copy, **{Q2.replace(".", "__"): torch.zeros(256, 256).to(dtype)})
    message = plan_error(tiny_copy).message
    assert f"{Q2} has dtype " in message and "; expected BF16, F16, F32" in message


@pytest.mark.parametrize("place", ["top", "thinker_config", "description"])
def test_quantized_source_is_refused(tiny_copy: Path, place: str) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    if place == "description":
        (tiny_copy / "quant_model_description.json").write_text("{}")
    else:
        block = config if place == "top" else config[place]
        block["quantization_config"] = {"quant_method": "awq"}
        (tiny_copy / "config.json").write_text(json.dumps(config))
    error = plan_error(tiny_copy)
    assert error.message == f"{tiny_copy} is already quantized ({'ascend' if place == 'description' else 'awq'})"
    assert "float checkpoint" in error.hint


def test_config_of_another_model(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    config["model_type"] = "qwen2_5_vl"
    (tiny_copy / "config.json").write_text(json.dumps(config))
    error = plan_error(tiny_copy)
    assert "config.json has model_type 'qwen2_5_vl'; Qwen2.5-Omni-7B requires 'qwen2_5_omni'" in error.message
    assert "--model_type" in error.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, f"text_config.hidden_size is 0; {SIZE}"),
        ({"intermediate_size": "512"}, f"text_config.intermediate_size is '512'; {SIZE}"),
        ({"num_attention_heads": True}, f"text_config.num_attention_heads is True; {SIZE}"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple of num_key_value_heads, which is 3"),
    ],
)
def test_invalid_layer_shape(tiny: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["thinker_config"]["text_config"].update(changes)
    with pytest.raises(QuantError, match=words):
        qwen2_5_omni.layer_spec(config)


@pytest.mark.parametrize("layers", [None, 0, 10**12])
def test_invalid_number_of_layers(tiny_copy: Path, layers: Any) -> None:
    edit_config(tiny_copy, num_hidden_layers=layers)
    assert f"text_config.num_hidden_layers is {layers}; {SIZE}" in plan_error(tiny_copy).message


def test_config_that_transformers_cannot_build(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    config["thinker_config"]["vision_config"]["hidden_act"] = "no such function"
    (tiny_copy / "config.json").write_text(json.dumps(config))
    assert "transformers cannot build this model" in plan_error(tiny_copy).message


def test_config_without_thinker_config(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    del config["thinker_config"]
    (tiny_copy / "config.json").write_text(json.dumps(config))
    error = plan_error(tiny_copy)
    assert error.message == "config.json has no thinker_config.text_config"
    assert "complete Qwen2.5-Omni" in error.hint


# --- model types ---------------------------------------------------------------------------------------------


def config_of(hidden: int, layers: int) -> dict[str, Any]:
    text = {"hidden_size": hidden, "num_hidden_layers": layers}
    return {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": text}}


@pytest.mark.parametrize(("hidden", "layers", "name"), [(3584, 28, "Qwen2.5-Omni-7B"), (2048, 36, "Qwen2.5-Omni-3B")])
def test_model_type_is_derived_from_the_shape(hidden: int, layers: int, name: str) -> None:
    assert derive_model_type(config_of(hidden, layers)).model_type == name


def test_unpublished_shape_gets_the_first_model_type_of_its_architecture() -> None:
    assert derive_model_type(config_of(256, 4)).model_type == "Qwen2.5-Omni-7B"


@pytest.mark.parametrize("model_type", ["qwen2_5_omni_thinker", None, 5])
def test_unknown_architecture(model_type: Any) -> None:
    with pytest.raises(QuantError) as caught:
        derive_model_type({"model_type": model_type})
    assert f"model_type {model_type!r}; supported: qwen2_5_omni" in caught.value.message
    assert "complete model" in caught.value.hint


def test_unknown_model_type_suggests_the_nearest() -> None:
    with pytest.raises(QuantError) as caught:
        find_model_type("Qwen2.5-Omni-8B")
    assert "Known: Qwen2.5-Omni-7B, Qwen2.5-Omni-3B, Qwen2.5-VL-7B-Instruct, Qwen2.5-VL-3B" in caught.value.message
    assert "Did you mean 'Qwen2.5-Omni-" in caught.value.message
    assert "--model_type" in caught.value.hint


def test_7b_given_for_a_3b_checkpoint_is_a_warning(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny shape is registered as the published shape of 3B, because building the real one takes minutes."""
    monkeypatch.setitem(qwen2_5_omni._PUBLISHED_SHAPES, (256, 4), "Qwen2.5-Omni-3B")
    (warning,) = plan_of(tiny).warnings
    assert warning.startswith("config.json has the shape of Qwen2.5-Omni-3B, not of Qwen2.5-Omni-7B")
    assert make_plan(recipe(linear_quant()), OMNI_3B, open_checkpoint(tiny)).warnings == ()


# --- the forecast --------------------------------------------------------------------------------------------


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_forecast_equals_the_output_size_of_a_run(tiny: Path, tmp_path: Path) -> None:
    formats = ["ascendv1_saver", "compressed_tensors"]
    expected = forecast(plan_of(tiny, save_formats=formats), NO_SAMPLES)
    report = quantize(
        tiny,
        tmp_path / "out",
        device="cpu",
        config_path="qwen2_5_omni_w8a8_minmax",
        save_format=formats,
    )
    other = sum((tiny / file).stat().st_size for file in open_checkpoint(tiny).other_files())
    for name in formats:
        folder = tmp_path / "out" / name
        tensors = sum(info.nbytes for file in folder.glob("*.safetensors") for info in read_header(file).values())
        assert expected.output_bytes[name] == tensors + other
        assert report.output_bytes[name] == tensors
        written = sum(path.stat().st_size for path in files_under(folder))
        assert abs(written - expected.output_bytes[name]) < 0.05 * written  # headers, description, report
    assert expected.output_bytes["ascendv1_saver"] < open_checkpoint(tiny).total_bytes + other


def test_forecast_of_the_work_folder(tiny: Path) -> None:
    plan = plan_of(tiny)
    data_free, calibrated = forecast(plan, NO_SAMPLES), forecast(plan, Extent(8192, 1024, 4))
    assert data_free.work_bytes == 0  # outputs are written directly to the output folder
    assert calibrated.work_bytes > 0
    assert calibrated.disk_bytes == calibrated.work_bytes + sum(data_free.output_bytes.values())
    assert calibrated.peak_memory_bytes < 4 * GB
    assert resolve_device("cpu").torch.type == "cpu"


@pytest.mark.parametrize(
    ("block", "key"),
    [("text_config", "num_hidden_layers"), ("vision_config", "depth"), ("audio_config", "encoder_layers")],
)
def test_invalid_depth_is_refused_before_the_model_is_built(tiny_copy: Path, block: str, key: str) -> None:
    path = tiny_copy / "config.json"
    config = json.loads(path.read_text())
    config["thinker_config"][block][key] = 10**7
    path.write_text(json.dumps(config))
    error = plan_error(tiny_copy, linear_quant())
    assert key in error.message and "10000000" in error.message and "1024" in error.message
