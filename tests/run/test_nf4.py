"""NF4 end to end: comparison with bitsandbytes, loading in transformers, and refused recipes and checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from command import command, files, quant, write_index
from outputs import FLOAT_LINEAR, edit_config, edited, replaced, weights_file, without, write_recipe
from safetensors import safe_open
from safetensors.torch import load_file

from msmodelslim_omni import load_recipe
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.formats import bitsandbytes as nf4_format
from msmodelslim_omni.numerics import arithmetic
from msmodelslim_omni.numerics.arithmetic import dequantize, linear_rows, quantize_weight
from msmodelslim_omni.numerics.nf4 import (
    NF4_LEVELS,
    nest_absmax,
    pack_nf4,
    unpack_nf4,
)
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.reader import open_quantized

NF4 = QuantScheme(4, None, group_size=64, codebook="nf4")
DOUBLE = QuantScheme(4, None, group_size=64, codebook="nf4", double_quant=True)
QCONFIG = "{weight: {scope: per_group, dtype: nf4, ext: {group_size: 64, double_quant: DOUBLE}}}"
LINEARS = 4 * 7
Q_PROJ = "thinker.model.layers.0.self_attn.q_proj"


# --- numbers -------------------------------------------------------------------------------------------------


def test_levels_are_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(NF4_LEVELS), get_4bit_type("nf4", device="cpu"))


def test_codes_of_a_small_weight() -> None:
    """absmax is 2, so 1.0 becomes 0.5, which is between the levels 0.4407 and 0.5626 and nearer to the latter."""
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([-2.0, 1.0, 0.1, 0.2, -0.5])
    linear = quantize_weight(weight, NF4)
    assert linear.scales.tolist() == [[2.0]]
    assert linear.qweight[0, :6].tolist() == [0, 12, 8, 8, 4, 7] and linear.qweight.dtype == torch.int8
    expected = [-2.0, 0.8814196586608887, 0.15916059911251068, 0.15916059911251068, -0.5688827633857727, 0.0]
    assert dequantize(linear)[0, :6].tolist() == expected


def test_packed_bytes() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [7, 8, 0, 10]], dtype=torch.int8)
    assert pack_nf4(codes).tolist() == [[0x12], [0xF0], [0x78], [0x0A]]
    assert torch.equal(unpack_nf4(pack_nf4(codes), (2, 4)), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
def test_quantization_equals_bitsandbytes(dtype: torch.dtype, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_BLOCK_ELEMENTS", 1 << 12)  # several blocks of rows
    weight = torch.randn(100, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 64:128] = 0  # a block of zeros
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    linear = quantize_weight(weight, DOUBLE if double else NF4)
    assert torch.equal(pack_nf4(linear.qweight), packed)
    state.dtype = torch.float32
    assert torch.equal(dequantize(linear), dequantize_4bit(packed, state))
    assert torch.equal(dequantize(linear_rows(linear, slice(2, 5))), dequantize(linear)[2:5])
    assert (linear.nested is not None) == double


def test_double_quantization_has_the_layout_of_bitsandbytes() -> None:
    absmax = torch.rand(600, generator=torch.Generator().manual_seed(0))
    nested = nest_absmax(absmax)
    assert nested.codes.dtype == torch.uint8 and len(nested.scales) == 3 and len(nested.levels) == 256
    assert nested.offset == float(absmax.mean())
    assert float((nested.absmax() - absmax).abs().max()) < 0.01


def test_nan_is_refused() -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = torch.nan
    with pytest.raises(Exception, match="NaN or Inf"):
        quantize_weight(weight, NF4)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of the shipped recipe, with double quantization, and with one Linear kept float."""
    folder = tmp_path_factory.mktemp("nf4")
    quant(tiny, folder / "plain", "--quant_type", "nf4").done()
    for name, float_linear in (("double", "-"), ("mixed", FLOAT_LINEAR)):
        recipe = write_recipe(folder, name, QCONFIG.replace("DOUBLE", str(name == "double")), float_linear)
        recipe.write_text(recipe.read_text().replace("compressed_tensors", "bitsandbytes"))
        quant(tiny, folder / name, "--config_path", recipe).done()
    return {name: folder / name for name in ("plain", "double", "mixed")}


NAMES = ("plain", "double", "mixed")


def by_bitsandbytes(source: Path, linear: str, double: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed weight of bitsandbytes, and its dequantized weight in float32."""
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if f"{linear}.weight" in opened.keys():  # noqa: SIM118, not a mapping
                packed, state = quantize_4bit(
                    opened.get_tensor(f"{linear}.weight"), quant_type="nf4", compress_statistics=double
                )
                state.dtype = torch.float32
                return packed, dequantize_4bit(packed, state)
    raise KeyError(linear)


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_bitsandbytes_on_the_source(outputs: dict[str, Path], tiny: Path, name: str) -> None:
    output = open_quantized(outputs[name])
    assert output.saver == "bitsandbytes" and len(output.linears) == LINEARS - (name == "mixed")
    tensors = load_file(weights_file(outputs[name]))
    for linear in output.linears:
        packed, weight = by_bitsandbytes(tiny, linear, name == "double")
        assert torch.equal(tensors[f"{linear}.weight"], packed)
        assert torch.equal(dequantize(output.load_linear(linear)), weight)


def assert_loaded_as_planned(model: Any, path: Path, prefix: str = "") -> None:
    """Exactly the quantized Linears on disk are 4-bit modules, with the same weights.

    prefix: comes before the model's names on disk.
    """
    output = open_quantized(path)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    loaded = {prefix + name.replace("language_model.", ""): module for name, module in modules.items()}
    assert loaded.keys() == output.linears.keys()
    for on_disk, module in loaded.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, dequantize(output.load_linear(on_disk)).to(weight.dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["full", "thinker"])
def test_transformers_loads_it_without_arguments(outputs: dict[str, Path], name: str, part: str) -> None:
    import transformers

    full, thinker = "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration"
    model = getattr(transformers, full if part == "full" else thinker).from_pretrained(outputs[name])
    assert_loaded_as_planned(model, outputs[name], "" if part == "full" else "thinker.")
    speaker = model.thinker if part == "full" else model
    ids = torch.arange(5, 25)[None]
    tokens = speaker.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 23)


def test_vl(tiny_vl: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    quant(tiny_vl, tmp_path / "out", "--quant_type", "nf4").done()
    assert examine(tmp_path / "out", tiny_vl).codes() == set()
    assert_loaded_as_planned(Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out"), tmp_path / "out")


def test_sizes_and_config(outputs: dict[str, Path]) -> None:
    with safe_open(weights_file(outputs["plain"]), "pt") as opened:
        parts = {n.removeprefix(f"{Q_PROJ}.") for n in opened.keys() if n.startswith(Q_PROJ)}  # noqa: SIM118
        assert parts == {*nf4_format.NF4_PARTS, "bias"}
    config = json.loads((outputs["double"] / "config.json").read_text())
    for block in (config, config["thinker_config"]):
        settings = block["quantization_config"]
        assert settings["quant_method"] == "bitsandbytes" and settings["load_in_4bit"]
        assert settings["bnb_4bit_use_double_quant"]
        assert {"visual", "audio_tower", "lm_head", "talker", "token2wav"} <= set(settings["llm_int8_skip_modules"])
    bits = {name: json.loads((path / "quant_report.json").read_text()) for name, path in outputs.items()}
    assert 4.5 < bits["plain"]["bits_per_weight"] < 4.53
    assert 4.12 < bits["double"]["bits_per_weight"] < 4.26  # the table of 1 KiB counts for Linears of this size
    assert {linear["scheme"] for layer in bits["double"]["layers"] for linear in layer["linears"]} == {"NF4_G64_DOUBLE"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_source", [False, True])
def test_doctor_finds_no_problem(outputs: dict[str, Path], tiny: Path, name: str, with_source: bool) -> None:
    diagnosis = examine(outputs[name], tiny if with_source else None)
    assert diagnosis.codes() == set(), [str(finding) for finding in diagnosis.findings]


def test_two_runs_give_the_same_bytes(outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    quant(tiny, tmp_path / "repeated", "--quant_type", "bnb").done()
    assert files(tmp_path / "repeated") == files(outputs["plain"])


def test_eval_export_inspect_and_generate_accept_it(outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    words = ("eval", "--float", tiny, "--quant", outputs["double"], "--dataset", index, "--device", "cpu", "--json")
    figures = command(*words).done().json
    assert 0 < figures["overall"]["kl_mean"]["value"] < 1
    command("export", outputs["double"], "--save_path", tmp_path / "copy", "--save_format", "bitsandbytes").done()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == weights_file(outputs["double"]).read_bytes()
    layers = command("inspect", outputs["plain"], "--json").done().json["parts"][0]
    assert "bitsandbytes" in layers["scheme"]
    answer = command("generate", outputs["plain"], "--text", "Hello", "--max_new_tokens", 2, "--device", "cpu").done()
    assert answer.out.strip()


@pytest.mark.full
def test_awq_before_nf4(tiny: Path, tmp_path: Path) -> None:
    """With scales searched on a few samples, the output error is never larger than with nf4 only."""
    index = write_index(tmp_path / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    recipe = "qwen2_5_omni_nf4_awq"
    quant(tiny, tmp_path / "out", "--config_path", recipe, "--dataset", index).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    gains = [record["gain"] for layer in report["layers"] for record in layer["smoothing"]]
    assert len(gains) == 16 and max(gains) <= 1.0 and min(gains) < 1.0
    assert examine(tmp_path / "out", tiny).codes() == set()


# --- errors --------------------------------------------------------------------------------------------------


def test_error_without_bitsandbytes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = quant(tiny, tmp_path / "out", "--quant_type", "nf4").fault()
    assert "nf4 needs bitsandbytes" in message and "pip install 'msmodelslim_omni[bnb]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("qconfig", "message"),
    [
        ("{weight: {scope: per_channel, dtype: nf4}}", "nf4 requires scope per_group"),
        ("{weight: {scope: per_group, dtype: nf4, method: gptq}}", "nf4 requires method minmax"),
        ("{weight: {scope: per_group, dtype: nf4, symmetric: False}}", "symmetric: true"),
        ("{weight: {scope: per_group, dtype: int4, ext: {double_quant: True}}}", "double_quant requires dtype nf4"),
        ("{act: {}, weight: {scope: per_group, dtype: nf4}}", "nf4 weights require float activations"),
    ],
)
def test_invalid_recipes(tmp_path: Path, qconfig: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        load_recipe(write_recipe(tmp_path, "invalid", qconfig, "-"))


@pytest.mark.parametrize("saver", ["awq", "compressed_tensors", "ascendv1_saver"])
def test_formats_without_nf4_are_refused(tiny: Path, tmp_path: Path, saver: str) -> None:
    message = quant(tiny, tmp_path / "out", "--quant_type", "nf4", "--save_format", saver).fault()
    assert f"{saver} " in message and "NF4_G64" in message and not (tmp_path / "out").exists()


def test_int8_recipe_is_refused_by_bitsandbytes(tiny: Path, tmp_path: Path) -> None:
    message = quant(tiny, tmp_path / "out", "--quant_type", "w8a8", "--save_format", "bitsandbytes").fault()
    assert "bitsandbytes supports nf4, not W8A8_DYNAMIC" in message


def state_tensor(text: str) -> torch.Tensor:
    """A quantization state, stored as JSON in uint8."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = f"{Q_PROJ}.{nf4_format.NF4_STATE}"
VALID = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [256, 256]}'


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (without(STATE), "linear_incomplete"),
        (without(f"{Q_PROJ}.weight.absmax"), "linear_incomplete"),
        (without(f"{Q_PROJ}.weight"), "linear_incomplete"),
        (replaced(STATE, state_tensor("{")), "nf4_state_wrong"),
        (replaced(STATE, state_tensor("[]")), "nf4_state_wrong"),
        (replaced(STATE, state_tensor(VALID.replace("nf4", "fp4"))), "nf4_state_wrong"),
        (replaced(STATE, state_tensor(VALID.replace("64", "63"))), "nf4_state_wrong"),
        (replaced(STATE, state_tensor(VALID.replace("256, 256", "64, 256"))), "nf4_state_wrong"),
        (replaced(STATE, torch.zeros(1 << 13, dtype=torch.uint8)), "nf4_state_wrong"),
        (replaced(f"{Q_PROJ}.weight.quant_map", torch.linspace(-1, 1, 16)), "nf4_state_wrong"),
        (replaced(f"{Q_PROJ}.weight.absmax", torch.full((3,), 1.0)), "nf4_state_wrong"),
    ],
)
def test_damage_is_detected(
    outputs: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], code: str
) -> None:
    damaged = edited(outputs["plain"], tmp_path / "damaged", change)
    assert code in examine(damaged).codes()
    assert Q_PROJ in command("export", damaged, "--save_path", tmp_path / "x", "--save_format", "bitsandbytes").fault()


def test_valid_state_is_accepted(outputs: dict[str, Path], tmp_path: Path) -> None:
    assert examine(edited(outputs["plain"], tmp_path / "same", replaced(STATE, state_tensor(VALID)))).codes() == set()


def test_nan_scales_are_detected(outputs: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.weight.absmax"][5] = torch.nan

    damaged = edited(outputs["plain"], tmp_path / "damaged", change)
    assert examine(damaged).codes() == {"scale_nan", "float_not_finite"}


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("bnb_4bit_use_double_quant", True, "nested_wrong"),
        ("bnb_4bit_quant_type", "fp4", "quantization_field"),
        ("load_in_4bit", False, "quantization_field"),
        ("llm_int8_skip_modules", ["visual"], "loader_expects_quantized"),
        ("llm_int8_skip_modules", ["q_proj"], "loader_expects_float"),
    ],
)
def test_config_that_contradicts_the_weights(
    outputs: dict[str, Path], tmp_path: Path, key: str, value: Any, code: str
) -> None:
    damaged = Path(shutil.copytree(outputs["plain"], tmp_path / "damaged"))

    def change(config: dict[str, Any]) -> None:
        for block in (config, config["thinker_config"]):
            block["quantization_config"][key] = value

    edit_config(damaged, change)
    assert code in examine(damaged).codes()


def test_error_on_a_quantized_source_names_its_scheme(outputs: dict[str, Path], tmp_path: Path) -> None:
    message = quant(outputs["plain"], tmp_path / "out", "--quant_type", "nf4").fault()
    assert "is already quantized (bitsandbytes nf4)" in message
