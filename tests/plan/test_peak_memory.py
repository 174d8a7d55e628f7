"""--max_memory and the estimated peak: the budget for a limit, and identical output bytes for every limit."""

from __future__ import annotations

import importlib
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
from msmodelslim_omni.calibration import CalibSample, CalibSet, MediaFacts
from msmodelslim_omni.models.inputs import MODALITIES
from msmodelslim_omni.plan.peak_memory import (
    card_memory,
    fit_budget,
    fit_card,
    gram_disk_bytes,
    peak_memory,
    phase_memory,
    refit_budget,
)
from msmodelslim_omni.plan.plan import QuantPlan
from msmodelslim_omni.run.forecast import assumed_extent, forecast
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.runtime.budget import DEFAULT_BUDGET, MIB, NO_SAMPLES, Extent


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
def test_plan_fits_its_limit_or_the_error_names_one_that_works(plan: QuantPlan, extent: Extent, limit: int) -> None:
    try:
        fitted = fit_budget(plan, extent, limit)
    except QuantError as error:
        enough = int(float(re.search(r"--max_memory ([\d.]+)GiB", error.hint or "")[1]) * 2**30)  # type: ignore[index]
        assert enough > limit
        assert peak_memory(fit_budget(plan, extent, enough), extent) <= enough
    else:
        assert peak_memory(fitted, extent) <= limit
        assert replace(fitted, budget=plan.budget) == plan  # only the budget changes


def test_larger_limit_keeps_more_tensors_in_memory(plan: QuantPlan) -> None:
    budgets = [fit_budget(plan, Extent(10_000, 1024, 4), gib << 30).budget for gib in (2, 4, 8, 16)]
    assert [b.towers for b in budgets] == sorted({b.towers for b in budgets})
    assert [b.hidden for b in budgets] == sorted({b.hidden for b in budgets})
    assert all(b.read_ahead for b in budgets[1:])


def test_more_layers_or_samples_do_not_raise_the_peak(plan: QuantPlan) -> None:
    deeper = replace(plan, layers=plan.layers * 10)
    few, more, most = (Extent(tokens, 512, 4) for tokens in (10_000, 100_000, 1_000_000))
    assert phase_memory(deeper, few) == phase_memory(plan, few)
    assert peak_memory(plan, most) == peak_memory(plan, more)


def test_budget_of_h_fits_the_memory_of_a_card(plan: QuantPlan) -> None:
    """The process and what stays on the host are not on the card. The least budget of H that fits none is an error."""
    extent = Extent(100_000, 1024, 4)
    needed = card_memory(plan, extent)
    assert 0 < needed < peak_memory(plan, extent) - 600 * MIB
    assert card_memory(plan, replace(extent, media=8 << 30)) == needed
    assert card_memory(replace(plan, budget=replace(plan.budget, hidden=1 << 40)), extent) == needed
    assert fit_card(plan, extent, 2 * needed) == plan
    with pytest.raises(QuantError, match=r"the card has 0\.01 GiB, but this run needs about") as caught:
        fit_card(plan, extent, 10 * MIB)
    assert "--device cpu" in caught.value.hint


def test_small_card_gets_a_smaller_budget_of_h(tiny: Path, index: Path) -> None:
    """With layers 16 times as wide as the tiny Omni's."""
    plan = prepare(QuantRequest(tiny, device="cpu", quant_type="w4a16", dataset=str(index))).plan
    shapes = {n: tuple(16 * size for size in shape) for n, shape in plan.layer_spec.shapes.items()}
    wide = replace(plan, layer_spec=replace(plan.layer_spec, shapes=shapes))
    extent = Extent(100_000, 512, 1)
    total = int((card_memory(wide, extent) - 10 * MIB) / 0.9)
    fitted = fit_card(wide, extent, total)
    assert fitted.budget.matrix < wide.budget.matrix and card_memory(fitted, extent) <= 0.9 * total
    assert replace(fitted, budget=wide.budget) == wide


def test_towers_are_not_loaded_for_text_only_samples(tiny: Path, index: Path, tmp_path: Path) -> None:
    for_text, for_all = (
        prepare(QuantRequest(tiny, device="cpu", dataset=str(d))).plan for d in (index, mixed_index(tmp_path))
    )
    assert (for_text.budget.towers, for_all.budget.towers) == (0, DEFAULT_BUDGET.towers)


def test_data_free_run_has_one_small_phase(tiny: Path) -> None:
    plan = prepare(QuantRequest(tiny, device="cpu", config_path=MINMAX)).plan
    assert assumed_extent(plan, None) == NO_SAMPLES
    assert set(phase_memory(plan, NO_SAMPLES)) == {"layers"}
    assert forecast(plan, NO_SAMPLES).peak_memory_bytes < 600 * MIB


def test_assumed_extent_of_samples(tiny: Path, tmp_path: Path) -> None:
    """Text counts one token per three bytes. Media count by what their files say, in addition to their text."""
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
    single = [assumed_extent(mixed.plan, replace(mixed.calib, samples=(s,))) for s in mixed.calib.samples]
    assert assumed.tokens == sum(extent.tokens for extent in single)
    assert [bool(extent.media) for extent in single] == [False, True, True, True]
    unknown = [replace(sample, media=()) for sample in mixed.calib.samples]
    guessed = [assumed_extent(mixed.plan, replace(mixed.calib, samples=(s,))) for s in unknown]
    assert [extent.tokens > 512 for extent in guessed] == [False, True, True, True]
    assert assumed.longest == max(extent.longest for extent in single) == max(extent.tokens for extent in single)
    assert max(extent.longest for extent in guessed) == max(extent.tokens for extent in guessed) + 512
    assert assumed.modalities == 4


@pytest.mark.parametrize("kind", ["w8a8", pytest.param("w4a16", marks=pytest.mark.full)])
def test_limit_keeps_output_bytes(kind: str, tiny: Path, index: Path, tmp_path: Path) -> None:
    """With the smallest possible limit, no tensor is kept in memory and each is re-read when needed."""
    recipe = fast_recipe(tmp_path) if kind == "w8a8" else int4_recipe(tmp_path)
    common = ("--config_path", recipe, "--dataset", index)
    refused = quant(tiny, tmp_path / "out", *common, "--max_memory", "300MiB")
    assert "--max_memory is 0.29 GiB" in refused.fault()
    enough = re.search(r"--max_memory ([\d.]+GiB)", refused.err)
    assert enough is not None and not (tmp_path / "out").exists()
    quant(tiny, tmp_path / "least", *common, "--max_memory", enough[1]).done()
    quant(tiny, tmp_path / "default", *common).done()
    assert files(tmp_path / "least") == files(tmp_path / "default")


def test_budget_is_divided_again_for_the_measured_extent(plan: QuantPlan) -> None:
    """The budget of H stays unchanged, because the work folder was made for it."""
    assumed, measured, too_long = Extent(10_000, 1024, 4), Extent(60_000, 1500, 4), Extent(60_000, 32_000, 4)
    first = fit_budget(plan, assumed, 1400 * MIB)
    refitted = refit_budget(first, measured)
    assert (refitted.budget.matrix, refitted.budget.factor) == (first.budget.matrix, first.budget.factor)
    assert refitted.budget.hidden < first.budget.hidden
    assert peak_memory(refitted, measured) <= 1400 * MIB < peak_memory(first, too_long)
    message = r"--max_memory is 1\.37 GiB, but this run needs .* 60000 tokens, 32000 in one sample"
    with pytest.raises(QuantError, match=message):
        refit_budget(first, too_long)
    assert refit_budget(plan, too_long) == plan  # no limit


def test_h_that_does_not_fit_is_on_disk(
    tiny: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H and its factorization: two matrices per input, 256 or 512 wide. The plan says so, and so does the report."""
    module = importlib.import_module("msmodelslim_omni.plan.peak_memory")  # the room exports a function of this name
    monkeypatch.setattr(module, "_BUDGET_OPTIONS", ((1 << 10, 1 << 16, False),))
    words = ("--config_path", int4_recipe(tmp_path), "--dataset", index, "--max_memory", "2GiB", "--json")
    planned = quant(tiny, tmp_path / "out", *words, "--dry_run").done().json
    narrow, wide = 2 * 4 * 256**2, 2 * 4 * 512**2
    assert planned["gram_disk_bytes"] == {"qkv": narrow, "o": narrow, "gate_up": narrow, "down": wide}
    assert "H of the input of down: on disk" in quant(tiny, tmp_path / "out", *words[:-1], "--dry_run").done().out
    layers = quant(tiny, tmp_path / "out", *words).done().json["layers"]
    assert all(record["reason"].endswith("on disk") for layer in layers for record in layer["smoothing"])
    assert not [path for path in tmp_path.rglob("*") if path.stat().st_size == 4 * 512**2]


def test_h_that_fits_takes_no_disk(plan: QuantPlan) -> None:
    assert gram_disk_bytes(plan, Extent(10_000, 1024, 4)) == {} == gram_disk_bytes(plan, NO_SAMPLES)


def test_samples_that_are_longer_than_assumed(tiny: Path, tmp_path: Path) -> None:
    """The estimate uses the bytes of the text. If the text has more tokens, the run stops before its first layer."""
    index = write_index(tmp_path / "data", {"text": "1 2 3 4 " * 400})
    options = ("--config_path", fast_recipe(tmp_path), "--dataset", index)
    plan = prepare(QuantRequest(tiny, device="cpu", config_path=str(fast_recipe(tmp_path)), dataset=str(index)))
    limit = round(plan.forecast.peak_memory_bytes / 0.9 * 1.01)
    refused = quant(tiny, tmp_path / "out", *options, "--max_memory", limit)
    assert "GiB, but this run needs" in refused.fault() and "towers 1/1" in refused.err
    assert not (tmp_path / "out" / "config.json").exists()
    enough = re.search(r"--max_memory ([\d.]+GiB)", refused.err)
    assert enough is not None
    quant(tiny, tmp_path / "out", *options, "--max_memory", enough[1]).done()


def test_limit_that_is_not_a_size(tiny: Path, tmp_path: Path) -> None:
    assert "'much' is not a size" in quant(tiny, tmp_path / "out", "--max_memory", "much").fault()


# --- against measured memory, at the full widths ------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 3B model with two decoder layers and all other parts, 7 GB."""
    path = tmp_path_factory.mktemp("3b") / "model"
    make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "3b", str(path), "--layers", "2"]
    subprocess.run(make, check=True, capture_output=True)
    return path


@pytest.mark.full
@pytest.mark.parametrize("recipe", [MINMAX, "qwen2_5_omni_w8a8", "qwen2_5_omni_w4a16"])
def test_estimated_peak_is_within_15_percent_of_measured(recipe: str, two_layers: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path, *({"text": " ".join(f"word{n * i % 97}" for i in range(200))} for n in range(1, 9)))
    command = [sys.executable, "-m", "msmodelslim_omni", "quant", "--model_path", two_layers, "--device", "cpu"]
    command += ["--save_path", tmp_path / "out", "--config_path", recipe, "--json"]
    command += ["--dataset", index] if recipe != MINMAX else []
    estimated, measured = (
        json.loads(subprocess.run([*map(str, command), *more], check=True, capture_output=True).stdout)
        for more in (["--dry_run"], [])
    )
    assert estimated["peak_memory_bytes"] == pytest.approx(measured["peak_rss_bytes"], rel=0.15)


def test_plan_knows_the_media(plan: QuantPlan) -> None:
    """A clip of 60 frames of 1080p: 30 pairs of frames, and their memory. One of 4K takes 125 MB more."""
    limited = replace(plan, calibration=plan.calibration.model_copy(update={"max_pixels": 200_704, "max_tokens": 8192}))

    def extent(*media: MediaFacts) -> Extent:
        parts = [{"type": found.kind, found.kind: Path("a")} for found in media]
        sample = CalibSample("a:1", ({"role": "user", "content": parts},), False, media)
        return assumed_extent(limited, CalibSet(Path("a"), (sample,), ()))

    clip = extent(MediaFacts("video", 1920 * 1080, 30.0))
    assert clip.longest == 30 * 257 + 1
    assert clip.media == 20 * 1920 * 1080 + 128 * 1024 * 30 * 257
    assert extent(MediaFacts("video", 3840 * 2160, 30.0)).media - clip.media == 20 * 3 * 1920 * 1080
    assert extent(MediaFacts("image", 64_000_000)).media > 1_000_000_000
    assert extent(MediaFacts("audio", seconds=600.0, samples=600 * 48_000)).longest == 8192
    small, large = (phase_memory(limited, found)["towers"] for found in (extent(MediaFacts("image", 784)), clip))
    assert large - small > 900 * MIB
