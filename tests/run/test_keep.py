"""keep: the units that cost most stay in a better precision within the limits; a resumed run makes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import change_recipe
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.models import derive_model_type
from msmodelslim_omni.plan.plan import QuantPlan, make_plan
from msmodelslim_omni.recipe.schema import load_recipe
from msmodelslim_omni.run.keep import Candidate, choose
from msmodelslim_omni.run.keep_limits import extra_bytes, keep_budget
from msmodelslim_omni.storage.checkpoint import open_checkpoint

LAYERS = 2
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
