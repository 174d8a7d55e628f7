"""Reading quantized checkpoints: every format, variants from other tools, and missing or wrong tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dequantizers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outputs import (
    FLOAT_LINEAR,
    LINEARS,
    all_tensors,
    edit_config,
    edited,
    quantize_all,
    replaced,
    weights_file,
    without,
)

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import awq, compressed_tensors, nibbles
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.quantized.reader import open_quantized, read_quantized, without_quantization
from msmodelslim_omni.storage.safetensors_io import read_header, write_tensors

LAYER = "thinker.model.layers.2"
NAME = f"{LAYER}.self_attn.k_proj"
SAVERS = {
    "ascend": "ascendv1_saver",
    "int8": "compressed_tensors",
    "awq": "awq",
    "packed": "compressed_tensors",
    "symmetric": "compressed_tensors",
}
SCHEMES = {"ascend": "W8A8_DYNAMIC", "int8": "W8A8_DYNAMIC", "awq": "W4A16_G64", "packed": "W4A16_G64"}


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantize_all(tiny, tmp_path_factory.getbasetemp() / "outputs")


# --- unpacking nibbles ---------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**32))
def test_unpacking_undoes_packing(words: int, columns: int, transposed: bool, seed: int) -> None:
    q = torch.randint(-8, 8, (8 * words, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    q = q.t().contiguous().t() if transposed else q
    for back in (
        nibbles.unpack_gemm(nibbles.pack_gemm(q)),
        nibbles.unpack_plain(nibbles.pack_plain(q, axis=0), axis=0, size=8 * words),
        nibbles.unpack_plain(nibbles.pack_plain(q, axis=1), axis=1, size=columns),
    ):
        assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, q)


def test_unpacking_by_hand() -> None:
    """The words in the docstring of nibbles.py; the second is cut after three nibbles."""
    rising = torch.arange(-8, 0, dtype=torch.int8)
    assert torch.equal(nibbles.unpack_gemm(torch.tensor([[0x75316420]], dtype=torch.int32)), rising.unsqueeze(1))
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert torch.equal(nibbles.unpack_plain(word, axis=1, size=3), rising[:3].unsqueeze(0))
    assert nibbles.unpack_plain(torch.tensor([[-1]], dtype=torch.int32), axis=0, size=8).flatten().tolist() == [7] * 8


def test_unpacking_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randint(-8, 8, (24, 50), dtype=torch.int8)
    packed = nibbles.pack_gemm(q)
    monkeypatch.setattr(nibbles, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(nibbles.unpack_gemm(packed), q)


# --- our own outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVERS)
def test_contents_of_an_output(outputs: dict[str, Path], kind: str, tiny: Path) -> None:
    checkpoint = open_quantized(outputs[kind])
    assert (
        checkpoint.saver == SAVERS[kind]
        and checkpoint.model.model_type == "Qwen2.5-Omni-7B"
        and checkpoint.faults == ()
    )
    assert len(checkpoint.linears) == LINEARS and FLOAT_LINEAR not in checkpoint.linears
    assert {scheme.name for scheme in checkpoint.schemes} == {SCHEMES.get(kind, "W4A16_G64_SYM")}
    linear = checkpoint.linears[NAME].linear
    assert (linear.name, linear.shape, linear.float_dtype) == (NAME, (128, 256), "BF16")
    loaded = checkpoint.load_linear(NAME)
    assert (loaded.qweight.dtype, loaded.scales.dtype) == (torch.int8, torch.float32)
    assert (loaded.zeros is None) == (kind in ("ascend", "int8", "symmetric"))
    parts = {part.name for stored in checkpoint.linears.values() for part in stored.parts.values()}
    assert parts.isdisjoint(checkpoint.floats) and parts | set(checkpoint.floats) == set(all_tensors(outputs[kind]))
    source = {n: i.shape for file in tiny.glob("*.safetensors") for n, i in read_header(file).items()}
    assert set(source) == {*checkpoint.floats, *(f"{name}.weight" for name in checkpoint.linears)}
    assert torch.equal(
        checkpoint.load_float(f"{LAYER}.input_layernorm.weight"),
        all_tensors(outputs[kind])[f"{LAYER}.input_layernorm.weight"],
    )


def test_formats_hold_equal_weights(outputs: dict[str, Path]) -> None:
    ascend, int8, gemm, packed = (open_quantized(outputs[kind]) for kind in ("ascend", "int8", "awq", "packed"))
    for name in gemm.linears:
        assert torch.equal(ascend.load_linear(name).qweight, int8.load_linear(name).qweight)
        assert torch.equal(dequantize(gemm.load_linear(name)), dequantize(packed.load_linear(name)))
    assert list(gemm.linears) == list(packed.linears)


@pytest.mark.parametrize("kind", ["awq", "packed", "symmetric"])
def test_weights_agree_with_an_independent_reader(outputs: dict[str, Path], kind: str) -> None:
    tensors = {n.rpartition(".")[2]: t for n, t in all_tensors(outputs[kind]).items() if n.startswith(f"{NAME}.")}
    arrays: dict[str, Any] = {n: (t.float() if t.is_floating_point() else t).numpy() for n, t in tensors.items()}
    if kind == "awq":
        weight = dequantizers.dequantize_gemm(arrays["qweight"], arrays["qzeros"], arrays["scales"])
    else:
        weight = dequantizers.dequantize_packed(
            arrays["weight_packed"], arrays["weight_scale"], arrays["weight_shape"], arrays.get("weight_zero_point")
        )
    loaded = open_quantized(outputs[kind]).load_linear(NAME)
    assert torch.equal(dequantize(loaded), torch.from_numpy(weight))


def test_only_headers_are_read(outputs: dict[str, Path], tmp_path: Path) -> None:
    """A sparse file with the original header and holes in place of data can be opened."""
    target = Path(shutil.copytree(outputs["awq"], tmp_path / "sparse"))
    file = weights_file(target)
    size, head = file.stat().st_size, file.read_bytes()[: 1 << 20]
    length = 8 + int.from_bytes(head[:8], "little")
    with file.open("wb") as stream:
        stream.write(head[:length])
        stream.truncate(size)
    assert len(open_quantized(target).linears) == LINEARS


# --- incomplete or damaged checkpoints -----------------------------------------------------------------------

PARTS = [
    ("ascend", "weight"),
    ("ascend", "weight_scale"),
    ("ascend", "weight_offset"),
    ("int8", "weight"),
    ("int8", "weight_scale"),
    ("awq", "qweight"),
    ("awq", "qzeros"),
    ("awq", "scales"),
    ("packed", "weight_packed"),
    ("packed", "weight_scale"),
    ("packed", "weight_shape"),
    ("packed", "weight_zero_point"),
    ("symmetric", "weight_scale"),
]


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_missing_parts_are_named(outputs: dict[str, Path], tmp_path: Path, kind: str, part: str) -> None:
    broken = edited(outputs[kind], tmp_path / "broken", without(f"{NAME}.{part}"))
    with pytest.raises(QuantError, match=f"{NAME}: {part} is missing"):
        open_quantized(broken)
    checkpoint = read_quantized(broken)
    assert [(fault.linear, fault.message) for fault in checkpoint.faults] == [(NAME, f"{part} is missing")]
    assert len(checkpoint.linears) == LINEARS - 1


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_wrong_shapes_and_dtypes_are_named(outputs: dict[str, Path], tmp_path: Path, kind: str, part: str) -> None:
    old = all_tensors(outputs[kind])[f"{NAME}.{part}"]
    longer = torch.cat([old, old])
    for number, value in enumerate((longer, old.to(torch.float64 if old.dtype.itemsize < 4 else torch.int16))):
        broken = edited(outputs[kind], tmp_path / str(number), replaced(f"{NAME}.{part}", value))
        if number == 1 and value.is_floating_point() and old.is_floating_point():
            continue  # another float dtype is valid
        faults = read_quantized(broken).faults
        assert {fault.linear for fault in faults} == {NAME}, faults


@pytest.mark.parametrize("removed", [f"{LAYER}.input_layernorm.weight", f"{NAME}.bias", f"{FLOAT_LINEAR}.weight"])
def test_missing_floats_of_layers_are_named(outputs: dict[str, Path], tmp_path: Path, removed: str) -> None:
    broken = edited(outputs["awq"], tmp_path / "broken", without(removed))
    owner, _, ending = removed.rpartition(".")
    with pytest.raises(QuantError, match=f"{owner}: {ending} is missing"):
        open_quantized(broken)


def test_a_linear_without_any_part_is_named(outputs: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{NAME}.{part}"]

    with pytest.raises(QuantError, match=f"{NAME}: weight is missing"):
        open_quantized(edited(outputs["awq"], tmp_path / "broken", change))


def test_a_long_list_of_faults_is_cut(outputs: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            del tensors[name]

    broken = edited(outputs["packed"], tmp_path / "broken", change)
    with pytest.raises(QuantError, match=f"and {LINEARS - 5} more"):
        open_quantized(broken)


def test_folders_that_are_not_checkpoints_are_refused(tmp_path: Path, tiny: Path, outputs: dict[str, Path]) -> None:
    with pytest.raises(QuantError, match="does not exist"):
        open_quantized(tmp_path / "nothing")
    with pytest.raises(QuantError, match=r"has no config\.json"):
        open_quantized(tmp_path)
    with pytest.raises(QuantError, match="is a float checkpoint"):
        open_quantized(tiny)
    (tmp_path / "config.json").write_bytes((outputs["awq"] / "config.json").read_bytes())
    with pytest.raises(QuantError, match="holds no weights"):
        open_quantized(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights_file(outputs["awq"]).read_bytes()[:-1])
    with pytest.raises(QuantError, match="not a valid safetensors file"):
        open_quantized(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}', encoding="utf-8")
    with pytest.raises(QuantError, match="'llama'"):
        open_quantized(tmp_path)


def test_shards_by_their_index(outputs: dict[str, Path], tmp_path: Path) -> None:
    """quant_model_weights with an index; then one shard is missing, then the index is empty."""
    target = Path(shutil.copytree(outputs["ascend"], tmp_path / "sharded"))
    tensors = all_tensors(target)
    weights_file(target).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"quant_model_weights-{number:05d}-of-00002.safetensors"
        write_tensors(target / file, {name: tensors[name] for name in half})
        weight_map |= dict.fromkeys(half, file)
    index = target / "quant_model_weights.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    assert len(open_quantized(target).linears) == LINEARS
    (target / "quant_model_weights-00002-of-00002.safetensors").unlink()
    with pytest.raises(QuantError, match=r"00002-of-00002\.safetensors' is missing"):
        open_quantized(target)
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(QuantError, match="no weight_map"):
        open_quantized(target)


# --- files from other tools, and unsupported settings --------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def setting(**values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"].update(values)

    return change


def weights_argument(**values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)

    return change


def duplicate_group(config: dict[str, Any]) -> None:
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("awq", setting(quant_method="gptq"), "quantized as 'gptq'"),
        ("awq", setting(bits=8), "bits 8"),
        ("awq", setting(version="gemv"), "version 'gemv'"),
        ("awq", setting(zero_point=False), "zero_point False"),
        ("awq", setting(group_size="128"), "group_size is '128'"),
        ("awq", setting(group_size=0), "group_size is 0"),
        ("awq", setting(group_size=96), "group_size 96 does not divide"),
        ("awq", setting(group_size=128), "qzeros has shape"),
        ("packed", setting(format="marlin-24"), "marlin-24"),
        ("packed", setting(config_groups=None), "contains no group"),
        ("packed", duplicate_group, "two groups with the same bits"),
        ("packed", weights_argument(num_bits=3), "pack-quantized 3"),
        ("packed", weights_argument(group_size=128), "weight_packed has shape"),
        ("packed", weights_argument(group_size=None), "is not supported"),
        ("int8", weights_argument(strategy="tensor"), "tensor"),
        ("int8", weights_argument(symmetric=False), "asymmetric is not supported"),
    ],
)  # fmt: skip
def test_unsupported_settings_are_refused(
    outputs: dict[str, Path], tmp_path: Path, kind: str, change: Change, message: str
) -> None:
    target = Path(shutil.copytree(outputs[kind], tmp_path / "other"))
    edit_config(target, change)
    with pytest.raises(QuantError, match=message):
        open_quantized(target)


def test_unsupported_descriptions_are_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    target = Path(shutil.copytree(outputs["ascend"], tmp_path / "other"))
    file = target / "quant_model_description.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**description, f"{NAME}.weight": "W4A4_DYNAMIC"}), encoding="utf-8")
    with pytest.raises(QuantError, match="W4A4_DYNAMIC; supported are W4A8_DYNAMIC, W8A8_DYNAMIC, W8A16"):
        open_quantized(target)
    file.write_text(json.dumps({n: k for n, k in description.items() if not n.startswith(NAME)}), encoding="utf-8")
    with pytest.raises(QuantError, match=f"{NAME}: the description lists no kind for its weight"):
        open_quantized(target)


def test_awq_from_another_tool(outputs: dict[str, Path], tmp_path: Path) -> None:
    """AutoAWQ's key names, at the top level of the config only; all tensors in float16."""

    def change(config: dict[str, Any]) -> None:
        del config["thinker_config"]["quantization_config"]
        config["quantization_config"] = {
            "quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM",
        }  # fmt: skip

    def to_float16(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: t.to(torch.float16) for name, t in tensors.items() if t.dtype == torch.bfloat16})

    target = edited(outputs["awq"], tmp_path / "other", to_float16)
    edit_config(target, change)
    foreign, original = open_quantized(target), open_quantized(outputs["awq"])
    assert foreign.linears[NAME].linear.float_dtype == "F16"
    assert torch.equal(dequantize(foreign.load_linear(NAME)), dequantize(original.load_linear(NAME)))


def test_awq_with_one_group_per_row() -> None:
    assert (
        awq._layout_fault(_infos(qweight=("I32", (64, 2)), qzeros=("I32", (1, 2)), scales=("F16", (1, 16))), -1) == ""
    )


def test_packed_per_channel_and_weight_only_int8() -> None:
    channel = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"weights": channel, "input_activations": None}
    layout, scheme = compressed_tensors._stored_scheme(group, "pack-quantized")
    assert (scheme.weight_bits, scheme.act_bits, scheme.group_size) == (4, None, None)
    parts = _infos(weight_packed=("I32", (16, 8)), weight_scale=("BF16", (16, 1)), weight_shape=("I64", (2,)))
    assert layout.fault(parts, scheme) == ""
    assert layout.stored_linear("x", parts, scheme, "BF16").shape == (16, 64)
    channel["num_bits"] = 8
    _, scheme = compressed_tensors._stored_scheme(group, "int-quantized")
    assert (scheme.weight_bits, scheme.act_bits) == (8, None)


def test_an_activation_order_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    order = replaced(f"{NAME}.weight_g_idx", torch.zeros(256, dtype=torch.int32))
    with pytest.raises(QuantError, match=f"{NAME}: weight_g_idx is present"):
        open_quantized(edited(outputs["packed"], tmp_path / "other", order))


def _infos(**parts: tuple[str, tuple[int, ...]]) -> Any:
    from msmodelslim_omni.storage.safetensors_io import TensorInfo

    return {ending: TensorInfo(f"x.{ending}", dtype, shape, Path("x"), 0) for ending, (dtype, shape) in parts.items()}


def test_config_without_quantization() -> None:
    config = {"a": 1, "quantization_config": {}, "b": {"c": 2, "quantization_config": {}, "d": [1]}}
    assert without_quantization(config) == {"a": 1, "b": {"c": 2, "d": [1]}}
    assert "quantization_config" in config
