"""Sizes, disk and memory foretold from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import CalibSample, CalibSet
from ..formats import FORMATS, format_tensors
from ..plan import QuantPlan, peak_memory
from ..report import RunMemory
from ..runtime import NO_SAMPLES, Extent
from .assembly import make_job
from .summary import memory_of, part_sizes

# Assumed of a sample's media, since they are not decoded for a forecast, and of its text.
_TOKENS_PER_SAMPLE, _LONGEST = 512, 1024
_BYTES_PER_TOKEN = 3


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


def assumed_extent(plan: QuantPlan, calib: CalibSet | None) -> Extent:
    """Of samples that were not turned into tokens yet; none for a data-free run."""
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
    """Foretell a run over samples of an extent, which may be an assumed one."""
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
    return Forecast(outputs, extent.tokens * (4 * hidden * 4 + 4096), peak_memory(plan, extent), served)
