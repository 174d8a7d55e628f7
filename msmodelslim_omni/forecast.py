"""Sizes, disk and memory foretold from the plan alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from .assembly import make_job
from .errors import QuantError
from .formats import FORMATS
from .formats.shards import format_tensors
from .plan import QuantPlan
from .report import human_bytes

# What the process holds before any weight: the interpreter, torch, and transformers' classes.
_BASE_BYTES = 520 << 20
_MEDIA_BYTES = 250 << 20  # processor, codecs and decoded media of one sample
_TOKENS_PER_SAMPLE = 512  # assumed, since the media are not decoded for a forecast


@dataclass(frozen=True)
class Forecast:
    """Bytes: of each output, of the work folder at its largest, of all disk needed, of memory at its peak."""

    output_bytes: dict[str, int]
    work_bytes: int
    peak_memory_bytes: int

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + sum(self.output_bytes.values())


def forecast(plan: QuantPlan, samples: int) -> Forecast:
    """Foretell a run; `samples` is 0 for a data-free one."""
    job = make_job(plan, lambda layer: {})
    other = sum((plan.checkpoint.path / file).stat().st_size for file in plan.checkpoint.other_files())
    outputs: dict[str, int] = {
        saver.type: sum(tensor.spec.nbytes for tensor in format_tensors(FORMATS[saver.type], job)) + other
        for saver in plan.savers
    }
    parts = sum(out * in_ + 4 * out for out, in_ in (linear.shape for linear in plan.linears if linear.scheme))
    hidden = plan.layer_spec.shapes["input_layernorm.weight"][0]
    tokens = samples * _TOKENS_PER_SAMPLE
    # Per token: hidden states at up to four places, rotary tables and the like once.
    return Forecast(outputs, parts + tokens * (4 * hidden * 4 + 4096), _peak_memory(plan, samples))


def _peak_memory(plan: QuantPlan, samples: int) -> int:
    """The larger of the towers' phase and the heaviest layer's, each on top of the process itself."""
    weights = [out * in_ for out, in_ in (linear.shape for linear in plan.linears)]
    layer = sum(weights) // len(plan.layers)  # weights of one layer
    stored = next(iter(plan.checkpoint.tensors.values())).nbytes and 2
    if samples == 0:
        # One layer as stored, its integers, and blocks of float32.
        return _BASE_BYTES + layer * stored + layer + (64 << 20)
    towers = sum(
        4 * info.numel
        for name, info in plan.checkpoint.tensors.items()
        if plan.model.part_of(name).name in ("visual tower", "audio tower")
    )
    tokens = samples * _TOKENS_PER_SAMPLE
    widest = max(in_ for _, in_ in (linear.shape for linear in plan.linears))
    working = layer * (stored + 4 + 4 + 1) + 16 * widest * min(tokens, 4 * 256)
    return _BASE_BYTES + _MEDIA_BYTES + max(towers, working)


def check_disk(expected: Forecast, folder: Path) -> None:
    """Refuse to start where the disk cannot hold the work and the outputs; what a stopped run has written counts."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if expected.disk_bytes > free + there:
        raise QuantError(
            f"{str(folder.parent)!r} needs {human_bytes(expected.disk_bytes)}, free are {human_bytes(free + there)}",
            "free some space, choose another disk, or write one format only (--save_format)",
        )
