"""Export to GGUF: blocks by hand, and files read again by gguf's own reader and by transformers' GGUF loader.

transformers knows neither qwen2vl nor qwen3vl. The decoder of qwen2vl has the tensors of qwen2, so its loader reads the
same file under that name; for text, M-RoPE is RoPE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command import command
from outputs import quantize_all, write_recipe

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.formats.gguf_blocks import block_loss, pack_blocks
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.quantized.gguf import export_gguf
from msmodelslim_omni.quantized.reader import QuantizedCheckpoint, open_quantized
from msmodelslim_omni.run.pipeline import quantize

gguf = pytest.importorskip("gguf")

ROLES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


# --- blocks --------------------------------------------------------------------------------------------------


def test_blocks_by_hand() -> None:
    """float16 1.0 is 00 3C, 0.5 is 00 38, -3.5 is 00 C3."""
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, [0, 1, 16, 31]] = torch.tensor([-8, 3, 7, -1], dtype=torch.int8)
    one = torch.ones(1, 1)
    assert pack_blocks("Q8_0", q, one, None)[0, :5].tolist() == [0x00, 0x3C, 0xF8, 0x03, 0x00]
    q4 = pack_blocks("Q4_0", q, one, None)[0].tolist()
    assert q4[:4] == [0x00, 0x3C, 0xF0, 0x8B] and q4[17] == 0x78 and len(q4) == 18
    zeros = torch.full((1, 1), -1, dtype=torch.int8)  # m = -(z + 8) s = -3.5
    q4 = pack_blocks("Q4_1", q, one / 2, zeros)[0].tolist()
    assert q4[:5] == [0x00, 0x38, 0x00, 0xC3, 0xF0] and len(q4) == 20


@pytest.mark.parametrize(("kind", "low", "high"), [("Q8_0", -127, 127), ("Q4_0", -8, 7), ("Q4_1", -8, 7)])
def test_blocks_agree_with_ggufs_own_dequantizer(kind: str, low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(low, high + 1, (4, 128), generator=generator, dtype=torch.int8)
    scales = (torch.rand(4, 2, generator=generator) + 0.01).to(torch.bfloat16).float()
    zeros = torch.randint(-8, 8, (4, 2), generator=generator, dtype=torch.int8) if kind == "Q4_1" else None
    read = gguf.dequantize(pack_blocks(kind, q, scales, zeros).numpy(), gguf.GGMLQuantizationType[kind])
    shifted = q.float().view(4, 2, 64) - (0 if zeros is None else zeros.float().unsqueeze(2))
    expected = (shifted * scales.unsqueeze(2)).flatten(1)
    error, signal = block_loss(kind, q, scales, zeros)
    assert error == pytest.approx(float((torch.from_numpy(read) - expected).square().sum()), rel=1e-3, abs=1e-9)
    assert (error / signal) ** 0.5 < 1e-3 and (error == 0) == (kind != "Q4_1")


# --- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantize_all(tiny, tmp_path_factory.mktemp("gguf") / "outputs")


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}


def values(tensor: Any) -> torch.Tensor:
    """The dequantized tensor, by gguf's own code."""
    return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type)))


def assert_same_weights(source: QuantizedCheckpoint, tensors: dict[str, Any], tolerance: float = 0.0) -> None:
    for index in range(4):
        for linear, own in ROLES.items():
            name = f"thinker.model.layers.{index}.{linear}"
            read = values(tensors[f"blk.{index}.{own}.weight"])
            if name in source.linears:
                torch.testing.assert_close(read, dequantize(source.load_linear(name)), rtol=0, atol=tolerance)
            else:
                assert torch.equal(read, source.load_float(f"{name}.weight").float())


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"), [("ascend", "Q8_0", 0.0), ("symmetric", "Q4_0", 0.0), ("awq", "Q4_1", 2e-4)]
)
def test_read_again(outputs: dict[str, Path], tmp_path: Path, name: str, kind: str, tolerance: float) -> None:
    result = export_gguf(outputs[name], tmp_path)
    source, tensors = open_quantized(outputs[name]), tensors_of(tmp_path / "model.gguf")
    assert_same_weights(source, tensors, tolerance)
    assert (result.lost == 0) == (kind != "Q4_1") and result.lost < 2e-4
    assert result.types == ("BF16", "F32", kind) and result.linears == 27
    assert result.left_out == ("visual tower", "audio tower", "talker", "token2wav")
    assert len(tensors) == 3 + 4 * 12 and tensors["blk.1.attn_k.bias"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "BF16"  # the Linear that the recipe leaves out
    embedding = source.load_float("thinker.model.embed_tokens.weight")
    assert torch.equal(values(tensors["token_embd.weight"]), embedding.float())


def test_metadata(outputs: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(outputs["int8"], tmp_path)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(str(tmp_path / "model.gguf")).fields.items()}
    text = json.loads((outputs["int8"] / "config.json").read_text(encoding="utf-8"))["thinker_config"]["text_config"]
    assert fields["general.architecture"] == "qwen2vl" and fields["general.file_type"] == 7
    assert fields["qwen2vl.block_count"] == 4 and fields["qwen2vl.embedding_length"] == text["hidden_size"]
    assert fields["qwen2vl.attention.head_count_kv"] == text["num_key_value_heads"]
    assert fields["qwen2vl.rope.dimension_sections"] == [*text["rope_scaling"]["mrope_section"], 0]
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "qwen2"
    assert len(fields["tokenizer.ggml.tokens"]) == text["vocab_size"]
    tokenizer = json.loads((outputs["int8"] / "tokenizer.json").read_text(encoding="utf-8"))
    special = tokenizer["added_tokens"][0]
    assert fields["tokenizer.ggml.tokens"][special["id"]] == special["content"]
    assert fields["tokenizer.ggml.token_type"][special["id"]] == 3


def test_transformers_reads_it(outputs: dict[str, Path], tmp_path: Path) -> None:
    """The loader's names, unpacking and metadata give the dequantized weights, and the same logits."""
    export_gguf(outputs["int8"], tmp_path, architecture="qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="model.gguf", torch_dtype=torch.float32
    )
    state, source = model.state_dict(), open_quantized(outputs["int8"])
    for name, stored in source.linears.items():
        expected = dequantize(source.load_linear(name))
        assert torch.equal(state[f"{name.removeprefix('thinker.')}.weight"], expected), stored
    for name in ("thinker.model.norm.weight", "thinker.lm_head.weight", "thinker.model.layers.2.self_attn.q_proj.bias"):
        assert torch.equal(state[name.removeprefix("thinker.")], source.load_float(name).float())
    assert model.config.num_key_value_heads == 2 and model.config.rms_norm_eps == pytest.approx(1e-6)


def test_qwen3_vl(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    quantize(tiny_qwen3_vl, tmp_path / "q", config_path="qwen3_vl_w8a16", device="cpu")
    result = export_gguf(tmp_path / "q", tmp_path / "gguf")
    reader = gguf.GGUFReader(str(tmp_path / "gguf" / "model.gguf"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3vl" and fields["qwen3vl.n_deepstack_layers"] > 0
    assert fields["qwen3vl.attention.key_length"] == tensors_of(Path(result.path))["blk.0.attn_q_norm.weight"].shape[0]
    source = open_quantized(tmp_path / "q")
    name = next(iter(source.linears))
    own = f"blk.{name.split('.layers.')[1].split('.')[0]}.{ROLES[name.split('.', 4)[4]]}.weight"
    assert torch.equal(values(tensors_of(Path(result.path))[own]), dequantize(source.load_linear(name)))


# --- faults --------------------------------------------------------------------------------------------------


def test_refusals(tiny: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    fp8 = write_recipe(tmp_path, "fp8", "{act: {dtype: fp8_e4m3}, weight: {dtype: fp8_e4m3}}", "x")
    quantize(tiny, tmp_path / "fp8", config_path=str(fp8), device="cpu")
    with pytest.raises(QuantError, match="gguf has no block for FP8_DYNAMIC"):
        export_gguf(tmp_path / "fp8", tmp_path / "no")
    export_gguf(outputs["int8"], tmp_path / "a")
    with pytest.raises(QuantError, match="exists"):
        export_gguf(outputs["int8"], tmp_path / "a")
    assert not (tmp_path / "no").exists()


def test_experts_are_refused(tmp_path: Path) -> None:
    from make_tiny_qwen3_omni import make_tiny_qwen3_omni

    model = make_tiny_qwen3_omni(tmp_path / "model")
    quantize(model, tmp_path / "q", config_path="qwen3_omni_w8a8_minmax", device="cpu")
    with pytest.raises(QuantError, match=r"has experts, which llama\.cpp stores as one tensor a layer"):
        export_gguf(tmp_path / "q", tmp_path / "no")


def test_command(outputs: dict[str, Path], tmp_path: Path) -> None:
    answer = command("export", outputs["int8"], tmp_path / "out", "--save_format", "gguf").done()
    assert "types: BF16, F32, Q8_0; lost: nothing" in answer.out and "left out: visual tower, audio tower" in answer.out
    again = command(
        "export", outputs["int8"], tmp_path / "out", "--save_format", "gguf", "--overwrite", "--json"
    ).done()
    assert again.json["linears"] == 27
