"""Sizes, disk and memory foretold from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import make_job
from .capture import ROWS_PER_MODALITY
from .formats import FORMATS
from .formats.shards import format_tensors
from .gram import sketch_rows
from .models.spec import MODALITIES
from .plan import QuantPlan
from .run_memory import RunMemory
from .stream import ARGUMENTS_BUDGET, HIDDEN_BUDGET
from .summary import memory_of, part_sizes

# What the process holds before any weight: the interpreter, torch, and transformers' classes.
_BASE_BYTES = 520 << 20
_MEDIA_BYTES = 250 << 20  # processor, codecs and decoded media of one sample
_BLOCK_BYTES = 64 << 20
_TOKENS_PER_SAMPLE = 512  # assumed, since the media are not decoded for a forecast


@dataclass(frozen=True)
class Forecast:
    """Bytes: of each output, of the work folder at its largest, of all disk needed, of memory at its peak.

    run_memory: of the first output's weights, once they are served.
    """

    output_bytes: dict[str, int]
    work_bytes: int
    peak_memory_bytes: int
    run_memory: RunMemory

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + sum(self.output_bytes.values())


def forecast(plan: QuantPlan, samples: int, tokens: int | None = None) -> Forecast:
    """Foretell a run; `samples` is 0 for a data-free one, `tokens` of all samples where they are known already."""
    tokens = samples * _TOKENS_PER_SAMPLE if tokens is None else tokens
    job = make_job(plan)
    other = sum((plan.checkpoint.path / file).stat().st_size for file in plan.checkpoint.other_files())
    tensors = {saver.type: format_tensors(FORMATS[saver.type], job) for saver in plan.savers}
    outputs: dict[str, int] = {
        name: sum(tensor.spec.nbytes for tensor in written) + other for name, written in tensors.items()
    }
    parts = part_sizes(plan, tensors[plan.savers[0].type])
    served = memory_of(plan.model, plan.checkpoint.config, parts)
    hidden = plan.layer_spec.shapes["input_layernorm.weight"][0]
    # Per token: hidden states at up to four places, rotary tables and the like once.
    return Forecast(outputs, tokens * (4 * hidden * 4 + 4096), _peak_memory(plan, tokens), served)


def _gram_bytes(in_features: int, tokens: int) -> int:
    """H of one input with all modalities present, its weighted sum and what is factorized of it."""
    share = max(1, tokens // len(MODALITIES))
    rows = sketch_rows([share] * len(MODALITIES), in_features)
    if rows is None:
        return 4 * in_features**2 * (len(MODALITIES) + 3)
    return 4 * in_features * 4 * sum(rows)


def _peak_memory(plan: QuantPlan, tokens: int) -> int:
    """The larger of the towers' phase and the heaviest layer's, each on top of the process itself."""
    first = plan.layers[0].index
    names = [plan.model.layer_name(first, f"{linear}.weight") for linear in plan.layer_spec.linears]
    infos = [plan.checkpoint.tensors[name] for name in names]
    weights, stored = sum(info.numel for info in infos), sum(info.nbytes for info in infos)
    if tokens == 0:
        # One layer as stored, its integers, and blocks of float32.
        return _BASE_BYTES + stored + weights + _BLOCK_BYTES
    # Towers keep their Linears as stored; one at a time is widened to float32.
    towers = sum(part_bytes for part, part_bytes in plan.kept_parts() if part.name.endswith("tower"))
    # As stored, in float32 for the forward, in float32 as smoothed, the integers, and the widest one once more.
    widest = max(info.numel for info in infos)
    kept_rows = min(tokens, len(MODALITIES) * ROWS_PER_MODALITY)
    rows = 4 * sum(info.shape[1] for info in infos) * kept_rows
    hidden = 4 * plan.layer_spec.shapes["input_layernorm.weight"][0] * tokens
    stores = 3 * min(hidden, HIDDEN_BUDGET) + min(4096 * tokens, ARGUMENTS_BUDGET)
    grams = 0
    if plan.statistics == "gram":
        first_names = {group.linears[0] for group in plan.layer_spec.groups}
        grams = sum(_gram_bytes(plan.layer_spec.shapes[f"{name}.weight"][1], tokens) for name in sorted(first_names))
    layer = 2 * stored + 4 * weights + 4 * weights + 2 * weights + 8 * widest + rows + stores + grams
    return _BASE_BYTES + _MEDIA_BYTES + max(towers, layer)
