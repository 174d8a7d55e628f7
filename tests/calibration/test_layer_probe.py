"""LayerProbe: the errors of changed blocks and layers, against the same layers built from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_layer
import torch

from msmodelslim_omni.calibration.layer_probe import Errors, LayerProbe, add_sums, squared_errors, sums_by_modality
from msmodelslim_omni.statistics.capture import run_layer

IMPORTANCE = {0: 0.5, 1: 0.1, 2: 0.0, 3: 2.0}  # weight of a token by modality


def watched_layer() -> tuple[dict[str, torch.Tensor], list[tiny_layer.Sample], LayerProbe]:
    """Weights, samples, and a probe that has watched the layer on them."""
    weights, samples = tiny_layer.layer_weights(torch.float32), [tiny_layer.sample(9, 1), tiny_layer.sample(14, 2)]
    probe = LayerProbe(tiny_layer.build(weights), {"self_attn", "mlp"}, IMPORTANCE)
    for sample in samples:
        assert torch.equal(probe.watch(sample.inputs, sample.modality), tiny_layer.output(weights, sample))
    return weights, samples, probe


def weighted(error: torch.Tensor, modality: torch.Tensor, out: torch.Tensor) -> float:
    """Sum of |e|² / |h| over the tokens of an error e and of the float layer's output h, weighted by modality."""
    return sum(
        IMPORTANCE[m] * float(e.double().square().sum() / h.double().norm())
        for m, e, h in zip(modality.tolist(), error[0], out[0], strict=True)
    )


def test_unchanged_weights_have_no_error() -> None:
    weights, _, probe = watched_layer()
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        same = {f"{block}.{name}_proj.weight": weights[f"{block}.{name}_proj.weight"].clone() for name in names}
        assert probe.block_errors(block, [same]) == [0.0]
    assert probe.weighted_error(probe.errors(tiny_layer.build(weights))) == 0.0


@pytest.mark.parametrize("block", ["self_attn", "mlp"])
def test_block_error(block: str) -> None:
    """The error of the block's output on its own inputs, against a block built with the changed weights."""
    weights, samples, probe = watched_layer()
    changed = dict(weights)
    for name in [n for n in weights if n.startswith(block) and n.endswith(("q_proj.weight", "up_proj.weight"))]:
        changed[name] = weights[name] + 0.1 * weights[name].flip(0)
    expected = 0.0
    exact, other = tiny_layer.build(weights), tiny_layer.build(changed)
    calls: list[Any] = []
    exact.get_submodule(block).register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    with torch.inference_mode():
        for sample in samples:
            layer_out = run_layer(exact, sample.inputs)
            arguments, keywords, out = calls.pop()
            changed_out = other.get_submodule(block)(*arguments, **keywords)
            hidden = [o[0] if isinstance(o, tuple) else o for o in (changed_out, out)]
            expected += weighted(hidden[0] - hidden[1], sample.modality, layer_out)
    replaced = {name: changed[name] for name in changed if changed[name] is not weights[name]}
    assert len(replaced) == 1 and expected > 0
    found, without_change = probe.block_errors(block, [replaced, {}])
    assert found == pytest.approx(expected, rel=1e-4)
    assert without_change == 0.0  # the layer itself has not changed


def test_layer_error() -> None:
    weights, samples, probe = watched_layer()
    changed = {**weights, "mlp.down_proj.weight": 1.1 * weights["mlp.down_proj.weight"]}
    pairs = [(tiny_layer.output(changed, s), tiny_layer.output(weights, s), s.modality) for s in samples]
    expected = sum(weighted(out - exact, modality, exact) for out, exact, modality in pairs)
    assert probe.weighted_error(probe.errors(tiny_layer.build(changed))) == pytest.approx(expected, rel=1e-4)
    error, signal, *_ = probe.errors(tiny_layer.build(changed))
    for modality in range(4):
        outputs = [(tiny_layer.output(changed, s), tiny_layer.output(weights, s), s) for s in samples]
        expected_error = sum(float((a - b)[0, s.modality == modality].double().square().sum()) for a, b, s in outputs)
        expected_signal = sum(
            float((b - s.inputs.hidden)[0, s.modality == modality].double().square().sum()) for a, b, s in outputs
        )
        assert float(error[modality]) == pytest.approx(expected_error, rel=1e-4)
        assert float(signal[modality]) == pytest.approx(expected_signal, rel=1e-4)


def test_sums_of_a_sample_by_hand() -> None:
    """The layer adds 1, 2, 3 to text tokens and 400 to one more, and 5 to an audio token."""
    entering = torch.zeros(1, 5, 2)
    exact = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [400.0, 0.0], [5.0, 0.0], [3.0, 0.0]]])
    out = exact + torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 20.0], [0.0, 2.0], [0.0, 1.0]]])
    modality = torch.tensor([0, 0, 0, 2, 0], dtype=torch.int8)
    sums = add_sums(sums_by_modality([(squared_errors(entering, exact, out), modality)] * 2))
    assert isinstance(sums, Errors)
    assert sums.error.tolist() == [2 * 403, 0, 2 * 4, 0]
    assert sums.signal.tolist() == [2 * (14 + 160000), 0, 2 * 25, 0]
    assert sums.noise.tolist() == pytest.approx([2 * (1 + 1 / 2 + 400 / 400 + 1 / 3), 0, 2 * 4 / 5, 0])
    assert sums.ordinary_error.tolist() == [2 * 3, 0, 2 * 4, 0]
    assert sums.ordinary_signal.tolist() == [2 * 14, 0, 2 * 25, 0]
    assert sums.massive.tolist() == [2, 0, 0, 0]
