"""The page of an analysis, from an analysis that is written by hand."""

from __future__ import annotations

from dataclasses import replace

from msmodelslim_omni.analysis.mixed_recipe import W4, W8
from msmodelslim_omni.analysis.page import as_html
from msmodelslim_omni.analysis.result import Analysis, Choice, Round
from msmodelslim_omni.analysis.sensitivity import Error, LinearSensitivity, UnitSensitivity
from msmodelslim_omni.report.fidelity import Interval


def unit(layer: int, group: str, damage: float) -> UnitSensitivity:
    errors = {W4.name: Error(10 * damage, {"text": 10 * damage}), W8.name: Error(damage, {"text": damage})}
    linear = LinearSensitivity(f"layers.{layer}.{group}", (8, 8), {W4.name: 0.1, W8.name: 0.01}, errors, 1.5, 0.02)
    return UnitSensitivity(layer, group, (linear,), {}, {W4.name: damage, W8.name: damage / 100})


ANALYSIS = Analysis(
    model_type="Qwen2.5-Omni-7B", model_path="model", dataset="data", samples=3, tokens_by_modality={"text": 30},
    units=(unit(1, "down", 0.03), unit(0, "down", 0.01), unit(1, "o", 0.0)), exclude=("*.layers.1.mlp.down_proj",),
    choice=None, device="cpu", seed=0, versions={}, seconds=1.0, seconds_by_phase={}, peak_rss_bytes=1,
    warnings=("<b>a warning</b>",),
)  # fmt: skip


def test_page_names_the_worst_units_and_what_to_exclude() -> None:
    page = as_html(ANALYSIS)
    assert "layer 1 down" in page and "75.0% of the damage" in page and "1 of 3 units" in page
    assert "*.layers.1.mlp.down_proj" in page
    assert page.index("layers.1.down") < page.index("layers.0.down") < page.index("layers.1.o")
    assert "&lt;b&gt;a warning" in page and "<b>a warning" not in page
    assert page.count("<svg") == 2 and "src=" not in page and "<script" not in page


def test_page_of_some_units_says_which() -> None:
    page = as_html(replace(ANALYSIS, patterns=("*.down_proj", "*<o>")))
    assert "Only units with a Linear that matches `*.down_proj`, `*&lt;o&gt;` were measured" in page
    assert "of quantizing these units to int4" in page and "of quantizing everything to int4" in as_html(ANALYSIS)


def test_page_of_a_search_begins_with_the_rounds() -> None:
    kl = Interval(0.02, 0.01, 0.03)
    trial = Round("all int4", {W4.name: 3}, 0.04, 0.04, 1000, 1000, 0.04, kl)
    choice = Choice(None, 0.01, (trial,), 1, False, {}, "recipe.yaml", "model", "a", "b", ())
    page = as_html(replace(ANALYSIS, choice=choice))
    assert "a KL of at most 0.01. No recipe that was tried reaches it" in page
    assert page.index("1 all int4*") < page.index("Where the damage is") and "0.02000" in page
