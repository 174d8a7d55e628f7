"""The peak of a run's resident memory, foretold from the plan: what each phase holds at once, summed up.

Every tensor of a layer above a few MiB is named here. What a phase holds is known from the code that it runs, not
measured; only the process itself is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import QuantError
from ..models import LinearGroup
from ..runtime import (
    DEFAULT_BUDGET,
    MIB,
    NO_SAMPLES,
    Budget,
    Extent,
)
from ..statistics import ROWS_PER_MODALITY, sketch_rows
from .plan import QuantPlan

# The interpreter, torch and transformers' classes; with a processor and decoded media, those too.
_PROCESS = 330 * MIB
_PROCESS_WITH_MEDIA = 620 * MIB
_BITSANDBYTES = 80 * MIB  # with what it takes for itself on each thread
_BLOCKS = 64 * MIB  # pieces of a weight that are worked on, written or copied
_TOWER_TOKENS = 96 * 1024  # bytes of activations per token in the towers
_HEADROOM = 0.05  # what the C library keeps of what was freed

# Of a limit that the user sets; the rest is for what is foretold too low, by a tenth at most where it was measured.
_USED = 0.9

# From generous to frugal: how much of H is held, and whether the next layer is read ahead.
_FRUGAL = (
    (DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, True),
    (DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, False),
    (256 * MIB, 80 * MIB, False),
    (128 * MIB, 40 * MIB, False),
    (64 * MIB, 20 * MIB, False),
)


def peak_memory(plan: QuantPlan, extent: Extent) -> int:
    """Of the phase that holds most, in bytes."""
    return max(phase_memory(plan, extent).values())


def phase_memory(plan: QuantPlan, extent: Extent) -> dict[str, int]:
    """What each phase holds, in bytes."""
    layer = _Layer(plan)
    if extent == NO_SAMPLES:
        # A Linear and the next; integers of a layer that is written, and of one that is in work.
        waiting = layer.widest_stored if plan.budget.read_ahead else 0
        held = {"layers": _PROCESS + layer.widest_stored + waiting + 2 * layer.integers + _BLOCKS}
    else:
        waiting = layer.stored if plan.budget.read_ahead else 0
        held = {"towers": _towers(plan, extent), **_calibrated(plan, layer, waiting, extent)}
    schemes = {scheme for planned in plan.layers for scheme in planned.schemes.values()}
    more = _BITSANDBYTES if any(scheme.codebook for scheme in schemes) else 0
    return {phase: int((size + more) * (1 + _HEADROOM)) for phase, size in held.items()}


class _Layer:
    """Sizes of a decoder layer and its widest Linear: bytes as stored, and weights, which are the bytes as integers."""

    def __init__(self, plan: QuantPlan) -> None:
        shapes = plan.layer_spec.shapes
        infos = [plan.checkpoint.tensors[plan.model.layer_name(plan.layers[0].index, name)] for name in shapes]
        self.numel = {linear: shapes[f"{linear}.weight"][0] * shapes[f"{linear}.weight"][1]
                      for linear in plan.layer_spec.linears}  # fmt: skip
        self.stored = sum(info.nbytes for info in infos)
        self.widest_stored = max(info.nbytes for info in infos)
        self.integers = sum(self.numel.values())
        self.widest = max(self.numel.values())
        self.inputs = {group.name: shapes[f"{group.linears[0]}.weight"][1] for group in plan.layer_spec.groups}
        self.hidden = shapes["input_layernorm.weight"][0]

    def of(self, group: LinearGroup) -> int:
        return sum(self.numel[linear] for linear in group.linears)


def _towers(plan: QuantPlan, extent: Extent) -> int:
    """Linears up to the budget, one more widened to float32, and the activations of the longest sample."""
    towers = sum(size for part, size in plan.kept_parts() if part.name.endswith("tower"))
    return _PROCESS_WITH_MEDIA + min(towers, plan.budget.towers) + _BLOCKS + _TOWER_TOKENS * extent.longest


def _calibrated(plan: QuantPlan, layer: _Layer, waiting: int, extent: Extent) -> dict[str, int]:
    tokens, longest, searching = extent.tokens, extent.longest, plan.statistics == "gram"
    rows = 4 * sum(layer.inputs.values()) * min(tokens, extent.modalities * ROWS_PER_MODALITY)
    stores = min(plan.budget.hidden, 12 * layer.hidden * tokens) + min(plan.budget.arguments, 2048 * tokens)
    # What enters and leaves the layer; for a search, its blocks too.
    judges = (16 if searching else 8) * layer.hidden * min(tokens, extent.modalities * longest)
    # The integers of the layer before are being written.
    common = _PROCESS_WITH_MEDIA + layer.stored + waiting + layer.integers + rows + stores + judges + _BLOCKS
    activations = 4 * longest * (3 * layer.inputs["down"] + 8 * layer.hidden)
    grams = [_gram_bytes(plan.budget, width, extent) for width in layer.inputs.values()] if searching else []
    phases = {"forward": common + 4 * layer.integers + activations + sum(apart for apart, _ in grams)}
    if searching:
        # The float layer is there, to be tried; H is factorized, and its factors rescaled.
        kept = common + 4 * layer.integers + 3 * sum(together for _, together in grams)
        phases["search"] = kept + max(_trying(layer, group) for group in plan.layer_spec.groups)
        phases["check"] = common + 3 * layer.integers + activations
    else:
        phases["search"] = common + layer.integers + 12 * layer.widest
    propagating = 4 * layer.integers if plan.calibration.propagate_error else 0
    phases["propagate"] = common + layer.integers + propagating + activations
    return phases


def _trying(layer: _Layer, group: LinearGroup) -> int:
    """A group rounded, dequantized and put into its block; the Linear behind it as it is now."""
    if group.subgraph != "norm-linear":
        return 12 * layer.widest
    return (4 + 2) * layer.of(group) + 4 * layer.widest + layer.integers


def _gram_bytes(budget: Budget, width: int, extent: Extent) -> tuple[int, int]:
    """H of one input: of every modality by itself, and weighed, of all together."""
    share = [max(1, extent.tokens // extent.modalities)] * extent.modalities
    rows = sketch_rows(share, width, budget.matrix, budget.factor)
    if rows is None:
        return 4 * width**2 * extent.modalities, 4 * width**2
    return 4 * width * sum(rows), 4 * width * sum(rows)


def fit_budget(plan: QuantPlan, extent: Extent, limit: int) -> QuantPlan:
    """The plan with the most generous budget that stays below a limit. Raises QuantError where none does."""
    return _within(plan, extent, limit, _FRUGAL)


def refit_budget(plan: QuantPlan, extent: Extent) -> QuantPlan:
    """The plan with its limit, if it has one, shared out anew, now that the extent is no longer an assumed one.

    H, on which results depend, keeps its room. Raises QuantError where too little is left for the rest.
    """
    budget = plan.budget
    if budget.limit is None:
        return plan
    return _within(plan, extent, budget.limit, [way for way in _FRUGAL if way[:2] == (budget.matrix, budget.factor)])


def _within(plan: QuantPlan, extent: Extent, limit: int, ways: Sequence[tuple[int, int, bool]]) -> QuantPlan:
    for matrix, factor, read_ahead in ways:
        least = Budget(0, 0, 0, matrix, factor, read_ahead)
        needed = phase_memory(replace(plan, budget=least), extent)
        if max(needed.values()) <= _USED * limit:
            left = {phase: int((_USED * limit - size) / (1 + _HEADROOM)) for phase, size in needed.items()}
            towers = left.pop("towers", 0)
            arguments = min(left.values()) // 4
            hidden = min(left.values()) - arguments
            budget = replace(least, hidden=hidden, arguments=arguments, towers=towers, limit=limit)
            return replace(plan, budget=budget)
    heaviest = max(needed, key=lambda phase: needed[phase])
    least_gib = math.ceil(needed[heaviest] / _USED / 2**30 * 100) / 100
    samples = f", {extent.tokens} tokens, {extent.longest} in one sample" if extent != NO_SAMPLES else ""
    raise QuantError(
        f"--max_memory: {limit / 2**30:.2f} GiB are allowed, and this run needs {least_gib} GiB ({heaviest}{samples})",
        f"give --max_memory {least_gib}GiB"
        + (", lower calibration.max_tokens or max_pixels, or take a data-free recipe" if extent != NO_SAMPLES else ""),
    )
