"""How often the host waits for a card, so that waits in loops over candidates, blocks of rows or columns stay out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import mixed_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics import QuantScheme, WeightChecks, quantize_weight
from msmodelslim_omni.processors.gptq import factorize, round_in_order
from msmodelslim_omni.processors.rounding import round_group
from msmodelslim_omni.processors.smooth import output_errors
from msmodelslim_omni.statistics.gram import Gram
from simulated_card.card import Kind, simulated_card

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


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_rounding_three_linears_waits_once_at_every_width(scheme: QuantScheme) -> None:
    """For the limits of weights and scales."""
    assert [waits_of_rounding(width, scheme) for width in (64, 160)] == [1, 1]


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_gptq_needs_one_launch_for_four_inputs_and_rounds_as_on_the_cpu(kind: Kind) -> None:
    """A block of 128 inputs is recorded once for each shape. The last block has 64 inputs, a shape of its own."""
    x = torch.randn(500, 320, generator=torch.Generator().manual_seed(0))
    weight, gram = x[:48].clone(), Gram(x.T @ x, None, len(x))
    grid = quantize_weight(weight, INT4, gram.diagonal_blocks(32))
    expected = round_in_order(weight, grid, factorize(gram))
    with simulated_card(kind) as counts:
        device = f"{kind}:0"
        on_card = replace(grid, **{name: getattr(grid, name).to(device) for name in ("qweight", "scales", "zeros")})
        cholesky = factorize(Gram((x.T @ x).to(device), None, len(x)))
        linear = round_in_order(weight.to(device), on_card, cholesky)
        before, waits = counts.launches.total(), counts.waits.total()
        again = round_in_order(weight.to(device), on_card, cholesky)
        assert counts.launches.total() - before <= 320 / 4
        assert counts.waits.total() == waits
        integers = [found.qweight.cpu() for found in (linear, again)]
    assert torch.equal(integers[0], expected.qweight) and torch.equal(integers[1], expected.qweight)


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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("recipe", "waits_of_a_layer"), [("qwen2_5_omni_w8a8", 20), ("qwen2_5_omni_w4a16", 40)])
def test_waits_of_a_layer(tmp_path: Path, recipe: str, waits_of_a_layer: int) -> None:
    """Of runs that differ by one layer, with four samples, each of which is waited for when it is written."""
    index = mixed_index(tmp_path / "samples")
    two, three = (waits_of_run(tmp_path / str(layers), index, recipe, layers) for layers in (2, 3))
    assert three - two <= waits_of_a_layer


def waits_of_run(folder: Path, index: Path, recipe: str, layers: int) -> int:
    model = make_tiny_omni(folder / "model", layers=layers)
    words = [sys.executable, "-m", "simulated_card.count", *map(str, (model, folder / "out", index, recipe))]
    root = Path(__file__).parents[2]
    paths = f"{root}:{root / 'tests'}"
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rpartition(":")[2])
