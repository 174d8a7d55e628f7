"""W4A8 of experts for vLLM-Ascend: bytes by hand, an independent reader, eval, doctor and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dequantizers
import pytest
import torch
from command import command, files
from damage import DESCRIPTION, change_json, change_tensor, drop_tensors, set_value
from make_tiny_qwen3_omni import make_tiny_qwen3_omni
from outputs import RECIPE, all_tensors

from msmodelslim_omni.doctor.examine import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import ascend
from msmodelslim_omni.formats.job import OutLinear
from msmodelslim_omni.formats.nibbles import pack_row_pairs, unpack_row_pairs
from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_act, quantize_weight, quantized_matmul
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe import find_recipe, parse_recipe
from msmodelslim_omni.run.pipeline import quantize

W4A8 = QuantScheme(4, 8, "mse")
ASCEND = "ascendv1_saver"
ATTENTION = "thinker.model.layers.0.self_attn"
EXPERT = "thinker.model.layers.0.mlp.experts.1"
QCONFIGS = """
    - {type: linear_quant, include: ["*experts*"], qconfig: {act: {}, weight: {dtype: int4, method: mse}}}
    - {type: linear_quant, qconfig: {act: {}, weight: {}}}
  save: [{type: ascendv1_saver}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_omni(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def output(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w4a8")
    text = "apiversion: multimodal_vlm_modelslim_v1\nspec:\n  process:" + QCONFIGS
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    quantize(model, folder / "out", config_path=str(folder / "r.yaml"), device="cpu")
    return folder / "out"


# --- bytes ---------------------------------------------------------------------------------------------------


def test_row_pairs_by_hand() -> None:
    q = torch.tensor([[1, -8, 7], [-2, 7, 0]], dtype=torch.int8)
    packed = pack_row_pairs(q)
    assert packed.view(torch.uint8).tolist() == [[0xE1, 0x78, 0x07]]
    assert torch.equal(unpack_row_pairs(packed), q)


def test_golden_tensors() -> None:
    """The rows 1..32 and -1 have the sums 528 and -32; in sixteen parts of two inputs the first is 1 + 2 = 3."""
    q = torch.stack([torch.arange(32) % 8, torch.full((32,), -1)]).to(torch.int8)
    for name, columns in (("x.gate_proj", 1), ("x.down_proj", 16)):
        linear = OutLinear(name, W4A8, (2, 32), "BF16", lambda: q, lambda: torch.tensor([[0.5], [2.0]]))
        tensors = {t.spec.name.rpartition(".")[2]: t.load() for t in ascend.linear_tensors(linear)}
        assert list(tensors) == ["weight", "weight_scale", "weight_offset", "scale_bias"]
        assert tensors["weight"][0, :3].tolist() == [-16, -15, -14]  # type: ignore[index]
        bias = tensors["scale_bias"]
        assert bias.shape == (2, columns)  # type: ignore[union-attr]
        assert bias.sum(dim=1).tolist() == [8 * 112 * 0.5, 8 * -32 * 2.0]  # type: ignore[union-attr]
        assert columns == 1 or bias[0, :4].tolist() == [4.0, 20.0, 36.0, 52.0]  # type: ignore[index]


# --- outputs -------------------------------------------------------------------------------------------------


def test_an_independent_reader_agrees(output: Path) -> None:
    """Weights, and the product of the NPU as its layout implies it, against the product that eval computes."""
    tensors, checkpoint = all_tensors(output), open_quantized(output)
    assert {scheme.name for scheme in checkpoint.schemes} == {"W4A8_DYNAMIC", "W8A8_DYNAMIC"}
    for name in (f"{EXPERT}.up_proj", f"{EXPERT}.down_proj"):
        parts = {part: tensors[f"{name}.{part}"].numpy() for part in ("weight", "weight_scale", "scale_bias")}
        loaded = checkpoint.load_linear(name)
        expected = dequantizers.dequantize_w4a8(parts["weight"], parts["weight_scale"])
        assert torch.equal(dequantize(loaded), torch.from_numpy(expected))
        x = torch.randn(5, expected.shape[1], generator=torch.Generator().manual_seed(4))
        q, s = quantize_act(x)
        product = dequantizers.product_w4a8(
            q.to(torch.int8).numpy(), s.numpy(), parts["weight"], parts["weight_scale"], parts["scale_bias"]
        )
        torch.testing.assert_close(quantized_matmul(x, loaded), torch.from_numpy(product), rtol=1e-4, atol=1e-6)


def test_description(output: Path) -> None:
    description = json.loads((output / DESCRIPTION).read_text(encoding="utf-8"))
    assert description["model_quant_type"] == "W4A8_DYNAMIC" and description["group_size"] == 0
    assert description[f"{EXPERT}.up_proj.scale_bias"] == description[f"{EXPERT}.up_proj.weight"] == "W4A8_DYNAMIC"
    assert description["thinker.model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"
    assert description["thinker.model.layers.0.mlp.gate.weight"] == "FLOAT"


def test_search_is_better_than_the_full_range() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    full, searched = (quantize_weight(weight, QuantScheme(4, 8, method)) for method in ("minmax", "mse"))
    errors = [float((dequantize(linear) - weight).norm()) for linear in (full, searched)]
    assert errors[1] < 0.95 * errors[0] and int(full.qweight.min()) >= -7


def test_export_copies_and_refuses(output: Path, tmp_path: Path) -> None:
    export(output, tmp_path / "copy", "ascendv1_saver")
    assert files(tmp_path / "copy") == files(output)
    with pytest.raises(QuantError, match="not W4A8_DYNAMIC"):
        export(output, tmp_path / "no", "compressed_tensors")


def test_doctor(output: Path, model: Path) -> None:
    diagnosis = examine(output, model)
    assert diagnosis.healthy and not diagnosis.codes(), [f for f in diagnosis.findings if f.level != "ok"]


@pytest.mark.parametrize(
    ("inflict", "code", "where"),
    [
        (drop_tensors(f"{EXPERT}.up_proj.scale_bias".__eq__), "description_wrong_type", "up_proj"),
        (change_tensor(f"{EXPERT}.up_proj.scale_bias", set_value(9.0, 3, 0)), "scale_bias_wrong", "up_proj"),
        (change_tensor(f"{EXPERT}.down_proj.scale_bias", lambda t: t.sum(1, True) * 2), "scale_bias_wrong", "down"),
        (change_tensor(f"{EXPERT}.up_proj.weight", lambda t: (t << 4) | ((t >> 4) & 15)), "scale_bias_wrong", "up"),
        (change_tensor(f"{EXPERT}.up_proj.weight", lambda t: t[:-1]), "tensor_shape", "up_proj"),
        (change_json(DESCRIPTION, lambda d: d.update({f"{EXPERT}.up_proj.weight": "W8A16"})),
         "description_unsupported", "up_proj"),
        (change_json(DESCRIPTION, lambda d: d.update({f"{ATTENTION}.o_proj.weight": "W4A8_DYNAMIC"})),
         "description_unsupported", "o_proj"),
    ],
)  # fmt: skip
def test_damage_is_reported(output: Path, tmp_path: Path, inflict: Any, code: str, where: str) -> None:
    folder = Path(shutil.copytree(output, tmp_path / "damaged"))
    inflict(folder)
    found = examine(folder).findings
    assert any(f.code == code and where in f.where for f in found), [(f.code, f.where) for f in found if f.code]


def test_reader_names_what_is_missing(output: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(output, tmp_path / "damaged"))
    drop_tensors(f"{EXPERT}.up_proj.scale_bias".__eq__)(folder)
    with pytest.raises(QuantError, match="scale_bias is missing"):
        open_quantized(folder)


# --- recipes -------------------------------------------------------------------------------------------------


def test_dense_linears_are_refused(tiny: Path, model: Path, tmp_path: Path) -> None:
    """vLLM-Ascend has this type for experts only: neither a dense model nor attention takes it."""
    text = RECIPE.replace("QCONFIG", "{act: {}, weight: {dtype: int4}}").replace("FLOAT_LINEAR", "x")
    recipe = tmp_path / "r.yaml"
    for saver, reason in (("ascendv1_saver", "for the experts of mixture models only"), ("awq", "cannot store")):
        recipe.write_text(text.replace("compressed_tensors", saver), encoding="utf-8")
        for folder in (tiny, model):
            fault = command("quant", folder, tmp_path / "out", "--config_path", recipe, "--device", "cpu").fault()
            assert reason in fault and "W4A8_DYNAMIC" in fault
    recipe.write_text(
        RECIPE.replace("QCONFIG", "{weight: {}}").replace("FLOAT_LINEAR", "x").replace("compressed_tensors", ASCEND),
        encoding="utf-8",
    )
    fault = command("quant", model, tmp_path / "out", "--config_path", recipe, "--device", "cpu").fault()
    assert "would be W8A16, which vLLM-Ascend has for dense Linears only" in fault


def test_quant_type_alone_saves_for_ascend(model: Path, tmp_path: Path) -> None:
    """On a machine without an NPU too: no other format has W4A8."""
    shown = command("quant", model, tmp_path / "out", "--quant_type", "w4a8", "--device", "cpu", "--dry_run").done().out
    assert ASCEND in shown and "W4A8_DYNAMIC" in shown


def test_recipes() -> None:
    assert find_recipe("Qwen3-Omni-30B-A3B-Instruct", "w4a8").metadata.config_id == "qwen3_omni_w4a8"
    text = RECIPE.replace("FLOAT_LINEAR", "x")
    with pytest.raises(QuantError, match="int4 weights per_channel require int8 activations per_token"):
        parse_recipe(text.replace("QCONFIG", "{weight: {dtype: int4}}"))
    with pytest.raises(QuantError, match="int4 per_channel requires method minmax or mse"):
        parse_recipe(text.replace("QCONFIG", "{act: {}, weight: {dtype: int4, method: gptq}}"))
