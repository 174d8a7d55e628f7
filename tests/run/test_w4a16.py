"""W4A16 from end to end on the tiny Omni: both layouts of one run, what is reported, and what is said of hard cases."""

from __future__ import annotations

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
from test_end_to_end import decoder, linear_names, load_checkpoint, load_json, load_thinker, logits, relative
from test_resume import finished_layers, start
from tiny_layer import arguments

from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.calibration.token_roles import token_importance
from msmodelslim_omni.models.inputs import LayerInput
from msmodelslim_omni.numerics.arithmetic import quantize_weight
from msmodelslim_omni.processors.rounding import TOKENS_PER_INPUT
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
    """Six samples of every modality, with tokens enough for GPTQ on every Linear."""
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
    """Scaled, clipped and rounded by GPTQ; in both layouts from one run."""
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


def test_report_says_what_was_gained(both: Path) -> None:
    report = report_of(both / AWQ)
    assert report == report_of(both / COMPRESSED)
    assert report["samples"] == 6 and set(report["tokens_by_modality"]) == {"text", "image", "audio", "video"}
    # 4 bits, and 16 + 4 for the scale and the zero point of every 128 weights.
    assert report["bits_per_weight"] == pytest.approx(4 + 20 / 128, rel=1e-3)
    assert len(report["layers"]) == LAYERS
    for layer in report["layers"]:
        assert 0 < layer["error_over_plain"] <= 1
        assert layer["notes"] == []
        assert {entry["group"] for entry in layer["smoothing"]} == {"qkv", "o", "gate_up", "down"}
        assert all(0 < entry["gain"] <= 1 and "H: " in entry["reason"] for entry in layer["smoothing"])
        for linear in layer["linears"]:
            assert linear["scheme"] == "W4A16_G128"
            assert 0.02 < linear["weight_error"] < 0.3 and 0 < linear["output_error"] < 0.3
    assert min(layer["error_over_plain"] for layer in report["layers"]) < 0.8
    assert {"towers", "forward", "awq", "linear_quant", "check", "propagate"} <= set(report["seconds_by_phase"])
    page = (both / AWQ / "quant_report.md").read_text(encoding="utf-8")
    assert "4.156 bits per weight" in page and "over plain" in page and "int8" not in page


def test_both_layouts_hold_the_same_weights(tiny: Path, both: Path) -> None:
    """Through a reader of their descriptions; of one run they are the same numbers, not just near ones."""
    gemm, packed, source = load_checkpoint(both / AWQ), load_checkpoint(both / COMPRESSED), load_checkpoint(tiny)
    for name in linear_names():
        mine, theirs = gemm_weight(gemm, name), packed_weight(packed, name)
        assert torch.equal(mine, theirs), name
        assert mine.shape == source[f"{name}.weight"].shape
        codes = dequantizers.gemm_codes(gemm[f"{name}.qweight"].numpy())
        assert set(range(16)) == set(codes.flatten().tolist()), "codes that are never used"
        if f"{name}.bias" in source:
            torch.testing.assert_close(gemm[f"{name}.bias"].float(), packed[f"{name}.bias"].float(), rtol=1e-3, atol=0)
    others = set(source) - {f"{n}.{part}" for n in linear_names() for part in ("weight", "bias")}
    for name in others:
        assert torch.equal(gemm[name].view(torch.uint8), packed[name].view(torch.uint8)), name
        if not name.startswith("thinker.model.layers."):
            assert torch.equal(gemm[name].view(torch.uint8), source[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def samples(tiny: Path, index: Path) -> list[dict[str, Any]]:
    """Those of the calibration, and one that it has not seen, as keyword arguments of the thinker."""
    return thinker_inputs(tiny, index, 50176)


def quantized_thinker(tiny: Path, written: Tensors) -> Any:
    """The float thinker with the norms and biases of an output and its Linears' weights dequantized."""
    thinker = load_thinker(tiny)
    for number, layer in enumerate(decoder(thinker).layers):
        prefix = f"thinker.model.layers.{number}."
        for name, parameter in layer.named_parameters():
            linear = f"{prefix}{name.removesuffix('.weight')}"
            weight = gemm_weight(written, linear) if f"{linear}.qweight" in written else written[f"{prefix}{name}"]
            parameter.data = weight.float()
    return thinker


def test_outputs_are_nearer_than_those_of_plain_rounding(
    tiny: Path, index: Path, both: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The whole model from the files, against the float one; and the scaling alone is exact but for the rounding."""
    plain = int4_recipe(tmp_path, method="minmax", scale=False)
    quant(tiny, tmp_path / "plain", "--config_path", plain, "--save_format", AWQ).done()
    exact = logits(load_thinker(tiny), samples)
    mine = relative(logits(quantized_thinker(tiny, load_checkpoint(both / AWQ)), samples), exact)
    theirs = relative(logits(quantized_thinker(tiny, load_checkpoint(tmp_path / "plain")), samples), exact)
    assert mine < 0.8 * theirs
    report = report_of(tmp_path / "plain")
    assert report["data_free"] and all(layer["error_over_plain"] is None for layer in report["layers"])


# --- the same again ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text alone: no tower is run."""
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(20, 120, 20))
    return write_index(tmp_path_factory.mktemp("text"), *texts)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in which every layer sees the float model's hidden states."""
    return int4_recipe(tmp_path_factory.mktemp("other"), propagate_error=False)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, text: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    save = tmp_path_factory.mktemp("runs") / "whole"
    quant(tiny, save, "--config_path", other, "--dataset", text).done()
    return files(save)


def test_two_runs_give_the_same_bytes(
    tiny: Path, text: Path, other: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    quant(tiny, tmp_path / "again", "--config_path", other, "--dataset", text).done()
    assert files(tmp_path / "again") == undisturbed


@pytest.mark.full  # what W8A8 is asked in test_resume.py
def test_killed_run_goes_on_to_the_same_bytes(
    tiny: Path,
    text: Path,
    other: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL once a layer is finished, while the next is worked on and another may be read or written."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: the last bits of a sum depend on the number of threads
    save, words = tmp_path / "out", ("--config_path", other, "--dataset", text)
    run = start(tiny, save, tmp_path / "said", *words)
    run.wait_until(lambda: finished_layers(save) >= 1)
    assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
    assert finished_layers(save) >= 1
    answer = quant(tiny, save, *words).done()
    assert "resuming at layer" in answer.err
    assert files(save) == undisturbed


def test_a_run_of_another_recipe_is_not_gone_on_with(small: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "One sentence."})
    stop_at("layers", 1, small, tmp_path / "out", index, config_path=str(int4_recipe(tmp_path)))
    for change, named in (
        ({"method": "mse"}, "recipe process"),
        ({"modality_weights": {"text": 1.0}}, "recipe calibration"),
    ):
        recipe = int4_recipe(tmp_path, **change)
        message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).fault()
        assert f"{named} was " in message and "--overwrite" in message


# --- hard cases are said -------------------------------------------------------------------------------------


def test_too_few_tokens_for_gptq_are_reported(small: Path, tmp_path: Path) -> None:
    """Few are few for a Linear with many inputs and enough for one with fewer."""
    index = write_index(tmp_path / "data", {"text": "Hi."}, {"text": "Ho."})
    save = tmp_path / "out"
    words = ("--config_path", int4_recipe(tmp_path), "--dataset", index, "--max_samples", 1)
    quant(small, save, *words).done()
    report = report_of(save / AWQ)
    (tokens,) = report["tokens_by_modality"].values()
    assert tokens < TOKENS_PER_INPUT * 512
    for layer in report["layers"]:
        for group, inputs in (("qkv", 256), ("o", 256), ("gate_up", 256), ("down", 512)):
            note = (
                f"{group}: {tokens} tokens are too few for GPTQ on {inputs} inputs (it takes"
                f" {round(TOKENS_PER_INPUT * inputs)}); rounded to the nearest level on searched clips instead"
            )
            assert (note in layer["notes"]) == (tokens < TOKENS_PER_INPUT * inputs)
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


def codes_already(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Weights that are levels of the int4 grid, the whole range used in every group of 128."""
    codes = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(len(name))).float()
    codes[:, ::128], codes[:, 1::128] = -8, 7
    return codes / 128


def test_a_layer_that_plain_rounding_keeps_exactly_is_plainly_rounded(small: Path, tmp_path: Path) -> None:
    """Nothing can be nearer: the report says that it fell back, and not that something else would have been better."""
    model = Path(shutil.copytree(small, tmp_path / "model"))
    rewrite(model, lambda name, weight: codes_already(name, weight) if ".layers.1." in name else weight)
    index = write_index(tmp_path / "data", *({"text": f"A {'very ' * 40}long sentence {n}."} for n in range(3)))
    quant(model, tmp_path / "out", "--config_path", int4_recipe(tmp_path), "--dataset", index).done()
    first, second = report_of(tmp_path / "out" / AWQ)["layers"]
    assert first["error_over_plain"] < 1 and first["notes"] == []
    assert second["error_over_plain"] == 1.0 and second["output_error"] == 0.0
    assert all(entry["alpha"] is None for entry in second["smoothing"])
    assert not any("0.000x" in note for note in second["notes"]), "nothing would have been better"
    written, source = load_checkpoint(tmp_path / "out" / AWQ), load_checkpoint(model)
    for name in (name for name in linear_names() if ".layers.1." in name):
        assert torch.equal(gemm_weight(written, name), source[f"{name}.weight"].float())


def test_a_layer_that_stays_float_is_not_said_to_fall_back(small: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", *({"text": f"A {'very ' * 40}long sentence {n}."} for n in range(3)))
    recipe = int4_recipe(tmp_path, exclude=("*.layers.0.*",))
    quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).done()
    first, second = report_of(tmp_path / "out" / AWQ)["layers"]
    assert {linear["scheme"] for linear in first["linears"]} == {"FLOAT"}
    assert first["output_error"] == 0.0
    assert not any("fell back" in note for note in first["notes"])
    assert second["error_over_plain"] < 1


def layer_for(small: Path, folder: Path) -> tuple[Any, LayerWork, LayerProbe]:
    """A plan, one of its layers as loaded, and the layer's probe on random hidden states."""
    index = write_index(folder / "data", {"text": "One sentence."})
    plan = prepare(QuantRequest(small, device="cpu", config_path=str(int4_recipe(folder)), dataset=str(index))).plan
    layer = plan.layers[0]
    weights = layers._load(plan, layer)
    loaded = LayerWork(0, plan.layer_spec, layer.schemes, weights, importance=token_importance("tokens", [40, 0, 0, 0]))
    module = layers._module(plan, loaded)
    probe = LayerProbe(module, {"self_attn", "mlp"}, loaded.importance)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 40, 256), generator=generator)
    probe.watch(LayerInput(hidden, arguments(40, 64, generator)), torch.zeros(40, dtype=torch.int8))
    return plan, loaded, probe


def test_a_layer_worse_than_plain_rounding_is_plainly_rounded(small: Path, tmp_path: Path) -> None:
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

    found, errors = layers._no_worse_than_rounding(plan, loaded, worse, probe)
    assert found.over_plain == 1.0
    assert found.smoothing == (SmoothingRecord("qkv", None, 1.0, "reverted: as searched"),)
    assert found.weights is loaded.weights and not found.changed  # norms and biases of the checkpoint, no factors
    for linear, quantized in found.quantized.items():
        assert torch.equal(quantized.qweight, plain[linear].qweight)
        assert torch.equal(quantized.scales, plain[linear].scales)
    assert found.notes[0] == "before"
    of_worse, of_found = (probe.errors(layers._module(plan, made)) for made in (worse, found))
    torch.testing.assert_close(errors[0], of_found[0], rtol=1e-4, atol=0.0)
    ratio = (probe.weighted_error(of_worse) / probe.weighted_error(of_found)) ** 0.5
    assert ratio > 2 and found.notes[1].startswith("fell back to plain rounding") and f"{ratio:.3f}x" in found.notes[1]


def test_a_layer_better_than_plain_rounding_is_kept(small: Path, tmp_path: Path) -> None:
    plan, loaded, probe = layer_for(small, tmp_path)
    exact = {linear: quantize_weight(loaded.weights[f"{linear}.weight"], replace(scheme, weight_method="mse"))
             for linear, scheme in loaded.schemes.items()}  # fmt: skip
    better = replace(loaded, quantized={"mlp.up_proj": exact["mlp.up_proj"]})  # all others as they are
    found, _ = layers._no_worse_than_rounding(plan, loaded, better, probe)
    assert found.quantized is better.quantized and found.notes == ()
    assert found.over_plain is not None and 0 < found.over_plain < 1


# --- the say of each modality --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"video": 1.0}, "a weight for video, but no sample of"),
        ({"text": 1.0, "audio": 1.0, "image": 0.5}, "a weight for image"),
        ({"text": 0.0}, "all modality weights are zero"),
        ({}, "all modality weights are zero"),
    ],
)
def test_modality_weights_that_do_not_fit_the_data(
    weights: dict[str, float], words: str, small: Path, tmp_path: Path
) -> None:
    sound = {"audio": str(DATA / "audio" / "three_beeps.wav"), "text": "How many?"}
    index = write_index(tmp_path / "data", {"text": "Hi."}, sound)
    recipe = int4_recipe(tmp_path, modality_weights=weights)
    message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index, "--dry_run").fault()
    assert words in message and "int4.yaml:1" in message
    if "video" in weights:
        assert "the samples have audio, text" in message and "add samples with that modality" in message
    assert not (tmp_path / "out").exists()


def test_modality_weights_change_what_is_written(tiny: Path, index: Path, both: Path, tmp_path: Path) -> None:
    recipe = int4_recipe(tmp_path, modality_weights={"audio": 1.0})
    quant(tiny, tmp_path / "audio", "--config_path", recipe, "--dataset", index, "--save_format", AWQ).done()
    heard, every = (load_checkpoint(folder) for folder in (tmp_path / "audio", both / AWQ))
    assert all(not torch.equal(heard[f"{name}.qweight"], every[f"{name}.qweight"]) for name in linear_names())


def test_the_only_weighed_modality_may_be_left_out_with_its_samples(small: Path, tmp_path: Path) -> None:
    """The sound is longer than max_tokens allows, and is skipped; nothing that has a say is left."""
    sound = {"audio": str(DATA / "audio" / "letters.wav"), "text": "Which letters?"}
    index = write_index(tmp_path / "data", {"text": "Hi."}, sound)
    limits = {"max_tokens": 50, "on_bad_sample": "skip"}
    recipe = int4_recipe(tmp_path, modality_weights={"audio": 1.0}, **limits)
    message = quant(small, tmp_path / "out", "--config_path", recipe, "--dataset", index).fault()
    assert "modality_weights" in message and "index.jsonl:2" in message


# --- other ways to the same scheme ---------------------------------------------------------------------------


def test_shipped_recipe_by_its_name(tiny: Path, index: Path, tmp_path: Path) -> None:
    words = ("--quant_type", "awq", "--dataset", index, "--dry_run", "--json")
    answer = quant(tiny, tmp_path / "out", *words).done().json
    assert {linear["scheme"] for linear in answer["linears"]} == {"W4A16_G128"}
    assert [linear["name"] for linear in answer["linears"]] == linear_names()
    assert answer["output_bytes"].keys() == {"awq"}


def test_foretold_size_is_that_of_the_files(tiny: Path, index: Path, recipe: Path, both: Path, tmp_path: Path) -> None:
    words = ("--config_path", recipe, "--dataset", index, "--dry_run", "--json")
    foretold = quant(tiny, tmp_path / "out", *words).done().json
    for name in (AWQ, COMPRESSED):
        real = sum(file.stat().st_size for file in (both / name).iterdir())
        assert foretold["output_bytes"][name] == pytest.approx(real, rel=0.02)
    assert foretold["disk_bytes"] > sum(foretold["output_bytes"].values())
