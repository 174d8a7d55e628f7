"""doctor: nothing to say about good outputs of every format, the right thing about every damage, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import MINMAX, command, quant, write_index
from damage import DAMAGES, Damage, change_json, change_tensors, leave_out_speech, split_shards
from safetensors.torch import load_file, save_file

from msmodelslim_omni.doctor import Diagnosis, examine
from msmodelslim_omni.doctor.codes import CODES
from msmodelslim_omni.errors import QuantError

CONFIGS = Path(__file__).parents[2] / "configs"
ASCEND, COMPRESSED = "ascendv1_saver", "compressed_tensors"

# What the runs of `goods` change in the shipped recipes: no search, and Linears that stay float.
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
EXCLUDE = '["*layers.1.mlp.down_proj", "*layers.2.self_attn.{q,k,v}_proj"]'


def data_free(name: str, qconfig: str, exclude: str, saver: str = COMPRESSED) -> str:
    text = DATA_FREE.replace("CONFIG", name, 1).replace("QCONFIG", qconfig).replace("EXCLUDE", exclude)
    return text.replace("SAVER", saver)


SYMMETRIC = data_free("sym4", INT4.replace("SYMMETRIC", "True"), "[]")
BOTH = data_free("both", INT4.replace("SYMMETRIC", "True"), '["*layers.3.mlp.down_proj"]').replace(
    "process: [",
    f'process: [{{type: linear_quant, qconfig: {INT8}, include: ["*down_proj", "*layers.2.*"],'
    ' exclude: ["*layers.3.*"]}, ',
)
MIXED4 = data_free("mixed4", INT4.replace("SYMMETRIC", "False"), EXCLUDE)
MIXED8 = data_free("mixed8", INT8, EXCLUDE, ASCEND)


def recipe(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A shipped recipe with pieces of its text replaced."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}{len(changes)}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def goods(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good outputs of every format, made by the command; and what an export or a large model makes of them."""
    folder = tmp_path_factory.mktemp("goods")
    index = write_index(folder / "data", {"text": "Why is the sky blue?", "answer": "Short waves scatter most."})
    both8 = ("--save_format", ASCEND, "--save_format", COMPRESSED)
    both4 = ("--save_format", "awq", "--save_format", COMPRESSED)

    def run(name: str, config: object, *words: object) -> Path:
        quant(tiny, folder / name, "--config_path", config, *words).done()
        return folder / name

    w8 = run("w8", recipe(folder, "qwen2_5_omni_w8a8", *FIXED), "--dataset", index, *both8)
    w4 = run("w4", recipe(folder, "qwen2_5_omni_w4a16", *COARSE), "--dataset", index, *both4)
    for name, text in (("sym4", SYMMETRIC), ("mixed4", MIXED4), ("mixed8", MIXED8), ("both", BOTH)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    mixed4 = run("mixed4", folder / "mixed4.yaml", *both4)
    made = {
        "ascend": w8 / ASCEND,
        "ct8": w8 / COMPRESSED,
        "awq": w4 / "awq",
        "ct4": w4 / COMPRESSED,
        "plain": run("plain", MINMAX),
        "sym4": run("sym4", folder / "sym4.yaml"),
        "both": run("both", folder / "both.yaml"),
        "mixed awq": mixed4 / "awq",
        "mixed ct4": mixed4 / COMPRESSED,
        "mixed ascend": run("mixed8", folder / "mixed8.yaml"),
    }
    for name, of, change in (
        ("sharded", "ct8", split_shards),
        ("thinker only", "awq", leave_out_speech),
        ("sharded thinker only", "ct4", lambda f: [leave_out_speech(f), split_shards(f)]),
    ):
        made[name] = Path(shutil.copytree(made[of], folder / name))
        change(made[name])
    return made


GOODS = (
    "ascend", "ct8", "awq", "ct4", "plain", "sym4", "mixed awq", "mixed ct4", "mixed ascend", "sharded", "thinker only",
    "sharded thinker only", "both",
)  # fmt: skip


def told(diagnosis: Diagnosis) -> list[str]:
    return [f"{f.level} {f.check} {f.code} | {f.where} | {f.what}" for f in diagnosis.findings if f.level != "ok"]


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("name", GOODS)
def test_no_false_alarm(goods: dict[str, Path], tiny: Path, name: str, with_source: bool) -> None:
    diagnosis = examine(goods[name], tiny if with_source else None)
    # AutoAWQ's list cannot tell a Linear of one layer from that of another; all other loaders read it.
    allowed = {"autoawq_cannot_say"} if name == "mixed awq" else set()
    assert diagnosis.codes() == allowed, told(diagnosis)
    assert diagnosis.healthy and len(diagnosis.findings) <= 14
    assert {f.check for f in diagnosis.findings} >= {"files", "config", "tensors", "names", "scales", "integers"}
    assert ("source" in {f.check for f in diagnosis.findings}) == with_source


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_every_damage_is_found_and_named(goods: dict[str, Path], tiny: Path, tmp_path: Path, damage: Damage) -> None:
    folder = Path(shutil.copytree(goods[damage.of], tmp_path / "damaged"))
    damage.inflict(folder)
    diagnosis = examine(folder, tiny if damage.needs_source else None)
    hits = [f for f in diagnosis.findings if f.code == damage.code and damage.where in f.where]
    assert hits, told(diagnosis)
    kind = CODES[damage.code]
    assert all((f.level, f.why, f.runtimes, f.todo) == (kind.level, kind.why, kind.runtimes, kind.todo) for f in hits)
    assert diagnosis.healthy == (diagnosis.errors == 0)
    assert kind.level == "warning" or not diagnosis.healthy
    assert "check_failed" not in diagnosis.codes(), told(diagnosis)


def test_there_are_many_kinds_of_damage() -> None:
    assert len({damage.name for damage in DAMAGES}) == len(DAMAGES) > 100
    assert {damage.code for damage in DAMAGES} <= CODES.keys()


# --- the source ----------------------------------------------------------------------------------------------


def other_source(tiny: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    source = Path(shutil.copytree(tiny, folder / "source"))
    change(source)
    return source


def narrower(source: Path) -> None:
    """Another model's weights under the same names."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if "thinker.model.layers.0.mlp.up_proj.weight" in tensors:
            tensors["thinker.model.layers.0.mlp.up_proj.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)
            write_shard(tensors, file)


def write_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda s: (s / "config.json").unlink(), "source_unreadable", "config.json"),
        (lambda s: next(s.glob("*.safetensors")).unlink(), "source_unreadable", "missing"),
        (change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
         "source_other_model", "quantized itself"),
        (change_json("config.json", lambda c: c.update(model_type="llama")), "source_other_model", "llama"),
        (narrower, "source_other_model", "[256, 256]"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_compared_is_a_finding(
    goods: dict[str, Path], tiny: Path, tmp_path: Path, change: Callable[[Path], object], code: str, says: str
) -> None:
    diagnosis = examine(goods["plain"], other_source(tiny, tmp_path, change))
    assert [says in f.what for f in diagnosis.findings if f.code == code] == [True], told(diagnosis)
    assert not diagnosis.healthy


def test_a_source_that_was_rounded_before(goods: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """Weights that quantization did not change: the source already stood on the grid."""
    name = "thinker.model.layers.0.mlp.up_proj"

    def on_grid(source: Path) -> None:
        stored = load_file(next(goods["plain"].glob("*.safetensors")))
        exact = torch.ones_like(stored[f"{name}.weight_scale"])
        for file in source.glob("*.safetensors"):
            tensors = load_file(file)
            if f"{name}.weight" in tensors:
                tensors[f"{name}.weight"] = (stored[f"{name}.weight"] * exact).to(torch.bfloat16)
                write_shard(tensors, file)

    source = other_source(tiny, tmp_path, on_grid)
    output = Path(shutil.copytree(goods["plain"], tmp_path / "output"))
    change_tensors(output, lambda t: t.update({f"{name}.weight_scale": torch.ones_like(t[f"{name}.weight_scale"])}))
    diagnosis = examine(output, source)
    assert [f.where for f in diagnosis.findings if f.code == "weight_unchanged"] == [name], told(diagnosis)


def test_a_float_checkpoint_is_not_quantized(tiny: Path) -> None:
    diagnosis = examine(tiny)
    assert {f.code for f in diagnosis.findings if f.level == "error"} == {"not_quantized"}, told(diagnosis)


@pytest.mark.parametrize("source", [False, True])
def test_a_path_that_is_no_folder_is_refused(tiny: Path, tmp_path: Path, source: bool) -> None:
    for wrong in (tmp_path / "nothing", tiny / "config.json"):
        with pytest.raises(QuantError, match=r"is not a folder|does not exist"):
            examine(tiny if source else wrong, wrong if source else None)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert examine(tmp_path).codes() >= {"no_weights", "config_missing", "spk_dict_missing", "tokenizer_missing"}


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_on_a_good_output(goods: dict[str, Path], tiny: Path) -> None:
    answer = command("doctor", goods["ct8"], "--source", tiny).done()
    assert "0 errors, 0 warnings" in answer.out and answer.out.count(" ok ") == 12
    assert len(answer.out.splitlines()) < 50


def test_the_command_on_a_damaged_one(goods: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(goods["ct8"], tmp_path / "damaged"))
    (folder / "spk_dict.pt").unlink()
    change_json("config.json", lambda c: c["thinker_config"].pop("quantization_config") and None)(folder)
    answer = command("doctor", folder)
    assert answer.code == 1 and "Traceback" not in answer.err
    assert "spk_dict_missing" in answer.out and "copy spk_dict.pt from the source" in answer.out
    assert "1 errors, 1 warnings" in answer.out


def test_the_command_in_json(goods: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(goods["awq"], tmp_path / "damaged"))
    change_tensors(folder, lambda t: [t[name].zero_() for name in t if name.endswith(".scales")])
    answer = command("doctor", folder, "--json")
    found = answer.json
    assert answer.code == 1 and found["errors"] == 8 and not found["healthy"] and found["format"] == "awq"
    faults = [f for f in found["findings"] if f["level"] == "error"]
    assert {f["code"] for f in faults} == {"scale_zero"}
    assert found["unlisted"] == {"scale_zero": 20}  # eight of 28 Linears are listed
    assert all(f["why"] and f["todo"] and f["runtimes"] and f["where"].endswith(".scales") for f in faults)
    assert command("doctor", goods["awq"], "--json").done().json["healthy"]


@pytest.mark.parametrize("words", [["nothing"], ["pyproject.toml"], [".", "--source", "nothing"]])
def test_the_command_on_no_folder(words: list[str]) -> None:
    assert "folder" in command("doctor", *words).fault()


def test_every_code_tells_what_to_do() -> None:
    for code, kind in CODES.items():
        assert kind.why and kind.todo and kind.level in ("warning", "error"), code
        assert not kind.why.endswith(".") and not kind.todo.endswith("."), code


def test_json_of_a_diagnosis_is_json(goods: dict[str, Path]) -> None:
    assert json.loads(json.dumps(examine(goods["ascend"]).as_dict()))["healthy"] is True
