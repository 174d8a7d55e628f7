"""The simulated card refuses and counts what a card would; data-free recipes give on it what they give on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import command, quant

from msmodelslim_omni.runtime.device import resolve_device
from simulated_card.card import Graph, Kind, graph, simulated_card

KINDS: tuple[Kind, ...] = ("npu", "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_cpu(kind: Kind) -> None:
    x = torch.arange(12.0).view(3, 4)
    with simulated_card(kind):
        there = x.to(f"{kind}:0")
        assert there.device == torch.device(f"{kind}:0") and not there.is_cpu
        assert torch.equal((there @ there.T).cpu(), x @ x.T)
        assert torch.equal(there[1:, [0, 2]].cpu(), x[1:, [0, 2]])
        there[0] = 7.0
        assert float(there[0].sum()) == 28.0


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_a_card_refuses(kind: Kind) -> None:
    with simulated_card(kind):
        x = torch.ones((3, 4), device=f"{kind}:0")
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones((3, 4))
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="integers"):
            x.to(torch.int64) @ x.to(torch.int64).T


def test_an_npu_has_no_float64_and_no_complex_numbers() -> None:
    with simulated_card("npu"):
        x = torch.ones(3, device="npu:0")
        for dtype in (torch.float64, torch.complex64):
            with pytest.raises(RuntimeError, match="on an NPU"):
                x.to(dtype)
    with simulated_card("cuda"):
        assert torch.ones(3, device="cuda:0").to(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_counts_by_hand(kind: Kind) -> None:
    with simulated_card(kind) as counts:
        x = torch.ones((3, 4)).to(f"{kind}:0")  # a copy
        y = (x + 1).sum()  # two kernels
        float(y)  # a wait
        x[x > 0]  # two kernels, and a wait for the size of the mask
        x.T.cpu()  # a copy, for which the host waits; no kernel for the view
    assert (counts.waits.total(), counts.copies.total()) == (3, 2)
    assert counts.launches.total() == 6  # add, sum, compare, select, and the copies
    assert "waits: 3" in counts.table()


def test_a_graph_is_one_launch_and_must_not_wait() -> None:
    with simulated_card("npu") as counts:
        x = torch.zeros(2, device="npu:0")
        recorded = Graph()
        with graph(recorded):
            x.add_(1)
            x.mul_(3)
        x.zero_()
        before = counts.launches.total()
        recorded.replay()
        assert counts.launches.total() == before + 1
        assert x.tolist() == [3.0, 3.0]
        with graph(Graph()), pytest.raises(RuntimeError, match="captured"):
            float(x[0])


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_card_outside(kind: Kind) -> None:
    with simulated_card(kind):
        assert resolve_device(kind).name == f"{kind}:0"
    assert resolve_device("auto").name == "cpu"


@pytest.mark.parametrize(("kind", "recipe"), [("npu", "qwen2_5_omni_w8a16"), ("cuda", "qwen2_5_omni_fp8_block")])
def test_a_data_free_recipe_gives_the_bytes_of_the_cpu(tiny: Path, tmp_path: Path, kind: Kind, recipe: str) -> None:
    quant(tiny, tmp_path / "cpu", "--config_path", recipe).done()
    with simulated_card(kind):
        command(
            "quant", "--model_path", tiny, "--save_path", tmp_path / kind, "--device", kind, "--config_path", recipe
        ).done()
    expected = sorted((tmp_path / "cpu").rglob("*.safetensors"))
    assert expected
    for file in expected:
        assert (tmp_path / kind / file.relative_to(tmp_path / "cpu")).read_bytes() == file.read_bytes()
