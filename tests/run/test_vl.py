"""Qwen2.5-VL: inputs, layers and outputs against transformers, all formats and commands, and error messages."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DATA, command, quant, write_index
from library_videos import use_in_library
from make_checkpoint import VL_SHAPES
from make_tiny_vl import vl_config
from outputs import all_tensors, edit_config, quantize_all
from safetensors.torch import save_file
from ties import assert_greedy

from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.doctor.linears import expected_linears
from msmodelslim_omni.doctor.names import (
    ascend_modules,
    awq_loaders,
    compressed_tensors_loaders,
    loader_views,
)
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.evaluation.run import evaluate
from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.formats.job import OutLinear, OutputJob
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type, find_model_type
from msmodelslim_omni.models import qwen2_5_vl as vl
from msmodelslim_omni.models.inputs import MODALITIES, LayerInput, MediaLimits, ModelInputs
from msmodelslim_omni.models.spec import ModelSpec, apply_renaming
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.generate import generate
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe.loading import find_recipe, load_recipe
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.statistics.capture import run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

SPEC = MODEL_TYPES["Qwen2.5-VL-7B-Instruct"]
FLOAT_LINEAR = "model.layers.1.mlp.down_proj"
IMAGE, OTHER_IMAGE = str(DATA / "images/notice_zh.png"), str(DATA / "images/coffee cup.jpg")
CLIP, OTHER_CLIP = str(DATA / "videos/cat_pan_zh.mp4"), str(DATA / "videos/bouncing ball.mp4")
AUDIO = str(DATA / "audio/three_beeps.wav")

CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A notice."}]},
    {"role": "user", "content": [{"type": "video", "video": OTHER_CLIP}, {"type": "text", "text": "And this?"}]},
]
MIXES: dict[str, dict[str, Any]] = {
    "text": {"text": "Why is the sky blue?"},
    "answered": {"text": "三加五等于几？", "answer": "八。", "system": "Be brief."},
    "image": {"image": IMAGE, "text": "Read it.", "answer": "It is a notice."},
    "two images": {"image": [IMAGE, OTHER_IMAGE], "text": "Compare."},
    "video with an unused audio track": {"video": CLIP, "text": "What moves?", "use_audio_in_video": True},
    "everything": {"image": IMAGE, "video": [OTHER_CLIP, CLIP], "text": "Describe."},
    "conversation": {"messages": CONVERSATION},
}


@pytest.fixture(scope="module", params=["own lm_head", "tied"])
def model(request: pytest.FixtureRequest, tiny_vl: Path, tied_vl: Path) -> Path:
    return tied_vl if request.param == "tied" else tiny_vl


def library_class() -> Any:
    vl.load_transformers()
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


# --- names and shapes ----------------------------------------------------------------------------------------


def test_transformers_loads_and_saves_the_tiny_model(model: Path, tmp_path: Path) -> None:
    loaded, info = library_class().from_pretrained(model, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    loaded.save_pretrained(tmp_path)
    saved = {name: tensor.shape for name, tensor in all_tensors(tmp_path).items()}
    checkpoint = open_checkpoint(model)
    assert {name: torch.Size(tensor.shape) for name, tensor in checkpoint.tensors.items()} == saved
    expected, optional = vl.expected_tensors(checkpoint.config)
    assert {name: torch.Size(shape) for name, shape in expected.items() if name not in optional} == saved
    assert optional == ({"lm_head.weight"} if "lm_head.weight" not in saved else set())
    assert SPEC.lm_head_tensor(checkpoint.config) == ("model.embed_tokens.weight" if optional else "lm_head.weight")


def test_config_saved_by_transformers_is_read(tied_vl: Path, tmp_path: Path) -> None:
    """It has a text_config, while the published config is flat."""
    vl.load_transformers()
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig.from_pretrained(tied_vl).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    flat = open_checkpoint(tied_vl).config
    assert "text_config" in nested and "text_config" not in flat
    assert vl.layer_spec(nested) == vl.layer_spec(flat)
    assert vl.num_layers(nested) == vl.num_layers(flat) == 4
    assert vl.tied_tensors(nested) == vl.tied_tensors(flat) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert vl.expected_tensors(nested)[0] == vl.expected_tensors(flat)[0]


def test_model_types_and_aliases() -> None:
    assert find_model_type("Qwen2.5-VL-3B").model_type == "Qwen2.5-VL-3B-Instruct"
    assert find_model_type("Qwen2.5-VL-7B-Instruct").model_type == "Qwen2.5-VL-7B-Instruct"
    with pytest.raises(QuantError, match=r"Did you mean 'Qwen2\.5-VL-7B-Instruct'"):
        find_model_type("Qwen2.5-VL-7B-instruct")
    config = {"model_type": "qwen2_5_vl", "hidden_size": 2048, "num_hidden_layers": 36}
    assert derive_model_type(config).model_type == "Qwen2.5-VL-3B-Instruct"
    nested = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584, "num_hidden_layers": 28}}
    assert derive_model_type(nested).model_type == "Qwen2.5-VL-7B-Instruct"
    for quant_type in ("w8a8", "w4a16", "awq"):
        for size in ("3B", "7B"):
            assert "qwen2_5_vl" in find_recipe(f"Qwen2.5-VL-{size}-Instruct", quant_type).metadata.config_id


# --- layer inputs --------------------------------------------------------------------------------------------


def as_messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation as users of transformers write it. The chat template adds the system turn."""
    if "messages" in entry:
        return list(entry["messages"])
    parts = []
    for kind in ("image", "video"):
        files = entry.get(kind, [])
        parts += [{"type": kind, kind: file} for file in ([files] if isinstance(files, str) else files)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": entry["text"]}]}]
    if "system" in entry:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": entry["system"]}]})
    if "answer" in entry:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": entry["answer"]}]})
    return messages


def library_inputs(entry: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The standard processing: chat template, process_vision_info, processor."""
    vl.load_transformers()
    from qwen_omni_utils import process_vision_info

    use_in_library()
    from transformers import Qwen2_5_VLProcessor, __version__

    processor = Qwen2_5_VLProcessor.from_pretrained(path)
    messages = as_messages(entry)
    answered = messages[-1]["role"] == "assistant"
    text = processor.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
    images, videos, info = process_vision_info(messages, return_video_kwargs=True)
    options: dict[str, Any] = {"fps": info["fps"]} if videos and __version__.startswith("4.") else {}
    if videos and not options:
        lengths = [len(video) for video in videos]
        options["video_metadata"] = [
            {"fps": rate, "total_num_frames": n, "frames_indices": list(range(n))}
            for rate, n in zip(info["fps"], lengths, strict=True)
        ]
    encoded = processor(
        text=[text], images=images, videos=videos, return_tensors="pt", do_sample_frames=False, **options
    )
    return {name: torch.as_tensor(value) for name, value in encoded.items()}


@pytest.fixture(scope="module")
def library(tied_vl: Path) -> Any:
    return library_class().from_pretrained(tied_vl, dtype=torch.float32, attn_implementation="sdpa").eval()


def full_model_states(library: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The input of every decoder layer of the transformers model, and the input of the final norm."""
    states: list[torch.Tensor] = []

    def record_input(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append(arguments[0] if arguments else keywords["hidden_states"])

    decoder = library.model.language_model
    modules = (*decoder.layers, decoder.norm)
    hooks = [module.register_forward_pre_hook(record_input, with_kwargs=True) for module in modules]
    with torch.inference_mode():
        library(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def model_inputs(entry: dict[str, Any], path: Path, folder: Path, max_pixels: int | None = None) -> ModelInputs:
    media = vl.open_media_processor(path, MediaLimits(8192, max_pixels, 2.0), False)
    (sample,) = load_calib_set(str(write_index(folder, entry)), "Describe.", SPEC).samples
    assert not sample.use_audio_in_video
    return prepare_sample(sample, media)


def layer_states(checkpoint: Checkpoint, first: LayerInput) -> Iterator[torch.Tensor]:
    """Yield the input of every decoder layer and the output of the last."""
    hidden = first.hidden
    for index in range(vl.num_layers(checkpoint.config)):
        yield hidden
        shapes = vl.layer_spec(checkpoint.config).shapes
        weights = {name: checkpoint.load(SPEC.layer_name(index, name)).float() for name in shapes}
        hidden = run_layer(vl.build_layer(checkpoint.config, index, weights), LayerInput(hidden, first.arguments))
    yield hidden


@pytest.mark.parametrize("mix", MIXES)
def test_layer_inputs_equal_the_full_model(mix: str, tied_vl: Path, library: Any, tmp_path: Path) -> None:
    inputs, reference = model_inputs(MIXES[mix], tied_vl, tmp_path), library_inputs(MIXES[mix], tied_vl)
    assert set(inputs.tensors) == set(reference)
    for name, tensor in reference.items():
        assert torch.equal(inputs.tensors[name], tensor), name
    checkpoint = open_checkpoint(tied_vl)
    stem = vl.open_stem(checkpoint, torch.device("cpu"), 1 << 30)
    actual = list(layer_states(checkpoint, stem.layer_input(inputs)))
    expected = full_model_states(library, reference)
    assert len(actual) == len(expected) == 5
    for state, expected_state in zip(actual, expected, strict=True):
        assert state.shape == expected_state.shape
        assert float((state - expected_state).norm() / expected_state.norm()) < 1e-5
    ids = inputs.tensors["input_ids"][0]
    assert inputs.modality.tolist() == [
        MODALITIES.index({2828: "image", 2829: "video"}.get(token, "text")) for token in ids.tolist()
    ]


def test_norm_equals_transformers(tied_vl: Path, library: Any) -> None:
    checkpoint = open_checkpoint(tied_vl)
    norm = vl.build_norm(checkpoint.config, checkpoint.load(SPEC.norm).float())
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), library.model.language_model.norm(x))


def test_max_pixels_limits_images_and_videos(tied_vl: Path, tmp_path: Path) -> None:
    limit = 32 * 28 * 28
    small = model_inputs(MIXES["everything"], tied_vl, tmp_path, max_pixels=limit)
    large = model_inputs(MIXES["everything"], tied_vl, tmp_path)
    for kind in ("image", "video"):
        grids = (inputs.tensors[f"{kind}_grid_thw"][:, 1:].prod(1) * 14 * 14 for inputs in (small, large))
        smaller, larger = (int(grid.max()) for grid in grids)
        assert smaller <= limit < larger


# --- outputs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tied_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data-free outputs of the tied model in every format, with one Linear kept float."""
    return quantize_all(tied_vl, tmp_path_factory.mktemp("vl") / "outputs", FLOAT_LINEAR)


@pytest.mark.parametrize("name", ["ascend", "int8", "awq", "packed", "symmetric"])
def test_doctor_finds_no_problem(name: str, outputs: dict[str, Path], tied_vl: Path) -> None:
    problems = [finding for finding in examine(outputs[name], tied_vl).findings if finding.level != "ok"]
    # AutoAWQ's list of excluded names cannot name a single layer.
    assert {finding.code for finding in problems} == ({"autoawq_cannot_say"} if name == "awq" else set())


def test_only_the_decoder_is_quantized(outputs: dict[str, Path], tied_vl: Path) -> None:
    source = all_tensors(tied_vl)
    for name, path in outputs.items():
        kept = all_tensors(path)
        assert "lm_head.weight" not in kept, name
        for key, tensor in source.items():
            if not key.startswith("model.layers.") or key.startswith(f"{FLOAT_LINEAR}."):
                assert torch.equal(kept[key].view(torch.uint8), tensor.view(torch.uint8)), (name, key)


def test_ascend_description_lists_the_tied_lm_head(outputs: dict[str, Path], tmp_path: Path) -> None:
    description = json.loads((outputs["ascend"] / "quant_model_description.json").read_text())
    assert description["lm_head.weight"] == "FLOAT"
    assert description["visual.blocks.0.attn.qkv.weight"] == "FLOAT"
    assert description["model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"
    broken = shutil.copytree(outputs["ascend"], tmp_path / "broken")
    del description["lm_head.weight"]
    (broken / "quant_model_description.json").write_text(json.dumps(description))
    (fault,) = [finding for finding in examine(broken).findings if finding.level == "error"]
    assert (fault.code, fault.where) == ("description_missing_entry", "lm_head.weight")


@pytest.mark.parametrize(("source", "target"), [("awq", "packed"), ("packed", "awq"), ("ascend", "int8")])
def test_export_gives_the_tensors_of_a_direct_run(
    source: str, target: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    save_format = {"awq": "awq", "packed": "compressed_tensors", "int8": "compressed_tensors"}[target]
    export(outputs[source], tmp_path / "out", save_format)
    actual, expected = all_tensors(tmp_path / "out"), all_tensors(outputs[target])
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", outputs[target])]
    assert configs[0] == configs[1]


def test_generate_equals_transformers(model: Path, tmp_path: Path) -> None:
    entry = {"image": IMAGE, "video": OTHER_CLIP, "text": "What is it?"}
    loaded = library_class().from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    limited = model_inputs(entry, model, tmp_path, max_pixels=768 * 28 * 28).tensors
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = torch.cat(loaded.generate(**limited, max_new_tokens=8, pad_token_id=0, **options).logits)
    answer = generate(model, entry["text"], images=[IMAGE], videos=[OTHER_CLIP], max_new_tokens=8, device="cpu")
    assert_greedy(answer.tokens, logits)


def test_eval_equals_the_full_models_of_transformers(
    outputs: dict[str, Path], tied_vl: Path, library: Any, tmp_path: Path
) -> None:
    entries = [MIXES["answered"], MIXES["image"], MIXES["everything"]]
    report = evaluate(tied_vl, outputs["packed"], str(write_index(tmp_path, *entries)), device="cpu")
    other = copy.deepcopy(library)
    output = open_quantized(outputs["packed"])
    for name in output.linears:
        module = other.model.language_model.get_submodule(name.removeprefix("model."))
        module.weight.data = dequantize(output.load_linear(name))
    kl: dict[str, list[float]] = {}
    for kind, entry in zip(("text", "image", "video"), entries, strict=True):
        inputs = model_inputs(entry, tied_vl, tmp_path / kind, max_pixels=200704)
        with torch.inference_mode():
            p, q = (m(**inputs.tensors, use_cache=False).logits[0].double().log_softmax(-1) for m in (library, other))
        of_text = [t for t in range(len(inputs.modality) - 1) if inputs.modality[t + 1] == 0]
        scored = range(inputs.answer[0] - 1, inputs.answer[1] - 1) if inputs.answer else of_text
        kl[kind] = [float((p[t].exp() * (p[t] - q[t])).sum()) for t in scored]
    kl["image"] += kl["video"]  # the last sample has both
    for kind, values in kl.items():
        assert report.by_modality[kind].positions == len(values)
        assert report.by_modality[kind].kl_mean.value == pytest.approx(sum(values) / len(values), rel=1e-4)
    same = evaluate(tied_vl, tied_vl, str(tmp_path), device="cpu", save_path=tmp_path / "same")
    assert same.overall.kl_mean.value == 0.0 and same.overall.exact_float == same.overall.exact_quant


@pytest.mark.parametrize("name", ["int8", "awq"])
def test_generate_with_quantized_checkpoints(name: str, outputs: dict[str, Path]) -> None:
    assert generate(outputs[name], "Why?", images=[IMAGE], max_new_tokens=3, device="cpu").tokens


def test_calibrated_run_with_the_shipped_recipe(tiny_vl: Path, tmp_path: Path) -> None:
    """Samples with audio are left out, in one line. All others are used."""
    index = write_index(
        tmp_path / "data",
        {"text": "Why is the sky blue?", "answer": "Short waves scatter most."},
        {"audio": AUDIO, "text": "How many?"},
        {"audio": "missing.wav", "text": "A file that is never opened"},
        {"image": IMAGE, "text": "Read it."},
        {"video": CLIP, "text": "What moves?"},
    )
    answer = quant(tiny_vl, tmp_path / "out", "--quant_type", "w8a8", "--dataset", index).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["samples"] == 3 and set(report["tokens_by_modality"]) == {"text", "image", "video"}
    left_out = "2 samples with audio left out: Qwen2.5-VL-7B-Instruct takes no audio"
    assert report["warnings"].count(left_out) == 1 and f"warning: {left_out}" in answer.err
    assert not [finding for finding in examine(tmp_path / "out", tiny_vl).findings if finding.level != "ok"]


# --- text prompts --------------------------------------------------------------------------------------------


def test_calibration_on_a_list_of_prompts(tied_vl: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why is the sky blue?\n\n  三加五等于几？\n{not json}\n", encoding="utf-8")
    texts = [sample.messages[-1]["content"][0]["text"] for sample in load_calib_set(str(prompts), "", SPEC).samples]
    assert texts == ["Why is the sky blue?", "三加五等于几？", "{not json}"]
    words = ("--config_path", "qwen2_5_w4a16_text", "--dataset", prompts, "--model_type", "Qwen2.5-VL-3B")
    quant(tied_vl, tmp_path / "out", *words).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["samples"] == 3 and set(report["tokens_by_modality"]) == {"text"}


def test_shipped_prompts() -> None:
    calib = load_calib_set("prompts", "", SPEC)
    assert len(calib.samples) >= 32 and not calib.warnings
    assert {kind for sample in calib.samples for kind in sample.modalities()} == {"text"}
    recipe = find_recipe("Qwen2.5-VL-3B-Instruct", "w4a16")
    assert recipe.metadata.config_id == "qwen2_5_vl_w4a16"  # the recipe with media is the default


# --- errors --------------------------------------------------------------------------------------------------


def preparation_error(model: Path, **options: Any) -> QuantError:
    with pytest.raises(QuantError) as caught:
        prepare(QuantRequest(model, device="cpu", **options))
    return caught.value


def recipe_with(folder: Path, include: str) -> str:
    path = folder / "recipe.yaml"
    qconfig = {"act": {}, "weight": {}}
    process = [{"type": "linear_quant", "qconfig": qconfig, "include": ["*self_attn*", include]}]
    spec = {"process": process, "save": [{"type": "compressed_tensors"}]}
    path.write_text(json.dumps({"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec}))
    return str(path)


def test_model_type_of_the_other_family(tiny: Path, tiny_vl: Path) -> None:
    error = preparation_error(tiny_vl, model_type="Qwen2.5-Omni-7B")
    assert "config.json has model_type 'qwen2_5_vl'; Qwen2.5-Omni-7B requires 'qwen2_5_omni'" in error.message
    assert "--model_type Qwen2.5-VL-7B-Instruct" in error.hint
    error = preparation_error(tiny, model_type="Qwen2.5-VL-3B")
    assert "config.json has model_type 'qwen2_5_omni'; Qwen2.5-VL-3B-Instruct requires 'qwen2_5_vl'" in error.message
    assert "--model_type Qwen2.5-Omni-7B" in error.hint


@pytest.mark.parametrize("weights", ["vl", "omni"])
def test_config_of_the_other_family(weights: str, tiny: Path, tied_vl: Path, tmp_path: Path) -> None:
    source, other = (tied_vl, tiny) if weights == "vl" else (tiny, tied_vl)
    mixed = shutil.copytree(source, tmp_path / "mixed")
    shutil.copy(other / "config.json", mixed / "config.json")
    error = preparation_error(mixed)
    declared, actual = ("qwen2_5_omni", "qwen2_5_vl") if weights == "vl" else ("qwen2_5_vl", "qwen2_5_omni")
    assert f"config.json has model_type '{declared}', but the tensor names are those of '{actual}'" in error.message
    assert {"vl": "Qwen2.5-VL", "omni": "Qwen2.5-Omni"}[weights] in error.hint


@pytest.mark.parametrize("weights", ["vl", "omni"])
def test_model_type_of_the_other_family_in_a_config(weights: str, tiny: Path, tied_vl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tied_vl if weights == "vl" else tiny, tmp_path / "copy")
    declared, actual = ("qwen2_5_omni", "qwen2_5_vl") if weights == "vl" else ("qwen2_5_vl", "qwen2_5_omni")
    edit_config(copy, lambda config: config.update(model_type=declared))
    assert f"'{declared}', but the tensor names are those of '{actual}'" in preparation_error(copy).message


@pytest.mark.parametrize("more", [{}, {"image": IMAGE, "text": "Both?"}])
def test_audio_alone_is_no_dataset_for_a_vl(more: dict[str, str], tiny_vl: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path, {"audio": AUDIO, **more})
    message = preparation_error(tiny_vl, dataset=str(index)).message
    assert "no usable sample\n1 sample with audio left out: Qwen2.5-VL-7B-Instruct takes no audio" in message
    message = command("generate", tiny_vl, "--audio", AUDIO, "--text", "How many?").fault()
    assert "audio is not supported by Qwen2.5-VL-7B-Instruct" in message


def test_error_on_lm_head_in_a_recipe(tiny_vl: Path, tied_vl: Path, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "*lm_head*")
    assert "selects the output token" in preparation_error(tiny_vl, config_path=recipe).message
    error = preparation_error(tied_vl, config_path=recipe)
    assert "selects lm_head (lm_head)" in error.message
    assert "it is tied to model.embed_tokens.weight and not stored itself" in error.message


def test_stored_tied_lm_head_is_accepted(tied_vl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tied_vl, tmp_path / "copy")
    tensors = all_tensors(copy)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert not prepare(QuantRequest(copy, device="cpu", config_path="qwen2_5_vl_w8a8_minmax")).plan.warnings


def test_error_on_a_missing_lm_head(tied_vl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tied_vl, tmp_path / "copy")
    edit_config(copy, lambda config: config.update(tie_word_embeddings=False))
    assert "tensor lm_head.weight is missing" in preparation_error(copy).message


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("awq", "awq 4 bits"),
        ("int8", "compressed-tensors int-quantized"),
        ("packed", "compressed-tensors pack-quantized"),
        ("ascend", "ascend W8A8_DYNAMIC"),
    ],
)
def test_error_on_a_quantized_source_names_its_scheme(name: str, scheme: str, outputs: dict[str, Path]) -> None:
    assert f"is already quantized ({scheme})" in preparation_error(outputs[name]).message


def test_error_on_speech(outputs: dict[str, Path], tied_vl: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="a qwen2_5_vl answers in text only"):
        generate(tied_vl, "Hello", speech=tmp_path / "x.wav", device="cpu")
    with pytest.raises(QuantError, match="a qwen2_5_vl has no speech parts"):
        export(outputs["awq"], tmp_path / "out", "compressed_tensors", thinker_only=True)


def test_every_pattern_of_the_vl_recipes_matches(tiny_vl: Path) -> None:
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        if SPEC.model_type in load_recipe(path).metadata.verified_model_types:
            options = {"config_path": str(path)}
            warnings = prepare(QuantRequest(tiny_vl, device="cpu", **options)).plan.warnings
            assert not [warning for warning in warnings if "pattern" in warning], path


# --- published shapes ----------------------------------------------------------------------------------------

# Published numbers of parameters, and entries of the state dict in transformers.
PUBLISHED = {"vl-3b": (3_754_622_976, 825), "vl-7b": (8_292_166_656, 729)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_loader_converts_only_the_decoder(name: str) -> None:
    config = vl_config(VL_SHAPES[name], "bfloat16")
    model = derive_model_type(config)
    assert model.model_type == {"vl-3b": "Qwen2.5-VL-3B-Instruct", "vl-7b": "Qwen2.5-VL-7B-Instruct"}[name]
    expected, optional = vl.expected_tensors(config)
    stored = {tensor: shape for tensor, shape in expected.items() if tensor not in optional}
    # transformers counts a tied lm_head as a separate entry.
    assert (sum(torch.Size(shape).numel() for shape in stored.values()), len(expected)) == PUBLISHED[name]
    linears = sorted(expected_linears(expected))
    decoder = {linear for linear in linears if linear.startswith("model.layers.")}
    assert len(decoder) == 7 * vl.num_layers(config)
    job = output_job(linears, model)
    for loaders in (
        awq_loaders(model, awq.modules_to_not_convert(job), decoder),
        compressed_tensors_loaders(model, compressed_tensors.quantization_config(job)["ignore"], ["Linear"]),
    ):
        results = list(loader_views(loaders, linears))
        names = {result.loader for result in results}
        assert {"transformers 4.57, full class", "transformers 5.x, full class", "vLLM"} <= names
        for result in results:
            assert result.converted == decoder and not result.split, result.loader
    assert "language_model.lm_head" in ascend_modules(model, linears)


def output_job(linears: list[str], model: ModelSpec) -> OutputJob:
    def unread() -> torch.Tensor:
        raise AssertionError("names only")

    scheme = QuantScheme(4, None, group_size=128, symmetric=False)
    quantized = [name for name in linears if name.startswith(model.layers_prefix)]
    items = tuple(OutLinear(name, scheme, (128, 128), "BF16", unread, unread, unread) for name in quantized)
    return OutputJob(items, (), model.ignore_patterns, model.config_paths, {}, Path(), ())


def test_module_names_equal_transformers(tiny_vl: Path) -> None:
    """Checks the renaming tables of this package against the class itself."""
    modules = dict(library_class().from_pretrained(tiny_vl).named_modules())
    expected = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    (full,) = SPEC.loaders.classes
    on_disk = expected_linears(vl.expected_tensors(open_checkpoint(tiny_vl).config)[0])
    for renaming in (full.modules, full.modules_5):
        assert {apply_renaming(name, renaming) for name in on_disk} == expected
