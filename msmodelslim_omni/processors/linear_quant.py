"""linear_quant: round the weights of the matching Linears. Only `gptq` and the global scales of inputs need data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from ..errors import QuantError
from ..models import LinearGroup
from ..numerics import WeightChecks
from ..recipe import LinearQuantConfig
from ..statistics import Gram
from .judge import better_rounding
from .rounding import cholesky_for_gptq, has_enough_tokens, round_group, tokens_for_gptq
from .work import FEWEST_EXPERT_TOKENS, LayerWork

_LISTED_EXPERTS = 8


def needs(config: LinearQuantConfig) -> Literal["", "inputs", "gram"]:
    if config.qconfig.weight.method == "gptq":
        return "gram"
    return "inputs" if config.qconfig.stores_input_scale else ""


def apply(work: LayerWork, config: LinearQuantConfig, linears: frozenset[str]) -> LayerWork:
    """Quantize the Linears of the layer with these relative names by their planned schemes."""
    checks = WeightChecks()
    try:
        for group in work.spec.groups:
            if selected := [linear for linear in group.linears if linear in linears]:
                work = _quantize_group(work, group, selected, checks)
        checks.raise_fault()
    except QuantError as error:
        raise QuantError(f"layer {work.index}, {error.message}", error.hint) from error
    if note := _experts_note(work, linears):
        work = replace(work, notes=(*work.notes, note))
    return work


def _experts_note(work: LayerWork, linears: frozenset[str]) -> str:
    """Which experts too few tokens reached, for the report; empty in a data-free run."""
    if work.stats is None:
        return ""
    experts = {g.expert: g for g in work.spec.groups if g.expert is not None and linears & set(g.linears)}
    few = [number for number, group in experts.items() if work.input_stats(group) is None]
    if not few:
        return ""
    listed = ", ".join(map(str, few[:_LISTED_EXPERTS])) + (", ..." if len(few) > _LISTED_EXPERTS else "")
    return (
        f"{len(few)} of {len(experts)} experts got fewer than {FEWEST_EXPERT_TOKENS} tokens and are rounded without"
        f" data: {listed}"
    )


def _quantize_group(work: LayerWork, group: LinearGroup, linears: list[str], checks: WeightChecks) -> LayerWork:
    quantized = {linear: work.rounded[linear] for linear in linears if linear in work.rounded}
    remaining = [linear for linear in linears if linear not in quantized]
    schemes = {linear: work.schemes[linear] for linear in linears}
    stats = work.input_stats(group)
    gram = stats.gram(work.importance) if stats is not None and stats.has_gram else None
    if group.expert is not None and gram is not None and gram.tokens < FEWEST_EXPERT_TOKENS:
        gram = None
    cholesky = work.cholesky_factors.get(group.name)
    if cholesky is None and remaining:
        cholesky = cholesky_for_gptq({linear: schemes[linear] for linear in remaining}, gram)
    weights = ((linear, work.weight(linear)) for linear in remaining)
    quantized |= round_group(weights, schemes, gram if cholesky is None else None, cholesky, work.team, checks)
    by_gptq = {linear: quantized[linear] for linear in linears if schemes[linear].weight_method == "gptq"}
    if group.expert is None and cholesky is not None and gram is not None:
        work, judged = better_rounding(work, group, gram, by_gptq, checks)
        quantized |= judged
    elif cholesky is None and gram is not None and by_gptq and (group.expert is None or has_enough_tokens(gram)):
        note = _not_factorized_note if has_enough_tokens(gram) else _too_few_tokens_note
        work = replace(work, notes=(*work.notes, note(group, gram)))
    quantized = {linear: replace(q, input_global=work.input_global(linear)) for linear, q in quantized.items()}
    return replace(work, quantized={**work.quantized, **quantized})


def _not_factorized_note(group: LinearGroup, gram: Gram) -> str:
    return (
        f"{group.name}: H of {gram.tokens} tokens and {gram.in_features} inputs has no Cholesky factor in float32, so"
        " GPTQ cannot use it; rounded to the nearest level with a clip search instead"
    )


def _too_few_tokens_note(group: LinearGroup, gram: Gram) -> str:
    return (
        f"{group.name}: {gram.tokens} tokens are too few for GPTQ on {gram.in_features} inputs (it needs"
        f" {math.ceil(tokens_for_gptq(gram.in_features))}); rounded to the nearest level with a clip search instead"
    )
