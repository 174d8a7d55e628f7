"""FP8 from the recipe to the files: golden bytes, an independent reader, exact emulation, export, generation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dequantizers
import numpy as np
import pytest
import torch
from command import files, write_index
from outputs import FP8, FP8_BLOCK, LINEARS, all_tensors, edited, replaced, without, write_recipe
from safetensors.torch import load_file

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.evaluation.run import evaluate
from msmodelslim_omni.formats import compressed_tensors
from msmodelslim_omni.formats.job import OutLinear
from msmodelslim_omni.numerics.arithmetic import dequantize, quantize_weight, quantized_matmul
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.generate import RoundingLinear
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe import find_recipe, parse_recipe
from msmodelslim_omni.run.pipeline import quantize

NAME = "thinker.model.layers.2.self_attn.k_proj"
CHANNEL = QuantScheme(8, 8, number="e4m3")
BLOCK = QuantScheme(8, 8, group_size=128, number="e4m3", block_rows=128)
KINDS = {"fp8": (FP8, CHANNEL), "fp8_block": (FP8_BLOCK, BLOCK)}


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    for name, (qconfig, _) in KINDS.items():
        recipe = write_recipe(folder, name, qconfig, "thinker.model.layers.1.mlp.down_proj")
        quantize(tiny, folder / name, config_path=str(recipe), device="cpu")
    return {name: folder / name for name in KINDS}


def source_weight(tiny: Path, linear: str) -> torch.Tensor:
    (tensor,) = (t for f in tiny.glob("*.safetensors") for n, t in load_file(f).items() if n == f"{linear}.weight")
    return tensor


# --- golden bytes --------------------------------------------------------------------------------------------


def tensors_of(weight: torch.Tensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
    linear = quantize_weight(weight, scheme)
    out = OutLinear("x", scheme, (len(weight), weight.shape[1]), "BF16", lambda: linear.qweight, lambda: linear.scales)
    written = compressed_tensors.linear_tensors(out)
    for tensor in written:
        assert (str(tensor.load().dtype), tuple(tensor.load().shape)) == (  # type: ignore[union-attr]
            {"F8_E4M3": "torch.float8_e4m3fn", "BF16": "torch.bfloat16"}[tensor.spec.dtype],
            tensor.spec.shape,
        )
    return {tensor.spec.name: tensor.load() for tensor in written}  # type: ignore[misc]


def test_bytes_per_channel() -> None:
    weight = torch.tensor([[448.0, -17.0, 0.3, 0.001], [-0.875, 0.4375, 0.01, 0.0]], dtype=torch.float32)
    tensors = tensors_of(weight, CHANNEL)
    # 448 = 0x7E, -16 = 0xD8, 0.3125 = 0x2A, 2^-9 = 0x01; -448 = 0xFE, 224 = 0x76, 5 = 0x4A, 0.
    assert tensors["x.weight"].view(torch.uint8).tolist() == [[0x7E, 0xD8, 0x2A, 0x01], [0xFE, 0x76, 0x4A, 0x00]]
    assert tensors["x.weight_scale"].view(torch.uint8).flatten().tolist() == [0x80, 0x3F, 0x00, 0x3B]  # 1, 2^-9


def test_bytes_in_blocks() -> None:
    weight = torch.zeros(130, 256)
    weight[0, 0], weight[127, 127], weight[5, 200], weight[129, 255] = 448.0, 17.0, 3.5, -896.0
    tensors = tensors_of(weight, BLOCK)
    codes = tensors["x.weight"].view(torch.uint8)
    assert [[*place, int(codes[tuple(place)])] for place in codes.nonzero().tolist()] == [
        [0, 0, 0x7E], [5, 200, 0x7E], [127, 127, 0x58], [129, 255, 0xFE],
    ]  # fmt: skip
    assert tensors["x.weight_scale"].tolist() == [[1.0, 2.0**-7], [1.0, 2.0]]


def test_config(outputs: dict[str, Path]) -> None:
    found = json.loads((outputs["fp8"] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    assert found["format"] == "float-quantized"
    assert found["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**number, "strategy": "channel", "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    }
    blocks = json.loads((outputs["fp8_block"] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    group = blocks["config_groups"]["group_0"]
    assert group["weights"] == {**number, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
    assert group["input_activations"] == {**number, "strategy": "group", "group_size": 128, "dynamic": True}


# --- outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_agree_with_an_independent_reader(outputs: dict[str, Path], tiny: Path, kind: str) -> None:
    tensors, checkpoint = all_tensors(outputs[kind]), open_quantized(outputs[kind])
    assert len(checkpoint.linears) == LINEARS and checkpoint.schemes == {KINDS[kind][1]}
    for name in checkpoint.linears:
        codes = tensors[f"{name}.weight"].view(torch.uint8).numpy()
        assert not ((codes & 127) == 127).any()
    codes, scale = tensors[f"{NAME}.weight"].view(torch.uint8).numpy(), tensors[f"{NAME}.weight_scale"].float().numpy()
    expected = torch.from_numpy(dequantizers.dequantize_float8(codes, scale))
    found = checkpoint.load_linear(NAME)
    assert found.qweight.dtype == torch.float8_e4m3fn and torch.equal(dequantize(found), expected)
    weight = source_weight(tiny, NAME).float()
    # Half a step is 2^-4 of a normal value, and half of 2^-9 below the smallest normal value.
    steps = (
        torch.from_numpy(np.repeat(np.repeat(scale, 128, 0)[:128], 128, 1))
        if kind != "fp8"
        else torch.from_numpy(scale)
    )
    assert ((expected - weight).abs() <= torch.maximum(weight.abs() / 16, steps * 2.0**-10) * 1.001).all()


def test_independent_values_equal_the_table() -> None:
    values = dequantizers.float8_values(np.arange(256, dtype=np.uint8))
    assert values[:127].tolist() == list(dequantizers.E4M3)
    assert values[128:255].tolist() == [-value for value in dequantizers.E4M3]
    assert np.isnan(values[[127, 255]]).all()


FAULTS = {
    "scale missing": (without(f"{NAME}.weight_scale"), "weight_scale is missing"),
    "int8 weight": (replaced(f"{NAME}.weight", torch.zeros(128, 256, dtype=torch.int8)), "weight is I8, not F8_E4M3"),
    "flat scale": (replaced(f"{NAME}.weight_scale", torch.ones(128)), "weight_scale has shape"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(outputs: dict[str, Path], tmp_path: Path, kind: str, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(QuantError, match=f"{re.escape(NAME)}: {message}"):
        open_quantized(edited(outputs[kind], tmp_path / "broken", change))


def test_nan_code_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    codes = torch.full((128, 256), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    broken = open_quantized(edited(outputs["fp8"], tmp_path / "broken", replaced(f"{NAME}.weight", codes)))
    with pytest.raises(QuantError, match=f"{re.escape(NAME)}: its weight holds NaN"):
        broken.load_linear(NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_export(outputs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    export(outputs[kind], tmp_path / "copy", "compressed_tensors")
    assert files(tmp_path / "copy") == files(outputs[kind])
    with pytest.raises(QuantError, match="Ascend A2 and A3 do not compute in FP8"):
        export(outputs[kind], tmp_path / "no", "ascendv1_saver")


def test_evaluation_emulates_weights_and_activations(outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    index = str(write_index(tmp_path, {"text": "Why is the sky blue?", "answer": "Short waves scatter most."}))
    reports = {kind: evaluate(tiny, outputs[kind], index, device="cpu") for kind in KINDS}
    errors = {kind: report.overall.hidden_error for kind, report in reports.items()}
    assert all(0 < error < 0.2 for error in errors.values()), errors


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCK])
def test_generation_rounds_as_quantized_matmul(scheme: QuantScheme) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((24, 256), (1, 5, 256), (24,)))
    linear, cpu = quantize_weight(weight, scheme), torch.device("cpu")
    exact = quantized_matmul(x, linear, bias)
    torch.testing.assert_close(RoundingLinear(linear, bias, torch.float32, cpu)(x), exact, rtol=1e-5, atol=1e-5)
    found = RoundingLinear(linear, bias, torch.bfloat16, cpu)(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


# --- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["Qwen2.5-Omni-7B", "Qwen2.5-Omni-3B", "Qwen2.5-VL-7B-Instruct"])
def test_names_of_the_quant_type(model_type: str) -> None:
    for name in ("fp8", "FP8_dynamic", "w8a8_fp8"):
        assert find_recipe(model_type, name).quant_type == "fp8"
    assert find_recipe(model_type, "fp8_block").quant_type == "fp8_block"
    assert find_recipe(model_type, "w8a8").metadata.config_id.endswith("w8a8")


RECIPE = """apiversion: multimodal_vlm_modelslim_v1
spec: {process: [{type: linear_quant, qconfig: QCONFIG}], save: [{type: compressed_tensors}]}
"""


@pytest.mark.parametrize(
    ("qconfig", "message"),
    [
        (
            "{weight: {dtype: fp8_e4m3}}",
            "fp8_e4m3 weights per_channel require `act: {dtype: fp8_e4m3, scope: per_token}`",
        ),
        ("{act: {}, weight: {dtype: fp8_e4m3}}", "fp8_e4m3 weights per_channel require"),
        ("{act: {dtype: fp8_e4m3}, weight: {scope: per_block, dtype: fp8_e4m3}}", "scope: per_group}"),
        ("{act: {dtype: fp8_e4m3}, weight: {}}", "int8 weights require int8 activations per_token"),
        ("{act: {dtype: fp8_e4m3}, weight: {scope: per_group, dtype: fp8_e4m3}}", "scope per_channel or per_block"),
        ("{act: {dtype: fp8_e4m3}, weight: {dtype: fp8_e4m3, method: gptq}}", "method minmax or mse"),
        ("{act: {dtype: fp8_e4m3}, weight: {dtype: fp8_e4m3, ext: {group_size: 64}}}", "fp8_e4m3 has no ext options"),
        ("{act: {}, weight: {scope: per_block}}", "scope per_block requires dtype fp8_e4m3"),
    ],
)
def test_recipe_errors(qconfig: str, message: str) -> None:
    with pytest.raises(QuantError) as caught:
        parse_recipe(RECIPE.replace("QCONFIG", qconfig), Path("my.yaml"))
    assert message in caught.value.message and "my.yaml:2" in caught.value.message


def refused(tiny: Path, tmp_path: Path, text: str, **arguments: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QuantError) as caught:
        quantize(tiny, tmp_path / "out", config_path=str(path), device="cpu", **arguments)
    return caught.value.message


def test_formats_without_fp8(tiny: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("QCONFIG", FP8)
    assert "Ascend A2 and A3" in refused(tiny, tmp_path, text, save_format=["ascendv1_saver"])
    assert "awq cannot store" in refused(tiny, tmp_path, text, save_format="awq")
    both = text.replace(
        "[{type: linear", f'[{{type: linear_quant, qconfig: {FP8_BLOCK}, include: ["*o_proj"]}}, {{type: linear'
    )
    assert "supports one float-quantized scheme, not FP8_BLOCK and FP8_DYNAMIC" in refused(tiny, tmp_path, both)
