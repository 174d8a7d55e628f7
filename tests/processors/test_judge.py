"""With few tokens, a group is rounded by GPTQ or by the clip search, whichever changes the true output less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_layer import SPEC, build, layer_weights, output, sample, tensors, work_of

from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.models.spec import LinearGroup
from msmodelslim_omni.numerics.arithmetic import QuantizedLinear, dequantize
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import awq, judge, linear_quant
from msmodelslim_omni.processors.gptq import ENOUGH_TOKENS
from msmodelslim_omni.processors.rounding import cholesky_for_gptq, round_group
from msmodelslim_omni.processors.work import LayerWork
from msmodelslim_omni.recipe.processors import AwqConfig, LinearQuantConfig
from msmodelslim_omni.statistics import relative_weights

GPTQ = QuantScheme(4, None, "gptq", 32, symmetric=False)
GROUPS = {group.name: group for group in SPEC.groups}
RECIPE = LinearQuantConfig.model_validate(
    {
        "type": "linear_quant",
        "qconfig": {
            "weight": {
                "scope": "per_group",
                "dtype": "int4",
                "symmetric": False,
                "method": "gptq",
                "ext": {"group_size": 32},
            }
        },
    }
)
HELD_OUT = sample(tokens=60, seed=9)


def probed_work(tokens: int) -> LayerWork:
    """A float32 layer with statistics of this many tokens, and a probe on a sample that is not among them."""
    work = work_of(layer_weights(torch.float32), [sample(tokens=tokens, seed=1)], GPTQ)
    probe = LayerProbe(build(work.weights), {"self_attn", "mlp"}, work.importance)
    probe.watch(HELD_OUT.inputs, HELD_OUT.modality)
    return replace(work, probe=probe)


def misled(work: LayerWork, group: LinearGroup, tokens: int | None = None) -> LayerWork:
    """The layer with an H of wrong correlations: every other 32 inputs have the other sign.

    H within each 32 inputs stays true, which is all that the clip search needs.
    """
    assert work.stats is not None
    gram = work.stats[group.name].gram(work.importance)
    wrong = gram.rescaled((-1.0) ** (torch.arange(gram.in_features) // 32))
    stats = replace(work.stats[group.name], grams={}, weighted=replace(wrong, tokens=tokens or gram.tokens))
    return replace(work, stats={**work.stats, group.name: stats})


def rounded_by(work: LayerWork, group: LinearGroup, *, gptq: bool) -> dict[str, QuantizedLinear]:
    assert work.stats is not None
    gram = work.stats[group.name].gram(work.importance)
    schemes = dict.fromkeys(group.linears, GPTQ)
    weights = {linear: work.weight(linear) for linear in group.linears}
    return round_group(weights.items(), schemes, gram, cholesky_for_gptq(schemes, gram) if gptq else None)


def test_clip_search_is_taken_if_gptq_is_worse_on_the_probe() -> None:
    group = GROUPS["down"]
    work = misled(probed_work(300), group)
    done = linear_quant.apply(work, RECIPE, frozenset(group.linears))
    expected = rounded_by(work, group, gptq=False)["mlp.down_proj"]
    assert torch.equal(done.quantized["mlp.down_proj"].qweight, expected.qweight)
    (note,) = done.notes
    assert note.startswith("down: 300 tokens for 96 inputs; GPTQ's output error is 1.")
    assert note.endswith("x that of the clip search on the probe samples; rounded by the clip search")


def test_gptq_is_kept_if_it_is_better_on_the_probe() -> None:
    group, work = GROUPS["down"], probed_work(300)
    done = linear_quant.apply(work, RECIPE, frozenset(group.linears))
    expected = rounded_by(work, group, gptq=True)["mlp.down_proj"]
    assert torch.equal(done.quantized["mlp.down_proj"].qweight, expected.qweight)
    assert len(done.notes) == 1 and "GPTQ's output error is 0." in done.notes[0]


@pytest.mark.parametrize("missing", ["few tokens", "probe"])
def test_many_tokens_or_no_probe_are_not_judged(missing: str) -> None:
    group, width = GROUPS["down"], SPEC.shapes["mlp.down_proj.weight"][1]
    work = misled(probed_work(300), group, ENOUGH_TOKENS * width if missing == "few tokens" else None)
    work = replace(work, probe=None) if missing == "probe" else work
    done = linear_quant.apply(work, RECIPE, frozenset(group.linears))
    expected = rounded_by(work, group, gptq=True)["mlp.down_proj"]
    assert not done.notes and torch.equal(done.quantized["mlp.down_proj"].qweight, expected.qweight)


def test_error_is_that_of_the_layer_also_after_scaling() -> None:
    """down_proj is the last Linear, so the error of its block is that of the layer; no fold may change it."""
    config = AwqConfig.model_validate({"type": "awq", "n_grid": 4})
    work = awq.apply(probed_work(100), config, frozenset(SPEC.linears))
    assert {record.group for record in work.smoothing if record.alpha is not None} >= {"gate_up"}
    rounded = rounded_by(work, GROUPS["down"], gptq=True)
    changed = {**tensors(work), "mlp.down_proj.weight": dequantize(rounded["mlp.down_proj"])}
    exact = output(probed_work(100).weights, HELD_OUT)
    error = (output(changed, HELD_OUT) - exact)[0].square().sum(dim=1)
    importance = torch.tensor([work.importance[m] for m in HELD_OUT.modality.tolist()]) * relative_weights(exact[0])
    assert work.probe is not None
    (found,) = work.probe.block_errors("mlp", [judge._block_weights(work, GROUPS["down"], rounded)])
    assert found == pytest.approx(float((importance * error).sum()), rel=1e-2)
