"""--max_memory and the foretold peak: what a limit is turned into, and that it changes no byte of the output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import MINMAX, fast_recipe, files, int4_recipe, mixed_index, quant, write_index
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni import QuantError
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.plan.peak_memory import (
    fit_budget,
    peak_memory,
    phase_memory,
    refit_budget,
)
from msmodelslim_omni.plan.plan import QuantPlan
from msmodelslim_omni.run.forecast import assumed_extent, forecast
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.runtime.budget import (
    DEFAULT_BUDGET,
    MIB,
    NO_SAMPLES,
    Extent,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(0, 60, 15))
    return write_index(tmp_path_factory.mktemp("data"), *texts)


@pytest.fixture(scope="module", params=["w8a8", "w4a16"])
def plan(request: pytest.FixtureRequest, tiny: Path, index: Path) -> QuantPlan:
    return prepare(QuantRequest(tiny, device="cpu", quant_type=request.param, dataset=str(index))).plan


@settings(max_examples=60, deadline=None)
@given(
    extent=st.builds(Extent, st.integers(1, 200_000), st.integers(1, 8192), st.integers(1, len(MODALITIES))),
    limit=st.integers(500, 40_000).map(lambda n: n * MIB),
)
def test_a_plan_keeps_within_its_limit_or_says_what_would_do(plan: QuantPlan, extent: Extent, limit: int) -> None:
    try:
        found = fit_budget(plan, extent, limit)
    except QuantError as error:
        least = int(float(re.search(r"--max_memory ([\d.]+)GiB", error.hint or "")[1]) * 2**30)  # type: ignore[index]
        assert least > limit
        assert peak_memory(fit_budget(plan, extent, least), extent) <= least
    else:
        assert peak_memory(found, extent) <= limit
        assert replace(found, budget=plan.budget) == plan  # nothing else is changed


def test_more_memory_is_used_for_what_would_be_read_again(plan: QuantPlan) -> None:
    budgets = [fit_budget(plan, Extent(10_000, 1024, 4), gib << 30).budget for gib in (2, 4, 8, 16)]
    assert [b.towers for b in budgets] == sorted({b.towers for b in budgets})
    assert [b.hidden for b in budgets] == sorted({b.hidden for b in budgets})
    assert all(b.read_ahead for b in budgets[1:])


def test_neither_layers_nor_samples_raise_the_peak(plan: QuantPlan) -> None:
    deeper = replace(plan, layers=plan.layers * 10)
    few, more, most = (Extent(tokens, 512, 4) for tokens in (10_000, 100_000, 1_000_000))
    assert phase_memory(deeper, few) == phase_memory(plan, few)
    assert peak_memory(plan, most) == peak_memory(plan, more)


def test_towers_are_not_loaded_for_text_alone(tiny: Path, index: Path, tmp_path: Path) -> None:
    for_text, for_all = (
        prepare(QuantRequest(tiny, device="cpu", dataset=str(d))).plan for d in (index, mixed_index(tmp_path))
    )
    assert (for_text.budget.towers, for_all.budget.towers) == (0, DEFAULT_BUDGET.towers)


def test_a_data_free_run_is_asked_for_less(tiny: Path) -> None:
    plan = prepare(QuantRequest(tiny, device="cpu", config_path=MINMAX)).plan
    assert assumed_extent(plan, None) == NO_SAMPLES
    assert set(phase_memory(plan, NO_SAMPLES)) == {"layers"}
    assert forecast(plan, NO_SAMPLES).peak_memory_bytes < 600 * MIB


def test_what_is_assumed_of_samples(tiny: Path, tmp_path: Path) -> None:
    """Text by its bytes, three a token; media by what is common, and the text beside them."""
    short, long = (
        prepare(
            QuantRequest(
                tiny, device="cpu", dataset=str(write_index(tmp_path / str(n), *({"text": "é" * n} for _ in range(2))))
            )
        )
        for n in (30, 330)
    )
    few, many = assumed_extent(short.plan, short.calib), assumed_extent(long.plan, long.calib)
    assert many == Extent(few.tokens + 2 * 200, few.longest + 200, 1)
    mixed = prepare(QuantRequest(tiny, device="cpu", dataset=str(mixed_index(tmp_path / "mixed"))))
    assert mixed.calib is not None
    assumed = assumed_extent(mixed.plan, mixed.calib)
    texts = [assumed_extent(mixed.plan, replace(mixed.calib, samples=(s,))) for s in mixed.calib.samples]
    assert assumed.tokens == sum(one.tokens for one in texts)
    assert [one.tokens > 512 for one in texts] == [False, True, True, True]
    assert assumed.longest == max(one.tokens for one in texts) + 512
    assert assumed.modalities == 4


@pytest.mark.parametrize("kind", ["w8a8", pytest.param("w4a16", marks=pytest.mark.full)])
def test_a_limit_changes_no_byte(kind: str, tiny: Path, index: Path, tmp_path: Path) -> None:
    """With the least that would do nothing is held, and everything read each time it is needed."""
    recipe = fast_recipe(tmp_path) if kind == "w8a8" else int4_recipe(tmp_path)
    common = ("--config_path", recipe, "--dataset", index)
    refused = quant(tiny, tmp_path / "out", *common, "--max_memory", "300MiB")
    assert "0.29 GiB are allowed" in refused.fault()
    least = re.search(r"--max_memory ([\d.]+GiB)", refused.err)
    assert least is not None and not (tmp_path / "out").exists()
    quant(tiny, tmp_path / "least", *common, "--max_memory", least[1]).done()
    quant(tiny, tmp_path / "default", *common).done()
    assert files(tmp_path / "least") == files(tmp_path / "default")


def test_the_limit_is_shared_out_anew_once_the_tokens_are_known(plan: QuantPlan) -> None:
    """Not H's part: the work folder was made for it."""
    assumed, true, far = Extent(10_000, 1024, 4), Extent(60_000, 1500, 4), Extent(60_000, 32_000, 4)
    first = fit_budget(plan, assumed, 1400 * MIB)
    then = refit_budget(first, true)
    assert (then.budget.matrix, then.budget.factor) == (first.budget.matrix, first.budget.factor)
    assert then.budget.hidden < first.budget.hidden
    assert peak_memory(then, true) <= 1400 * MIB < peak_memory(first, far)
    needs = r"1\.37 GiB are allowed, and this run needs .* 60000 tokens, 32000 in one sample"
    with pytest.raises(QuantError, match=needs):
        refit_budget(first, far)
    assert refit_budget(plan, far) == plan  # no limit


def test_samples_that_are_longer_than_assumed(tiny: Path, tmp_path: Path) -> None:
    """Foretold from the bytes of the text; where it has more tokens than that, the run stops before its first layer."""
    index = write_index(tmp_path / "data", {"text": "1 2 3 4 " * 400})
    words = ("--config_path", fast_recipe(tmp_path), "--dataset", index)
    plan = prepare(QuantRequest(tiny, device="cpu", config_path=str(fast_recipe(tmp_path)), dataset=str(index)))
    limit = round(plan.forecast.peak_memory_bytes / 0.9 * 1.01)
    refused = quant(tiny, tmp_path / "out", *words, "--max_memory", limit)
    assert "GiB are allowed, and this run needs" in refused.fault() and "towers 1/1" in refused.err
    assert not (tmp_path / "out" / "config.json").exists()
    enough = re.search(r"--max_memory ([\d.]+GiB)", refused.err)
    assert enough is not None
    quant(tiny, tmp_path / "out", *words, "--max_memory", enough[1]).done()


def test_a_limit_that_is_no_size(tiny: Path, tmp_path: Path) -> None:
    assert "'much' is no size" in quant(tiny, tmp_path / "out", "--max_memory", "much").fault()


# --- against what is measured, at the true widths ------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 3B with two decoder layers, 7 GB: all else is whole."""
    path = tmp_path_factory.mktemp("3b") / "model"
    make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "3b", str(path), "--layers", "2"]
    subprocess.run(make, check=True, capture_output=True)
    return path


@pytest.mark.full
@pytest.mark.parametrize("recipe", [MINMAX, "qwen2_5_omni_w8a8", "qwen2_5_omni_w4a16"])
def test_the_foretold_peak_is_within_a_seventh_of_the_measured(recipe: str, two_layers: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path, *({"text": " ".join(f"word{n * i % 97}" for i in range(200))} for n in range(1, 9)))
    command = [sys.executable, "-m", "msmodelslim_omni", "quant", "--model_path", two_layers, "--device", "cpu"]
    command += ["--save_path", tmp_path / "out", "--config_path", recipe, "--json"]
    command += ["--dataset", index] if recipe != MINMAX else []
    told, measured = (
        json.loads(subprocess.run([*map(str, command), *more], check=True, capture_output=True).stdout)
        for more in (["--dry_run"], [])
    )
    assert told["peak_memory_bytes"] == pytest.approx(measured["peak_rss_bytes"], rel=0.15)
