"""Shipped recipes, resumed after a stop, and the other commands give on a simulated card what they give on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulated_card.card import Kind

ROOT = Path(__file__).parents[2]


def outcomes(folder: Path, kind: Kind, *recipes: str) -> dict[str, str]:
    """What `run_all` prints for each recipe and command."""
    words = [sys.executable, "-m", "simulated_card.run_all", str(folder), kind, *recipes]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", ROOT / "examples"))
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_recipes_give_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    """The other recipes, commands and kinds: see below, they take minutes."""
    recipes = ("qwen2_5_vl_nf4_awq", "qwen2_5_vl_fp8_block", "qwen2_5_omni_nf4")
    assert outcomes(tmp_path, "cuda", *recipes) == dict.fromkeys(recipes, "equal")


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_every_recipe_and_every_command_gives_the_bytes_of_the_cpu(tmp_path: Path, kind: Kind) -> None:
    different = {name: what for name, what in outcomes(tmp_path, kind).items() if what != "equal"}
    assert different == {}
