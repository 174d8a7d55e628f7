"""Progress events of a long run. The pipeline emits them and the commands show them; the base class is silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Receiver of progress events. This base class does nothing; subclasses show the events."""

    def say(self, text: str) -> None:
        """Report a line to keep: the device, a warning, the layer at which a run resumes."""

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Report that `done` of `total` units of a phase are finished."""

    def doing(self, activity: str, share: float | None = None) -> None:
        """Report what is being done inside the current unit, and the share of the unit that is finished, if known."""


class Clock:
    """Seconds per phase, and the bytes by which the peak memory rose in each phase.

    peak: returns the current peak in bytes; without it all peak_rises are 0. on_phase: called with each phase that
    begins.
    """

    def __init__(self, peak: Callable[[], int] | None = None, on_phase: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rises: dict[str, int] = {}
        self._peak = peak or (lambda: 0)
        self._on_phase = on_phase or (lambda _: None)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._on_phase(phase)
        started, peak = time.perf_counter(), self._peak()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            self.peak_rises[phase] = self.peak_rises.get(phase, 0) + self._peak() - peak

    def total(self) -> float:
        return time.perf_counter() - self._started
