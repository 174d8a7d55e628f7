"""Sizes, disk and memory foretold from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .assembly import make_job
from .formats import FORMATS
from .formats.shards import format_tensors
from .peak_memory import peak_memory
from .plan import QuantPlan
from .run_memory import RunMemory
from .summary import memory_of, part_sizes

# Assumed, since the media are not decoded for a forecast.
_TOKENS_PER_SAMPLE, _LONGEST = 512, 1024


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


def assumed_tokens(plan: QuantPlan, samples: int) -> tuple[int, int]:
    """Of all samples, and of the longest; zero for a data-free run."""
    most = plan.calibration.max_tokens
    return samples * min(_TOKENS_PER_SAMPLE, most), min(_LONGEST, most) if samples else 0


def forecast(plan: QuantPlan, samples: int, lengths: Sequence[int] = ()) -> Forecast:
    """Foretell a run; `samples` is 0 for a data-free one, `lengths` in tokens where they are known already."""
    tokens, longest = (sum(lengths), max(lengths)) if lengths else assumed_tokens(plan, samples)
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
    return Forecast(outputs, tokens * (4 * hidden * 4 + 4096), peak_memory(plan, tokens, longest), served)
