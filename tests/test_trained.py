"""Accuracy loss of the shipped recipes on the trained tiny Omni, measured on held-out samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import command, quant

from msmodelslim_omni.run import QuantRequest, prepare, run_prepared
from msmodelslim_omni.runtime import Progress

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_omni"
MEDIA = ("image", "audio", "video")


@pytest.fixture(scope="module", params=[80, pytest.param(1, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def step(request: pytest.FixtureRequest) -> int:
    """Every how many held-out samples one is used: 80 is enough to compare hidden states, 1 uses all."""
    return int(request.param)


@pytest.fixture(scope="module")
def questions(step: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (TINY / "heldout" / "index.jsonl").read_text(encoding="utf-8").splitlines()[::step]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        for kind in MEDIA:
            if kind in entry:
                entry[kind] = str(TINY / "heldout" / entry[kind])
    index = tmp_path_factory.mktemp("questions") / "index.jsonl"
    index.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return index


@pytest.fixture(scope="module")
def reports(step: int, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eval reports of W8A8, W4A16 and plain rounding to int4, calibrated on 16 samples or on all samples."""
    folder = tmp_path_factory.mktemp("trained")
    recipes = {
        "w8a8": ("--quant_type", "w8a8", "--save_format", "compressed_tensors"),
        "w4a16": ("--quant_type", "w4a16"),
        "rounded": ("--config_path", ROOT / "benchmarks" / "recipes" / "w4a16_rounded.yaml"),
    }
    results = {}
    limit = ("--max_samples", 16) if step == 80 else ()
    for name, flags in recipes.items():
        quant(TINY / "model", folder / name, "--dataset", TINY / "calib", *limit, *flags).done()
        results[name] = evaluated(folder / name, questions)
    return results


def evaluated(output: Path, questions: Path) -> Any:
    words = ("--float", TINY / "model", "--quant", output, "--dataset", questions, "--device", "cpu")
    return command("eval", *words, "--json").done().json


def kl(report: Any, modality: str = "") -> float:
    return float((report["by_modality"][modality] if modality else report["overall"])["kl_mean"]["value"])


def hidden_error(report: Any, modality: str = "") -> float:
    """The error of the last hidden states. Unlike the KL divergence of a few texts, it hardly depends on the processor.

    W8A8 chooses among nearly equal scales by their float32 errors, and the KL of these choices differs by half.
    """
    return float((report["by_modality"][modality] if modality else report["overall"])["hidden_error"])


def test_float_answers_are_better_than_chance(reports: dict[str, Any]) -> None:
    for modality, chance in (("image", 0.15), ("audio", 0.03), ("video", 0.2)):
        assert reports["w8a8"]["by_modality"][modality]["exact_float"]["value"] > 2 * chance, modality


def test_w8a8_is_close_to_the_float_model(reports: dict[str, Any], step: int) -> None:
    for modality in ("text", *MEDIA):
        assert hidden_error(reports["w8a8"], modality) < 0.1, modality
        if step == 1:
            assert kl(reports["w8a8"], modality) < 0.002, modality
        change = reports["w8a8"]["by_modality"][modality]["exact_change"]
        assert change["low"] <= 0.0 <= change["high"], modality


def test_w4a16_is_better_than_plain_rounding(reports: dict[str, Any], step: int) -> None:
    assert hidden_error(reports["w4a16"]) < 0.8 * hidden_error(reports["rounded"])
    if step == 1:
        assert kl(reports["w4a16"]) < 0.75 * kl(reports["rounded"])
        assert kl(reports["w4a16"], "text") < 0.75 * kl(reports["rounded"], "text")
        for modality in MEDIA:
            assert kl(reports["w4a16"], modality) < kl(reports["rounded"], modality), modality


FORMS = {"on disk": {"matrix": 0, "factor": 1 << 20}, "one weighted matrix": {"matrix": 4 * 768**2}}


@pytest.mark.parametrize("form", ["on disk", pytest.param("one weighted matrix", marks=pytest.mark.full)])
def test_small_memory_budget_costs_no_accuracy(
    form: str, reports: dict[str, Any], step: int, questions: Path, tmp_path: Path
) -> None:
    """Each form that H can be given by a small budget is the same H up to its last bits."""
    request = QuantRequest(TINY / "model", device="cpu", quant_type="w4a16", dataset=str(TINY / "calib"))
    prepared = prepare(replace(request, max_samples=16 if step == 80 else None))
    budget = replace(prepared.plan.budget, **FORMS[form])
    small = replace(prepared, plan=replace(prepared.plan, budget=budget))
    report = run_prepared(small, tmp_path / "out", overwrite=False, progress=Progress())
    kinds = {record["reason"].partition("H: ")[2] for layer in report.layers for record in layer.smoothing}
    assert any("on disk" in kind for kind in kinds) == (form == "on disk")
    found = evaluated(tmp_path / "out", questions)
    assert hidden_error(found) == pytest.approx(hidden_error(reports["w4a16"]), rel=0.02)
    if step == 1:
        assert kl(found) < 1.1 * kl(reports["w4a16"])


def test_plain_rounding_has_a_measurable_loss(reports: dict[str, Any], step: int) -> None:
    """The loss of plain rounding to int4 is several times that of W8A8."""
    assert hidden_error(reports["rounded"]) > 3 * hidden_error(reports["w8a8"]) > 0
    if step == 1:
        assert kl(reports["rounded"]) > 10 * kl(reports["w8a8"]) > 0


@pytest.mark.full
def test_gptq_is_better_than_plain_rounding_in_w8a16(questions: Path, step: int, tmp_path: Path) -> None:
    found = {}
    for name in ("w8a16", "w8a16_gptq"):
        words = ("--quant_type", name, "--save_format", "compressed_tensors", "--dataset", TINY / "calib")
        quant(TINY / "model", tmp_path / name, *words).done()
        found[name] = evaluated(tmp_path / name, questions)
    assert hidden_error(found["w8a16_gptq"]) < 0.9 * hidden_error(found["w8a16"])
    if step == 1:
        assert kl(found["w8a16_gptq"]) < 0.8 * kl(found["w8a16"])
