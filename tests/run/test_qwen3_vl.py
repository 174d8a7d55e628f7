"""Qwen3-VL: inputs, layers and outputs against transformers, all formats and commands, and error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DATA, command, quant, write_index
from library_videos import use_in_library
from make_checkpoint import QWEN3_VL_SHAPES
from make_tiny_qwen3_vl import make_tiny_qwen3_vl, qwen3_vl_config
from outputs import all_tensors, quantize_all
from ties import assert_greedy

from msmodelslim_omni.calibration.sample_store import StemStore
from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.doctor.linears import expected_linears
from msmodelslim_omni.doctor.names import ascend_modules, awq_loaders, compressed_tensors_loaders, loader_views
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.evaluation.run import evaluate
from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.formats.job import OutLinear, OutputJob
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type
from msmodelslim_omni.models import qwen3_vl as vl
from msmodelslim_omni.models.inputs import MODALITIES, MediaLimits, ModelInputs
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.generate import generate
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe.loading import find_recipe, load_recipe
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.statistics.capture import run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

SPEC = MODEL_TYPES["Qwen3-VL-4B-Instruct"]
FLOAT_LINEAR = "model.language_model.layers.1.mlp.down_proj"
IMAGE, OTHER_IMAGE = str(DATA / "images/notice_zh.png"), str(DATA / "images/coffee cup.jpg")
CLIP, OTHER_CLIP = str(DATA / "videos/cat_pan_zh.mp4"), str(DATA / "videos/bouncing ball.mp4")
AUDIO = str(DATA / "audio/three_beeps.wav")
PIXELS = 64 * 32 * 32  # keeps the tests fast

MIXES: dict[str, dict[str, Any]] = {
    "text": {"text": "Why is the sky blue?", "answer": "Short waves scatter most."},
    "image": {"image": IMAGE, "text": "Read it.", "answer": "It is a notice.", "system": "Be brief."},
    "video": {"video": CLIP, "text": "What moves?"},
    "everything": {"image": [IMAGE, OTHER_IMAGE], "video": [OTHER_CLIP, CLIP], "text": "Describe."},
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL in one file, with a tied lm_head that is not stored, as in the 4B, and three layers.

    The last of the three DeepStack maps is added after the last layer, in front of the final norm.
    """
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("models") / "tied", tied=True, shards=1, layers=3)


def library_class() -> Any:
    vl.load_transformers()
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration


@pytest.fixture(scope="module")
def library(tied: Path) -> Any:
    return library_class().from_pretrained(tied, dtype=torch.float32, attn_implementation="sdpa").eval()


# --- names and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_qwen3_vl", "tied"])
def test_transformers_loads_and_saves_the_tiny_model(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    loaded, info = library_class().from_pretrained(path, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    loaded.save_pretrained(tmp_path)
    saved = {name: tensor.shape for name, tensor in all_tensors(tmp_path).items()}
    checkpoint = open_checkpoint(path)
    assert {name: torch.Size(tensor.shape) for name, tensor in checkpoint.tensors.items()} == saved
    expected, optional = vl.expected_tensors(checkpoint.config)
    assert {name: torch.Size(shape) for name, shape in expected.items() if name not in optional} == saved
    assert optional == ({"lm_head.weight"} if model == "tied" else set())


# --- layer inputs --------------------------------------------------------------------------------------------


def library_inputs(entry: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The processing that the model's authors describe: chat template, process_vision_info, processor."""
    from qwen_omni_utils import process_vision_info

    use_in_library()
    from transformers import Qwen3VLProcessor

    parts: list[dict[str, Any]] = []
    for kind in ("image", "video"):
        files = entry.get(kind, [])
        limits = {"max_pixels": PIXELS} if kind == "image" else {"max_pixels": PIXELS, "min_pixels": PIXELS // 2}
        parts += [{"type": kind, kind: f, **limits} for f in ([files] if isinstance(files, str) else files)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": entry["text"]}]}]
    if "system" in entry:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": entry["system"]}]})
    if "answer" in entry:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": entry["answer"]}]})
    processor = Qwen3VLProcessor.from_pretrained(path)
    text = processor.apply_chat_template(messages, add_generation_prompt="answer" not in entry, tokenize=False)
    images, clips, options = process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True, image_patch_size=16
    )
    if clips:
        videos, metadata = zip(*clips, strict=True)
        options |= {"videos": list(videos), "video_metadata": list(metadata)}
    encoded = processor(text=[text], images=images, return_tensors="pt", do_resize=False, **options)
    return {name: torch.as_tensor(value) for name, value in encoded.items()}


def model_inputs(entry: dict[str, Any], path: Path, folder: Path, max_pixels: int | None = PIXELS) -> ModelInputs:
    media = vl.open_media_processor(path, MediaLimits(8192, max_pixels, 2.0), False)
    (sample,) = load_calib_set(str(write_index(folder, entry)), "Describe.", SPEC).samples
    return prepare_sample(sample, media)


def full_model_states(library: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The input of every decoder layer of the transformers model, and the input of the final norm."""
    states: list[torch.Tensor] = []

    def record_input(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    decoder = library.model.language_model
    hooks = [m.register_forward_pre_hook(record_input, with_kwargs=True) for m in (*decoder.layers, decoder.norm)]
    with torch.inference_mode():
        library(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def stream_states(checkpoint: Checkpoint, inputs: ModelInputs, folder: Path) -> Iterator[torch.Tensor]:
    """Yield the input of every decoder layer and of the final norm, through the stored stem."""
    stem = vl.open_stem(checkpoint, torch.device("cpu"), 1 << 30)
    store = StemStore(folder / "stem", 0)
    store.write(0, stem.layer_input(inputs), inputs.modality)
    hidden = store.hidden(0)
    for index in range(vl.num_layers(checkpoint.config)):
        entering = store.layer_input(0, index, hidden, torch.device("cpu"))
        yield entering.hidden
        shapes = vl.layer_spec(checkpoint.config).shapes
        weights = {name: checkpoint.load(SPEC.layer_name(index, name)).float() for name in shapes}
        hidden = run_layer(vl.build_layer(checkpoint.config, index, weights), entering)
    yield store.entering(0, vl.num_layers(checkpoint.config), hidden)


@pytest.mark.parametrize("mix", MIXES)
def test_layer_inputs_equal_the_full_model(mix: str, tied: Path, library: Any, tmp_path: Path) -> None:
    inputs, reference = model_inputs(MIXES[mix], tied, tmp_path), library_inputs(MIXES[mix], tied)
    assert set(inputs.tensors) == set(reference)
    for name, tensor in reference.items():
        assert torch.equal(inputs.tensors[name], tensor), name
    actual = list(stream_states(open_checkpoint(tied), inputs, tmp_path))
    expected = full_model_states(library, reference)
    assert len(actual) == len(expected) == 4
    for state, expected_state in zip(actual, expected, strict=True):
        assert float((state - expected_state).norm() / expected_state.norm()) < 1e-5
    ids = inputs.tensors["input_ids"][0]
    tokens = {tied_config(tied)[f"{kind}_token_id"]: kind for kind in ("image", "video")}
    assert inputs.modality.tolist() == [MODALITIES.index(tokens.get(token, "text")) for token in ids.tolist()]


def tied_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def test_max_pixels_limits_images_and_videos(tied: Path, tmp_path: Path) -> None:
    small = model_inputs(MIXES["everything"], tied, tmp_path, max_pixels=PIXELS)
    for kind in ("image", "video"):
        assert int(small.tensors[f"{kind}_grid_thw"][:, 1:].prod(1).max()) * 16 * 16 <= PIXELS
    with pytest.raises(QuantError, match="max_pixels is 3136, less than 4 visual tokens of Qwen3"):
        model_inputs(MIXES["image"], tied, tmp_path, max_pixels=3136)


# --- outputs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data-free outputs of the tied model in every format, with one Linear kept float."""
    return quantize_all(tied, tmp_path_factory.mktemp("vl") / "outputs", FLOAT_LINEAR)


@pytest.mark.parametrize("name", ["ascend", "int8", "awq", "packed", "symmetric"])
def test_doctor_finds_no_problem(name: str, outputs: dict[str, Path], tied: Path) -> None:
    problems = [finding for finding in examine(outputs[name], tied).findings if finding.level != "ok"]
    # AutoAWQ's list of excluded names cannot name a single layer.
    assert {finding.code for finding in problems} == ({"autoawq_cannot_say"} if name == "awq" else set())
    source = all_tensors(tied)
    kept = all_tensors(outputs[name])
    for key, tensor in source.items():
        if not key.startswith("model.language_model.layers.") or "norm" in key or key.startswith(f"{FLOAT_LINEAR}."):
            assert torch.equal(kept[key].view(torch.uint8), tensor.view(torch.uint8)), (name, key)


def test_ascend_description_has_every_float_linear(outputs: dict[str, Path]) -> None:
    description = json.loads((outputs["ascend"] / "quant_model_description.json").read_text())
    assert description["model.visual.blocks.0.attn.qkv.weight"] == "FLOAT"
    assert description["model.visual.deepstack_merger_list.0.linear_fc1.weight"] == "FLOAT"
    assert description["model.language_model.layers.0.self_attn.q_norm.weight"] == "FLOAT"
    assert description["model.language_model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"
    assert description["lm_head.weight"] == "FLOAT"


def test_generate_equals_transformers(tied: Path, library: Any, tmp_path: Path) -> None:
    entry = {"image": OTHER_IMAGE, "text": "What is it?"}
    inputs = model_inputs(entry, tied, tmp_path, max_pixels=768 * 32 * 32).tensors
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = torch.cat(library.generate(**inputs, max_new_tokens=6, pad_token_id=0, **options).logits)
    answer = generate(tied, entry["text"], images=[OTHER_IMAGE], max_new_tokens=6, device="cpu")
    assert_greedy(answer.tokens, logits)


def test_eval_equals_the_full_models_of_transformers(
    outputs: dict[str, Path], tied: Path, library: Any, tmp_path: Path
) -> None:
    entries = [MIXES["text"], MIXES["image"]]
    report = evaluate(tied, outputs["packed"], str(write_index(tmp_path, *entries)), device="cpu", max_pixels=PIXELS)
    other = library_class().from_pretrained(tied, dtype=torch.float32, attn_implementation="sdpa").eval()
    output = open_quantized(outputs["packed"])
    for name in output.linears:
        other.get_submodule(name).weight.data = dequantize(output.load_linear(name))
    for kind, entry in zip(("text", "image"), entries, strict=True):
        inputs = model_inputs(entry, tied, tmp_path / kind)
        with torch.inference_mode():
            p, q = (m(**inputs.tensors, use_cache=False).logits[0].double().log_softmax(-1) for m in (library, other))
        assert inputs.answer is not None
        scored = range(inputs.answer[0] - 1, inputs.answer[1] - 1)
        kl = [float((p[t].exp() * (p[t] - q[t])).sum()) for t in scored]
        assert report.by_modality[kind].kl_mean.value == pytest.approx(sum(kl) / len(kl), rel=1e-4)


@pytest.mark.parametrize("quant_type", ["w8a8", "w4a16"])
def test_calibrated_run_with_the_shipped_recipe(quant_type: str, tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    """Samples with audio are skipped with a reason. All others are used."""
    index = write_index(
        tmp_path / "data",
        MIXES["text"],
        {"audio": AUDIO, "text": "How many?"},
        {"image": OTHER_IMAGE, "text": "What is it?"},
        {"video": OTHER_CLIP, "text": "What moves?"},
    )
    recipe = tmp_path / "recipe.yaml"
    text = find_recipe(SPEC.model_type, quant_type).text
    recipe.write_text(text.replace("max_pixels: 262144", f"max_pixels: {PIXELS}"), encoding="utf-8")
    quant(tiny_qwen3_vl, tmp_path / "out", "--config_path", recipe, "--dataset", index).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["samples"] == 3 and set(report["tokens_by_modality"]) == {"text", "image", "video"}
    assert all(layer["output_error"] < (0.05 if quant_type == "w8a8" else 0.3) for layer in report["layers"])
    assert not [finding for finding in examine(tmp_path / "out", tiny_qwen3_vl).findings if finding.level != "ok"]


# --- errors --------------------------------------------------------------------------------------------------


def test_recipe_of_the_other_generation(tiny_qwen3_vl: Path, tiny_vl: Path) -> None:
    for model, other in ((tiny_qwen3_vl, "Qwen2.5-VL-7B-Instruct"), (tiny_vl, "Qwen3-VL-4B-Instruct")):
        with pytest.raises(QuantError) as caught:
            prepare(QuantRequest(model, device="cpu", model_type=other))
        assert "config.json has model_type" in caught.value.message
        assert "--model_type Qwen" in caught.value.hint


def test_error_on_audio(tiny_qwen3_vl: Path) -> None:
    message = command("generate", tiny_qwen3_vl, "--audio", AUDIO, "--text", "How many?").fault()
    assert "audio is not supported by Qwen3-VL-4B-Instruct, which supports text, image, video" in message


def test_error_on_a_config_without_deepstack(tiny_qwen3_vl: Path) -> None:
    config = tied_config(tiny_qwen3_vl)
    config["vision_config"]["deepstack_visual_indexes"] = "all"
    with pytest.raises(QuantError, match="deepstack_visual_indexes is 'all'"):
        vl.deepstack_depth(config)
    del config["text_config"]
    with pytest.raises(QuantError, match="no text_config"):
        vl.num_layers(config)


def test_every_pattern_of_the_recipes_matches(tiny_qwen3_vl: Path) -> None:
    for path in sorted((Path(__file__).parents[2] / "configs").glob("qwen3_vl*.yaml")):
        assert SPEC.model_type in load_recipe(path).metadata.verified_model_types
        warnings = prepare(QuantRequest(tiny_qwen3_vl, device="cpu", config_path=str(path))).plan.warnings
        assert not [warning for warning in warnings if "pattern" in warning], path


# --- published shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3_VL_SHAPES)
def test_every_loader_converts_only_the_decoder(name: str) -> None:
    config = qwen3_vl_config(QWEN3_VL_SHAPES[name], "bfloat16")
    model = derive_model_type(config)
    assert model.model_type == f"Qwen3-VL-{name.rpartition('-')[2].upper()}-Instruct"
    linears = sorted(expected_linears(vl.expected_tensors(config)[0]))
    decoder = {linear for linear in linears if linear.startswith(model.layers_prefix)}
    assert len(decoder) == 7 * vl.num_layers(config)

    def unread() -> torch.Tensor:
        raise AssertionError("names only")

    scheme = QuantScheme(4, None, group_size=128, symmetric=False)
    items = tuple(OutLinear(linear, scheme, (128, 128), "BF16", unread, unread, unread) for linear in decoder)
    job = OutputJob(items, (), model.ignore_patterns, model.config_paths, {}, Path(), ())
    for loaders in (
        awq_loaders(model, awq.modules_to_not_convert(job), decoder),
        compressed_tensors_loaders(model, compressed_tensors.quantization_config(job)["ignore"], ["Linear"]),
    ):
        results = list(loader_views(loaders, linears))
        assert {"transformers 4.57, full class", "transformers 5.x, full class", "vLLM"} <= {r.loader for r in results}
        for result in results:
            assert result.converted == decoder and not result.split, result.loader
    assert "language_model.lm_head" in ascend_modules(model, linears)
