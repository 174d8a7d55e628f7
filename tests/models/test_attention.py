"""Attention that tokens receive: by hand, and compared with the probabilities of the library's eager attention."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import SPEC, build, layer_weights, sample
from tiny_layer import received_attention as received_attention_of_library

from msmodelslim_omni.models import attention
from msmodelslim_omni.models.attention import AttentionRecord, received_attention
from msmodelslim_omni.statistics.capture import run_layer


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


def test_value_group_is_the_input_of_v_proj() -> None:
    group = SPEC.value_group
    assert group is not None
    assert "self_attn.v_proj" in group.linears
