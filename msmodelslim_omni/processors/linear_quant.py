"""linear_quant: round the weights of the matching Linears to integers. Only the method `gptq` needs data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..errors import QuantError
from ..models import LinearGroup
from ..recipe import LinearQuantConfig
from ..statistics import Gram
from .rounding import TOKENS_PER_INPUT, cholesky_for_gptq, round_group
from .work import LayerWork


def needs(config: LinearQuantConfig) -> Literal["", "gram"]:
    return "gram" if config.qconfig.weight.method == "gptq" else ""


def apply(work: LayerWork, config: LinearQuantConfig, linears: frozenset[str]) -> LayerWork:
    """Quantize the Linears of the layer with these relative names by their planned schemes."""
    ready = {linear: work.rounded[linear] for linear in linears if linear in work.rounded}
    work = replace(work, quantized={**work.quantized, **ready})
    for group in work.spec.groups:
        if remaining := [linear for linear in group.linears if linear in linears - set(ready)]:
            work = _quantize_group(work, group, remaining)
    return work


def _quantize_group(work: LayerWork, group: LinearGroup, linears: list[str]) -> LayerWork:
    stats = work.stats[group.name] if work.stats is not None else None
    cholesky = work.cholesky_factors.get(group.name)
    gram = stats.gram(work.importance) if stats is not None and stats.has_gram and cholesky is None else None
    weights = ((linear, work.weight(linear)) for linear in linears)
    schemes = {linear: work.schemes[linear] for linear in linears}
    cholesky = cholesky or cholesky_for_gptq(schemes, gram)
    try:
        quantized = round_group(weights, schemes, gram, cholesky, work.team)
    except QuantError as error:
        raise QuantError(f"layer {work.index}, {error.message}", error.hint) from error
    if cholesky is None and gram is not None and any(s.weight_method == "gptq" for s in schemes.values()):
        work = replace(work, notes=(*work.notes, _too_few_tokens_note(group, gram)))
    return replace(work, quantized={**work.quantized, **quantized})


def _too_few_tokens_note(group: LinearGroup, gram: Gram) -> str:
    return (
        f"{group.name}: {gram.tokens} tokens are too few for GPTQ on {gram.in_features} inputs (it needs"
        f" {round(TOKENS_PER_INPUT * gram.in_features)}); rounded to the nearest level with a clip search instead"
    )
