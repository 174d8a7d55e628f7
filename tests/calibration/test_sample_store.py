"""Stored stems and hidden states: tensors come back unchanged, from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from growth import python_calls

from msmodelslim_omni.calibration.sample_store import HiddenStates, StemStore
from msmodelslim_omni.models.inputs import LayerInput

CPU = torch.device("cpu")


def layer_input(tokens: int) -> LayerInput:
    cos, sin = torch.randn(3, 1, tokens, 4), torch.randn(3, 1, tokens, 4)
    arguments = {
        "position_embeddings": (cos, sin),
        "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril(),
        "position_ids": torch.arange(tokens)[None],
    }
    return LayerInput(torch.randn(1, tokens, 8), arguments)


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_stem_reads_back_unchanged(tmp_path: Path, budget: int) -> None:
    store = StemStore(tmp_path / "stem", budget)
    inputs, modality = layer_input(6), torch.tensor([0, 0, 1, 2, 3, 3], dtype=torch.int8)
    assert not store.has(4)
    store.write(4, inputs, modality)
    assert store.has(4) and not store.has(3)
    assert torch.equal(store.hidden(4), inputs.hidden)
    assert torch.equal(store.modality(4), modality) and store.modality(4).dtype == torch.int8
    for _ in range(2):  # the second read comes from memory if the budget allows
        arguments = store.arguments(4, CPU)
        assert arguments.keys() == inputs.arguments.keys()
        assert isinstance(arguments["position_embeddings"], tuple)
        pairs = zip(arguments["position_embeddings"], inputs.arguments["position_embeddings"], strict=True)
        assert all(torch.equal(read, written) for read, written in pairs)
        for name in ("attention_mask", "position_ids"):
            read = arguments[name]
            assert isinstance(read, torch.Tensor)
            assert torch.equal(read, inputs.arguments[name]) and read.dtype == inputs.arguments[name].dtype


def test_stem_keeps_the_order_of_a_long_tuple(tmp_path: Path) -> None:
    """With more than ten parts, sorting their names as text would change the order."""
    store = StemStore(tmp_path, 0)
    parts = tuple(torch.full((1,), float(i)) for i in range(12))
    store.write(0, LayerInput(torch.zeros(1, 1, 2), {"many": parts}), torch.zeros(1, dtype=torch.int8))
    many = store.arguments(0, CPU)["many"]
    assert [float(part) for part in many] == list(range(12))


def test_stem_is_read_by_another_store(tmp_path: Path) -> None:
    inputs = layer_input(3)
    StemStore(tmp_path, 1 << 20).write(0, inputs, torch.zeros(3, dtype=torch.int8))
    reopened = StemStore(tmp_path, 1 << 20)
    assert reopened.has(0)
    assert torch.equal(reopened.hidden(0), inputs.hidden)


@pytest.mark.parametrize("budget", [0, 4 * 8 * 5, 1 << 20])  # memory for no sample, one sample, and all
def test_hidden_states_read_back_unchanged(tmp_path: Path, budget: int) -> None:
    lengths = [5, 1, 7]
    samples = [torch.randn(1, length, 8) for length in lengths]
    states = HiddenStates(tmp_path / "hidden.safetensors", lengths, 8, budget)
    states.write(iter(samples))
    assert len(states) == 3
    reopened = HiddenStates(tmp_path / "hidden.safetensors", lengths, 8, budget)
    for store in (states, reopened):
        for number in (2, 0, 1, 0):
            assert torch.equal(store.read(number), samples[number])


def test_cache_stays_within_the_budget(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "hidden.safetensors", [5, 1, 7], 8, budget=4 * 8 * 6)
    states.write(torch.randn(1, length, 8) for length in [5, 1, 7])
    assert [states._cache.get(number) is not None for number in range(3)] == [True, True, False]


def test_hidden_states_are_stored_in_float32(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "hidden.safetensors", [2], 4, 0)
    states.write([torch.ones(1, 2, 4, dtype=torch.float64)])
    assert states.read(0).dtype == torch.float32


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "hidden.safetensors", [2, 2], 4, 1 << 20)

    def failing_samples() -> object:
        yield torch.ones(1, 2, 4)
        raise RuntimeError("the layer failed")

    with pytest.raises(RuntimeError, match="the layer failed"):
        states.write(failing_samples())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_reading_one_sample_back_does_not_cost_more_with_more_samples(tmp_path: Path) -> None:
    def calls_per_sample(count: int) -> float:
        states = HiddenStates(tmp_path / f"{count}.safetensors", [1] * count, 4, budget=0)
        states.write((torch.zeros(1, 1, 4) for _ in range(count)), sync=False)
        return python_calls(lambda: [states.read(number) for number in range(count)]) / count

    assert calls_per_sample(400) < 1.1 * calls_per_sample(100)


def test_states_that_were_written_again_are_read_anew(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "hidden.safetensors", [1, 2], 4, budget=0)
    for value in (1.0, 2.0):
        states.write(torch.full((1, length, 4), value) for length in (1, 2))
        assert states.read(1).tolist() == [[[value] * 4] * 2]
