"""The trained tiny MoE of examples/tiny_moe: its batches, the committed checkpoint, the loss of the expert recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command, quant
from safetensors.torch import load_file
from tiny_moe import model as moe
from tiny_omni import harden, score
from tiny_samples import assert_trains_on_the_true_logits, samples, write_first_turn

from msmodelslim_omni.calibration.samples import parse_sample, prepare_sample
from msmodelslim_omni.models import MODEL_TYPES, qwen3_omni

MODEL = Path(moe.__file__).parent / "model"
TINY_OMNI = MODEL.parent.parent / "tiny_omni"
RECIPES = MODEL.parent.parent.parent / "benchmarks" / "recipes"
SPEC = MODEL_TYPES["Qwen3-Omni-30B-A3B-Instruct"]
MEDIA = ("image", "audio", "video")


@pytest.mark.parametrize("name", ["picture", "clip", "talking clip"])
def test_batches_equal_the_package_on_files(name: str, tmp_path: Path) -> None:
    """As for the tiny Omni. Without a mask, the library would let no text see a picture."""
    sample = samples(1)[name]
    entry = write_first_turn(sample, tmp_path)
    processor = qwen3_omni.open_media_processor(MODEL, score.LIMITS, False)
    inputs = prepare_sample(parse_sample("a", entry, tmp_path, "", SPEC), processor)
    batch = moe.sample_batch(moe.Tokens(MODEL), [[type(sample)(sample.turns[:1], *media(sample))]])
    length = batch.ids.shape[1]  # the template ends with a line break
    assert torch.equal(inputs.tensors["input_ids"][:, :length], batch.ids)
    assert batch.pixels is not None and batch.grid is not None
    pixels = inputs.tensors["pixel_values_videos" if batch.video else "pixel_values"]
    torch.testing.assert_close(pixels, batch.pixels, atol=1e-6, rtol=0)
    assert torch.equal(inputs.tensors["video_grid_thw" if batch.video else "image_grid_thw"], batch.grid)
    if batch.mels is not None:
        features = inputs.tensors["input_features"][:, :, inputs.tensors["feature_attention_mask"][0].bool()]
        # The processor mirrors the end of a sound for its last frame; training appends silence.
        torch.testing.assert_close(batch.mels[..., :-1], features[..., :-1], atol=1e-3, rtol=0)
        torch.testing.assert_close(batch.mels, features, atol=0.5, rtol=0)
        batch.mels = features
    assert_trains_on_the_true_logits(moe, moe.build_thinker(MODEL, 0).eval(), inputs, batch, atol=1e-4)


def media(sample: Any) -> tuple[Any, Any, Any]:
    return sample.picture, sample.frames, sample.sound


def test_checkpoint_is_small_and_in_bfloat16() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 20e6
    weights = load_file(MODEL / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert sum(value.numel() for name, value in weights.items() if name.startswith("thinker.")) < 10e6


def test_outlier_channels_keep_the_function_of_experts() -> None:
    """Those of the norm in front of the experts: the router's columns are divided too, so the routing is the same."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    weights = load_file(MODEL / "model.safetensors")
    hardened = harden.harden(weights, heads=4, kv_heads=2)
    prefix = "thinker.model.layers.0."
    plain, hard = (
        qwen3_omni.build_layer(
            config, 0, {name.removeprefix(prefix): w[name].float() for name in w if name.startswith(prefix)}
        )
        for w in (weights, hardened)
    )
    x = torch.randn((1, 50, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        peaks = hard.post_attention_layernorm(x).abs().amax() / plain.post_attention_layernorm(x).abs().amax()
        assert peaks > 4
        assert torch.equal(*(layer.mlp(layer.post_attention_layernorm(x)) for layer in (plain, hard)))
        assert [t.tolist() for t in hard.mlp.routed] == [t.tolist() for t in plain.mlp.routed]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 16th held-out sample."""
    lines = (TINY_OMNI / "heldout" / "index.jsonl").read_text(encoding="utf-8").splitlines()[::16]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.update({kind: str(TINY_OMNI / "heldout" / entry[kind]) for kind in MEDIA if kind in entry})
    index = tmp_path_factory.mktemp("questions") / "index.jsonl"
    index.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return index


@pytest.fixture(scope="module")
def reports(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eval reports of the shipped recipes for experts, calibrated on 8 samples, and of plain rounding."""
    folder = tmp_path_factory.mktemp("trained")
    flags = {
        "w8a8": ("--quant_type", "w8a8"),
        "w4a16": ("--quant_type", "w4a16"),
        "rounded": ("--config_path", RECIPES / "experts_w4a16_rounded.yaml"),
    }
    results = {}
    for name, words in flags.items():
        data = () if name == "rounded" else ("--dataset", TINY_OMNI / "calib", "--max_samples", 8)
        quant(MODEL, folder / name, *data, *words).done()
        words = ("--float", MODEL, "--quant", folder / name, "--dataset", questions, "--device", "cpu", "--json")
        results[name] = command("eval", *words).done().json
    return results


def kl(report: Any, modality: str = "") -> float:
    return float((report["by_modality"][modality] if modality else report["overall"])["kl_mean"]["value"])


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_expert_recipes_keep_the_answers(reports: dict[str, Any]) -> None:
    for modality, least in (("text", 0.45), ("image", 0.75), ("audio", 0.35), ("video", 0.7)):
        assert reports["w8a8"]["by_modality"][modality]["exact_float"]["value"] > least, modality
        assert kl(reports["w8a8"], modality) < (0.006 if modality == "text" else 0.002), modality
    assert kl(reports["w4a16"]) < 0.8 * kl(reports["rounded"])
    for modality in ("text", *MEDIA):
        change = reports["w8a8"]["by_modality"][modality]["exact_change"]
        assert change["low"] <= 0.0 <= change["high"], modality
