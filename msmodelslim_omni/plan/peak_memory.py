"""Estimate of a run's peak resident memory from the plan: the sum of all tensors that a phase holds at once.

The estimate covers every tensor of a layer above a few MiB. It follows from the code of each phase; only the size of
the process itself is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import QuantError
from ..models import JOINED_TOKENS, LinearGroup
from ..runtime import DEFAULT_BUDGET, MIB, NO_SAMPLES, Budget, Extent
from ..statistics import FLUSH_TOKENS, GramForm, choose_form, rows_per_modality
from .plan import QuantPlan

# The interpreter, torch and the classes of transformers. With samples, also the processor and decoded media.
_PROCESS = 330 * MIB
_PROCESS_WITH_MEDIA = 620 * MIB
_BITSANDBYTES = 80 * MIB  # includes its buffers on each thread
_BLOCKS = 64 * MIB  # blocks of weights that are being processed, written or copied
_TOWER_BYTES_PER_TOKEN = 96 * 1024  # activations in the towers
_ARGUMENT_BYTES = 2048  # rotary tables of a token
_PROBE_TOKENS = 128  # of a modality, from short samples beside one of typical length; see choose_probe_samples
_HEADROOM = 0.05  # freed memory that the C library does not return

# Of `tuning`: the least tokens of a batch, and the positions whose logits are in memory at once.
TUNED_TOKENS, TUNED_POSITIONS = 1024, 256

# Of tuning.own_texts: tokens of a text, the most texts, the most for each given token, and tokens that are enough.
_OWN_TEXT_TOKENS, _OWN_TEXTS, _OWN_PER_GIVEN, _ENOUGH_TOKENS = 256, 64, 4, 20_000

# Share of the user's limit to plan for. Estimates have been up to a tenth below the measured peak.
_USABLE_SHARE = 0.9

# Options from largest to smallest: bytes of H as a matrix and as a factor, and whether to read the next layer ahead.
_BUDGET_OPTIONS = (
    (DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, True),
    (DEFAULT_BUDGET.matrix, DEFAULT_BUDGET.factor, False),
    (448 * MIB, 160 * MIB, False),
    (256 * MIB, 80 * MIB, False),
    (128 * MIB, 40 * MIB, False),
    (64 * MIB, 20 * MIB, False),
)


def peak_memory(plan: QuantPlan, extent: Extent) -> int:
    """Return the estimated peak memory in bytes: that of the largest phase."""
    return max(phase_memory(plan, extent).values())


def own_texts(tokens: int) -> int:
    """How many texts the model writes for `--effort best`, in addition to samples of so many tokens."""
    tokens_to_write = min(_ENOUGH_TOKENS - tokens, _OWN_PER_GIVEN * tokens)
    return max(0, min(_OWN_TEXTS, tokens_to_write // _OWN_TEXT_TOKENS))


def own_text_length(plan: QuantPlan) -> int:
    """Tokens of each of these texts."""
    return min(_OWN_TEXT_TOKENS, plan.calibration.max_tokens)


def with_own_texts(plan: QuantPlan, extent: Extent) -> Extent:
    """The extent of the samples with the model's own texts, if the plan has any."""
    count = own_texts(extent.tokens) if plan.calibration.effort == "best" else 0
    length = own_text_length(plan) if count else 0
    return replace(extent, tokens=extent.tokens + count * length, longest=max(extent.longest, length))


def room_for_layers(plan: QuantPlan) -> int:
    """Bytes of float layers that stay in memory while the model writes: as much as its towers may take otherwise."""
    return DEFAULT_BUDGET.towers if plan.budget.limit is None else plan.budget.towers


def phase_memory(plan: QuantPlan, extent: Extent) -> dict[str, int]:
    """Return the estimated memory of each phase in bytes."""
    held = _held_bytes(plan, extent)
    schemes = {scheme for planned in plan.layers for scheme in planned.schemes.values()}
    library = _BITSANDBYTES if any(scheme.codebook for scheme in schemes) else 0
    return {phase: int((size + library) * (1 + _HEADROOM)) for phase, size in held.items()}


def card_memory(plan: QuantPlan, extent: Extent) -> int:
    """Return the estimated peak memory on an accelerator in bytes: that of a run without the process and its stores.

    Hidden states between layers, layers that are read ahead, and media stay on the host.
    """
    on_card = replace(plan.budget, hidden=0, arguments=0, read_ahead=False)
    held = _held_bytes(replace(plan, budget=on_card), replace(extent, media=0))
    process = _PROCESS if extent == NO_SAMPLES else _PROCESS_WITH_MEDIA
    return int((max(held.values()) - process) * (1 + _HEADROOM))


def _held_bytes(plan: QuantPlan, extent: Extent) -> dict[str, int]:
    """Bytes of all tensors that each phase holds at once, and of the process."""
    layer = _LayerSizes(plan)
    if extent == NO_SAMPLES:
        # One Linear and the next; the integers of the layer being written and of the layer being quantized.
        next_read = layer.widest_stored if plan.budget.read_ahead else 0
        held = {"layers": _PROCESS + layer.widest_stored + next_read + backlog_bytes(plan) + _BLOCKS}
    else:
        next_read = layer.stored if plan.budget.read_ahead else 0
        held = {"towers": _towers_memory(plan, extent), **_layer_phases(plan, layer, next_read, extent)}
    return held


def backlog_bytes(plan: QuantPlan) -> int:
    """Integers that a data-free run holds at most while a layer is written: a layer and a half.

    A layer's integers are freed one Linear after the other as they are written, and the next layer's arrive meanwhile.
    With less, rounding could wait for the disk when the disk does not wait for it.
    """
    return 3 * sum(math.prod(plan.layer_spec.shapes[f"{linear}.weight"]) for linear in plan.layer_spec.linears) // 2


class _LayerSizes:
    """Sizes of a decoder layer and of its largest Linear.

    stored, widest_stored: bytes on disk. integers, widest: numbers of weights, which are the bytes as int8.
    """

    def __init__(self, plan: QuantPlan) -> None:
        shapes = plan.layer_spec.shapes
        infos = [plan.checkpoint.tensors[plan.model.layer_name(plan.layers[0].index, name)] for name in shapes]
        self.numel = {linear: shapes[f"{linear}.weight"][0] * shapes[f"{linear}.weight"][1]
                      for linear in plan.layer_spec.linears}  # fmt: skip
        self.stored = sum(info.nbytes for info in infos)
        self.widest_stored = max(info.nbytes for info in infos)
        self.integers = sum(self.numel.values())
        self.widest = max(self.numel.values())
        spec = plan.layer_spec
        widths = {group.name: shapes[f"{group.linears[0]}.weight"][1] for group in spec.groups}
        # A token reaches only some experts; their inputs together are as wide as those of the active ones.
        shared = sum(widths[group.name] for group in spec.groups if group.expert is None)
        routed = sum(widths[group.name] for group in spec.groups if group.expert is not None)
        self.active_share = spec.experts.active / spec.experts.count if spec.experts else 1.0
        self.inputs = {group.name: widths[group.name] for group in spec.groups if group.expert is None}
        self.routed_inputs = [widths[group.name] for group in spec.groups if group.expert is not None]
        self.input_width = shared + int(routed * self.active_share)
        # The float layer: all Linears in float32, but those of experts as they are stored; see run.layers.float_module.
        routed_linears = {linear for group in spec.groups if group.expert is not None for linear in group.linears}
        self.float_layer = 4 * sum(numel for linear, numel in self.numel.items() if linear not in routed_linears)
        # Of experts: inputs that awq scales alone, whose H it factorizes and rescales before the Linears are rounded.
        self.scaled_inputs = [
            widths[group.name] for group in spec.groups if group.expert is not None and group.subgraph != "norm-linear"
        ]
        inner = max(widths[group.name] for group in spec.groups if group.subgraph == "up-down")
        self.inner = inner * (spec.experts.active if spec.experts else 1)
        self.hidden = plan.layer_spec.hidden_size

    def group_numel(self, group: LinearGroup) -> int:
        return sum(self.numel[linear] for linear in group.linears)


def _towers_memory(plan: QuantPlan, extent: Extent) -> int:
    """Linears up to the budget, one more Linear converted to float32, and the activations of the longest sample.

    Or its media, which are decoded before it runs.
    """
    towers = sum(size for part, size in plan.kept_parts() if part.name.endswith("tower"))
    deepstack = 4 * plan.layer_spec.hidden_size * plan.model.family.deepstack_depth(plan.checkpoint.config)
    per_token = _TOWER_BYTES_PER_TOKEN + 2 * deepstack
    sample = max(per_token * extent.longest, extent.media)
    return _PROCESS_WITH_MEDIA + min(towers, plan.budget.towers) + _BLOCKS + sample


def _layer_phases(plan: QuantPlan, layer: _LayerSizes, next_read: int, extent: Extent) -> dict[str, int]:
    """Return the memory of each phase of a layer that is quantized with samples."""
    tokens, longest, searching = extent.tokens, extent.longest, plan.statistics == "gram"
    rows = 4 * layer.input_width * min(tokens, extent.modalities * rows_per_modality(extent.modalities))
    stores = min(plan.budget.hidden, 12 * layer.hidden * tokens) + min(plan.budget.arguments, _ARGUMENT_BYTES * tokens)
    # Layer probe: inputs, outputs and rotary tables of the layer; for a search, also of its two blocks.
    probed = min(tokens, extent.modalities * (longest + _PROBE_TOKENS))
    probe = ((24 if searching else 8) * layer.hidden + _ARGUMENT_BYTES) * probed
    # layer.integers: the previous layer, which is still being written.
    common = _PROCESS_WITH_MEDIA + layer.stored + next_read + layer.integers + rows + stores + probe + _BLOCKS
    together = max(longest, min(tokens, JOINED_TOKENS))
    activations = 4 * together * (3 * layer.inner + 8 * layer.hidden)
    grams = [_gram_bytes(plan.budget, width, extent) for width in layer.inputs.values()] if searching else []
    of_experts = sum(_routed_gram_bytes(layer, layer.routed_inputs, tokens)) if searching else 0
    waiting = _waiting_bytes(layer, tokens) if searching else 0
    scales = _scale_bytes(plan, layer) if layer.routed_inputs else 0
    separate = sum(separate for separate, _ in grams)
    phases = {"forward": common + layer.float_layer + activations + separate + of_experts + waiting}
    if searching:
        # The float layer for trials; H, its factorization and the rescaled factors.
        kept = common + layer.float_layer + 3 * sum(combined for _, combined in grams) + of_experts
        trial = max(_trial_bytes(layer, group) for group in plan.layer_spec.groups if group.expert is None)
        phases["search"] = kept + trial
        if layer.routed_inputs:  # before that, all experts are rounded, with H of all
            scaled = 2 * sum(_routed_gram_bytes(layer, layer.scaled_inputs, tokens))
            phases["search"] = kept + max(trial, scaled + layer.integers + scales)
        phases["check"] = common + 3 * layer.integers + 2 * scales + activations
    else:
        phases["search"] = common + layer.integers + 12 * layer.widest
    if plan.tunes:
        phases["tuning"] = _tuning_memory(plan, layer, stores, longest)
    if plan.calibration.effort == "best" and tokens <= _ENOUGH_TOKENS:
        phases["own texts"] = _own_texts_memory(plan, layer, tokens)
    propagating = 4 * layer.integers if plan.calibration.propagate_error else 0
    phases["propagate"] = common + layer.integers + propagating + activations
    return phases


def _tuning_memory(plan: QuantPlan, layer: _LayerSizes, stores: int, longest: int) -> int:
    """A layer in float32 with its integers, the batch at every boundary, one sample's activations, and the logits."""
    lm_head = plan.checkpoint.tensors[plan.model.lm_head_tensor(plan.checkpoint.config)]
    boundaries = 4 * layer.hidden * (len(plan.layers) + 1) * (TUNED_TOKENS + longest)
    activations = 4 * longest * (8 * layer.inner + 24 * layer.hidden)
    logits = 4 * 4 * TUNED_POSITIONS * lm_head.shape[0]
    return _PROCESS_WITH_MEDIA + 6 * layer.integers + boundaries + stores + max(activations, logits) + _BLOCKS


def _own_texts_memory(plan: QuantPlan, layer: _LayerSizes, tokens: int) -> int:
    """A layer as stored and in float32, others that stay, keys and values in bfloat16, and the logits of a token."""
    count = min(_OWN_TEXTS, tokens // _OWN_TEXT_TOKENS)
    values = [linear for linear in plan.layer_spec.linears if linear.endswith((".k_proj", ".v_proj"))]
    width = sum(plan.layer_spec.shapes[f"{linear}.weight"][0] for linear in values)
    cached = 2 * width * _OWN_TEXT_TOKENS * count * len(plan.layers)
    vocabulary = plan.checkpoint.tensors[plan.model.lm_head_tensor(plan.checkpoint.config)].shape[0]
    kept = min(room_for_layers(plan), len(plan.layers) * layer.float_layer)
    return _PROCESS_WITH_MEDIA + layer.stored + layer.float_layer + kept + cached + 12 * vocabulary * count + _BLOCKS


def _trial_bytes(layer: _LayerSizes, group: LinearGroup) -> int:
    """A group that is rounded, dequantized and inserted into its block, and the current Linear after it."""
    if group.subgraph != "norm-linear":
        return 12 * layer.widest
    return (4 + 2) * layer.group_numel(group) + 4 * layer.widest + layer.integers


def _gram_bytes(budget: Budget, width: int, extent: Extent) -> tuple[int, int]:
    """Return the bytes of H of one input: one per modality, and the weighted sum of all modalities."""
    form = _gram_form(budget, width, extent)
    separate = form.nbytes(width, extent.modalities)
    return separate, separate if form.rows is not None or form.strip is not None else 4 * width**2


def _gram_form(budget: Budget, width: int, extent: Extent) -> GramForm:
    counts = [max(1, extent.tokens // extent.modalities)] * extent.modalities
    return choose_form(counts, width, budget.matrix, budget.factor, combinable=True)


def gram_disk_bytes(plan: QuantPlan, extent: Extent) -> dict[str, int]:
    """Return the bytes on disk of H and its factorization, by group, for the groups whose H does not fit in memory."""
    if plan.statistics != "gram" or extent == NO_SAMPLES:
        return {}
    sizes = {
        group: _gram_form(plan.budget, width, extent).disk_bytes(width, extent.modalities)
        for group, width in _LayerSizes(plan).inputs.items()
    }
    return {group: size for group, size in sizes.items() if size}


def _routed_gram_bytes(layer: _LayerSizes, widths: Sequence[int], tokens: int) -> list[int]:
    """Bytes of H of inputs of experts: the tokens of each, up to half a matrix, or the matrix; see gram.py."""
    routed = int(tokens * layer.active_share)
    return [4 * width * (routed if 2 * routed < width else width) for width in widths]


def _waiting_bytes(layer: _LayerSizes, tokens: int) -> int:
    """Bytes of tokens of experts that wait for being added to H, where it is a matrix."""
    routed = int(tokens * layer.active_share)
    return sum(4 * width * min(routed, FLUSH_TOKENS) for width in layer.routed_inputs if 2 * routed >= width)


def _scale_bytes(plan: QuantPlan, layer: _LayerSizes) -> int:
    """Bytes of the scales and zero points of a layer, in float32 and int8, at the smallest groups of the plan."""
    schemes = [scheme for planned in plan.layers for scheme in planned.schemes.values()]
    sizes = [scheme.group_size for scheme in schemes if scheme.group_size is not None]
    return 5 * layer.integers // min(sizes) if sizes else 0


def fit_budget(plan: QuantPlan, extent: Extent, limit: int) -> QuantPlan:
    """Return the plan with the largest budget that fits a memory limit. Raises QuantError if none fits."""
    return _fit_options(plan, extent, limit, _BUDGET_OPTIONS)


def fit_card(plan: QuantPlan, extent: Extent, total: int) -> QuantPlan:
    """Return the plan with the largest budget of H that fits a card with `total` bytes. Raises QuantError if none does.

    The total and not what is free decides, so that a resumed run computes the same.
    """
    budget = plan.budget
    smaller = [option[:2] for option in _BUDGET_OPTIONS if option[:2] <= (budget.matrix, budget.factor)]
    for matrix, factor in smaller or [(budget.matrix, budget.factor)]:
        fitted = replace(plan, budget=replace(budget, matrix=matrix, factor=factor))
        if (needed := card_memory(fitted, extent)) <= _USABLE_SHARE * total:
            return fitted
    raise QuantError(
        f"the card has {total / 2**30:.2f} GiB, but this run needs about {needed / 2**30:.2f} GiB on it",
        "lower calibration.max_tokens or max_pixels, use a data-free recipe, or use --device cpu",
    )


def refit_budget(plan: QuantPlan, extent: Extent) -> QuantPlan:
    """Return the plan with the budget divided again for the measured extent, if the plan has a memory limit.

    The budget of H stays unchanged, because results depend on it. Raises QuantError if the rest does not fit.
    """
    budget = plan.budget
    if budget.limit is None:
        return plan
    options = [option for option in _BUDGET_OPTIONS if option[:2] == (budget.matrix, budget.factor)]
    return _fit_options(plan, extent, budget.limit, options)


def _fit_options(plan: QuantPlan, extent: Extent, limit: int, options: Sequence[tuple[int, int, bool]]) -> QuantPlan:
    for matrix, factor, read_ahead in options:
        minimum = Budget(0, 0, 0, matrix, factor, read_ahead)
        needed = phase_memory(replace(plan, budget=minimum), extent)
        if max(needed.values()) <= _USABLE_SHARE * limit:
            left = {phase: int((_USABLE_SHARE * limit - size) / (1 + _HEADROOM)) for phase, size in needed.items()}
            towers = min((left.pop(phase) for phase in ("towers", "own texts") if phase in left), default=0)
            arguments = min(left.values()) // 4
            hidden = min(left.values()) - arguments
            budget = replace(minimum, hidden=hidden, arguments=arguments, towers=towers, limit=limit)
            return replace(plan, budget=budget)
    largest = max(needed, key=lambda phase: needed[phase])
    needed_gib = math.ceil(needed[largest] / _USABLE_SHARE / 2**30 * 100) / 100
    samples = f", {extent.tokens} tokens, {extent.longest} in one sample" if extent != NO_SAMPLES else ""
    raise QuantError(
        f"--max_memory is {limit / 2**30:.2f} GiB, but this run needs {needed_gib} GiB (phase {largest}{samples})",
        f"give --max_memory {needed_gib}GiB"
        + (", lower calibration.max_tokens or max_pixels, or use a data-free recipe" if extent != NO_SAMPLES else ""),
    )
