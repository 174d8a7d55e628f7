"""The choice of the number format of products."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
import torch
from simulated_card.card import simulated_card

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.runtime import choose_precision

CPU, LARGE = torch.device("cpu"), (2048, 2048)


def test_what_is_asked_is_taken() -> None:
    assert choose_precision("float32", CPU, LARGE).name == "float32"
    assert choose_precision("bfloat16", CPU, (8, 8)).is_reduced


def test_small_layers_are_not_measured() -> None:
    """So that results of small models do not depend on the processor."""
    assert choose_precision("auto", CPU, (1024, 1024)).name == "float32"


def test_the_faster_format_is_taken_and_the_reason_is_told() -> None:
    chosen = choose_precision("auto", CPU, LARGE)
    found = re.fullmatch(r"a product takes (\d+\.\d) times as long in float32 as in bfloat16", chosen.reason)
    assert found is not None
    if abs((ratio := float(found[1])) - 1.3) > 0.1:
        assert chosen.is_reduced == (ratio > 1.3)


def test_a_device_without_bfloat16() -> None:
    with simulated_card("npu"), patch.object(torch.npu, "is_bf16_supported", lambda: False):  # type: ignore[attr-defined]
        device = torch.device("npu:0")
        assert choose_precision("auto", device, LARGE).name == "float32"
        with pytest.raises(QuantError, match=r"compute_dtype: bfloat16, but npu:0 has no bfloat16 arithmetic"):
            choose_precision("bfloat16", device, LARGE)
