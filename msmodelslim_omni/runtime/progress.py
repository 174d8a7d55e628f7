"""What a long run tells whoever waits for it. The pipeline calls it, terminal.py shows it, here it is silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Events of a run. Subclasses show them; this one does nothing."""

    def say(self, text: str) -> None:
        """A line worth keeping: the device, a warning, where a run goes on."""

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` units of a phase are finished."""


class Clock:
    """Seconds spent per phase, and by how many bytes the peak of memory rose meanwhile. peak: what tells that peak."""

    def __init__(self, peak: Callable[[], int] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.rises: dict[str, int] = {}
        self._peak = peak or (lambda: 0)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, peak = time.perf_counter(), self._peak()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            self.rises[phase] = self.rises.get(phase, 0) + self._peak() - peak

    def total(self) -> float:
        return time.perf_counter() - self._started
