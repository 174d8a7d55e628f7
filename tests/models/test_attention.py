"""Attention that tokens receive: by hand, and compared with the probabilities of the library's eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omni_layers import difference
from tiny_layer import SPEC, build, layer_weights, sample
from tiny_layer import received_attention as received_attention_of_library

from msmodelslim_omni.models import attention, qwen2_5_omni, qwen2_5_vl, qwen3_omni, qwen3_vl
from msmodelslim_omni.models.attention import AttentionRecord, received_attention
from msmodelslim_omni.models.inputs import LayerInput, can_join, join_samples
from msmodelslim_omni.statistics.capture import run_layer
from msmodelslim_omni.storage.checkpoint import open_checkpoint


@pytest.fixture
def layer() -> torch.nn.Module:
    return build(layer_weights())


def test_by_hand() -> None:
    """Scores log 3 and 0 of the last query give probabilities 3/4 and 1/4; the first query attends to itself."""
    query = torch.tensor([[[0.0], [1.0]]])
    key = torch.tensor([[[3.0], [1.0]]]).log()
    received = received_attention(query, key, None, scaling=1.0)
    assert received.tolist() == pytest.approx([1 + 9 / 16, 1 / 16])
    allowed = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert received_attention(query, key, allowed, scaling=1.0).tolist() == pytest.approx(
        [1 / 4 + 9 / 16, 1 / 4 + 1 / 16]
    )
    forbidden = torch.tensor([[[[0.0, -torch.inf], [0.0, -torch.inf]]]])
    assert received_attention(query, key, forbidden, scaling=1.0).tolist() == pytest.approx([2.0, 0.0])


def test_record_agrees_with_the_library(layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads read two key-value heads; blocks of a few queries give the same sums."""
    each = sample(tokens=23)
    inputs, before = each.inputs, run_layer(layer, each.inputs)
    expected = received_attention_of_library(layer_weights(), [each])
    for block_bytes in (64 << 20, 2048):
        monkeypatch.setattr(attention, "_BLOCK_BYTES", block_bytes)
        record = AttentionRecord(layer)
        assert torch.equal(run_layer(layer, inputs), before)  # recording changes nothing
        torch.testing.assert_close(record.received(), expected)
        record.remove()
    assert layer.self_attn.config._attn_implementation == "sdpa"


def test_joined_samples_do_not_see_each_other(layer: torch.nn.Module) -> None:
    """The outputs and the attention received are those of each sample alone; one of them has a mask of its own."""
    samples = [sample(tokens=tokens, seed=tokens).inputs for tokens in (9, 1, 14)]
    mask = torch.ones(14, 14, dtype=torch.bool).tril() & (torch.arange(14) != 3)[None]
    samples[2] = LayerInput(samples[2].hidden, samples[2].arguments | {"attention_mask": mask[None, None]})
    alone = [run_layer(layer, each) for each in samples]
    received = torch.cat([received_attention_of(layer, each) for each in samples])
    joined = join_samples(samples)
    assert joined.lengths == (9, 1, 14)
    assert difference(run_layer(layer, joined), torch.cat(alone, dim=1)) < 5e-6
    torch.testing.assert_close(received_attention_of(layer, joined), received)
    assert layer.self_attn.config._attn_implementation == "sdpa"
    unlike = run_layer(layer, LayerInput(joined.hidden, joined.arguments))
    assert float((unlike[:, 9:] - torch.cat(alone[1:], dim=1)).abs().max()) > 1e-3  # a test that can fail


def received_attention_of(layer: torch.nn.Module, inputs: LayerInput) -> torch.Tensor:
    record = AttentionRecord(layer)
    run_layer(layer, inputs)
    received = record.received()
    record.remove()
    return received


def test_samples_with_unknown_arguments_are_not_joined() -> None:
    assert can_join(["position_embeddings", "attention_mask", "position_ids", "cache_position"])
    assert not can_join(["position_embeddings", "something_new"])


@pytest.mark.parametrize(
    ("model", "family"),
    [("tiny", qwen2_5_omni), ("tiny_vl", qwen2_5_vl), ("tiny_qwen3_vl", qwen3_vl), ("tiny_qwen3_omni", qwen3_omni)],
)
def test_record_of_one_layer_changes_no_other(model: str, family: Any, request: pytest.FixtureRequest) -> None:
    config = open_checkpoint(request.getfixturevalue(model)).config
    before = family._layer(config, 0)
    AttentionRecord(before)
    after = family._layer(config, 1)
    names = [layer.self_attn.config._attn_implementation for layer in (before, after)]
    assert names == ["msmodelslim_recorded", "sdpa"] and after.self_attn.layer_idx == 1


def test_value_group_is_the_input_of_v_proj() -> None:
    group = SPEC.value_group
    assert group is not None
    assert "self_attn.v_proj" in group.linears
