"""The 4-bit layouts: exact bytes, comparison with each other, and an independent reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dequantizers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_formats import float_tensor, golden, read_json, write

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats import FORMATS, nibbles
from msmodelslim_omni.formats.job import OutLinear, OutputJob
from msmodelslim_omni.formats.shards import format_tensors
from msmodelslim_omni.numerics.arithmetic import QuantizedLinear, dequantize, quantize_weight
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.run.pipeline import quantize
from msmodelslim_omni.storage.checkpoint import open_checkpoint
from msmodelslim_omni.storage.safetensors_io import DTYPE_NAMES, load_tensor, read_header

Tensors = dict[str, torch.Tensor]

ASYM, SYM = QuantScheme(4, None, group_size=128, symmetric=False), QuantScheme(4, None, group_size=128)
W8A8 = QuantScheme(8, 8)
NAME = "thinker.model.layers.0.self_attn.k_proj"
OUT, IN, GROUPS = 8, 256, 2
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# --- a Linear with known values ------------------------------------------------------------------------------


def code(o: int, i: int) -> int:
    """A code in 0..15. Eight neighbours differ along both axes, and the axes differ from each other."""
    return (3 * o + 5 * i + 1) % 16


def zero_code(o: int, group: int) -> int:
    return (5 * o + 9 * group + 2) % 16


def scale(o: int, group: int) -> float:
    return 2.0**-o * (1 + group / 4)


def table(entry: Callable[[int, int], float], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[entry(row, column) for column in range(columns)] for row in range(rows)], dtype=dtype)


def known_linear(scheme: QuantScheme) -> QuantizedLinear:
    groups = IN // (scheme.group_size or IN)
    qweight = table(lambda o, i: code(o, i) - 8, OUT, IN, torch.int8)
    zeros = None if scheme.symmetric else table(lambda o, g: zero_code(o, g) - 8, OUT, groups, torch.int8)
    return QuantizedLinear(qweight, table(scale, OUT, groups, torch.float32), scheme, zeros)


def word(codes: Sequence[int]) -> int:
    """Pack eight codes into a signed int32, the first in the lowest nibble."""
    unsigned = sum(c << (4 * i) for i, c in enumerate(codes))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def out_linear(linear: QuantizedLinear, float_dtype: str = "BF16", name: str = NAME) -> OutLinear:
    rows, columns = linear.qweight.shape
    zeros = linear.zeros
    return OutLinear(
        name, linear.scheme, (rows, columns), float_dtype, lambda: linear.qweight, lambda: linear.scales,
        None if zeros is None else lambda: zeros,
    )  # fmt: skip


BIAS = torch.tensor([1.5, -2.0, 0.1, 65280.0, 0.0, 3.0, 4.0, 5.0], dtype=torch.bfloat16)
NORM = torch.tensor([1.0, 1e30], dtype=torch.bfloat16)


def output_job(tmp_path: Path, scheme: QuantScheme) -> OutputJob:
    return OutputJob(
        items=(
            out_linear(known_linear(scheme)),
            float_tensor(f"{NAME}.bias", BIAS),
            float_tensor("thinker.model.norm.weight", NORM),
        ),
        float_linears=("thinker.model.layers.1.mlp.down_proj",),
        ignore_patterns=("re:.*visual.*", "re:.*lm_head", "re:talker.*"),
        config_paths=((), ("thinker_config",)),
        config={"model_type": "x", "thinker_config": {"a": 1}},
        source=tmp_path,
        other_files=(),
    )


def test_packed_words() -> None:
    """The codes of outputs 0..7 of input 0: 1 4 7 10 13 0 3 6; of inputs 0..7 of output 0: 1 6 11 0 5 10 15 4."""
    linear = known_linear(ASYM)
    assert linear.zeros is not None
    gemm, gemm_zeros = nibbles.pack_gemm(linear.qweight), nibbles.pack_gemm(linear.zeros)
    assert gemm[0].tolist() == [0x60A43D71]
    assert gemm[1].tolist() == [0xB5F982C6 - 2**32]
    assert gemm_zeros.tolist() == [[0x5B1706C2], [0xE4A09F5B - 2**32]]
    plain, plain_zeros = nibbles.pack_plain(linear.qweight, axis=1), nibbles.pack_plain(linear.zeros, axis=0)
    assert plain[:2, 0].tolist() == [0x4FA50B61, 0x72D83E94]
    assert plain_zeros.tolist() == [[0x50B61C72, 0xE94FA50B - 2**32]]


def test_packed_words_of_the_module_docstring() -> None:
    q = torch.arange(-8, 0, dtype=torch.int8).unsqueeze(1)  # [8, 1]
    assert nibbles.pack_plain(q, axis=0).item() == 0x76543210 == 1985229328
    assert nibbles.pack_gemm(q).item() == 0x75316420 == 1966171168
    assert nibbles.pack_gemm(torch.full_like(q, 7)).item() == -1


def words(rows: Sequence[Sequence[int]]) -> bytes:
    return np.array(rows, "<i4").tobytes()


def test_awq_file_bytes(tmp_path: Path) -> None:
    write(output_job(tmp_path, ASYM), "awq", tmp_path / "out")
    header = (
        '{"__metadata__":{"format":"pt"},'
        f'"{NAME}.qweight":{{"dtype":"I32","shape":[256,1],"data_offsets":[0,1024]}},'
        f'"{NAME}.qzeros":{{"dtype":"I32","shape":[2,1],"data_offsets":[1024,1032]}},'
        f'"{NAME}.bias":{{"dtype":"F16","shape":[8],"data_offsets":[1032,1048]}},'
        f'"{NAME}.scales":{{"dtype":"F16","shape":[2,8],"data_offsets":[1048,1080]}},'
        '"thinker.model.norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[1080,1084]}}'
    )
    data = words([[word([code(o, i) for o in GEMM_ORDER])] for i in range(IN)])
    data += words([[word([zero_code(o, g) for o in GEMM_ORDER])] for g in range(GROUPS)])
    bias = [1.5, -2.0, 0.10009765625, 65280.0, 0.0, 3.0, 4.0, 5.0]  # 0.1 rounded to bfloat16
    data += np.array(bias, "<f2").tobytes()
    data += np.array([[scale(o, g) for o in range(OUT)] for g in range(GROUPS)], "<f2").tobytes()
    data += b"\x80\x3f" + b"\x4a\x71"  # 1.0 and 1e30 (not in float16): the norm is not quantized and stays unchanged
    assert file_parts(tmp_path / "out" / "model.safetensors") == file_parts_of(golden(header, data))


@pytest.mark.parametrize("scheme", [SYM, ASYM])
def test_pack_quantized_file_bytes(tmp_path: Path, scheme: QuantScheme) -> None:
    write(output_job(tmp_path, scheme), "compressed_tensors", tmp_path / "out")
    entries = [
        (f"{NAME}.weight_shape", "I64", [2], np.array([OUT, IN], "<i8").tobytes()),
        (
            f"{NAME}.weight_packed",
            "I32",
            [8, 32],
            words([[word([code(o, i) for i in range(8 * c, 8 * c + 8)]) for c in range(IN // 8)] for o in range(OUT)]),
        ),
    ]
    if scheme is ASYM:
        zeros = words([[word([zero_code(o, g) for o in range(OUT)]) for g in range(GROUPS)]])
        entries.append((f"{NAME}.weight_zero_point", "I32", [1, 2], zeros))
    entries += [
        (f"{NAME}.bias", "BF16", [8], bfloat_bytes(BIAS.tolist())),
        (
            f"{NAME}.weight_scale",
            "BF16",
            [8, 2],
            bfloat_bytes([scale(o, g) for o in range(OUT) for g in range(GROUPS)]),
        ),
        ("thinker.model.norm.weight", "BF16", [2], b"\x80\x3f\x4a\x71"),
    ]
    header, data = '{"__metadata__":{"format":"pt"}', b""
    for name, dtype, shape, content in entries:
        sizes = ",".join(map(str, shape))
        span = f"[{len(data)},{len(data) + len(content)}]"
        header += f',"{name}":{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":{span}}}'
        data += content
    assert file_parts(tmp_path / "out" / "model.safetensors") == file_parts_of(golden(header + "}", data))


def bfloat_bytes(values: Sequence[float]) -> bytes:
    """The bytes of numbers that are exact in bfloat16: the upper half of the float32."""
    return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def file_parts(path: Path) -> tuple[str, bytes]:
    return file_parts_of(path.read_bytes())


def file_parts_of(content: bytes) -> tuple[str, bytes]:
    """Split into header and data, so that pytest shows a difference in the header as text."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length].decode(), content[8 + length :]


# --- written tensors, read by an independent reader ------------------------------------------------------------


def written_tensors(fmt: str, linear: OutLinear) -> dict[str, Any]:
    """The arrays by the end of their names, floats as float32. Checks that shapes and dtypes match the specs."""
    arrays = {}
    for tensor in FORMATS[fmt].linear_tensors(linear):
        data = tensor.load()
        assert isinstance(data, torch.Tensor) and data.is_contiguous()
        assert (DTYPE_NAMES[data.dtype], tuple(data.shape)) == (tensor.spec.dtype, tensor.spec.shape)
        assert tensor.kind == linear.scheme.name
        data = data.float() if data.is_floating_point() else data
        arrays[tensor.spec.name.removeprefix(f"{linear.name}.")] = data.numpy()
    return arrays


def random_linear(scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> QuantizedLinear:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03 + 0.004
    weight[1, : scheme.group_size] = 0.0
    return quantize_weight(weight.to(dtype), scheme)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 128])
def test_awq_tensors_give_the_dequantized_weight(dtype: torch.dtype, group_size: int) -> None:
    linear = random_linear(replace(ASYM, group_size=group_size), 24, 256, dtype)
    arrays = written_tensors("awq", out_linear(linear, DTYPE_NAMES[dtype]))
    weight = dequantizers.dequantize_gemm(arrays["qweight"], arrays["qzeros"], arrays["scales"])
    assert torch.equal(torch.from_numpy(weight), dequantize(linear))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [SYM, ASYM])
@pytest.mark.parametrize(("rows", "group_size"), [(24, 128), (10, 32)])  # 10: an incomplete word of zero points
def test_pack_quantized_tensors_give_the_dequantized_weight(
    dtype: torch.dtype, scheme: QuantScheme, rows: int, group_size: int
) -> None:
    linear = random_linear(replace(scheme, group_size=group_size), rows, 256, dtype)
    arrays = written_tensors("compressed_tensors", out_linear(linear, DTYPE_NAMES[dtype]))
    assert ("weight_zero_point" in arrays) == (not scheme.symmetric)
    weight = dequantizers.dequantize_packed(
        arrays["weight_packed"], arrays["weight_scale"], arrays["weight_shape"], arrays.get("weight_zero_point")
    )
    assert torch.equal(torch.from_numpy(weight), dequantize(linear))


def test_both_formats_store_the_same_integers_and_scales() -> None:
    linear = out_linear(random_linear(ASYM, 40, 384, torch.bfloat16))
    awq, packed = written_tensors("awq", linear), written_tensors("compressed_tensors", linear)
    q, z = dequantizers.gemm_codes(awq["qweight"]).T - 8, dequantizers.gemm_codes(awq["qzeros"]).T - 8
    assert np.array_equal(q, dequantizers.plain_codes(packed["weight_packed"], 384))
    assert np.array_equal(z.T, dequantizers.plain_codes(packed["weight_zero_point"].T.copy(), 40))
    assert np.array_equal(awq["scales"].T, packed["weight_scale"])
    assert len(np.unique(q)) == 16 and len(np.unique(z)) > 3  # enough values to detect a wrong order


@given(words=st.integers(1, 5), k=st.integers(1, 9), data=st.data())
def test_independent_reader_unpacks_gemm_order(words: int, k: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(-8, 7), min_size=8 * words * k, max_size=8 * words * k))
    q = torch.tensor(codes, dtype=torch.int8).reshape(8 * words, k)
    packed = nibbles.pack_gemm(q)
    assert packed.shape == (k, words)
    assert np.array_equal(dequantizers.gemm_codes(packed.numpy()).T - 8, q.numpy())


@given(rows=st.integers(1, 19), columns=st.integers(1, 19), axis=st.sampled_from([0, 1]), data=st.data())
def test_independent_reader_unpacks_plain_order(rows: int, columns: int, axis: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(-8, 7), min_size=rows * columns, max_size=rows * columns))
    q = torch.tensor(codes, dtype=torch.int8).reshape(rows, columns)
    packed = nibbles.pack_plain(q, axis)
    assert packed.is_contiguous()
    if axis == 1:
        assert np.array_equal(dequantizers.plain_codes(packed.numpy(), columns), q.numpy())
    else:
        assert np.array_equal(dequantizers.plain_codes(packed.numpy().T.copy(), rows).T, q.numpy())


def test_packing_in_blocks_gives_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randint(-8, 8, (40, 50), generator=torch.Generator().manual_seed(0)).to(torch.int8)

    def packed() -> list[torch.Tensor]:
        return [nibbles.pack_gemm(q), nibbles.pack_plain(q, 0), nibbles.pack_plain(q, 1)]

    at_once = packed()
    monkeypatch.setattr(nibbles, "_BLOCK_ELEMENTS", 300)
    assert all(torch.equal(a, b) for a, b in zip(at_once, packed(), strict=True))


def test_linear_tensors_loads_nothing() -> None:
    def unread() -> torch.Tensor:
        raise AssertionError("read too early")

    linear = OutLinear(NAME, ASYM, (OUT, IN), "BF16", unread, unread, unread)
    for fmt in ("awq", "compressed_tensors"):
        assert FORMATS[fmt].linear_tensors(linear)


# --- configs and refusals --------------------------------------------------------------------------------------


def test_awq_config_is_in_both_places(tmp_path: Path) -> None:
    job = output_job(tmp_path, ASYM)
    write(job, "awq", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    expected = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [
            "visual", "lm_head", "talker", ".*visual", ".*lm_head", ".*talker", "mlp.down_proj",
        ],
    }  # fmt: skip
    assert config.pop("quantization_config") == expected
    assert config["thinker_config"].pop("quantization_config") == expected
    assert config == job.config and "quantization_config" not in job.config


@pytest.mark.parametrize("scheme", [SYM, replace(ASYM, group_size=32)])
def test_pack_quantized_config(tmp_path: Path, scheme: QuantScheme) -> None:
    write(output_job(tmp_path, scheme), "compressed_tensors", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    expected = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": scheme.symmetric, "strategy": "group",
                    "group_size": scheme.group_size, "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["re:.*visual.*", "re:.*lm_head", "re:talker.*", r"re:.*\.layers\.1\.mlp\.down_proj$"],
        "kv_cache_scheme": None,
    }  # fmt: skip
    assert config["quantization_config"] == config["thinker_config"]["quantization_config"] == expected


@pytest.mark.parametrize(
    ("fmt", "schemes", "why"),
    [
        ("awq", {W8A8}, "not W8A8_DYNAMIC"),
        ("awq", {QuantScheme(4, None, symmetric=False)}, "not W4A16"),
        ("awq", {SYM}, "set symmetric: false"),
        ("awq", {ASYM, SYM}, "set symmetric: false"),
        ("awq", {ASYM, replace(ASYM, group_size=32)}, "one group size for all Linears, not W4A16_G128 and W4A16_G32"),
        ("awq", {ASYM, W8A8}, "not W8A8_DYNAMIC"),
        ("compressed_tensors", {QuantScheme(4, None)}, "not W4A16_SYM"),
        ("compressed_tensors", {QuantScheme(4, 8, group_size=128)}, "not W4A8_DYNAMIC"),
        ("compressed_tensors", {ASYM, SYM, W8A8}, "one int4 scheme, not W4A16_G128 and W4A16_G128_SYM"),
        ("ascendv1_saver", {ASYM}, "no Ascend runtime supports W4A16_G128 for dense Linears"),
        ("ascendv1_saver", {SYM, W8A8}, "no Ascend runtime supports W4A16_G128_SYM for dense Linears"),
    ],
)
def test_refusals(fmt: str, schemes: set[QuantScheme], why: str) -> None:
    assert why in FORMATS[fmt].refusal(frozenset(schemes))


@pytest.mark.parametrize("scheme", [ASYM, SYM])
def test_int8_and_one_int4_scheme_can_be_mixed(scheme: QuantScheme) -> None:
    assert FORMATS["compressed_tensors"].refusal(frozenset({scheme, W8A8})) == ""


@pytest.mark.parametrize(("fmt", "scheme"), [("awq", ASYM), ("compressed_tensors", ASYM), ("compressed_tensors", SYM)])
def test_schemes_that_differ_only_in_method_are_accepted(fmt: str, scheme: QuantScheme) -> None:
    schemes = {scheme, replace(scheme, weight_method="mse"), replace(scheme, weight_method="gptq")}
    assert FORMATS[fmt].refusal(frozenset(schemes)) == ""


def test_awq_refuses_outputs_that_are_not_a_multiple_of_8() -> None:
    linear = out_linear(random_linear(ASYM, 12, 256, torch.bfloat16))
    with pytest.raises(QuantError, match=rf"{NAME}: .* 12 is not a multiple\n  hint: exclude this Linear"):
        FORMATS["awq"].linear_tensors(linear)


@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_awq_refuses_a_bias_outside_the_float16_range(tmp_path: Path, value: float) -> None:
    job = output_job(tmp_path, ASYM)
    bias = torch.tensor([0.0] * 7 + [value])
    job = replace(job, items=(job.items[0], float_tensor(f"{NAME}.bias", bias, "F32")))
    with pytest.raises(
        QuantError, match=rf"{NAME}\.bias: .* exceeds the range of float16(.|\n)*save as compressed_tensors"
    ):
        write(job, "awq", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_biases_of_quantized_linears_become_float16(tmp_path: Path, dtype: torch.dtype) -> None:
    other, name = NAME.replace(".0.", ".1."), DTYPE_NAMES[dtype]
    bias = torch.tensor([0.5, -65280.0, 1e-3, 0, 0, 0, 0, 0]).to(dtype)
    job = output_job(tmp_path, ASYM)
    floats = (float_tensor(f"{NAME}.bias", bias, name), float_tensor(f"{other}.bias", bias, name))
    tensors = write(replace(job, items=(job.items[0], *floats)), "awq", tmp_path / "out")
    assert tensors[f"{NAME}.bias"].dtype == torch.float16
    assert torch.equal(tensors[f"{NAME}.bias"], bias.to(torch.float16))
    assert tensors[f"{other}.bias"].dtype == dtype and torch.equal(tensors[f"{other}.bias"], bias)


def test_awq_tensors_keep_the_source_order(tmp_path: Path) -> None:
    names = [tensor.spec.name for tensor in format_tensors(FORMATS["awq"], output_job(tmp_path, ASYM))]
    assert names == [
        f"{NAME}.qweight", f"{NAME}.qzeros", f"{NAME}.scales", f"{NAME}.bias", "thinker.model.norm.weight",
    ]  # fmt: skip


# --- a complete checkpoint -------------------------------------------------------------------------------------

RECIPE = """
apiversion: multimodal_vlm_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig: {weight: {scope: per_group, dtype: int4, symmetric: False}}
      exclude: ["*.layers.1.mlp.down_proj"]
  save: [{type: awq}, {type: compressed_tensors}]
"""


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Omni quantized data-free in both formats. down_proj of layer 1 stays float."""
    folder = tmp_path_factory.mktemp("formats_4bit")
    (folder / "recipe.yaml").write_text(RECIPE)
    quantize(tiny, folder / "out", device="cpu", config_path=str(folder / "recipe.yaml"))
    return folder / "out"


def checkpoint_tensors(folder: Path) -> Tensors:
    infos = [info for file in folder.glob("*.safetensors") for info in read_header(file).values()]
    return {info.name: load_tensor(info) for info in infos}


def arrays_of(tensors: Tensors, name: str, *parts: str) -> list[Any]:
    selected = [tensors[f"{name}.{part}"] for part in parts]
    return [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in selected]


def test_checkpoint_in_both_formats(tiny: Path, written: Path) -> None:
    source = open_checkpoint(tiny)
    awq, packed = (checkpoint_tensors(written / fmt) for fmt in ("awq", "compressed_tensors"))
    quantized = sorted(name.removesuffix(".qweight") for name in awq if name.endswith(".qweight"))
    assert len(quantized) == 27 and "thinker.model.layers.1.mlp.down_proj" not in quantized
    for name in quantized:
        weight = dequantizers.dequantize_gemm(*arrays_of(awq, name, "qweight", "qzeros", "scales"))
        parts = arrays_of(packed, name, "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        assert np.array_equal(weight, dequantizers.dequantize_packed(*parts))
        step = np.repeat(parts[1], 128, axis=1)
        # Half a step, or up to one step at the end of a range with a rounded zero point or scale.
        assert (np.abs(source.load(f"{name}.weight").float().numpy() - weight) <= step).all()
    weights = {f"{name}.weight" for name in quantized}
    for name in source.tensors.keys() - weights:
        before, is_bias = source.load(name), name.removesuffix(".bias") in quantized
        assert torch.equal(packed[name], before) and packed[name].dtype == before.dtype, name
        assert torch.equal(awq[name], before.half() if is_bias else before), name
        assert awq[name].dtype == (torch.float16 if is_bias else before.dtype), name
    assert not weights & (awq.keys() | packed.keys())
    settings = read_json(written / "awq" / "config.json")["quantization_config"]
    assert settings["modules_to_not_convert"][-1] == "layers.1.mlp.down_proj"
