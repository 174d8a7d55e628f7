"""export: every pair of formats, refused conversions, the thinker only, and bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import StopAt, command
from command import files as all_files
from outputs import (
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
from msmodelslim_omni.formats import shards
from msmodelslim_omni.numerics.arithmetic import dequantize
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.inspect import inspect_checkpoint
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.report.report import read_report
from msmodelslim_omni.run import assembly

NAME = "thinker.model.layers.2.self_attn.k_proj"
SAVERS = {"ascend": "ascendv1_saver", "int8": "compressed_tensors", "awq": "awq", "packed": "compressed_tensors"}


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files except the report and the card, which names the commands that made the output."""
    return {name: content for name, content in all_files(folder).items() if name != "README.md"}


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantize_all(tiny, tmp_path_factory.getbasetemp() / "outputs")


# --- pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"), [("awq", "packed"), ("packed", "awq"), ("ascend", "int8"), ("int8", "ascend")]
)
def test_export_equals_a_direct_run(outputs: dict[str, Path], tmp_path: Path, source: str, target: str) -> None:
    done = export(outputs[source], tmp_path / "out", SAVERS[target])
    assert files(tmp_path / "out") == files(outputs[target])
    assert (done.source_format, done.save_format, done.linears) == (SAVERS[source], SAVERS[target], LINEARS)
    assert done.source_bytes == sum(t.nbytes for t in all_tensors(outputs[source]).values())
    assert done.output_bytes == sum(t.nbytes for t in all_tensors(outputs[target]).values())


@pytest.mark.parametrize("kind", ["ascend", "int8", "awq", "packed"])
def test_export_and_back_restores_the_files(outputs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    other = {"ascend": "int8", "int8": "ascend", "awq": "packed", "packed": "awq"}[kind]
    export(outputs[kind], tmp_path / "there", SAVERS[other])
    export(tmp_path / "there", tmp_path / "back", SAVERS[kind])
    if kind == "ascend":  # compressed_tensors rounds its scales
        exported, direct = open_quantized(tmp_path / "back"), open_quantized(outputs["int8"])
        assert torch.equal(dequantize(exported.load_linear(NAME)), dequantize(direct.load_linear(NAME)))
    else:
        assert files(tmp_path / "back") == files(outputs[kind])


@pytest.mark.parametrize("kind", ["ascend", "int8", "awq", "packed", "symmetric"])
def test_export_to_the_source_format_is_a_copy(outputs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    export(outputs[kind], tmp_path / "out", SAVERS.get(kind, "compressed_tensors"))
    assert files(tmp_path / "out") == files(outputs[kind])


def test_shards_equal_those_of_a_direct_run(
    outputs: dict[str, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GB is set to a megabyte."""
    monkeypatch.setattr(shards, "GB", 10**6)
    export(outputs["awq"], tmp_path / "shards", "compressed_tensors", part_file_size=1)
    export(tmp_path / "shards", tmp_path / "back", "awq", part_file_size=1)
    export(outputs["awq"], tmp_path / "same", "awq", part_file_size=1)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert files(tmp_path / "back") == files(tmp_path / "same")
    export(tmp_path / "shards", tmp_path / "one", "compressed_tensors", part_file_size=0)
    assert files(tmp_path / "one") == files(outputs["packed"])


def test_biases_return_to_bfloat16_only_if_exact(outputs: dict[str, Path], tmp_path: Path) -> None:
    """A float32 bias that bfloat16 cannot represent stays float32."""
    inexact = torch.full((128,), 1 + 2.0**-20)
    source = edited(outputs["ascend"], tmp_path / "source", replaced(f"{NAME}.bias", inexact))
    export(source, tmp_path / "out", "compressed_tensors")
    exported = all_tensors(tmp_path / "out")
    assert torch.equal(exported[f"{NAME}.bias"], inexact)
    assert exported[f"{NAME.replace('k_proj', 'q_proj')}.bias"].dtype == torch.bfloat16


def test_report_and_config(outputs: dict[str, Path], tmp_path: Path) -> None:
    export(outputs["awq"], tmp_path / "out", "compressed_tensors")
    report, direct = read_report(tmp_path / "out"), read_report(outputs["packed"])
    assert report.savers == {"compressed_tensors": str(tmp_path / "out")}
    assert report.output_bytes["compressed_tensors"] == direct.output_bytes["compressed_tensors"]
    assert report.layers == direct.layers and report.source_bytes == direct.source_bytes
    assert [part.bytes_before for part in report.parts] == [part.bytes_before for part in direct.parts]
    assert sum(part.bytes_after for part in report.parts) == report.output_bytes["compressed_tensors"]
    assert report.warnings[-1].startswith(f"exported from {outputs['awq']} (awq)")
    assert "exported from" in (tmp_path / "out" / "quant_report.md").read_text(encoding="utf-8")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    export(tmp_path / "out", tmp_path / "again", "awq")
    assert sum("exported from" in warning for warning in read_report(tmp_path / "again").warnings) == 1
    export(outputs["int8"], tmp_path / "ascend", "ascendv1_saver")
    assert "quantization_config" not in (tmp_path / "ascend" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_source_without_a_report(outputs: dict[str, Path], tmp_path: Path, content: str | None) -> None:
    source = Path(shutil.copytree(outputs["awq"], tmp_path / "source"))
    (source / "quant_report.json").unlink()
    if content is not None:
        (source / "quant_report.json").write_text(content, encoding="utf-8")
    export(source, tmp_path / "out", "compressed_tensors")
    report = read_report(tmp_path / "out")
    assert report.quant_type == "W4A16_G64" and "holds no report" in report.warnings[0]
    assert "# Quantization report" in (tmp_path / "out" / "quant_report.md").read_text(encoding="utf-8")
    export(source, tmp_path / "out", "awq", overwrite=True)
    assert open_quantized(tmp_path / "out").saver == "awq"


# --- the thinker only ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ascend", "int8", "awq", "packed"])
def test_thinker_only(outputs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    done = export(outputs[kind], tmp_path / "out", SAVERS[kind], thinker_only=True)
    before, after = all_tensors(outputs[kind]), all_tensors(tmp_path / "out")
    omitted = {name: tensor for name, tensor in before.items() if not name.startswith("thinker.")}
    assert done.left_out_bytes == sum(tensor.nbytes for tensor in omitted.values()) > 0
    assert after.keys() == before.keys() - omitted.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    old, new = (json.loads((f / "config.json").read_text()) for f in (outputs[kind], tmp_path / "out"))
    assert new == {**old, "enable_audio_output": False} and new["thinker_config"] and new["talker_config"]
    unchanged = {n for n, c in files(outputs[kind]).items() if files(tmp_path / "out").get(n) == c}
    assert unchanged >= {"spk_dict.pt", "tokenizer.json", "preprocessor_config.json", "chat_template.json"}
    parts = {part.name: part for part in read_report(tmp_path / "out").parts}
    assert (parts["talker"].scheme, parts["talker"].bytes_after) == ("left out", 0)
    assert {part.name for part in inspect_checkpoint(tmp_path / "out").parts}.isdisjoint({"talker", "token2wav"})
    if kind == "ascend":
        description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
        assert not [name for name in description if name.startswith(("talker", "token2wav"))]


# --- refused conversions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "save_format", "message"),
    [
        ("symmetric", "awq", "awq cannot hold .*: awq and its runtimes require a zero point for every group"),
        ("symmetric", "ascendv1_saver", "no Ascend runtime supports W4A16_G64_SYM"),
        ("awq", "ascendv1_saver", "no Ascend runtime supports W4A16_G64"),
        ("int8", "awq", "int4 weights per group with float activations, not W8A8_DYNAMIC"),
        ("awq", "gguf", "unknown save_format 'gguf'. Known: ascendv1_saver, compressed_tensors, awq"),
    ],
)
def test_formats_that_cannot_hold_the_source_are_refused(
    outputs: dict[str, Path], tmp_path: Path, kind: str, save_format: str, message: str
) -> None:
    with pytest.raises(QuantError, match=message):
        export(outputs[kind], tmp_path / "out", save_format)
    assert not (tmp_path / "out").exists()


def change_scale(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{NAME}.weight_scale"].float()
        scale[0, 0] = value
        tensors[f"{NAME}.weight_scale"] = scale

    return change


@pytest.mark.parametrize(
    ("value", "message"),
    [(1 + 2.0**-20, "not exact in float16"), (1e6, "not exact in float16"), (float("nan"), "NaN or Inf")],
)
def test_inexact_scales_are_refused(outputs: dict[str, Path], tmp_path: Path, value: float, message: str) -> None:
    source = edited(outputs["packed"], tmp_path / "source", change_scale(value))
    with pytest.raises(QuantError, match=f"{NAME}: its scales .*{message}"):
        export(source, tmp_path / "out", "awq")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_quantized_tower_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    tower = "thinker.visual.blocks.0.mlp.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{tower}.weight"] = torch.zeros(tensors[f"{tower}.weight"].shape, dtype=torch.int8)
        tensors[f"{tower}.weight_scale"] = torch.ones((len(tensors[f"{tower}.weight"]), 1))

    source = edited(outputs["int8"], tmp_path / "source", change)
    with pytest.raises(QuantError, match=f"{tower} is quantized"):
        export(source, tmp_path / "out", "compressed_tensors")


def test_a_negative_part_file_size_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="part_file_size is -1"):
        export(outputs["awq"], tmp_path / "out", "awq", part_file_size=-1)


def test_disk_space_is_checked_first(outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=10**6))
    with pytest.raises(QuantError, match=r"needs 12.* MiB, but only 976.* are free"):
        export(outputs["awq"], tmp_path / "out", "awq")


# --- bad input -----------------------------------------------------------------------------------------------


def test_unusable_sources_are_refused(outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    for source, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "is not a checkpoint"),
        (tiny, "is a float checkpoint"),
        (edited(outputs["awq"], tmp_path / "a", without(f"{NAME}.scales")), f"{NAME}: scales is missing"),
    ):
        with pytest.raises(QuantError, match=message):
            export(source, tmp_path / "out", "compressed_tensors")
    broken = Path(shutil.copytree(outputs["awq"], tmp_path / "b"))
    weights_file(broken).write_bytes(weights_file(broken).read_bytes()[:-100])
    with pytest.raises(QuantError, match="not a valid safetensors file"):
        export(broken, tmp_path / "out", "compressed_tensors")
    edit_config(broken, lambda config: config["quantization_config"].update(quant_method="fp8"))
    with pytest.raises(QuantError, match="quantized as 'fp8', an unsupported format"):
        export(broken, tmp_path / "out", "compressed_tensors")
    assert not (tmp_path / "out").exists()


def test_unusable_save_paths_are_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(outputs["awq"], tmp_path / "source"))
    for inside in (source, source / "out", tmp_path):
        with pytest.raises(QuantError, match="lie inside one another"):
            export(source, inside, "compressed_tensors")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(QuantError, match="is not empty"):
        export(source, foreign, "compressed_tensors")
    with pytest.raises(QuantError, match="not an output of this tool"):
        export(source, foreign, "compressed_tensors", overwrite=True)
    with pytest.raises(QuantError, match="is a file"):
        export(source, foreign / "letter.txt", "compressed_tensors")
    assert [entry.name for entry in foreign.iterdir()] == ["letter.txt"]


def test_overwrite_replaces_an_output(outputs: dict[str, Path], tmp_path: Path) -> None:
    export(outputs["ascend"], tmp_path / "out", "ascendv1_saver")
    with pytest.raises(QuantError, match="is not empty"):
        export(outputs["awq"], tmp_path / "out", "compressed_tensors")
    export(outputs["awq"], tmp_path / "out", "compressed_tensors", overwrite=True)
    assert files(tmp_path / "out") == files(outputs["packed"])


def test_a_stopped_export_resumes(outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "GB", 10**6)
    monkeypatch.setattr(assembly, "PIECE_BYTES", 10**6)
    out, written, write = tmp_path / "out", [0], os.pwrite

    def counting_pwrite(stream: int, chunk: memoryview, place: int) -> int:
        written[0] += len(chunk)
        return write(stream, chunk, place)

    monkeypatch.setattr(os, "pwrite", counting_pwrite)
    export(outputs["awq"], tmp_path / "unstopped", "compressed_tensors", part_file_size=3)
    total, written[0] = written[0], 0
    with pytest.raises(KeyboardInterrupt):
        export(
            outputs["awq"], out, "compressed_tensors", part_file_size=3, progress=StopAt("write compressed_tensors", 5)
        )
    assert [entry.name for entry in out.iterdir()] == [".msmodelslim_work"]
    assert 4 * 10**6 < written[0] < total - 4 * 10**6
    with pytest.raises(QuantError, match="save_format was compressed_tensors, is awq"):
        export(outputs["awq"], out, "awq", part_file_size=3)
    export(outputs["awq"], out, "compressed_tensors", part_file_size=3)
    assert written[0] == total
    assert files(out) == files(tmp_path / "unstopped")


# --- the command ---------------------------------------------------------------------------------------------


def test_command_prints_and_exports(outputs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        "export",
        outputs["awq"],
        "--save_path",
        tmp_path / "out",
        "--save-format",
        "compressed_tensors",
        "--json",
    ]
    summary = command(*arguments, "--thinker_only", "--part_file_size", 0).done().json
    formats = (summary["source_format"], summary["save_format"], summary["linears"])
    assert formats == ("awq", "compressed_tensors", LINEARS)
    assert summary["left_out_bytes"] > 0
    other = command(*arguments, "--part_file_size", 1)
    assert other.code == 1 and "part_file_size was 0, is 1; thinker_only was True, is False" in other.json["error"]
    same = command(*arguments, "--thinker_only", "--part_file_size", 0).done()
    assert "finished already" in same.err and same.json == summary
    table = command(*arguments[:-1], "--overwrite").done().out
    assert f"{LINEARS} quantized Linears" in table and "compressed_tensors" in table
    assert "zero point" in command(
        "export", outputs["symmetric"], "--save_path", tmp_path / "no", "--save_format", "awq"
    ).fault()  # fmt: skip
    assert command("export", outputs["awq"], "--save_path", tmp_path / "no").code == 2
