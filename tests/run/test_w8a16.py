"""W8A16 from the recipe to the files: golden bytes, an independent reader, export, mixed checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import dequantizers
import pytest
import torch
from command import files, write_index
from hypothesis import given
from hypothesis import strategies as st
from outputs import INT4, LINEARS, all_tensors, edited, replaced, without, write_recipe

from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import compressed_tensors
from msmodelslim_omni.formats.job import OutLinear
from msmodelslim_omni.formats.nibbles import pack_bytes, unpack_bytes
from msmodelslim_omni.numerics.arithmetic import dequantize, quantized_matmul
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.inspect import inspect_checkpoint
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.recipe import find_recipe
from msmodelslim_omni.run.pipeline import quantize

NAME = "thinker.model.layers.2.self_attn.k_proj"
W8A16 = QuantScheme(8, None)
INT8 = "{weight: {dtype: int8}}"
SAVERS = {"ascend": "ascendv1_saver", "compressed": "compressed_tensors"}


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`ascend` and `compressed` hold the same integers; in `mixed`, down_proj is int8 and the rest int4."""
    folder = tmp_path_factory.mktemp("w8a16")
    recipe = write_recipe(folder, "int8", INT8, "thinker.model.layers.1.mlp.down_proj")
    quantize(tiny, folder / "int8", config_path=str(recipe), save_format=list(SAVERS.values()), device="cpu")
    int4 = INT4.replace("SYMMETRIC", "True")
    mixed = write_recipe(folder, "mixed", int4, "thinker.model.layers.1.mlp.down_proj")
    step = f'process:\n    - {{type: linear_quant, qconfig: {INT8}, include: ["*down_proj"], exclude: ["*.1.mlp*"]}}'
    mixed.write_text(mixed.read_text(encoding="utf-8").replace("process:", step), encoding="utf-8")
    quantize(tiny, folder / "mixed", config_path=str(mixed), device="cpu")
    return {**{kind: folder / "int8" / saver for kind, saver in SAVERS.items()}, "mixed": folder / "mixed"}


# --- bytes ---------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    q = torch.tensor([[1, -2, 127, 0], [-127, 3, 4, 5]], dtype=torch.int8)
    linear = OutLinear("x", W8A16, (2, 4), "BF16", lambda: q, lambda: torch.tensor([[0.5], [1.01]]))
    packed, scale, shape = compressed_tensors.linear_tensors(linear)
    assert [t.spec.name for t in (packed, scale, shape)] == ["x.weight_packed", "x.weight_scale", "x.weight_shape"]
    stored = packed.load()
    assert isinstance(stored, torch.Tensor) and (packed.spec.dtype, packed.spec.shape) == ("I32", (2, 1))
    assert stored.view(torch.uint8).tolist() == [[0x81, 0x7E, 0xFF, 0x80], [0x01, 0x83, 0x84, 0x85]]
    assert int(stored[0, 0]) == 0x80FF7E81 - 2**32
    assert scale.load().tolist() == [[0.5], [1.0078125]]  # type: ignore[union-attr]
    assert shape.load().tolist() == [2, 4]  # type: ignore[union-attr]


@given(st.integers(1, 5), st.integers(1, 13), st.integers(0, 2**32))
def test_unpacking_undoes_packing(rows: int, columns: int, seed: int) -> None:
    q = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    assert pack_bytes(q).shape == (rows, -(-columns // 4)) and torch.equal(unpack_bytes(pack_bytes(q), columns), q)


def test_settings(outputs: dict[str, Path]) -> None:
    config = json.loads((outputs["compressed"] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": None,
        "output_activations": None,
    }
    description = json.loads((outputs["ascend"] / "quant_model_description.json").read_text(encoding="utf-8"))
    kinds = {description[f"{NAME}.{ending}"] for ending in ("weight", "weight_scale", "weight_offset")}
    assert kinds == {"W8A16"} == {description["model_quant_type"]} and description[f"{NAME}.bias"] == "FLOAT"


# --- outputs -------------------------------------------------------------------------------------------------


def test_gptq_is_closer_than_rounding_to_nearest(tiny: Path, tmp_path: Path) -> None:
    """On the samples that judge, which are kept out of H."""
    index = write_index(tmp_path / "data", *({"text": f"{n} and {n * n} are {n + n * n}."} for n in range(16)))
    words = {"quant_type": "w8a16_gptq", "dataset": str(index), "save_format": "compressed_tensors"}
    report = quantize(tiny, tmp_path / "out", device="cpu", **words)
    assert {linear.scheme for layer in report.layers for linear in layer.linears} == {"W8A16"}
    ratios = [layer.error_over_plain for layer in report.layers]
    assert all(ratio is not None and ratio < 0.9 for ratio in ratios), ratios


def test_weights_agree_with_an_independent_reader(outputs: dict[str, Path]) -> None:
    parts = {n.rpartition(".")[2]: t for n, t in all_tensors(outputs["compressed"]).items() if n.startswith(NAME)}
    expected = dequantizers.dequantize_packed_bytes(
        parts["weight_packed"].numpy(), parts["weight_scale"].float().numpy(), parts["weight_shape"].numpy()
    )
    checkpoint, ascend = open_quantized(outputs["compressed"]), open_quantized(outputs["ascend"])
    assert checkpoint.schemes == ascend.schemes == {W8A16} and len(checkpoint.linears) == LINEARS
    linear = checkpoint.load_linear(NAME)
    assert torch.equal(dequantize(linear), torch.from_numpy(expected))
    assert torch.equal(linear.qweight, ascend.load_linear(NAME).qweight)
    x = torch.randn(3, 256)
    assert torch.equal(quantized_matmul(x, linear), x @ torch.from_numpy(expected).T)  # activations stay float


def test_export_between_formats(outputs: dict[str, Path], tmp_path: Path) -> None:
    export(outputs["ascend"], tmp_path / "compressed", "compressed_tensors")
    exported, written = files(tmp_path / "compressed"), files(outputs["compressed"])
    cards = [content.pop("README.md").decode() for content in (exported, written)]
    assert exported == written
    memory = [next(line for line in card.splitlines() if "memory of the weights" in line) for card in cards]
    assert memory[0] == memory[1]  # that of this format, also where another one was the first of the run
    export(outputs["compressed"], tmp_path / "ascend", "ascendv1_saver")
    back, direct = open_quantized(tmp_path / "ascend"), open_quantized(outputs["compressed"])
    assert torch.equal(dequantize(back.load_linear(NAME)), dequantize(direct.load_linear(NAME)))


def test_int4_and_int8_in_one_checkpoint(outputs: dict[str, Path], tmp_path: Path) -> None:
    mixed = open_quantized(outputs["mixed"])
    bits = {name.rpartition(".")[2]: stored.linear.scheme.weight_bits for name, stored in mixed.linears.items()}
    assert bits == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 4),
        "down_proj": 8,
    }
    down = "thinker.model.layers.2.mlp.down_proj"
    whole = open_quantized(outputs["compressed"])
    assert torch.equal(mixed.load_linear(down).qweight, whole.load_linear(down).qweight)
    export(outputs["mixed"], tmp_path / "copy", "compressed_tensors")
    assert files(tmp_path / "copy") == files(outputs["mixed"])


def test_inspect_counts_weights(outputs: dict[str, Path]) -> None:
    counts = {
        kind: {part.name: part.parameters for part in inspect_checkpoint(outputs[kind]).parts}
        for kind in ("ascend", "compressed", "mixed")
    }
    assert counts["ascend"] == counts["compressed"] == counts["mixed"]


def test_faults(outputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="weight_scale is missing"):
        open_quantized(edited(outputs["compressed"], tmp_path / "a", without(f"{NAME}.weight_scale")))
    wrong = replaced(f"{NAME}.weight_packed", torch.zeros(128, 32, dtype=torch.int32))
    with pytest.raises(QuantError, match=r"weight has shape \[128, 128\], config.json implies \[128, 256\]"):
        open_quantized(edited(outputs["compressed"], tmp_path / "b", wrong))


@pytest.mark.parametrize("model_type", ["Qwen2.5-Omni-3B", "Qwen2.5-VL-7B-Instruct"])
def test_quant_type(model_type: str) -> None:
    assert find_recipe(model_type, "w8a16").quant_type == "w8a16"


def test_w8a8_and_w8a16_in_one_checkpoint(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "mixed", "{act: {}, weight: {}}", "thinker.model.layers.1.mlp.down_proj")
    step = f'process:\n    - {{type: linear_quant, qconfig: {INT8}, include: ["*down_proj"], exclude: ["*.1.mlp*"]}}'
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("process:", step), encoding="utf-8")
    quantize(tiny, tmp_path / "out", config_path=str(recipe), save_format=list(SAVERS.values()), device="cpu")
    for saver in SAVERS.values():
        checkpoint = open_quantized(tmp_path / "out" / saver)
        acts = {name.rpartition(".")[2]: stored.linear.scheme.act_bits for name, stored in checkpoint.linears.items()}
        assert acts["down_proj"] is None and set(acts.values()) == {8, None} and acts["o_proj"] == 8
        assert examine(tmp_path / "out" / saver, tiny).codes() <= {"autoawq_cannot_say"}
    text = (tmp_path / "out" / "ascendv1_saver" / "quant_model_description.json").read_text(encoding="utf-8")
    assert json.loads(text)["model_quant_type"] == "W8A8_DYNAMIC"


# --- the shipped recipe that mixes W8A8 and W8A16 ------------------------------------------------------------


def test_w8a8_mixed_keeps_the_activations_of_down_proj_float(tiny: Path, tmp_path: Path) -> None:
    """In both formats; the integers come from GPTQ, and so need samples."""
    index = write_index(tmp_path / "data", *({"text": f"A {'very ' * n}long sentence."} for n in range(0, 160, 10)))
    out = tmp_path / "out"
    quantize(
        tiny,
        out,
        config_path="qwen2_5_omni_w8a8_mixed",
        dataset=str(index),
        save_format=list(SAVERS.values()),
        device="cpu",
    )
    down, up = (NAME.replace("self_attn.k_proj", f"mlp.{name}_proj").replace("2", "1") for name in ("down", "up"))
    description = json.loads((out / "ascendv1_saver" / "quant_model_description.json").read_text(encoding="utf-8"))
    assert (description[f"{down}.weight"], description[f"{up}.weight"]) == ("W8A16", "W8A8_DYNAMIC")
    compressed = open_quantized(out / "compressed_tensors")
    for saver in SAVERS.values():
        assert examine(out / saver, tiny).codes() == set()
    schemes = {linear: compressed.linears[linear].linear.scheme.act_bits for linear in (down, up)}
    assert schemes == {down: None, up: 8}
