"""NVFP4A16 and NVFP4 from the recipe to the files: rounding by hand, golden bytes, independent readers, faults."""

from __future__ import annotations

import json
from pathlib import Path

import dequantizers
import pytest
import torch
from command import files, write_index
from outputs import LINEARS, all_tensors, edited, replaced, without, write_recipe

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import compressed_tensors
from msmodelslim_omni.formats.ct_nvfp4 import pack_e2m1, unpack_e2m1
from msmodelslim_omni.formats.job import OutLinear
from msmodelslim_omni.numerics.arithmetic import (
    QuantizedLinear,
    dequantize,
    quantize_weight,
    quantized_matmul,
    round_act,
)
from msmodelslim_omni.numerics.float4 import input_global_scale, round_act_nvfp4, round_e2m1
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.inspect import inspect_checkpoint
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe import find_recipe, parse_recipe
from msmodelslim_omni.run.pipeline import quantize

NAME = "thinker.model.layers.2.self_attn.k_proj"
NVFP4 = QuantScheme(4, None, group_size=16, number="e2m1")
QCONFIG = "{weight: {scope: per_group, dtype: nvfp4}}"
NVFP4_ACT = QuantScheme(4, 4, group_size=16, number="e2m1")


@pytest.fixture(scope="module")
def output(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvfp4")
    recipe = write_recipe(folder, "nvfp4", QCONFIG, "thinker.model.layers.1.mlp.down_proj")
    quantize(tiny, folder / "out", config_path=str(recipe), device="cpu")
    return folder / "out"


# --- rounding ------------------------------------------------------------------------------------------------


def test_rounding_by_hand() -> None:
    """Values in units of the block scale: the grid, then every tie, then both sides of a tie, then clamping."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    near = {
        0.26: 0.5,
        0.74: 0.5,
        1.26: 1.5,
        1.74: 1.5,
        2.49: 2.0,
        2.51: 3.0,
        3.49: 3.0,
        4.99: 4.0,
        5.01: 6.0,
        99.0: 6.0,
    }
    expected = {**{value: value for value in grid}, **ties, **near}
    for sign in (1, -1):
        x = sign * torch.tensor(list(expected))
        assert (round_e2m1(2 * x) / 2).tolist() == [sign * value for value in expected.values()]


def test_scales_by_hand() -> None:
    weight = torch.zeros(1, 48)
    weight[0, 0], weight[0, 16] = 6.0, -0.3
    linear = quantize_weight(weight, NVFP4)
    # 0.3 / 6 * 256 = 12.8, which e4m3 rounds to 13; an empty block has the smallest e4m3 scale.
    assert (linear.scales * 512).tolist() == [[256.0, 13.0, 2.0**-9]]
    assert linear.qweight[0, [0, 16]].tolist() == [12, -12]
    assert dequantize(linear)[0, [0, 16]].tolist() == [6.0, pytest.approx(-6 * 13 / 256)]
    with pytest.raises(QuantError, match="a weight of 20 is too large for NVFP4"):
        quantize_weight(torch.full((1, 16), 20.0), NVFP4)


def test_search_is_no_worse_per_block() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    searched = QuantScheme(4, None, "mse", 16, number="e2m1")
    plain, best = (
        (dequantize(quantize_weight(weight, s)) - weight).view(32, 16, 16).square().sum(2) for s in (NVFP4, searched)
    )
    assert (best <= plain * (1 + 1e-6)).all() and best.sum() < 0.85 * plain.sum()


def test_inputs_by_hand() -> None:
    """G = 256 for a largest number of 10: 2688 / 10 = 268.8. The block of 3 has the scale e4m3(256 * 3 / 6) = 128."""
    assert [float(input_global_scale(torch.tensor(x))) for x in (10.0, 10.5, 10.6, 2688.0, 3000.0)] == [
        256.0,
        256.0,
        128.0,
        1.0,
        0.5,
    ]
    block = torch.tensor([3.0, -1.5, 1.25, 1.24, 0.125, 0.124, -0.9, *[0.0] * 9])  # steps of 0.25, 0.5 and 1
    rounded = round_act_nvfp4(block, torch.tensor([256.0]))
    assert rounded.tolist() == [3.0, -1.5, 1.0, 1.0, 0.0, 0.0, -1.0, *[0.0] * 9]
    beyond = round_act_nvfp4(torch.full((16,), 40.0), torch.tensor([256.0]))  # clipped to 448 * 6 / 256
    assert beyond.tolist() == [10.5] * 16
    assert round_act_nvfp4(torch.full((16,), 1e-6), torch.tensor([256.0])).tolist() == [0.0] * 16  # its scale is zero
    assert float(input_global_scale(torch.tensor(0.0))) < float("inf")


def test_inputs_agree_with_an_independent_reader() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 1, 8)[:, None]
    for scale in (input_global_scale(x.abs().amax()), torch.tensor([20.5])):
        expected = dequantizers.round_nvfp4_inputs(x.numpy(), float(scale))
        torch.testing.assert_close(round_act(x, NVFP4_ACT, scale), torch.from_numpy(expected), rtol=1e-6, atol=0.0)
    weight = quantize_weight(6 * torch.eye(64), NVFP4_ACT)  # 6 is exact, 1 is not
    linear = QuantizedLinear(weight.qweight, weight.scales, NVFP4_ACT, input_global=torch.tensor([20.5]))
    assert torch.allclose(quantized_matmul(x, linear), 6 * round_act(x, NVFP4_ACT, torch.tensor([20.5])))


# --- bytes ---------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    q = torch.tensor([[2, -1, 12, 0, 1, 3, 4, 6, 8, -12, -8, -6, -4, -3, -2, 0]], dtype=torch.int8)
    linear = OutLinear("x", NVFP4, (1, 16), "BF16", lambda: q, lambda: torch.tensor([[13 / 512]]))
    tensors = {t.spec.name: t.load() for t in compressed_tensors.linear_tensors(linear)}
    expected = [0x92, 0x07, 0x31, 0x54, 0xF6, 0xDE, 0xBC, 0x0A]
    assert tensors["x.weight_packed"].flatten().tolist() == expected  # type: ignore[union-attr]
    assert tensors["x.weight_scale"].view(torch.uint8).tolist() == [[0x55]]  # type: ignore[union-attr]
    assert tensors["x.weight_global_scale"].tolist() == [256.0]  # type: ignore[union-attr]
    assert torch.equal(unpack_e2m1(pack_e2m1(q)), q)
    both = OutLinear("x", NVFP4_ACT, (1, 16), "BF16", linear.qweight, linear.scales, input_global=lambda: torch.ones(1))
    assert [t.spec.name for t in compressed_tensors.linear_tensors(both)] == [*tensors, "x.input_global_scale"]


def test_settings(output: Path) -> None:
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    group = config["config_groups"]["group_0"]
    dtype = "torch.float8_e4m3fn"
    assert group["weights"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
        "dynamic": False, "scale_dtype": dtype, "zp_dtype": dtype,
    }  # fmt: skip
    assert group["input_activations"] is None


# --- outputs -------------------------------------------------------------------------------------------------


def test_weights_agree_with_an_independent_reader(output: Path) -> None:
    parts = {n.rpartition(".")[2]: t for n, t in all_tensors(output).items() if n.startswith(f"{NAME}.")}
    expected = dequantizers.dequantize_nvfp4(
        parts["weight_packed"].numpy(),
        parts["weight_scale"].view(torch.uint8).numpy(),
        float(parts["weight_global_scale"]),
    )
    checkpoint = open_quantized(output)
    assert checkpoint.schemes == {NVFP4} and len(checkpoint.linears) == LINEARS
    assert torch.equal(dequantize(checkpoint.load_linear(NAME)), torch.from_numpy(expected))
    globals_ = {float(t) for n, t in all_tensors(output).items() if n.endswith("weight_global_scale")}
    assert globals_ == {256.0}  # equal for all parts of fused Linears


def test_export_and_inspect(output: Path, tiny: Path, tmp_path: Path) -> None:
    export(output, tmp_path / "copy", "compressed_tensors")
    assert files(tmp_path / "copy") == files(output)
    counts = [{part.name: part.parameters for part in inspect_checkpoint(path).parts} for path in (output, tiny)]
    assert counts[0] == counts[1]
    foreign = edited(output, tmp_path / "foreign", replaced(f"{NAME}.weight_global_scale", torch.tensor([1000.0])))
    with pytest.raises(QuantError, match="not exact with a global scale of 256"):
        export(foreign, tmp_path / "no", "compressed_tensors")


def test_faults(output: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="weight_global_scale is missing"):
        open_quantized(edited(output, tmp_path / "a", without(f"{NAME}.weight_global_scale")))
    with pytest.raises(QuantError, match="weight_scale is BF16, not F8_E4M3"):
        wrong = replaced(f"{NAME}.weight_scale", torch.ones(128, 16, dtype=torch.bfloat16))
        open_quantized(edited(output, tmp_path / "b", wrong))


# --- activations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 for weights and activations, calibrated on one short sample."""
    folder = tmp_path_factory.mktemp("nvfp4_act")
    recipe = write_recipe(
        folder, "nvfp4", f"{{act: {{scope: per_group, dtype: nvfp4}}, {QCONFIG[1:]}", "layers.1.mlp.down_proj"
    )
    data = write_index(folder / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    quantize(tiny, folder / "out", config_path=str(recipe), dataset=str(data), device="cpu")
    return folder / "out"


def test_input_scales(rounded: Path, output: Path, tmp_path: Path) -> None:
    tensors, config = all_tensors(rounded), json.loads((rounded / "config.json").read_text(encoding="utf-8"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"] == {**group["weights"], "dynamic": "local"}
    scales = {n: float(t) for n, t in tensors.items() if n.endswith("input_global_scale")}
    assert len(scales) == LINEARS and all(
        s > 0 and torch.frexp(torch.tensor(s)).mantissa == 0.5 for s in scales.values()
    )
    for layer in range(4):  # parts of fused Linears agree
        names = [f"thinker.model.layers.{layer}.{n}.input_global_scale" for n in ("mlp.gate_proj", "mlp.up_proj")]
        assert scales[names[0]] == scales[names[1]]
    of_weights = {n: t for n, t in tensors.items() if not n.endswith("input_global_scale")}
    assert {n: t.tolist() for n, t in of_weights.items()} == {n: t.tolist() for n, t in all_tensors(output).items()}
    checkpoint = open_quantized(rounded)
    assert checkpoint.schemes == {NVFP4_ACT}
    assert float(checkpoint.load_linear(NAME).input_global) == scales[f"{NAME}.input_global_scale"]  # type: ignore[arg-type]
    export(rounded, tmp_path / "copy", "compressed_tensors")
    assert files(tmp_path / "copy") == files(rounded)


def test_faults_of_input_scales(rounded: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="input_global_scale is missing"):
        open_quantized(edited(rounded, tmp_path / "a", without(f"{NAME}.input_global_scale")))
    zero = edited(rounded, tmp_path / "b", replaced(f"{NAME}.input_global_scale", torch.zeros(1)))
    with pytest.raises(QuantError, match="input_global_scale is 0; it must be positive"):
        open_quantized(zero).load_linear(NAME)


def test_recipes() -> None:
    assert find_recipe("Qwen2.5-Omni-3B", "nvfp4a16").quant_type == "nvfp4a16"
    assert find_recipe("Qwen2.5-VL-3B-Instruct", "nvfp4").quant_type == "nvfp4"
    text = """apiversion: multimodal_vlm_modelslim_v1
spec: {process: [{type: linear_quant, qconfig: QCONFIG}], save: [{type: compressed_tensors}]}
"""
    for wrong in ("{dtype: nvfp4}", "{dtype: nvfp4, scope: per_group, method: gptq}"):
        with pytest.raises(QuantError, match="nvfp4 requires scope per_group, method minmax or mse"):
            parse_recipe(text.replace("QCONFIG", f"{{weight: {wrong}}}"))
    with pytest.raises(QuantError, match="nvfp4 weights take"):
        parse_recipe(text.replace("QCONFIG", f"{{act: {{}}, {QCONFIG[1:]}"))
