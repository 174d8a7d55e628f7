"""Estimates of output sizes, disk space and memory, from the plan only."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import CalibSample, CalibSet
from ..formats import FORMATS, format_tensors
from ..plan import QuantPlan, gram_disk_bytes, peak_memory
from ..report import RunMemory
from ..runtime import NO_SAMPLES, Extent
from .assembly import make_job
from .summary import memory_of, part_sizes

# Assumptions about a sample: tokens of its media, which are not decoded for a forecast, and bytes of text per token.
_TOKENS_PER_SAMPLE, _LONGEST = 512, 1024
_BYTES_PER_TOKEN = 3


@dataclass(frozen=True)
class Forecast:
    """Bytes of each output, of the work folder at its largest, and of memory at its peak.

    run_memory: of a runtime that serves the first output. gram_disk_bytes: a part of work_bytes, by group; see
    plan.gram_disk_bytes.
    """

    output_bytes: dict[str, int]
    work_bytes: int
    peak_memory_bytes: int
    run_memory: RunMemory
    gram_disk_bytes: dict[str, int]

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + sum(self.output_bytes.values())


def assumed_extent(plan: QuantPlan, calib: CalibSet | None) -> Extent:
    """The assumed extent of samples that are not tokenized yet; NO_SAMPLES for a data-free run."""
    if calib is None:
        return NO_SAMPLES
    most = plan.calibration.max_tokens
    tokens, longest = (
        [min(bool(sample.files()) * media + _text_tokens(sample), most) for sample in calib.samples]
        for media in (_TOKENS_PER_SAMPLE, _LONGEST)
    )
    modalities = {kind for sample in calib.samples for kind in sample.modalities()}
    return Extent(sum(tokens), max(longest), len(modalities))


def _text_tokens(sample: CalibSample) -> int:
    texts = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return len("".join(texts).encode()) // _BYTES_PER_TOKEN + 1


def forecast(plan: QuantPlan, extent: Extent) -> Forecast:
    """Estimate a run over samples of this extent, measured or assumed."""
    job = make_job(plan)
    other = sum((plan.checkpoint.path / file).stat().st_size for file in plan.checkpoint.other_files())
    tensors = {saver.type: format_tensors(FORMATS[saver.type], job) for saver in plan.savers}
    outputs: dict[str, int] = {
        name: sum(tensor.spec.nbytes for tensor in written) + other for name, written in tensors.items()
    }
    parts = part_sizes(plan, tensors[plan.savers[0].type])
    served = memory_of(plan.model, plan.checkpoint.config, parts)
    grams = gram_disk_bytes(plan, extent)
    # Per token: hidden states at up to four boundaries, features that are added between layers, rotary tables once.
    states = 4 + plan.model.family.deepstack_depth(plan.checkpoint.config)
    work = extent.tokens * (states * plan.layer_spec.hidden_size * 4 + 4096) + sum(grams.values())
    return Forecast(outputs, work, peak_memory(plan, extent), served, grams)
