"""GPTQ or the clip search: the rounding of a group that changes the output of its block least on the probe samples.

GPTQ corrects errors by the correlations of the inputs in H. With few tokens per input some of these are chance, and the
correction adds error on other tokens. The probe samples are kept out of H if there are enough others. With many tokens
nothing is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..models import LinearGroup
from ..numerics import QuantizedLinear, WeightChecks, dequantize, relative_error
from ..statistics import Gram
from .gptq import has_few_tokens
from .rounding import round_group
from .work import LayerWork


def better_rounding(
    work: LayerWork, group: LinearGroup, gram: Gram, by_gptq: Mapping[str, QuantizedLinear], checks: WeightChecks
) -> tuple[LayerWork, dict[str, QuantizedLinear]]:
    """`by_gptq`, or the same Linears after a clip search alone, and the layer with a note of the comparison."""
    if work.probe is None or not by_gptq or not has_few_tokens(gram):
        return work, dict(by_gptq)
    weights = ((linear, work.weight(linear)) for linear in by_gptq)
    clipped = round_group(weights, {linear: work.schemes[linear] for linear in by_gptq}, gram, None, work.team, checks)
    candidates = (_block_weights(work, group, rounded) for rounded in (by_gptq, clipped))
    error, of_clip = work.probe.block_errors(group.block, candidates)
    taken = by_gptq if error <= of_clip else clipped
    note = (
        f"{group.name}: {gram.tokens} tokens for {gram.in_features} inputs; GPTQ's output error is"
        f" {relative_error(error, of_clip):.3f}x that of the clip search on the probe samples"
        + ("" if taken is by_gptq else "; rounded by the clip search")
    )
    return replace(work, notes=(*work.notes, note)), dict(taken)


def _block_weights(
    work: LayerWork, group: LinearGroup, rounded: Mapping[str, QuantizedLinear]
) -> dict[str, torch.Tensor]:
    """The weights of the block if these Linears are rounded and everything else is float.

    The probe's blocks get the input of the unscaled layer, so factors that are folded into a norm are left out.
    """
    from_norm = {
        linear: columns
        for other in work.spec.groups
        if other.subgraph == "norm-linear"
        for linear in other.linears
        if (columns := work.fold(linear).columns) is not None
    }
    weights = {
        name: work.tensor(name).to(torch.float32)
        for name in work.changed
        if name.startswith(f"{group.block}.") and name.removesuffix(".weight") not in rounded
    }
    weights |= {f"{linear}.weight": dequantize(quantized) for linear, quantized in rounded.items()}
    for linear, columns in from_norm.items():
        if f"{linear}.weight" in weights:
            weights[f"{linear}.weight"] = weights[f"{linear}.weight"] / columns
    return weights
