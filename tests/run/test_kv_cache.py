"""A rounded KV cache: rounding by hand, calibration on a real layer, both formats, eval, doctor, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import command, files, write_index
from damage import change_block, change_json, change_tensor, drop_tensors
from outputs import INT8, RECIPE, all_tensors, write_recipe
from tiny_layer import HEAD_DIM, SPEC, build, layer_weights, sample

from msmodelslim_omni.doctor.examine import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics.kv_cache import CacheScales, cache_scales, pair_lengths, round_cached
from msmodelslim_omni.processors.work import Fold, LayerWork
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe import find_recipe, parse_recipe
from msmodelslim_omni.run.cache import CachePeaks
from msmodelslim_omni.run.emulation import round_cache
from msmodelslim_omni.run.pipeline import quantize
from msmodelslim_omni.runtime import SINGLE_PROCESS
from msmodelslim_omni.statistics.capture import run_layer

LAYERS, KEY_WIDTH = 4, 128  # of the tiny Omni
KEY = "thinker.model.layers.1.self_attn"


# --- numbers -------------------------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    """The pair 3, 4 has the length 5 at every angle; 5 / 127 and 5 / 448 are rounded to bfloat16."""
    lengths = pair_lengths(torch.tensor([3.0, -1.0, 4.0, 0.0]))
    assert lengths.tolist() == [5.0, 1.0, 5.0, 1.0]
    int8 = cache_scales("int8", lengths[None], torch.tensor([[127.0, 0.0, 254.0, 12.7]]))
    assert int8.key.tolist() == [0.039306640625, 0.00787353515625, 0.039306640625, 0.00787353515625]
    assert int8.value.tolist() == [1.0, 2.0**-14, 2.0, 0.10009765625]
    fp8 = cache_scales("fp8", lengths[None], torch.tensor([[448.0, -1.0]]))
    assert fp8.key.tolist() == [0.01116943359375] and fp8.value.tolist() == [1.0]


def test_rounding_by_hand() -> None:
    x = torch.tensor([[[[0.5, 3.0], [-0.76, -500.0]]]])  # [1, 1 head, 2 tokens, 2 channels]
    assert round_cached(x, torch.tensor([0.5, 2.0]), "int8").tolist() == [[[[0.5, 4.0], [-1.0, -256.0]]]]
    # Steps of e4m3 are 1/32 at 0.5 and 1/16 at 1; beyond 448 it is clamped.
    assert round_cached(x, torch.tensor([1.0]), "fp8").tolist() == [[[[0.5, 3.0], [-0.75, -448.0]]]]
    assert round_cached(x, torch.tensor([0.5]), "fp8")[0, 0, 1].tolist() == [-0.75, -224.0]


# --- one layer -----------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_projections() -> None:
    """Values are outputs of v_proj. Rotation keeps the length of a pair, so keys need no positions either."""
    weights, each = layer_weights(), sample(tokens=19)
    layer, seen = build(weights), {}
    for name in ("k_proj", "v_proj"):
        hook = layer.get_submodule(f"self_attn.{name}")
        hook.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0].view(19, -1, HEAD_DIM)}))
    before = run_layer(layer, each.inputs)
    peaks = CachePeaks(layer)
    assert torch.equal(run_layer(layer, each.inputs), before)  # observing changes nothing
    work = LayerWork(0, SPEC, {}, weights)
    scales = peaks.scales("int8", work, SINGLE_PROCESS)
    expected = cache_scales("int8", pair_lengths(seen["k_proj"]).amax(0), seen["v_proj"].abs().amax(0))
    torch.testing.assert_close(scales.key, expected.key, rtol=2**-7, atol=0)  # bfloat16
    assert torch.equal(scales.value, expected.value)
    halved = LayerWork(0, SPEC, {}, weights, folds={"self_attn.v_proj": Fold(rows=torch.full((32,), 2.0))})
    assert torch.equal(peaks.scales("int8", halved, SINGLE_PROCESS).value, expected.value / 2)


def test_a_layer_with_a_rounded_cache() -> None:
    weights, each = layer_weights(), sample(tokens=19)
    exact = run_layer(build(weights), each.inputs)
    errors = {}
    for dtype in ("int8", "fp8"):
        watched = build(weights)
        peaks = CachePeaks(watched)
        run_layer(watched, each.inputs)
        layer = build(weights)
        round_cache(layer, peaks.scales(dtype, LayerWork(0, SPEC, {}, weights), SINGLE_PROCESS))  # type: ignore[arg-type]
        out = run_layer(layer, each.inputs)
        errors[dtype] = float((out - exact).norm() / (exact - each.inputs.hidden).norm())
    assert 1e-4 < errors["int8"] < errors["fp8"] < 0.15
    coarse = build(weights)
    round_cache(coarse, CacheScales("fp8", torch.tensor([1e4]), torch.tensor([1e4])))
    assert not torch.allclose(run_layer(coarse, each.inputs), exact, rtol=0.1)


# --- outputs -------------------------------------------------------------------------------------------------


def run(model: Path, folder: Path, kv_cache: str, saver: str) -> Path:
    recipe = write_recipe(folder, kv_cache, INT8, "layers.1.mlp.down_proj")
    text = recipe.read_text(encoding="utf-8").replace("compressed_tensors", saver)
    recipe.write_text(f"{text}  kv_cache: {{dtype: {kv_cache}}}\n", encoding="utf-8")
    data = write_index(folder / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    quantize(model, folder / kv_cache, config_path=str(recipe), dataset=str(data), device="cpu")
    return folder / kv_cache


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kv_cache")
    return {
        "fp8": run(tiny, folder, "fp8", "compressed_tensors"),
        "int8": run(tiny, folder, "int8", "ascendv1_saver"),
    }


def test_files(outputs: dict[str, Path]) -> None:
    tensors = all_tensors(outputs["fp8"])
    scales = {name: t for name, t in tensors.items() if name.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 2 * LAYERS
    assert all(t.shape == (1,) and t.dtype == torch.bfloat16 and float(t) > 0 for t in scales.values())
    config = json.loads((outputs["fp8"] / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip
    tensors = all_tensors(outputs["int8"])
    for name in ("k_proj", "v_proj"):
        scale, offset = (tensors[f"{KEY}.{name}.kv_cache_{part}"] for part in ("scale", "offset"))
        assert scale.shape == offset.shape == (KEY_WIDTH,) and bool((scale > 0).all()) and not bool(offset.any())
    description = json.loads((outputs["int8"] / "quant_model_description.json").read_text(encoding="utf-8"))
    assert description["kv_cache_type"] == "C8" and f"{KEY}.v_proj.kv_cache_scale" in description


def test_reports_and_memory(outputs: dict[str, Path]) -> None:
    for kv_cache, output in outputs.items():
        report = json.loads((output / "quant_report.json").read_text(encoding="utf-8"))
        assert report["kv_cache"] == kv_cache and 2 * report["run_memory"]["cache_now"] == report["run_memory"]["cache"]
        card = (output / "README.md").read_text(encoding="utf-8")
        assert ("--kv-cache-dtype fp8" in card) == (kv_cache == "fp8") and "KV cache" in card


def test_eval_rounds_the_cache(outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """A cache of a few codes makes the quantized model worse, and only by its scales."""
    data = write_index(tmp_path / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})

    def kl(output: Path, name: str) -> Any:
        words = ("--float", tiny, "--dataset", data, "--save_path", tmp_path / name, "--device", "cpu", "--json")
        return command("eval", output, *words).done().json["overall"]["kl_mean"]["value"]

    coarse = tmp_path / "coarse"
    shutil.copytree(outputs["fp8"], coarse)
    change_tensor(f"{KEY}.v_scale", lambda t: t * 0 + 8192)(coarse)
    assert kl(coarse, "a") > 1.05 * kl(outputs["fp8"], "b")


def test_generate_rounds_the_cache(outputs: dict[str, Path]) -> None:
    answer = command("generate", outputs["int8"], "--text", "Hi", "--max_new_tokens", "2", "--device", "cpu").done()
    assert "the KV cache is rounded to int8" in answer.err


def test_export(outputs: dict[str, Path], tmp_path: Path) -> None:
    export(outputs["fp8"], tmp_path / "copy", "compressed_tensors")
    assert files(tmp_path / "copy") == files(outputs["fp8"])
    with pytest.raises(QuantError, match="its KV cache is fp8; vLLM-Ascend on A2 and A3 caches int8"):
        export(outputs["fp8"], tmp_path / "no", "ascendv1_saver")


DAMAGES = [
    ("fp8", drop_tensors(f"{KEY}.k_scale".__eq__), "tensor_missing", f"{KEY}.k_scale"),
    ("fp8", change_tensor(f"{KEY}.v_scale", lambda t: t * 0), "scale_zero", f"{KEY}.v_scale"),
    ("fp8", change_tensor(f"{KEY}.v_scale", lambda t: t / 0), "float_not_finite", f"{KEY}.v_scale"),
    ("fp8", change_block(lambda b: b.update(kv_cache_scheme=None)), "tensor_unexpected", "k_scale"),
    ("fp8", change_block(lambda b: b["kv_cache_scheme"].update(type="int")), "quantization_field", "kv_cache_scheme"),
    ("int8", change_tensor(f"{KEY}.k_proj.kv_cache_scale", lambda t: -t), "scale_negative", "kv_cache_scale"),
    ("int8", change_tensor(f"{KEY}.k_proj.kv_cache_scale", lambda t: t[:1]), "tensor_shape", "kv_cache_scale"),
    ("int8", change_tensor(f"{KEY}.k_proj.kv_cache_offset", lambda t: t + 1), "offset_not_zero", "kv_cache_offset"),
    ("int8", change_json("quant_model_description.json", lambda d: {**d, "kv_cache_type": "none"}),
     "tensor_unexpected", "kv_cache"),
]  # fmt: skip


@pytest.mark.parametrize(("kv_cache", "inflict", "code", "where"), DAMAGES)
def test_damage_is_reported(
    outputs: dict[str, Path], tmp_path: Path, kv_cache: str, inflict: Any, code: str, where: str
) -> None:
    folder = Path(shutil.copytree(outputs[kv_cache], tmp_path / "damaged"))
    inflict(folder)
    found = examine(folder).findings
    assert any(f.code == code and where in f.where for f in found), [(f.code, f.where) for f in found]


def test_good_outputs_have_no_findings(outputs: dict[str, Path], tiny: Path) -> None:
    for output in outputs.values():
        diagnosis = examine(output, tiny)
        assert diagnosis.healthy and not diagnosis.codes()


def test_reader_names_what_is_missing(outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outputs["fp8"], tmp_path / "damaged"))
    drop_tensors(f"{KEY}.k_scale".__eq__)(folder)
    with pytest.raises(QuantError, match="k_scale of the KV cache is missing"):
        open_quantized(folder)


# --- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_cache", "saver", "reason"),
    [
        ("int8", "compressed_tensors", "vLLM caches fp8 and has no int8 cache"),
        ("fp8", "ascendv1_saver", "computes in no FP8"),
        ("fp8", "awq", "AutoAWQ's layout has no place for them"),
    ],
)
def test_formats_without_a_reader_are_refused(
    tiny: Path, tmp_path: Path, kv_cache: str, saver: str, reason: str
) -> None:
    qconfig = "{weight: {scope: per_group, dtype: int4, symmetric: false, ext: {group_size: 64}}}"
    text = RECIPE.replace("QCONFIG", qconfig if saver == "awq" else INT8).replace("FLOAT_LINEAR", "x")
    (tmp_path / "r.yaml").write_text(
        text.replace("compressed_tensors", saver) + f"  kv_cache: {{dtype: {kv_cache}}}\n", encoding="utf-8"
    )
    fault = command(
        "quant", tiny, tmp_path / "out", "--config_path", tmp_path / "r.yaml", "--device", "cpu", "--dry_run"
    ).fault()
    assert "r.yaml:7: " in fault and reason in fault and "compressed_tensors stores fp8" in fault


def test_recipes() -> None:
    assert find_recipe("Qwen2.5-Omni-3B", "fp8").spec.kv_cache is None
    cache = find_recipe("Qwen3-Omni-30B-A3B-Instruct", "w8a8_c8").spec.kv_cache
    assert cache is not None and cache.dtype == "int8"
    with pytest.raises(QuantError, match=r"spec\.kv_cache\.dtype"):
        parse_recipe(RECIPE.replace("QCONFIG", INT8).replace("FLOAT_LINEAR", "x") + "  kv_cache: {dtype: int4}\n")
