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
from safetensors.torch import load_file

from msmodelslim_omni.doctor import Diagnosis, examine
from msmodelslim_omni.doctor.codes import CODES
from msmodelslim_omni.errors import QuantError

CONFIGS = Path(__file__).parent.parent / "configs"
ASCEND, COMPRESSED = "ascendv1_saver", "compressed_tensors"

# What the runs of `goods` change in the shipped recipes: no search, and Linears that stay float.
FIXED = (("alpha: auto ", "alpha: 0.5 "),)
COARSE = (("n_grid: 20", "n_grid: 4"),)
EXCLUDED = (
    'exclude: ["*audio_tower*", "*visual*"]',
    'exclude: ["*layers.1.mlp.down_proj", "*layers.2.self_attn.{q,k,v}_proj"]',
)
SYMMETRIC = """
apiversion: multimodal_vlm_modelslim_v1
metadata: {config_id: sym4, label: {w_bit: 4, a_bit: 16}}
spec:
  process:
    - type: linear_quant
      qconfig: {weight: {scope: per_group, dtype: int4, symmetric: True, method: minmax, ext: {group_size: 128}}}
      include: ["*"]
      exclude: EXCLUDE
  save: [{type: compressed_tensors, part_file_size: 4}]
"""
MIXED8 = """
apiversion: multimodal_vlm_modelslim_v1
metadata: {config_id: mixed8, label: {w_bit: 8, a_bit: 8}}
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
      exclude: ["*layers.1.mlp.down_proj", "*layers.2.self_attn.{q,k,v}_proj"]
  save: [{type: ascendv1_saver, part_file_size: 4}]
"""


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
    mixed4 = run("mixed4", recipe(folder, "qwen2_5_omni_w4a16", *COARSE, EXCLUDED), "--dataset", index, *both4)
    (folder / "sym4.yaml").write_text(SYMMETRIC.replace("EXCLUDE", "[]"), encoding="utf-8")
    (folder / "mixed8.yaml").write_text(MIXED8, encoding="utf-8")
    made = {
        "ascend": w8 / ASCEND,
        "ct8": w8 / COMPRESSED,
        "awq": w4 / "awq",
        "ct4": w4 / COMPRESSED,
        "plain": run("plain", MINMAX),
        "sym4": run("sym4", folder / "sym4.yaml"),
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
    "sharded thinker only",
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
