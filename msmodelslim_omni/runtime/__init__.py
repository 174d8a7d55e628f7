"""Execution environment of a run: device, processes, threads, memory budget, progress events.

device.py is the only file that names accelerators. team.py shares work between processes started by torchrun.
transfer.py copies from a card. precision.py chooses the number format of products.
May import: errors.
Not here: models and files.
"""

from __future__ import annotations

from .background import Background, Backlog, prefetch
from .budget import DEFAULT_BUDGET, MIB, NO_SAMPLES, Budget, Extent
from .device import (
    Device,
    device_memory,
    float64_device,
    free_memory,
    free_modules,
    is_device_fault,
    out_of_memory_as_error,
    peak_device_memory,
    peak_rss,
    record_graph,
    resolve_device,
)
from .precision import FLOAT32, ComputeDtype, Precision, choose_precision
from .progress import Clock, Progress
from .team import SINGLE_PROCESS, UNSPLIT, Split, Team, open_team
from .transfer import to_cpu, to_floats

__all__ = [
    "DEFAULT_BUDGET",
    "FLOAT32",
    "MIB",
    "NO_SAMPLES",
    "SINGLE_PROCESS",
    "UNSPLIT",
    "Background",
    "Backlog",
    "Budget",
    "Clock",
    "ComputeDtype",
    "Device",
    "Extent",
    "Precision",
    "Progress",
    "Split",
    "Team",
    "choose_precision",
    "device_memory",
    "float64_device",
    "free_memory",
    "free_modules",
    "is_device_fault",
    "open_team",
    "out_of_memory_as_error",
    "peak_device_memory",
    "peak_rss",
    "prefetch",
    "record_graph",
    "resolve_device",
    "to_cpu",
    "to_floats",
]
