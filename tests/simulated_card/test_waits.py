"""How often the host waits for a card, so that waits in loops over candidates, blocks of rows or columns stay out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import mixed_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics import QuantScheme, WeightChecks
from msmodelslim_omni.processors.gptq import factorize
from msmodelslim_omni.processors.rounding import round_group
from msmodelslim_omni.processors.smooth import output_errors
from msmodelslim_omni.statistics.gram import Gram
from simulated_card.card import simulated_card

INT8 = QuantScheme(8, 8, "minmax")
INT4 = QuantScheme(4, None, "gptq", group_size=32, symmetric=False)
DEVICE = "npu:0"


def waits_of_rounding(width: int, scheme: QuantScheme) -> int:
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0))
    weights = {name: x[:rows].clone() for name, rows in (("q", width), ("k", width // 2), ("v", width // 2))}
    with simulated_card("npu") as counts:
        gram = Gram((x.T @ x).to(DEVICE), None, len(x))
        cholesky = factorize(gram) if scheme is INT4 else None
        before = counts.waits.total()
        on_card = [(name, weight.to(DEVICE)) for name, weight in weights.items()]
        rounded = round_group(on_card, dict.fromkeys(weights, scheme), gram, cholesky)
        waits = counts.waits.total() - before
        integers = {name: linear.qweight.cpu() for name, linear in rounded.items()}
    on_cpu = Gram(x.T @ x, None, len(x))
    expected = round_group(
        weights.items(), dict.fromkeys(weights, scheme), on_cpu, factorize(on_cpu) if cholesky else None
    )
    for name, linear in expected.items():
        assert float((linear.qweight != integers[name]).float().mean()) < 1e-3  # ties may differ
    return waits


@pytest.mark.parametrize(("scheme", "waits"), [(INT8, 1), (INT4, 2)])
def test_rounding_three_linears_waits_as_often_at_every_width(scheme: QuantScheme, waits: int) -> None:
    """For the limits of weights and scales, and for the numbers of GPTQ's factor."""
    assert [waits_of_rounding(width, scheme) for width in (64, 160)] == [waits, waits]


def test_the_errors_of_smoothing_do_not_wait() -> None:
    with simulated_card("npu") as counts:
        x, weight = torch.ones(20, 64).to(DEVICE), torch.ones(96, 64).to(DEVICE)
        checks = WeightChecks()
        output_errors(x, weight, INT8, [torch.ones(64).to(DEVICE)] * 2, checks)
        assert counts.waits.total() == 0
        checks.raise_fault()
        assert counts.waits.total() == 1


def test_results_come_with_the_limits_in_one_copy() -> None:
    with simulated_card("npu") as counts:
        checks, result = WeightChecks(), torch.tensor([[1.0, 2.0]]).to(DEVICE)
        checks.name = "q_proj"
        checks.at_most(torch.ones(()).to(DEVICE), 1.0, lambda value: QuantError(f"{value} is above 1"))
        on_cpu = torch.tensor([3.0])
        assert [tensor.tolist() for tensor in checks.checked([result, on_cpu])] == [[[1.0, 2.0]], [3.0]]
        assert counts.waits.total() == 1
        checks.at_most(torch.full((), 2.0).to(DEVICE), 1.0, lambda value: QuantError(f"{value} is above 1"))
        with pytest.raises(QuantError, match=r"q_proj\.weight: 2\.0 is above 1"):
            checks.checked([result])


@pytest.mark.full
@pytest.mark.parametrize(("recipe", "waits_of_a_layer"), [("qwen2_5_omni_w8a8", 35), ("qwen2_5_omni_w4a16", 62)])
def test_waits_of_a_layer(tmp_path: Path, recipe: str, waits_of_a_layer: int) -> None:
    """With four samples, each of which is waited for when it is written and checked."""
    model = make_tiny_omni(tmp_path / "model", layers=2)
    index = mixed_index(tmp_path / "samples")
    words = [sys.executable, "-m", "simulated_card.count", *map(str, (model, tmp_path / "out", index, recipe))]
    root = Path(__file__).parents[2]
    paths = f"{root}:{root / 'tests'}"
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.rpartition(":")[2]) <= 2 * waits_of_a_layer
