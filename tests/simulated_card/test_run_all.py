"""Shipped recipes, resumed after a stop, and the other commands give on a simulated card what they give on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulated_card.card import Kind

ROOT = Path(__file__).parents[2]


def printed(module: str, folder: Path, kind: Kind, *recipes: str) -> str:
    words = [sys.executable, "-m", f"simulated_card.{module}", str(folder), kind, *recipes]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", ROOT / "examples"))
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def outcomes(folder: Path, kind: Kind, *recipes: str) -> dict[str, str]:
    """What `run_all` prints for each recipe and command."""
    return dict(line.split(" ", 1) for line in printed("run_all", folder, kind, *recipes).splitlines())


def test_recipes_give_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    """The other recipes, commands and kinds: see below, they take minutes."""
    recipes = ("qwen2_5_vl_nf4_awq", "qwen2_5_omni_fp8_block")
    assert outcomes(tmp_path, "cuda", *recipes) == dict.fromkeys(recipes, "equal")


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_every_recipe_and_every_command_gives_the_bytes_of_the_cpu(tmp_path: Path, kind: Kind) -> None:
    different = {name: what for name, what in outcomes(tmp_path, kind).items() if what != "equal"}
    assert different == {}


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_tuning_comes_to_the_numbers_of_the_cpu(tmp_path: Path, kind: Kind) -> None:
    """`--effort best`: the same integers; of the tuned numbers, rounded as they are stored, at most 2 % of a tensor."""
    found = json.loads(printed("tuned", tmp_path, kind).splitlines()[-1])
    on_card, on_cpu = found["kl"]
    assert on_card == pytest.approx(on_cpu, rel=1e-3) and min(on_cpu) < 0.8 * on_cpu[0]
    assert found["integers"] == [] and found["share"] <= 0.02
