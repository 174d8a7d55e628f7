"""keep: the units that cost most stay in a better precision within the limits; a resumed run makes the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import StopAt, change_recipe, files, quant, stop_at, write_index
from make_tiny_omni import make_tiny_omni
from make_tiny_qwen3_omni import make_tiny_qwen3_omni

from msmodelslim_omni.doctor import examine
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models import derive_model_type
from msmodelslim_omni.plan.plan import QuantPlan, make_plan
from msmodelslim_omni.recipe.loading import load_recipe
from msmodelslim_omni.run import quantize
from msmodelslim_omni.run.keep import Candidate, choose
from msmodelslim_omni.run.keep_limits import extra_bytes, keep_budget
from msmodelslim_omni.storage.checkpoint import open_checkpoint

LAYERS = 2
W4A16 = "qwen2_5_omni_w4a16"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def keep_recipe(folder: Path, value: object, name: str = "qwen2_5_omni_w8a8") -> Path:
    """A shipped recipe with `keep` and, to be fast, a fixed exponent."""
    path = change_recipe(
        folder, "- type: linear_quant\n", f"- type: linear_quant\n      keep: {json.dumps(value)}\n", name
    )
    path.write_text(path.read_text(encoding="utf-8").replace("alpha: auto ", "alpha: 0.5 "), encoding="utf-8")
    return path


# --- the choice, by hand -------------------------------------------------------------------------------------


def test_greedy_by_damage_per_byte() -> None:
    """Per byte: b 3, a 2, d 1, c 0.5. b and a take 70 of 100 bytes, d does not fit, c does."""
    a, b = Candidate(100, 50, 9), Candidate(60, 20, 9)
    c, d = Candidate(15, 30, 9), Candidate(40, 40, 9)
    assert choose([a, b, c, d], 100, 0) == [1, 0, 2]
    assert choose([a, b, c, d], 110, 0) == [1, 0, 3]
    assert choose([a, b, c, d], 19, 0) == []


def test_units_that_cost_no_bytes_are_limited_by_their_weights() -> None:
    """Per weight: q 0.02, p 0.01, r 0.005. Of 1,500 weights q takes 1,000, p does not fit, r does."""
    p, q, r = Candidate(10, 0, 1000, True), Candidate(20, 16, 1000, True), Candidate(2, 0, 400, True)
    assert choose([p, q, r], 16, 1500) == [1, 2]
    assert choose([p, q, r], 16, 999) == [2]
    assert choose([p, q, r], 15, 1500) == [0, 2]  # the few bytes of a free unit count too


def test_a_unit_without_gain_is_not_kept() -> None:
    assert choose([Candidate(0, 0, 1), Candidate(-1, 5, 1)], 1000, 1000) == []


# --- the plan ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)


def plan_of(model: Path, folder: Path, value: object, *savers: str, name: str = "qwen2_5_omni_w8a8") -> QuantPlan:
    checkpoint = open_checkpoint(model)
    recipe = load_recipe(keep_recipe(folder, value, name))
    return make_plan(recipe, derive_model_type(checkpoint.config), checkpoint, save_formats=savers)


def test_bytes_of_a_linear_and_of_the_limit(model: Path, tmp_path: Path) -> None:
    """In compressed_tensors, int8 in bfloat16 models: a byte per weight more as float, without the scales."""
    plan = plan_of(model, tmp_path, {"max_extra_bytes": "2MB", "as": "float"}, "compressed_tensors")
    (keep,) = plan.keep
    extra = extra_bytes(plan, keep)
    out_features, in_features = plan.checkpoint.tensors[f"{min(extra)}.weight"].shape
    assert extra[min(extra)] == out_features * in_features - 2 * out_features
    assert keep_budget(plan, keep) == 2_000_000
    assert len(extra) == 7 * LAYERS


@pytest.mark.parametrize(
    ("saver", "wanted", "scheme"),
    [
        ("ascendv1_saver", None, "W8A16"),  # its only reader takes both
        ("compressed_tensors", None, "FLOAT"),  # not known of every reader of W8A8
        ("compressed_tensors", "w8a16", "W8A16"),
        ("ascendv1_saver", "float", "FLOAT"),
    ],
)
def test_precision_of_the_kept(model: Path, tmp_path: Path, saver: str, wanted: str | None, scheme: str) -> None:
    plan = plan_of(model, tmp_path, {"max_extra_bytes": "3%", **({"as": wanted} if wanted else {})}, saver)
    (keep,) = plan.keep
    assert (keep.scheme_name, keep.is_free) == (scheme, scheme == "W8A16")


def test_plan_with_a_kept_group(model: Path, tmp_path: Path) -> None:
    """int8 in the int4 recipe: the group is not scaled by awq; as float it is in no step. Everything else stays."""
    names = ("mlp.gate_proj", "mlp.up_proj")
    for form, steps in (("w8a16", ["linear_quant"]), ("float", [])):
        plan = plan_of(model, tmp_path, {"max_extra_bytes": "3%", "as": form}, "compressed_tensors", name=W4A16)
        (keep,) = plan.keep
        changed = plan.keeping(frozenset(plan.model.layer_name(1, name) for name in names), keep)
        assert changed.layers[0] == plan.layers[0]
        of_layer = changed.layers[1]
        assert {name: scheme for name, scheme in of_layer.schemes.items() if name not in names} == {
            name: scheme for name, scheme in plan.layers[1].schemes.items() if name not in names
        }
        assert [step.processor for step in of_layer.steps if step.linears & set(names)] == steps
        kept = [linear for linear in changed.linears if linear.name.endswith(("1.mlp.gate_proj", "1.mlp.up_proj"))]
        assert [linear.scheme and linear.scheme.name for linear in kept] == [{"w8a16": "W8A16"}.get(form)] * 2
        assert all(("kept float" in linear.reason) == (form == "float") for linear in kept)


# --- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(
        tmp_path_factory.mktemp("data"), *({"text": f"Count {'very ' * n}far."} for n in range(5, 50, 15))
    )


@pytest.fixture(scope="module")
def kept(model: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 with 3 % more bytes for float Linears, in `out`, and the plan of it as JSON."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = keep_recipe(folder, {"max_extra_bytes": "3%", "as": "float"})
    words = ("--config_path", recipe, "--dataset", index, "--save_format", "compressed_tensors")
    (folder / "plan.json").write_text(quant(model, folder / "out", *words, "--dry_run", "--json").done().out)
    dry = quant(model, folder / "out", *words, "--dry_run").done()
    assert "more for keep, as FLOAT" in " ".join(dry.out.split())
    quant(model, folder / "out", *words).done()
    return folder


def schemes_of(report: Any) -> dict[str, str]:
    return {linear["name"]: linear["scheme"] for layer in report["layers"] for linear in layer["linears"]}


def unchanged_files(model: Path) -> list[Path]:
    """What an estimate of the output counts besides tensors."""
    return [model / file for file in open_checkpoint(model).other_files()]


def test_output_grows_by_the_chosen_units_within_the_limit(model: Path, kept: Path) -> None:
    report, plan = (json.loads((kept / name).read_text()) for name in ("out/quant_report.json", "plan.json"))
    units = report["kept"]
    names = {name for unit in units for name in unit["linears"]}
    assert units and {name for name, scheme in schemes_of(report).items() if scheme == "FLOAT"} == names
    assert {linear["scheme"] for linear in plan["linears"]} == {"W8A8_DYNAMIC"}
    before = plan["output_bytes"]["compressed_tensors"] - sum(file.stat().st_size for file in unchanged_files(model))
    after = report["output_bytes"]["compressed_tensors"]
    assert after - before == sum(unit["extra_bytes"] for unit in units) <= plan["keep"][0]["max_extra_bytes"]
    assert plan["keep"][0]["max_extra_bytes"] == int(0.03 * before)
    for layer in range(LAYERS):
        for group in FUSED:
            found = {any(f"layers.{layer}." in n and n.endswith(part) for n in names) for part in group}
            assert len(found) == 1
    assert all(unit["damage"] > unit["damage_kept"] == 0 for unit in units)
    assert examine(kept / "out", model).codes() == set()


def test_documents_name_the_kept_units(kept: Path) -> None:
    (first, *_) = json.loads((kept / "out" / "quant_report.json").read_text())["kept"]
    text, card = ((kept / "out" / name).read_text(encoding="utf-8") for name in ("quant_report.md", "README.md"))
    assert "## Kept in a better precision" in text and f"| {first['unit']} | FLOAT |" in text
    assert "are kept in a better precision:" in card and f"{first['unit']}" in card


def test_stopped_run_makes_the_same_bytes(model: Path, index: Path, kept: Path, tmp_path: Path) -> None:
    """Stopped behind the first measured layer, and behind the first quantized one, which measures nothing again."""
    words: dict[str, Any] = {
        "config_path": str(kept / "changed.yaml"), "dataset": str(index), "save_format": ["compressed_tensors"],
        "device": "cpu",
    }  # fmt: skip
    for phase, done in (("keep", 1), ("layers", 1)):
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", progress=StopAt(phase, done), **words)
    with pytest.raises(AssertionError, match="not stopped"):
        stop_at("keep", LAYERS, model, tmp_path / "out", index, **{k: words[k] for k in ("config_path", "save_format")})
    assert files(tmp_path / "out") == files(kept / "out")


@pytest.mark.full
def test_w8a16_beside_w8a8_in_the_limit_of_weights(model: Path, index: Path, tmp_path: Path) -> None:
    recipe = keep_recipe(tmp_path, {"max_extra_bytes": "1%", "as": "w8a16", "max_share": "40%"})
    quant(model, tmp_path / "out", "--config_path", recipe, "--dataset", index).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    shapes = {linear["name"]: linear["shape"] for layer in report["layers"] for linear in layer["linears"]}
    names = [name for unit in report["kept"] for name in unit["linears"]]
    weights = [shapes[name][0] * shapes[name][1] for name in names]
    assert 0 < sum(weights) <= 0.4 * sum(rows * columns for rows, columns in shapes.values())
    assert {schemes_of(report)[name] for name in names} == {"W8A16"}
    assert all(unit["damage"] > unit["damage_kept"] > 0 for unit in report["kept"])
    assert examine(tmp_path / "out", model).codes() == set()


@pytest.mark.full
def test_two_processes_make_the_bytes_of_one(model: Path, index: Path, kept: Path, tmp_path: Path) -> None:
    """W8A8: every process takes the same choice, which the first one measures alone."""
    words = ("--config_path", kept / "changed.yaml", "--dataset", index, "--save_format", "compressed_tensors")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [*torchrun, "-m", "msmodelslim_omni", "quant", model, tmp_path / "out", "--device", "cpu", *words],
        check=True, env=environment,
    )  # fmt: skip
    assert files(tmp_path / "out") == files(kept / "out")


@pytest.mark.full
def test_tuning_with_float_linears(model: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", *({"text": f"Count {'very ' * n}far."} for n in range(5, 100, 10)))
    recipe = keep_recipe(tmp_path, {"max_extra_bytes": "3%"}, W4A16)
    words = ("--dataset", index, "--effort", "best")
    quant(model, tmp_path / "out", "--config_path", recipe, *words).done()
    report = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert report["kept"] and report["tuning"] is not None and "FLOAT" in schemes_of(report).values()


# --- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"max_extra_bytes": "0%"}, "above 0% and at most 100%"),
        ({"max_extra_bytes": "101%"}, "above 0% and at most 100%"),
        ({"max_extra_bytes": "-3%"}, "above 0% and at most 100%"),
        ({"max_extra_bytes": "3%%"}, "above 0% and at most 100%"),
        ({"max_extra_bytes": "three"}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": -3}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": 0}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": 3.5}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": True}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": None}, "a share of the output, e.g. 3%, or a size above zero"),
        ({"max_extra_bytes": "3%", "max_share": "0%"}, "keep.max_share is '0%'"),
        ({"max_extra_bytes": "3%", "as": "int8"}, "keep.as is 'int8'; allowed: 'w8a16' or 'float'"),
        ({"max_bytes": "3%"}, "unknown key. Allowed here: as, max_extra_bytes, max_share. Did you mean"),
        ({}, "keep.max_extra_bytes: this key is missing"),
        ("3%", "keep is '3%'"),
    ],
)
def test_nonsense(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(QuantError, match=r"changed.yaml:\d+: spec.process\[1\].keep") as caught:
        load_recipe(keep_recipe(tmp_path, value))
    assert message in caught.value.message


def test_data_free_recipe(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"changed\.yaml:\d+: keep measures damage on samples, and"):
        load_recipe(keep_recipe(tmp_path, {"max_extra_bytes": "3%"}, "qwen2_5_omni_w8a8_minmax"))


def test_what_a_format_cannot_store(model: Path, tmp_path: Path) -> None:
    limit = {"max_extra_bytes": "3%", "as": "w8a16"}
    with pytest.raises(QuantError, match="as: w8a16: awq cannot store it beside W4A16_G128"):
        plan_of(model, tmp_path, limit, "awq", name=W4A16)
    with pytest.raises(QuantError, match="as: w8a16: this linear_quant writes W8A16 anyway"):
        plan_of(model, tmp_path, limit, name="qwen2_5_omni_w8a8_mixed")


def test_enough_bytes_for_every_linear(model: Path, index: Path, tmp_path: Path) -> None:
    recipe = keep_recipe(tmp_path, {"max_extra_bytes": "100%", "as": "float"})
    fault = quant(model, tmp_path / "out", "--config_path", recipe, "--dataset", index).fault()
    assert "max_extra_bytes 100% is enough to leave every Linear float" in fault and "give less" in fault
    assert not (tmp_path / "out").exists()


def test_tuning_takes_no_int8(model: Path, index: Path, tmp_path: Path) -> None:
    recipe = keep_recipe(tmp_path, {"max_extra_bytes": "3%", "as": "w8a16"}, W4A16)
    words = ("--dataset", index, "--save_format", "compressed_tensors", "--effort", "best")
    fault = quant(model, tmp_path / "out", "--config_path", recipe, *words).fault()
    assert "--effort best tunes 4-bit and float Linears only" in fault and "use as: float" in fault


def test_experts_have_no_w8a16_on_ascend(tmp_path: Path) -> None:
    moe = make_tiny_qwen3_omni(tmp_path / "moe")
    limit = {"max_extra_bytes": "3%", "as": "w8a16"}
    with pytest.raises(QuantError, match="vLLM-Ascend has W8A16 for dense Linears only, and this"):
        plan_of(moe, tmp_path, limit, "ascendv1_saver", name="qwen3_omni_w8a8")
    del limit["as"]
    (keep,) = plan_of(moe, tmp_path, limit, "ascendv1_saver", name="qwen3_omni_w8a8").keep
    assert keep.better is None
