"""Execution environment of a run: device, processes, threads, memory budget, progress events.

device.py is the only file that names accelerators. team.py shares work between processes started by torchrun.
transfer.py copies from a card.
May import: errors.
Not here: models and files.
"""

from __future__ import annotations

from .background import Background, prefetch
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
    resolve_device,
)
from .progress import Clock, Progress
from .team import SINGLE_PROCESS, UNSPLIT, Split, Team, open_team
from .transfer import to_cpu, to_floats

__all__ = [
    "DEFAULT_BUDGET",
    "MIB",
    "NO_SAMPLES",
    "SINGLE_PROCESS",
    "UNSPLIT",
    "Background",
    "Budget",
    "Clock",
    "Device",
    "Extent",
    "Progress",
    "Split",
    "Team",
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
    "resolve_device",
    "to_cpu",
    "to_floats",
]
