"""W4A16 end to end on the tiny Omni: both layouts of one run, the report, and fallbacks to plain rounding."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import dequantizers
import pytest
import torch
from command import DATA, files, int4_recipe, quant, stop_at, thinker_inputs, write_index
from make_tiny_omni import make_tiny_omni
from safetensors.torch import load_file, save_file
from test_end_to_end import decoder, linear_names, load_checkpoint, load_json, load_thinker, logits, relative_difference
from test_resume import finished_layers, start
from tiny_layer import arguments

from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.calibration.token_roles import token_importance
from msmodelslim_omni.models.inputs import LayerInput
from msmodelslim_omni.numerics.arithmetic import quantize_weight
from msmodelslim_omni.processors import rounding
from msmodelslim_omni.processors.work import Fold, LayerWork, SmoothingRecord
from msmodelslim_omni.run import layers
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest

Tensors = dict[str, torch.Tensor]
AWQ, COMPRESSED = "awq", "compressed_tensors"
LAYERS = 4


# --- one run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples that cover every modality, with enough tokens for GPTQ on every Linear."""
    return write_index(
        tmp_path_factory.mktemp("data"),
        {"text": "Why is the sky blue?", "answer": "Short waves scatter most."},
        {"text": f"A {'very ' * 60}long sentence."},
        {"image": str(DATA / "images" / "notice_zh.png"), "text": "Read it."},
        {"audio": str(DATA / "audio" / "three_beeps.wav"), "text": "How many?"},
        {"audio": str(DATA / "audio" / "letters.wav"), "text": "Which letters?"},
        {"video": str(DATA / "videos" / "cat_pan_zh.mp4"), "text": "What is said?", "answer": "A cat."},
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int4_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def both(tiny: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scaled, clipped and rounded by GPTQ, written in both layouts by one run."""
    save = tmp_path_factory.mktemp("runs") / "both"
    quant(tiny, save, "--config_path", recipe, "--dataset", index).done()
    return save


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "small", layers=2)


def report_of(folder: Path) -> Any:
    return load_json(folder / "quant_report.json")


def gemm_weight(tensors: Tensors, name: str) -> torch.Tensor:
    parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
    return torch.from_numpy(dequantizers.dequantize_gemm(parts[0].numpy(), parts[1].numpy(), parts[2].float().numpy()))


def packed_weight(tensors: Tensors, name: str) -> torch.Tensor:
    parts = [tensors[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape", "zero_point")]
    packed, scale, shape, zeros = (part.float().numpy() if part.is_floating_point() else part.numpy() for part in parts)
    return torch.from_numpy(dequantizers.dequantize_packed(packed, scale, shape, zeros))


def test_report(both: Path) -> None:
    report = report_of(both / AWQ)
    assert report == report_of(both / COMPRESSED)
    assert report["samples"] == 6 and set(report["tokens_by_modality"]) == {"text", "image", "audio", "video"}
    # 4 bits per weight, and 16 + 4 bits for the scale and zero point of every 128 weights.
    assert report["bits_per_weight"] == pytest.approx(4 + 20 / 128, rel=1e-3)
    assert len(report["layers"]) == LAYERS
    for layer in report["layers"]:
        assert 0 < layer["error_over_plain"] <= 1
        assert all("that of the clip search" in note for note in layer["notes"])  # there are few tokens
        assert {entry["group"] for entry in layer["smoothing"]} == {"qkv", "o", "gate_up", "down"}
        assert all(0 < entry["gain"] <= 1 and "H: " in entry["reason"] for entry in layer["smoothing"])
        for linear in layer["linears"]:
            assert linear["scheme"] == "W4A16_G128"
            assert 0.02 < linear["weight_error"] < 0.3 and 0 < linear["output_error"] < 0.3
    assert min(layer["error_over_plain"] for layer in report["layers"]) < 0.8
    assert {"towers", "forward", "awq", "linear_quant", "check", "propagate"} <= set(report["seconds_by_phase"])
    page = (both / AWQ / "quant_report.md").read_text(encoding="utf-8")
    assert "4.156 bits per weight" in page and "vs. plain" in page and "int8" not in page


def test_both_layouts_hold_the_same_weights(tiny: Path, both: Path) -> None:
    """Decoded by independent readers of the formats, the weights are bitwise equal."""
    gemm, packed, source = load_checkpoint(both / AWQ), load_checkpoint(both / COMPRESSED), load_checkpoint(tiny)
    for name in linear_names():
        gemm_values, packed_values = gemm_weight(gemm, name), packed_weight(packed, name)
        assert torch.equal(gemm_values, packed_values), name
        assert gemm_values.shape == source[f"{name}.weight"].shape
        codes = dequantizers.gemm_codes(gemm[f"{name}.qweight"].numpy())
        assert set(range(16)) == set(codes.flatten().tolist()), "unused codes"
        if f"{name}.bias" in source:
            torch.testing.assert_close(gemm[f"{name}.bias"].float(), packed[f"{name}.bias"].float(), rtol=1e-3, atol=0)
    others = set(source) - {f"{n}.{part}" for n in linear_names() for part in ("weight", "bias")}
    for name in others:
        assert torch.equal(gemm[name].view(torch.uint8), packed[name].view(torch.uint8)), name
        if not name.startswith("thinker.model.layers."):
            assert torch.equal(gemm[name].view(torch.uint8), source[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def samples(tiny: Path, index: Path) -> list[dict[str, Any]]:
    """The calibration samples as keyword arguments of the thinker."""
    return thinker_inputs(tiny, index, 50176)


def quantized_thinker(tiny: Path, written: Tensors) -> Any:
    """The float thinker with the norms, biases and dequantized weights of an output."""
    thinker = load_thinker(tiny)
    for number, layer in enumerate(decoder(thinker).layers):
        prefix = f"thinker.model.layers.{number}."
        for name, parameter in layer.named_parameters():
            linear = f"{prefix}{name.removesuffix('.weight')}"
            weight = gemm_weight(written, linear) if f"{linear}.qweight" in written else written[f"{prefix}{name}"]
            parameter.data = weight.float()
    return thinker


def test_outputs_have_a_smaller_error_than_plain_rounding(
    tiny: Path, index: Path, both: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The full model is loaded from the files and compared with the float model."""
    plain = int4_recipe(tmp_path, method="minmax", scale=False)
    quant(tiny, tmp_path / "plain", "--config_path", plain, "--save_format", AWQ).done()
    exact = logits(load_thinker(tiny), samples)
    error = relative_difference(logits(quantized_thinker(tiny, load_checkpoint(both / AWQ)), samples), exact)
    plain_tensors = load_checkpoint(tmp_path / "plain")
    plain_error = relative_difference(logits(quantized_thinker(tiny, plain_tensors), samples), exact)
    assert error < 0.8 * plain_error
    report = report_of(tmp_path / "plain")
    assert report["data_free"] and all(layer["error_over_plain"] is None for layer in report["layers"])


# --- determinism ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text samples only, so that no tower runs."""
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(20, 120, 20))
    return write_index(tmp_path_factory.mktemp("text"), *texts)


@pytest.fixture(scope="module")
def no_propagation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in which every layer gets the float model's hidden states."""
    return int4_recipe(tmp_path_factory.mktemp("other"), propagate_error=False)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, text: Path, no_propagation: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    save = tmp_path_factory.mktemp("runs") / "uninterrupted"
    quant(tiny, save, "--config_path", no_propagation, "--dataset", text).done()
    return files(save)


def test_two_runs_give_the_same_bytes(
    tiny: Path, text: Path, no_propagation: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    quant(tiny, tmp_path / "repeated", "--config_path", no_propagation, "--dataset", text).done()
    assert files(tmp_path / "repeated") == uninterrupted


@pytest.mark.full  # test_resume.py covers W8A8
def test_killed_run_resumes_to_the_same_bytes(
    tiny: Path,
    text: Path,
    no_propagation: Path,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """SIGKILL after the first layer, while the next is computed and another may be read or written."""
    save, words = tmp_path / "out", ("--config_path", no_propagation, "--dataset", text)
    run = start(tiny, save, tmp_path / "log", *words)
    run.wait_until(lambda: finished_layers(save) >= 1)
    assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
    assert finished_layers(save) >= 1
    answer = quant(tiny, save, *words).done()
    assert "resuming at layer" in answer.err
    assert files(save) == uninterrupted


def test_resume_with_another_recipe_is_refused(small: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "One sentence."})
    stop_at("layers", 1, small, tmp_path / "out", index, config_path=str(int4_recipe(tmp_path)))
    for change, field in (
        ({"method": "mse"}, "processors"),
        ({"modality_weights": {"text": 1.0}}, "calibration"),
    ):
        recipe = int4_recipe(tmp_path, **change)
        message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).fault()
        assert "belongs to another run" in message and "--overwrite" in message
        assert field in message, message


# --- fallback to plain rounding ------------------------------------------------------------------------------


def test_too_few_tokens_for_gptq_are_reported(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens are too few for a Linear with many inputs and enough for a Linear with fewer."""
    monkeypatch.setattr(rounding, "TOKENS_PER_INPUT", 0.125)
    index = write_index(tmp_path / "data", {"text": "Hi."}, {"text": "Ho."})
    save = tmp_path / "out"
    words = ("--config_path", int4_recipe(tmp_path), "--dataset", index, "--max_samples", 1)
    quant(small, save, *words).done()
    report = report_of(save / AWQ)
    (tokens,) = report["tokens_by_modality"].values()
    assert tokens < 512 / 8
    for layer in report["layers"]:
        for group, inputs in (("qkv", 256), ("o", 256), ("gate_up", 256), ("down", 512)):
            note = (
                f"{group}: {tokens} tokens are too few for GPTQ on {inputs} inputs (it needs"
                f" {inputs // 8}); rounded to the nearest level with a clip search instead"
            )
            assert (note in layer["notes"]) == (tokens < inputs / 8)
        assert layer["error_over_plain"] <= 1
    page = (save / AWQ / "quant_report.md").read_text(encoding="utf-8")
    assert f"layer 1: down: {tokens} tokens are too few for GPTQ" in page


def rewrite(folder: Path, change: Any) -> None:
    """Change the decoder's Linears in the files; `change` takes a name and a weight."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.removesuffix(".weight") in linear_names():
                tensors[name] = change(name, tensors[name]).to(tensors[name].dtype).contiguous()
        save_file(tensors, shard, {"format": "pt"})


def grid_weights(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Weights on the levels of the int4 grid, with the full range used in every group of 128."""
    codes = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(len(name))).float()
    codes[:, ::128], codes[:, 1::128] = -8, 7
    return codes / 128


def test_layer_without_rounding_error_falls_back(small: Path, tmp_path: Path) -> None:
    """Plain rounding is exact here. The report shows the fallback and no note that the search was better."""
    model = Path(shutil.copytree(small, tmp_path / "model"))
    rewrite(model, lambda name, weight: grid_weights(name, weight) if ".layers.1." in name else weight)
    index = write_index(tmp_path / "data", *({"text": f"A {'very ' * 40}long sentence {n}."} for n in range(3)))
    quant(model, tmp_path / "out", "--config_path", int4_recipe(tmp_path), "--dataset", index).done()
    first, second = report_of(tmp_path / "out" / AWQ)["layers"]
    assert first["error_over_plain"] < 1 and not any("fell back" in note for note in first["notes"])
    assert second["error_over_plain"] == 1.0 and second["output_error"] < 1e-6
    assert all(entry["alpha"] is None for entry in second["smoothing"])
    assert not any("search's output error was 0.000x" in note for note in second["notes"])  # nothing can be better
    written, source = load_checkpoint(tmp_path / "out" / AWQ), load_checkpoint(model)
    for name in (name for name in linear_names() if ".layers.1." in name):
        assert torch.equal(gemm_weight(written, name), source[f"{name}.weight"].float())


def test_float_layer_is_not_reported_as_fallback(small: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", *({"text": f"A {'very ' * 40}long sentence {n}."} for n in range(3)))
    recipe = int4_recipe(tmp_path, exclude=("*.layers.0.*",))
    quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).done()
    first, second = report_of(tmp_path / "out" / AWQ)["layers"]
    assert {linear["scheme"] for linear in first["linears"]} == {"FLOAT"}
    assert first["output_error"] == 0.0
    assert not any("fell back" in note for note in first["notes"])
    assert second["error_over_plain"] < 1


def layer_for(small: Path, folder: Path) -> tuple[Any, LayerWork, LayerProbe]:
    """A plan, its first layer as loaded, and a probe that has watched the layer on random hidden states."""
    index = write_index(folder / "data", {"text": "One sentence."})
    plan = prepare(QuantRequest(small, device="cpu", config_path=str(int4_recipe(folder)), dataset=str(index))).plan
    layer = plan.layers[0]
    weights = layers.load_layer(plan, layer)
    loaded = LayerWork(0, plan.layer_spec, layer.schemes, weights, importance=token_importance("tokens", [40, 0, 0, 0]))
    module = layers._module(plan, loaded)
    probe = LayerProbe(module, {"self_attn", "mlp"}, loaded.importance)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 40, 256), generator=generator)
    probe.watch(LayerInput(hidden, arguments(40, 64, generator)), torch.zeros(40, dtype=torch.int8))
    return plan, loaded, probe


def test_layer_worse_than_plain_rounding_falls_back(small: Path, tmp_path: Path) -> None:
    plan, loaded, probe = layer_for(small, tmp_path)
    plain = {
        linear: quantize_weight(loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="minmax"))
        for linear, scheme in loaded.schemes.items()
    }
    record = SmoothingRecord("qkv", 0.5, 0.7, "as searched")
    scaled = loaded.with_folds({}, {"mlp.up_proj": Fold(torch.full((256,), 1.5))})
    work = replace(scaled, quantized=plain, notes=("before",), smoothing=(record,))
    worse = replace(
        work, quantized={**plain, "mlp.up_proj": replace(plain["mlp.up_proj"], scales=9 * plain["mlp.up_proj"].scales)}
    )

    kept, errors = layers._no_worse_than_rounding(plan, loaded, worse, probe)
    assert kept.over_plain == 1.0
    assert kept.smoothing == (SmoothingRecord("qkv", None, 1.0, "reverted: as searched"),)
    assert all(kept.weights[name] is tensor for name, tensor in loaded.weights.items())
    assert not kept.changed and not kept.folds  # nothing is folded in
    for linear, quantized in kept.quantized.items():
        assert torch.equal(quantized.qweight, plain[linear].qweight)
        assert torch.equal(quantized.scales, plain[linear].scales)
    assert kept.notes[0] == "before"
    worse_errors, kept_errors = (probe.errors(layers._module(plan, result)) for result in (worse, kept))
    torch.testing.assert_close(errors[0], kept_errors[0], rtol=1e-4, atol=0.0)
    ratio = (probe.weighted_error(worse_errors) / probe.weighted_error(kept_errors)) ** 0.5
    shown = re.fullmatch(
        r"fell back to plain rounding: the search's output error was ([\d.]+)x as large", kept.notes[1]
    )
    assert ratio > 2 and shown is not None and abs(float(shown[1]) - ratio) < 0.0005 + 1e-4 * ratio


def test_only_the_block_that_is_worse_falls_back(small: Path, tmp_path: Path) -> None:
    plan, loaded, probe = layer_for(small, tmp_path)
    searched = {linear: quantize_weight(loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="mse"))
                for linear, scheme in loaded.schemes.items()}  # fmt: skip
    up = searched["mlp.up_proj"]
    norms = {
        f"{name}.weight": loaded.weights[f"{name}.weight"] * 1
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    work = replace(
        loaded.with_folds(norms, {}),
        smoothing=tuple(SmoothingRecord(g, 0.5, 0.7, "as searched") for g in ("qkv", "down")),
    )
    worse = replace(work, quantized={**searched, "mlp.up_proj": replace(up, scales=9 * up.scales)})
    kept, errors = layers._no_worse_than_rounding(plan, loaded, worse, probe)
    assert kept.over_plain is not None and 0 < kept.over_plain < 1
    assert kept.notes[0].startswith("mlp fell back to plain rounding: the search's output error was ")
    assert [record.alpha for record in kept.smoothing] == [0.5, None]
    assert kept.changed == {"input_layernorm.weight"}
    assert kept.weights["post_attention_layernorm.weight"] is loaded.weights["post_attention_layernorm.weight"]
    for linear, scheme in loaded.schemes.items():
        weight = loaded.weights[f"{linear}.weight"]
        method: Any = "minmax" if linear.startswith("mlp.") else "mse"
        expected = quantize_weight(weight, replace(scheme, weight_method=method))
        assert torch.equal(kept.quantized[linear].qweight, expected.qweight), linear
    torch.testing.assert_close(errors[0], probe.errors(layers._module(plan, kept))[0], rtol=1e-4, atol=0.0)


def test_layer_better_than_plain_rounding_is_kept(small: Path, tmp_path: Path) -> None:
    plan, loaded, probe = layer_for(small, tmp_path)
    exact = {linear: quantize_weight(loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="mse"))
             for linear, scheme in loaded.schemes.items()}  # fmt: skip
    better = replace(loaded, quantized={"mlp.up_proj": exact["mlp.up_proj"]})  # all others unquantized
    kept, _ = layers._no_worse_than_rounding(plan, loaded, better, probe)
    assert kept.quantized is better.quantized and kept.notes == ()
    assert kept.over_plain is not None and 0 < kept.over_plain < 1


# --- modality weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"video": 1.0}, "a weight for video, but no sample of"),
        ({"text": 1.0, "audio": 1.0, "image": 0.5}, "a weight for image"),
        ({"text": 0.0}, "all modality weights are zero"),
        ({}, "all modality weights are zero"),
    ],
)
def test_modality_weights_that_contradict_the_data(
    weights: dict[str, float], expected: str, small: Path, tmp_path: Path
) -> None:
    sound = {"audio": str(DATA / "audio" / "three_beeps.wav"), "text": "How many?"}
    index = write_index(tmp_path / "data", {"text": "Hi."}, sound)
    recipe = int4_recipe(tmp_path, modality_weights=weights)
    message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index, "--dry_run").fault()
    assert expected in message and "int4.yaml:1" in message
    if "video" in weights:
        assert "the samples have audio, text" in message and "add samples with that modality" in message
    assert not (tmp_path / "out").exists()


def test_modality_weights_change_the_output(tiny: Path, index: Path, both: Path, tmp_path: Path) -> None:
    recipe = int4_recipe(tmp_path, modality_weights={"audio": 1.0})
    quant(tiny, tmp_path / "audio", "--config_path", recipe, "--dataset", index, "--save_format", AWQ).done()
    audio, mixed = (load_checkpoint(folder) for folder in (tmp_path / "audio", both / AWQ))
    assert all(not torch.equal(audio[f"{name}.qweight"], mixed[f"{name}.qweight"]) for name in linear_names())


def test_error_if_all_samples_of_the_weighted_modalities_are_skipped(small: Path, tmp_path: Path) -> None:
    """The audio sample exceeds max_tokens and is skipped, so that no sample with a weight remains."""
    sound = {"audio": str(DATA / "audio" / "letters.wav"), "text": "Which letters?"}
    index = write_index(tmp_path / "data", {"text": "Hi."}, sound)
    limits = {"max_tokens": 50, "on_bad_sample": "skip"}
    recipe = int4_recipe(tmp_path, modality_weights={"audio": 1.0}, **limits)
    message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).fault()
    assert "modality_weights" in message and "index.jsonl:2" in message


# --- dry runs ------------------------------------------------------------------------------------------------


def test_shipped_recipe_by_quant_type(tiny: Path, index: Path, tmp_path: Path) -> None:
    words = ("--quant_type", "awq", "--dataset", index, "--dry_run", "--json")
    answer = quant(tiny, tmp_path / "out", *words).done().json
    assert {linear["scheme"] for linear in answer["linears"]} == {"W4A16_G128"}
    assert [linear["name"] for linear in answer["linears"]] == linear_names()
    assert answer["output_bytes"].keys() == {"awq"}


def test_estimated_size_matches_the_files(tiny: Path, index: Path, recipe: Path, both: Path, tmp_path: Path) -> None:
    words = ("--config_path", recipe, "--dataset", index, "--dry_run", "--json")
    estimated = quant(tiny, tmp_path / "out", *words).done().json
    for name in (AWQ, COMPRESSED):
        real = sum(file.stat().st_size for file in (both / name).iterdir())
        assert estimated["output_bytes"][name] == pytest.approx(real, rel=0.02)
    assert estimated["disk_bytes"] > sum(estimated["output_bytes"].values())
