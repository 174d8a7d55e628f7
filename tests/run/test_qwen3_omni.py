"""Qwen3-Omni: a thinker with experts. Layers against transformers, routing, outputs in all formats, error messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DATA, change_recipe, command, quant, stop_at, write_index
from make_tiny_qwen3_omni import make_tiny_qwen3_omni, tiny_shape, write_checkpoint
from outputs import all_tensors, edit_config, edited, replaced, without
from ties import assert_greedy

from msmodelslim_omni.analysis.mixed_recipe import Grid, patterns
from msmodelslim_omni.calibration.sample_store import StemStore
from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files.digests import file_digest
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type
from msmodelslim_omni.models import qwen3_omni as omni
from msmodelslim_omni.models.inputs import MODALITIES, LayerInput, MediaLimits, ModelInputs
from msmodelslim_omni.models.qwen3_omni_generate import mend_placeholder_masks
from msmodelslim_omni.plan.plan import make_plan
from msmodelslim_omni.quantized.generate import generate
from msmodelslim_omni.recipe.loading import find_recipe, parse_recipe
from msmodelslim_omni.recipe.patterns import matches
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.statistics.capture import InputRecorder, run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

SPEC = MODEL_TYPES["Qwen3-Omni-30B-A3B-Instruct"]
LAYER = "thinker.model.layers.1."
IMAGE, CLIP = str(DATA / "images/coffee cup.jpg"), str(DATA / "videos/cat_pan_zh.mp4")
AUDIO = str(DATA / "audio/three_beeps.wav")
PIXELS = 64 * 32 * 32  # keeps the tests fast

MIXES: dict[str, dict[str, Any]] = {
    "text": {"text": "Why is the sky blue?", "answer": "Short waves scatter most."},
    "image": {"image": IMAGE, "text": "What is it?"},
    "audio": {"audio": AUDIO, "text": "How many?"},
    "video, audio track on": {"video": CLIP, "text": "What is said?"},
    "everything, audio track off": {
        "image": IMAGE, "audio": AUDIO, "video": CLIP, "text": "Describe.", "use_audio_in_video": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_qwen3_omni: Path) -> Path:
    return tiny_qwen3_omni


@pytest.fixture(scope="module")
def thinker(tiny: Path) -> Any:
    omni.load_transformers()
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    loaded, info = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        tiny, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    mend_placeholder_masks(loaded)  # 4.57 fails on a picture and a clip in one sample
    return loaded.eval()


def text_model(thinker: Any) -> Any:
    return getattr(thinker.model, "language_model", thinker.model)


# --- layer inputs --------------------------------------------------------------------------------------------


def model_inputs(entry: dict[str, Any], path: Path, folder: Path) -> ModelInputs:
    media = omni.open_media_processor(path, MediaLimits(8192, PIXELS, 2.0), False)
    (sample,) = load_calib_set(str(write_index(folder, entry)), "Describe.", SPEC).samples
    return prepare_sample(sample, media)


def float_layer(checkpoint: Checkpoint, index: int) -> torch.nn.Module:
    shapes = omni.layer_spec(checkpoint.config).shapes
    weights = {name: checkpoint.load(SPEC.layer_name(index, name)).float() for name in shapes}
    module: torch.nn.Module = omni.build_layer(checkpoint.config, index, weights)
    return module


@pytest.mark.parametrize("mix", MIXES)
def test_layer_inputs_equal_the_full_model(mix: str, tiny: Path, thinker: Any, tmp_path: Path) -> None:
    inputs, checkpoint = model_inputs(MIXES[mix], tiny, tmp_path), open_checkpoint(tiny)
    expected: list[torch.Tensor] = []

    def record_input(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        expected.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    modules = (*text_model(thinker).layers, text_model(thinker).norm)
    hooks = [module.register_forward_pre_hook(record_input, with_kwargs=True) for module in modules]
    with torch.inference_mode():
        thinker(**inputs.tensors, use_audio_in_video=inputs.use_audio_in_video, use_cache=False)
    for hook in hooks:
        hook.remove()
    store = StemStore(tmp_path / "stem", 0)
    stem = omni.open_stem(checkpoint, torch.device("cpu"), 1 << 30)
    store.write(0, stem.layer_input(inputs), inputs.modality)
    hidden, actual = store.hidden(0), []
    for index in range(3):
        entering = store.layer_input(0, index, hidden, torch.device("cpu"))
        actual.append(entering.hidden)
        hidden = run_layer(float_layer(checkpoint, index), entering)
    actual.append(store.entering(0, 3, hidden))
    assert len(expected) == 4
    for state, expected_state in zip(actual, expected, strict=True):
        assert float((state - expected_state).norm() / expected_state.norm()) < 1e-5
    kinds = {"text", *(kind for kind in ("image", "audio", "video") if kind in MIXES[mix])}
    kinds |= {"audio"} if inputs.use_audio_in_video else set()
    assert {MODALITIES[m] for m in inputs.modality.unique().tolist()} == kinds


def test_statistics_of_an_expert_are_those_of_its_tokens(tiny: Path) -> None:
    """Every token counts for the two experts that its router logits select, with its modality."""
    checkpoint = open_checkpoint(tiny)
    layer, spec = float_layer(checkpoint, 0), omni.layer_spec(checkpoint.config)
    hidden = torch.randn(1, 60, 256, generator=torch.Generator().manual_seed(1))
    rotary = (torch.ones(1, 60, 64), torch.zeros(1, 60, 64))
    modality = torch.arange(60, dtype=torch.int8) % 3
    entered: list[torch.Tensor] = []
    hook = layer.get_submodule("mlp").register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
    recorder = InputRecorder(layer, spec, [20, 20, 20, 0], importance={0: 1.0, 1: 2.0, 2: 0.5})
    recorder.begin(modality, torch.arange(60))
    run_layer(layer, LayerInput(hidden, {"position_embeddings": rotary, "attention_mask": None}))
    hook.remove()
    stats = recorder.finish()
    x = entered[0]
    chosen = (x @ layer.get_submodule("mlp.gate").weight.T).topk(2, dim=1).indices  # [tokens, 2]
    counted = 0
    for expert in range(8):
        mine = (chosen == expert).any(dim=1)
        name = f"mlp.experts.{expert}.gate_up"
        if not mine.any():
            assert name not in stats
            continue
        of_expert = stats[name]
        counted += int(of_expert.count.sum())
        assert of_expert.count.tolist() == modality[mine].bincount(minlength=4).tolist()
        assert torch.equal(of_expert.rows, x[mine]) and torch.equal(of_expert.row_modality, modality[mine])
        weights = torch.tensor([1.0, 2.0, 0.5])[modality[mine].long()]
        h = of_expert.gram({}).output_error(torch.eye(256))
        assert torch.allclose(h, (x[mine].square() * weights[:, None]).sum(dim=0), rtol=1e-4)
    assert counted == 2 * 60


# --- outputs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(qwen3_omni_outputs: dict[str, Path]) -> dict[str, Path]:
    return qwen3_omni_outputs


@pytest.mark.parametrize("name", ["ascend", "int8", "awq", "packed", "symmetric"])
def test_doctor_finds_no_problem(name: str, outputs: dict[str, Path], tiny: Path) -> None:
    problems = [finding for finding in examine(outputs[name], tiny).findings if finding.level != "ok"]
    assert {finding.code for finding in problems} == ({"autoawq_cannot_say"} if name == "awq" else set())
    source, kept = all_tensors(tiny), all_tensors(outputs[name])
    for key, tensor in source.items():
        if not key.startswith("thinker.model.layers.") or "norm" in key or key.endswith("mlp.gate.weight"):
            assert torch.equal(kept[key].view(torch.uint8), tensor.view(torch.uint8)), (name, key)


def test_ascend_description_has_a_line_per_expert(outputs: dict[str, Path], tiny: Path) -> None:
    description = json.loads((outputs["ascend"] / "quant_model_description.json").read_text())
    for expert in range(8):
        assert description[f"{LAYER}mlp.experts.{expert}.down_proj.weight"] == "W8A8_DYNAMIC"
    floats = {name for name, info in open_checkpoint(tiny).tensors.items() if len(info.shape) == 2}
    floats -= {name for name, kind in description.items() if kind == "W8A8_DYNAMIC"}
    assert all(description[name] == "FLOAT" for name in floats)
    assert {f"{LAYER}mlp.gate.weight", "thinker.lm_head.weight", "thinker.visual.blocks.0.attn.qkv.weight"} <= floats


def test_ignore_list_has_no_bare_prefix(outputs: dict[str, Path]) -> None:
    """vLLM and vllm-omni put different prefixes before the names."""
    block = json.loads((outputs["int8"] / "config.json").read_text())["quantization_config"]
    assert r"re:.*mlp\.gate$" in block["ignore"] and all(entry.startswith("re:.*") for entry in block["ignore"])
    awq = json.loads((outputs["awq"] / "config.json").read_text())["quantization_config"]
    assert "mlp.gate" in awq["modules_to_not_convert"]


def test_generate_equals_transformers(tiny: Path, thinker: Any, tmp_path: Path) -> None:
    inputs = model_inputs({"text": "What is it?"}, tiny, tmp_path).tensors
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = torch.cat(thinker.generate(**inputs, max_new_tokens=5, pad_token_id=0, **options).logits)
    assert_greedy(generate(tiny, "What is it?", max_new_tokens=5, device="cpu").tokens, logits)


def calibrated(model: Path, folder: Path, quant_type: str, *entries: dict[str, Any]) -> dict[str, Any]:
    recipe = folder / "recipe.yaml"
    text = find_recipe(SPEC.model_type, quant_type).text.replace("max_pixels: 262144", f"max_pixels: {PIXELS}")
    recipe.write_text(text, encoding="utf-8")
    quant(model, folder / "out", "--config_path", recipe, "--dataset", write_index(folder / "data", *entries)).done()
    report: dict[str, Any] = json.loads((folder / "out" / "quant_report.json").read_text())
    return report


@pytest.mark.parametrize("quant_type", ["w8a8", "w4a16"])
def test_calibrated_run_with_the_shipped_recipe(quant_type: str, tiny: Path, tmp_path: Path) -> None:
    report = calibrated(tiny, tmp_path, quant_type, *(MIXES[mix] for mix in MIXES))
    assert set(report["tokens_by_modality"]) == set(MODALITIES)
    for layer in report["layers"]:
        # Every token reaches two of the eight experts.
        for kind, tokens in report["tokens_by_modality"].items():
            assert sum(layer["expert_tokens"][kind]) == 2 * tokens
        assert 0 < layer["output_error"] < (0.2 if quant_type == "w8a8" else 0.4)
        errors = [linear["output_error"] or linear["weight_error"] for linear in layer["linears"]]
        assert len(errors) == 4 + 3 * 8 and all(0 < error < 1 for error in errors)
    assert not [finding for finding in examine(tmp_path / "out", tiny).findings if finding.level != "ok"]


@pytest.mark.parametrize("quant_type", ["w8a8", "w4a16"])
def test_experts_with_few_tokens_are_rounded_without_data(quant_type: str, tiny: Path, tmp_path: Path) -> None:
    """With one short sample, every expert has too few tokens. They get the integers of a data-free run."""
    report = calibrated(tiny, tmp_path, quant_type, {"text": "Why?"})
    notes = [note for layer in report["layers"] for note in layer["notes"]]
    assert all("8 of 8 experts got fewer than 32 tokens" in note for note in notes if "experts" in note)
    assert sum("experts" in note for note in notes) == 3
    for tensor in all_tensors(tmp_path / "out").values():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    assert not [finding for finding in examine(tmp_path / "out", tiny).findings if finding.level != "ok"]


# --- model types ---------------------------------------------------------------------------------------------


def test_a_thinker_alone(tmp_path: Path) -> None:
    """Thinking and Captioner have no talker. Their config.json has the same shape."""
    alone = make_tiny_qwen3_omni(tmp_path / "thinking", thinker_only=True, layers=1, shards=1)
    config = open_checkpoint(alone).config
    assert derive_model_type(config).model_type == "Qwen3-Omni-30B-A3B-Thinking"
    for model_type in (None, "Qwen3-Omni-30B-A3B-Captioner"):
        request = QuantRequest(alone, model_type=model_type, device="cpu", config_path="qwen3_omni_w8a8_minmax")
        assert not prepare(request).plan.warnings


# --- errors --------------------------------------------------------------------------------------------------


def fault(model: Path, **options: Any) -> QuantError:
    with pytest.raises(QuantError) as caught:
        prepare(QuantRequest(model, device="cpu", **{"config_path": "qwen3_omni_w8a8_minmax", **options}))
    return caught.value


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    down = [tensors.pop(f"{LAYER}mlp.experts.{expert}.down_proj.weight") for expert in range(8)]
    tensors[f"{LAYER}mlp.experts.down_proj"] = torch.stack(down)


def test_missing_and_fused_experts(tiny: Path, tmp_path: Path) -> None:
    missing = edited(tiny, tmp_path / "missing", without(f"{LAYER}mlp.experts.3.up_proj.weight"))
    assert f"tensor {LAYER}mlp.experts.3.up_proj.weight is missing" in fault(missing).message
    error = fault(edited(tiny, tmp_path / "fused", fuse))
    assert f"{LAYER}mlp.experts.down_proj has shape [8, 256, 128]" in error.message
    assert "as Qwen3-VL-MoE" in error.message


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "dense layers": (lambda text: text.update(mlp_only_layers=[1]), "some layers have no experts"),
    "too few experts": (lambda text: text.update(num_experts=1), "num_experts is 1; expected num_experts_per_tok, 2"),
    "text count": (lambda text: text.update(num_experts="8"), "num_experts is '8'; expected an integer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_error_on_a_config(change: str, tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    edit, message = CHANGES[change]
    edit_config(copy, lambda config: edit(config["thinker_config"]["text_config"]))
    assert message in fault(copy).message


INT8 = "{act: {scope: per_token, dtype: int8}, weight: {scope: per_channel, dtype: int8}}"
RECIPES = {
    "router": (INT8, '["*mlp.gate"]', "", "selects thinker.model.layers.0.mlp.gate (decoder layers)", "a router"),
    "some experts": (
        INT8, '["*"]', '["*experts.3.*"]', "mlp.experts.0.gate_proj would be W8A8_DYNAMIC and mlp.experts.3.gate_proj",
        "one scheme for all experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_error_on_a_recipe(name: str, tiny: Path) -> None:
    qconfig, include, exclude, first, second = RECIPES[name]
    text = (
        "apiversion: multimodal_vlm_modelslim_v1\nspec:\n  process:\n"
        f"    - {{type: linear_quant, qconfig: {qconfig}, include: {include}, exclude: {exclude or '[]'}}}\n"
        "  save: [{type: compressed_tensors}]\n"
    )
    with pytest.raises(QuantError) as caught:
        make_plan(parse_recipe(text), SPEC, open_checkpoint(tiny), check_later=True)
    assert first in caught.value.message and second in caught.value.message


def test_recipe_of_another_generation(tiny: Path, tiny_qwen3_vl: Path, tiny_vl: Path, tmp_path: Path) -> None:
    """The message names the recipe of the model."""
    cases = {
        "qwen2_5_omni_w8a8_minmax": (tiny, "w8a8", "qwen3_omni_w8a8"),
        "qwen2_5_vl_w4a16": (tiny_qwen3_vl, "w4a16", "qwen3_vl_w4a16"),
        "qwen3_omni_w4a16": (tiny_vl, "w4a16", "qwen2_5_vl_w4a16"),
    }
    for recipe, (model, quant_type, own) in cases.items():
        message = quant(model, tmp_path / "out", "--config_path", recipe).fault()
        assert f"{recipe}.yaml is made for Qwen" in message and ", not for Qwen" in message
        assert f"use --quant_type {quant_type}, which takes {own}" in message


def test_group_size_that_does_not_divide_the_experts(tmp_path: Path) -> None:
    """Inputs of down_proj are as many as an expert is wide: 768 as published, 96 here."""
    shape = replace(tiny_shape().with_layers(1), speaks=False)
    shape = replace(shape, text={**shape.text, "moe_intermediate_size": 96})
    write_checkpoint(tmp_path / "narrow", shape, dtype="bfloat16", seed=0, normal=None)
    text = find_recipe(SPEC.model_type, "w4a16").text.replace("group_size: 32", "group_size: 64")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    message = quant(tmp_path / "narrow", tmp_path / "out", "--config_path", tmp_path / "recipe.yaml").fault()
    assert "group_size 64 does not divide in_features 96 of thinker.model.layers.0.mlp.experts.0.down" in message
    assert "use 32" in message


def test_too_many_media_tokens(tiny: Path, tmp_path: Path) -> None:
    media = omni.open_media_processor(tiny, MediaLimits(50, PIXELS, 2.0), False)
    (sample,) = load_calib_set(str(write_index(tmp_path, MIXES["image"])), "Describe.", SPEC).samples
    with pytest.raises(QuantError, match=r"index.jsonl:1: the sample has \d+ tokens, more than max_tokens 50"):
        prepare_sample(sample, media)


def test_doctor_finds_experts_of_two_kinds_and_a_quantized_router(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    source = all_tensors(tiny)

    def leave_float(tensors: dict[str, torch.Tensor]) -> None:
        for leaf in ("gate", "up", "down"):
            name = f"{LAYER}mlp.experts.5.{leaf}_proj"
            del tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = source[f"{name}.weight"].clone()

    found = {f.code for f in examine(edited(outputs["int8"], tmp_path / "mixed", leave_float)).findings}
    assert "experts_differ" in found

    def quantize_router(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{LAYER}mlp.gate.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"{LAYER}mlp.gate.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{LAYER}mlp.gate.weight_scale"] = scale.to(torch.bfloat16)

    found = {f.code for f in examine(edited(outputs["int8"], tmp_path / "router", quantize_router)).findings}
    assert "router_quantized" in found


def test_doctor_finds_damage_in_one_expert(outputs: dict[str, Path], tmp_path: Path) -> None:
    name = f"{LAYER}mlp.experts.7.down_proj"
    cases = {
        "linear_incomplete": without(f"{name}.weight_scale"),
        "tensor_missing": without(f"{name}.weight"),
        "scale_not_finite": replaced(f"{name}.weight_scale", torch.full((256, 1), float("nan"))),
    }
    for number, change in enumerate(cases.values()):
        diagnosis = examine(edited(outputs["int8"], tmp_path / str(number), change))
        assert [finding for finding in diagnosis.findings if finding.level == "error" and name in finding.where]


# --- other verbs, and stopped runs -----------------------------------------------------------------------------


TEXTS: tuple[dict[str, Any], ...] = tuple(
    {"text": f"Sentence {'very ' * n}long.", "answer": "Yes."} for n in (0, 30, 60)
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("texts"), *TEXTS)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of w8a8 without a search, to be fast."""
    return change_recipe(tmp_path_factory.mktemp("recipe"), "alpha: auto ", "alpha: 0.5 ", "qwen3_omni_w8a8")


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, texts: Path, fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a run that is never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    quant(tiny, folder, "--config_path", fixed, "--dataset", texts).done()
    return folder


def test_stopped_run_resumes_to_the_same_bytes(
    uninterrupted: Path, tiny: Path, texts: Path, fixed: Path, tmp_path: Path
) -> None:
    stop_at("layers", 2, tiny, tmp_path / "out", texts, config_path=str(fixed))
    resumed = quant(tiny, tmp_path / "out", "--config_path", fixed, "--dataset", texts).done()
    assert "resuming at layer" in resumed.err
    assert digests(tmp_path / "out") == digests(uninterrupted)


def digests(folder: Path) -> dict[str, str]:
    """Of the files that do not name times or folders."""
    kept = [
        folder / name for name in ("quant_model_weights.safetensors", "quant_model_description.json", "changed.yaml")
    ]
    return {file.name: file_digest(file) for file in kept}


@pytest.mark.full
def test_two_processes_write_the_same_model(tiny: Path, texts: Path, tmp_path: Path) -> None:
    words = ["--quant_type", "w8a8", "--save_format", "compressed_tensors", "--dataset", texts]
    quant(tiny, tmp_path / "one", *words).done()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "msmodelslim_omni"]
    subprocess.run([*torchrun, "quant", tiny, tmp_path / "two", "--device", "cpu", *words], check=True)
    assert file_digest(tmp_path / "two" / "model.safetensors") == file_digest(tmp_path / "one" / "model.safetensors")


def test_export_equals_the_other_format(outputs: dict[str, Path], tmp_path: Path) -> None:
    command("export", outputs["ascend"], tmp_path / "out", "--save_format", "compressed_tensors").done()
    weights = "model.safetensors"
    assert file_digest(tmp_path / "out" / weights) == file_digest(outputs["int8"] / weights)


def test_inspect_shows_memory(outputs: dict[str, Path], tiny: Path) -> None:
    shown = command("inspect", outputs["int8"]).done().out
    assert "code2wav" in shown and "weights for text output" in shown


def test_eval_measures_the_loss(uninterrupted: Path, tiny: Path, texts: Path) -> None:
    words = (
        "--float",
        tiny,
        "--quant",
        uninterrupted,
        "--dataset",
        texts,
        "--max_samples",
        1,
        "--device",
        "cpu",
        "--json",
    )
    overall = command("eval", *words).done().json["overall"]
    assert 0 < overall["kl_mean"]["value"] < 0.2 and 0 < overall["hidden_error"] < 0.4


def test_analysis_treats_the_experts_of_a_layer_alike(tiny: Path) -> None:
    """A recipe that keeps some experts float is refused, so an analysis must not propose one."""
    spec = omni.layer_spec(open_checkpoint(tiny).config)
    assert [len(unit) for unit in spec.units] == [1, 1, 16]
    grid = Grid(SPEC.layer_prefix, 3, tuple(tuple(n for group in unit for n in group.linears) for unit in spec.units))
    chosen = [grid.name(1, linear) for linear in grid.groups[2]]
    assert patterns(grid, chosen) == ["thinker.model.layers.1.mlp.experts.*"]
    assert {name for name in grid.names() if matches(name, patterns(grid, chosen))} == set(chosen)


@pytest.mark.full
def test_analyze_measures_the_experts(tiny: Path, texts: Path, tmp_path: Path) -> None:
    command("analyze", tiny, tmp_path, "--dataset", texts, "--device", "cpu").done()
    units = json.loads((tmp_path / "analysis.json").read_text())["units"]
    assert {unit["group"] for unit in units} == {"qkv", "o", "experts"} and len(units) == 9
    assert all(0 < damage < 1 for unit in units for damage in unit["damage"].values())


def test_dry_run_names_the_experts_once(tiny: Path, tmp_path: Path) -> None:
    shown = quant(tiny, tmp_path / "out", "--config_path", "qwen3_omni_w8a8_minmax", "--dry_run").done().out
    assert "experts 0-7: gate up down" in " ".join(shown.split()) and len(shown.splitlines()) < 25
