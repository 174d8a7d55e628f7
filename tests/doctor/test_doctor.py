"""doctor: no findings for good outputs of every format, the right finding for every damage, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import MINMAX, command, quant, write_index
from damage import DAMAGES, LAYER, Damage, change_json, change_tensors, omit_speech, split_shards
from safetensors.torch import load_file, save_file

from msmodelslim_omni.doctor import Diagnosis, examine
from msmodelslim_omni.doctor.codes import CODES
from msmodelslim_omni.doctor.comparison import group_slopes
from msmodelslim_omni.doctor.source import slope_faults
from msmodelslim_omni.errors import QuantError

CONFIGS = Path(__file__).parents[2] / "configs"
ASCEND, COMPRESSED = "ascendv1_saver", "compressed_tensors"

# Changes to the shipped recipes for `good_outputs`: no search for alpha, a coarse grid.
FIXED = (("alpha: auto ", "alpha: 0.5 "),)
COARSE = (("n_grid: 20", "n_grid: 4"),)
DATA_FREE = """
apiversion: multimodal_vlm_modelslim_v1
metadata: {config_id: CONFIG}
spec:
  process: [{type: linear_quant, qconfig: QCONFIG, include: ["*"], exclude: EXCLUDE}]
  save: [{type: SAVER, part_file_size: 4}]
"""
INT4 = "{weight: {scope: per_group, dtype: int4, symmetric: SYMMETRIC, method: minmax, ext: {group_size: 128}}}"
INT8 = "{act: {scope: per_token, dtype: int8}, weight: {scope: per_channel, dtype: int8}}"
FP8 = "{act: {dtype: fp8_e4m3}, weight: {dtype: fp8_e4m3}}"
FP8_BLOCK = "{act: {scope: per_group, dtype: fp8_e4m3}, weight: {scope: per_block, dtype: fp8_e4m3}}"
EXCLUDE = '["*layers.1.mlp.down_proj", "*layers.2.self_attn.{q,k,v}_proj"]'


def data_free_recipe(name: str, qconfig: str, exclude: str, saver: str = COMPRESSED) -> str:
    text = DATA_FREE.replace("CONFIG", name, 1).replace("QCONFIG", qconfig).replace("EXCLUDE", exclude)
    return text.replace("SAVER", saver)


SYMMETRIC = data_free_recipe("sym4", INT4.replace("SYMMETRIC", "True"), "[]")
BOTH = data_free_recipe("both", INT4.replace("SYMMETRIC", "True"), '["*layers.3.mlp.down_proj"]').replace(
    "process: [",
    f'process: [{{type: linear_quant, qconfig: {INT8}, include: ["*down_proj", "*layers.2.*"],'
    ' exclude: ["*layers.3.*"]}, ',
)
FP8_AND_INT4 = data_free_recipe(
    "fp8 and int4", INT4.replace("SYMMETRIC", "True"), '["*layers.3.mlp.down_proj"]'
).replace(
    "process: [",
    f'process: [{{type: linear_quant, qconfig: {FP8}, include: ["*down_proj"], exclude: ["*layers.3.*"]}}, ',
)
BLOCKS = data_free_recipe("fp8 blocks", FP8_BLOCK, EXCLUDE)
NVFP4 = data_free_recipe("nvfp4", "{weight: {scope: per_group, dtype: nvfp4}}", EXCLUDE)
NVFP4_ACT = data_free_recipe(
    "nvfp4 act", "{act: {scope: per_group, dtype: nvfp4}, weight: {scope: per_group, dtype: nvfp4}}", EXCLUDE
)
W8A16_AND_INT4 = data_free_recipe("w8a16 and int4", INT4.replace("SYMMETRIC", "True"), "[]").replace(
    "process: [", 'process: [{type: linear_quant, qconfig: {weight: {}}, include: ["*down_proj", "*layers.2.*"]}, '
)
FP8_RECIPES = (
    ("fp8 and int4", FP8_AND_INT4),
    ("fp8 blocks", BLOCKS),
    ("w8a16 and int4", W8A16_AND_INT4),
    ("nvfp4", NVFP4),
)
MIXED4 = data_free_recipe("mixed4", INT4.replace("SYMMETRIC", "False"), EXCLUDE)
MIXED8 = data_free_recipe("mixed8", INT8, EXCLUDE, ASCEND)


def write_recipe(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Write a shipped recipe with parts of its text replaced."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}{len(changes)}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def good_outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return good outputs of every format, written by the command, and their sharded and thinker-only variants."""
    folder = tmp_path_factory.mktemp("good_outputs")
    index = write_index(folder / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    int8_formats = ("--save_format", ASCEND, "--save_format", COMPRESSED)
    int4_formats = ("--save_format", "awq", "--save_format", COMPRESSED)

    def run(name: str, config: object, *arguments: object) -> Path:
        quant(tiny, folder / name, "--config_path", config, *arguments).done()
        return folder / name

    w8 = run("w8", write_recipe(folder, "qwen2_5_omni_w8a8", *FIXED), "--dataset", index, *int8_formats)
    w4 = run("w4", write_recipe(folder, "qwen2_5_omni_w4a16", *COARSE), "--dataset", index, *int4_formats)
    for name, text in (("sym4", SYMMETRIC), ("mixed4", MIXED4), ("mixed8", MIXED8), ("both", BOTH), *FP8_RECIPES):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    w8a16 = run("w8a16", "qwen2_5_omni_w8a16", *int8_formats)
    mixed4 = run("mixed4", folder / "mixed4.yaml", *int4_formats)
    (folder / "nvfp4 act.yaml").write_text(NVFP4_ACT, encoding="utf-8")
    outputs = {
        "ascend": w8 / ASCEND,
        "ct8": w8 / COMPRESSED,
        "awq": w4 / "awq",
        "ct4": w4 / COMPRESSED,
        "plain": run("plain", MINMAX),
        "sym4": run("sym4", folder / "sym4.yaml"),
        "both": run("both", folder / "both.yaml"),
        **{name: run(name, folder / f"{name}.yaml") for name, _ in FP8_RECIPES},
        "fp8": run("fp8", "qwen2_5_omni_fp8"),
        "w8a16 ascend": w8a16 / ASCEND,
        "w8a16": w8a16 / COMPRESSED,
        "nvfp4 act": run("nvfp4 act", folder / "nvfp4 act.yaml", "--dataset", index),
        "mixed awq": mixed4 / "awq",
        "mixed ct4": mixed4 / COMPRESSED,
        "mixed ascend": run("mixed8", folder / "mixed8.yaml"),
    }
    for name, base, change in (
        ("sharded", "ct8", split_shards),
        ("thinker only", "awq", omit_speech),
        ("sharded thinker only", "ct4", lambda f: [omit_speech(f), split_shards(f)]),
    ):
        outputs[name] = Path(shutil.copytree(outputs[base], folder / name))
        change(outputs[name])
    return outputs


GOOD_OUTPUTS = (
    "ascend", "ct8", "awq", "ct4", "plain", "sym4", "mixed awq", "mixed ct4", "mixed ascend", "sharded", "thinker only",
    "sharded thinker only", "both", "fp8", "fp8 and int4", "fp8 blocks",
    "w8a16", "w8a16 ascend", "w8a16 and int4", "nvfp4", "nvfp4 act",
)  # fmt: skip


def fault_lines(diagnosis: Diagnosis) -> list[str]:
    return [f"{f.level} {f.check} {f.code} | {f.where} | {f.what}" for f in diagnosis.findings if f.level != "ok"]


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("name", GOOD_OUTPUTS)
def test_no_false_alarm(good_outputs: dict[str, Path], tiny: Path, name: str, with_source: bool) -> None:
    diagnosis = examine(good_outputs[name], tiny if with_source else None)
    # AutoAWQ's list cannot exclude a Linear in one layer only; all other loaders read the checkpoint.
    allowed = {"autoawq_cannot_say"} if name == "mixed awq" else set()
    assert diagnosis.codes() == allowed, fault_lines(diagnosis)
    assert diagnosis.healthy and len(diagnosis.findings) <= 14
    assert {f.check for f in diagnosis.findings} >= {"files", "config", "tensors", "names", "scales", "integers"}
    assert ("source" in {f.check for f in diagnosis.findings}) == with_source


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_every_damage_is_reported(good_outputs: dict[str, Path], tiny: Path, tmp_path: Path, damage: Damage) -> None:
    folder = Path(shutil.copytree(good_outputs[damage.of], tmp_path / "damaged"))
    damage.inflict(folder)
    diagnosis = examine(folder, tiny if damage.needs_source else None)
    hits = [f for f in diagnosis.findings if f.code == damage.code and damage.where in f.where]
    assert hits, fault_lines(diagnosis)
    kind = CODES[damage.code]
    assert all((f.level, f.why, f.runtimes, f.todo) == (kind.level, kind.why, kind.runtimes, kind.todo) for f in hits)
    assert diagnosis.healthy == (diagnosis.errors == 0)
    assert kind.level == "warning" or not diagnosis.healthy
    assert "check_failed" not in diagnosis.codes(), fault_lines(diagnosis)


def test_damages_are_unique_and_have_known_codes() -> None:
    assert len({damage.name for damage in DAMAGES}) == len(DAMAGES) > 100
    assert {damage.code for damage in DAMAGES} <= CODES.keys()


# --- the source ----------------------------------------------------------------------------------------------


def changed_source(tiny: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    source = Path(shutil.copytree(tiny, folder / "source"))
    change(source)
    return source


def narrow_up_proj(source: Path) -> None:
    """Give a tensor the shape of another model."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if "thinker.model.layers.0.mlp.up_proj.weight" in tensors:
            tensors["thinker.model.layers.0.mlp.up_proj.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)
            write_shard(tensors, file)


def write_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "code", "quoted"),
    [
        (lambda s: (s / "config.json").unlink(), "source_unreadable", "config.json"),
        (lambda s: next(s.glob("*.safetensors")).unlink(), "source_unreadable", "missing"),
        (change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
         "source_other_model", "quantized itself"),
        (change_json("config.json", lambda c: c.update(model_type="llama")), "source_other_model", "llama"),
        (narrow_up_proj, "source_other_model", "[256, 256]"),
    ],
)  # fmt: skip
def test_unusable_source_is_a_finding(
    good_outputs: dict[str, Path], tiny: Path, tmp_path: Path, change: Callable[[Path], object], code: str, quoted: str
) -> None:
    diagnosis = examine(good_outputs["plain"], changed_source(tiny, tmp_path, change))
    assert [quoted in f.what for f in diagnosis.findings if f.code == code] == [True], fault_lines(diagnosis)
    assert not diagnosis.healthy


def test_rounded_source_is_a_finding(good_outputs: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """The source is already on the quantization grid, so quantization does not change its weights."""
    name = "thinker.model.layers.0.mlp.up_proj"

    def round_source(source: Path) -> None:
        stored = load_file(next(good_outputs["plain"].glob("*.safetensors")))
        exact = torch.ones_like(stored[f"{name}.weight_scale"])
        for file in source.glob("*.safetensors"):
            tensors = load_file(file)
            if f"{name}.weight" in tensors:
                tensors[f"{name}.weight"] = (stored[f"{name}.weight"] * exact).to(torch.bfloat16)
                write_shard(tensors, file)

    source = changed_source(tiny, tmp_path, round_source)
    output = Path(shutil.copytree(good_outputs["plain"], tmp_path / "output"))
    change_tensors(output, lambda t: t.update({f"{name}.weight_scale": torch.ones_like(t[f"{name}.weight_scale"])}))
    diagnosis = examine(output, source)
    assert [f.where for f in diagnosis.findings if f.code == "weight_unchanged"] == [name], fault_lines(diagnosis)


def test_float_checkpoint_is_called_float(tiny: Path) -> None:
    diagnosis = examine(tiny)
    assert diagnosis.codes() == {"float_checkpoint"} and diagnosis.healthy, fault_lines(diagnosis)
    assert diagnosis.format == "float" and diagnosis.loads == {}
    answer = command("doctor", tiny).done()
    assert "`msmodelslim quant` makes a quantized checkpoint" in answer.out and "quantize again" not in answer.out


# --- the slopes of source on stored weights ------------------------------------------------------------------


def quantized_slopes(bits: int, groups: int, rows: int = 64, size: int = 64) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Random weights [rows, groups * size], their scales [rows, groups] by plain rounding, and the stored integers."""
    torch.manual_seed(0)
    weight = torch.randn(rows, groups, size)
    top = 2 ** (bits - 1) - 1
    scales = weight.abs().amax(dim=2) / top
    integers = torch.round(weight / scales[:, :, None])
    return weight, scales, integers


@pytest.mark.parametrize(("rows_unknown", "columns_unknown"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_slopes_tell_the_order_of_scales_that_are_alike(bits: int, rows_unknown: bool, columns_unknown: bool) -> None:
    weight, scales, integers = quantized_slopes(bits, 8)
    assert float(scales.std() / scales.mean()) < 0.2  # all alike

    def codes(stored: torch.Tensor) -> list[str]:
        y = integers * stored[:, :, None]
        slopes = group_slopes(weight.flatten(1), y.flatten(1), 8)
        return [f.code for f in slope_faults("x", slopes, stored, rows_unknown, columns_unknown)]

    assert codes(scales) == []
    assert codes(scales.flip(0)) == codes(scales.flip(1)) == ["scales_reordered"]
    assert codes(scales[torch.randperm(64)]) == ["scales_reordered"]
    equal = torch.full_like(scales, float(scales.max()))
    assert codes(equal) in ([], ["slope_wrong"])  # nothing to be in an order


def test_a_scale_in_another_unit_is_a_wrong_slope() -> None:
    weight, scales, integers = quantized_slopes(4, 2)
    slopes = group_slopes(weight.flatten(1), (integers * scales[:, :, None] * 1.4).flatten(1), 2)
    assert [f.code for f in slope_faults("x", slopes, scales * 1.4, False, False)] == ["slope_wrong"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("of", "suffix"), [("awq", "scales"), ("ct4", "weight_scale"), ("sym4", "weight_scale")])
def test_flipped_scales_are_found_in_4bit_formats(
    good_outputs: dict[str, Path], tiny: Path, tmp_path: Path, of: str, suffix: str, axis: int
) -> None:
    folder = Path(shutil.copytree(good_outputs[of], tmp_path / "damaged"))
    names = [f"{LAYER}{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[f"{name}.{suffix}"] = tensors[f"{name}.{suffix}"].flip(axis)

    change_tensors(folder, flip)
    found = {f.where for f in examine(folder, tiny).findings if f.level == "error"}
    assert all(any(name in where for where in found) for name in names), found


# --- the verdict ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ascend", {"vllm": "no", "vllm_cpu": "no", "vllm_ascend": "yes", "transformers_4": "no"}),
        ("awq", {"vllm": "yes", "vllm_ascend": "no", "transformers_4": "no", "transformers_5": "unknown"}),
        ("ct8", {"vllm": "yes", "vllm_ascend": "unknown", "transformers_4": "yes", "transformers_5": "yes"}),
        ("ct4", {"vllm": "yes", "transformers_4": "no", "transformers_5": "yes"}),
        ("sym4", {"vllm": "yes", "transformers_4": "yes", "transformers_5": "yes"}),
        ("both", {"vllm": "yes", "vllm_ascend": "no", "transformers_4": "yes"}),
    ],
)
def test_verdict_of_good_outputs(good_outputs: dict[str, Path], name: str, expected: dict[str, str]) -> None:
    loads = examine(good_outputs[name]).as_dict()["loads"]
    assert {runtime: loads[runtime]["verdict"] for runtime in expected} == expected
    assert all(found["how"] and found["proof"] for found in loads.values())


def test_verdict_follows_the_errors(good_outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good_outputs["ct8"], tmp_path / "damaged"))
    (folder / "spk_dict.pt").unlink()  # an error for transformers only
    loads = examine(folder).loads
    assert (loads["vllm"].verdict, loads["transformers_4"].verdict) == ("yes", "no")
    assert "spk_dict_missing" in loads["transformers_4"].how
    assert "Loads in" in command("doctor", folder).out


def test_nothing_is_examined_behind_a_file_that_is_cut_off(good_outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good_outputs["ct8"], tmp_path / "damaged"))
    (folder / "spk_dict.pt").unlink()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    diagnosis = examine(folder)
    assert diagnosis.codes() == {"file_truncated", "spk_dict_missing"}, fault_lines(diagnosis)
    assert {f.check for f in diagnosis.findings if f.level == "ok"} <= {"index", "config"}
    assert {found.verdict for found in diagnosis.loads.values()} == {"no"}
    assert "not examined" in command("doctor", folder).out


@pytest.mark.parametrize("source", [False, True])
def test_path_that_is_not_a_folder_is_an_error(tiny: Path, tmp_path: Path, source: bool) -> None:
    for wrong in (tmp_path / "nothing", tiny / "config.json"):
        with pytest.raises(QuantError, match=r"is not a folder|does not exist"):
            examine(tiny if source else wrong, wrong if source else None)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="holds no checkpoint"):
        examine(tmp_path)


# --- the command ---------------------------------------------------------------------------------------------


def test_command_on_good_output(good_outputs: dict[str, Path], tiny: Path) -> None:
    answer = command("doctor", good_outputs["ct8"], "--source", tiny).done()
    assert "0 errors, 0 warnings" in answer.out and answer.out.count(" ok ") == 12
    assert len(answer.out.splitlines()) < 70


def test_command_on_damaged_output(good_outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good_outputs["ct8"], tmp_path / "damaged"))
    (folder / "spk_dict.pt").unlink()
    change_json("config.json", lambda c: c["thinker_config"].pop("quantization_config") and None)(folder)
    answer = command("doctor", folder)
    assert answer.code == 1 and "Traceback" not in answer.err
    assert "spk_dict_missing" in answer.out and "copy spk_dict.pt from the source" in answer.out
    assert "1 errors, 1 warnings" in answer.out


def test_command_with_json(good_outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good_outputs["awq"], tmp_path / "damaged"))
    change_tensors(folder, lambda t: [t[name].zero_() for name in t if name.endswith(".scales")])
    answer = command("doctor", folder, "--json")
    report = answer.json
    assert answer.code == 1 and report["errors"] == 8 and not report["healthy"] and report["format"] == "awq"
    faults = [f for f in report["findings"] if f["level"] == "error"]
    assert {f["code"] for f in faults} == {"scale_zero"}
    assert report["unlisted"] == {"scale_zero": 20}  # 8 of 28 Linears are in the list
    assert all(f["why"] and f["todo"] and f["runtimes"] and f["where"].endswith(".scales") for f in faults)
    assert command("doctor", good_outputs["awq"], "--json").done().json["healthy"]


@pytest.mark.parametrize("arguments", [["nothing"], ["pyproject.toml"], [".", "--source", "nothing"]])
def test_command_without_folder(arguments: list[str]) -> None:
    assert "folder" in command("doctor", *arguments).fault()


def test_every_code_has_texts() -> None:
    for code, kind in CODES.items():
        assert kind.why and kind.todo and kind.level in ("warning", "error"), code
        assert not kind.why.endswith(".") and not kind.todo.endswith("."), code


def test_diagnosis_serializes_to_json(good_outputs: dict[str, Path]) -> None:
    assert json.loads(json.dumps(examine(good_outputs["ascend"]).as_dict()))["healthy"] is True
