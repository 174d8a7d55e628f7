"""Progress of a run: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..runtime import Progress

# Minimum time between two plain lines of a phase.
_PLAIN_LINE_SECONDS = 5.0


class TerminalProgress(Progress):
    """Progress on a rich console: phase, unit i/N, ETA and memory, redrawn in one line."""

    def __init__(self, console: Console, level: str = "info") -> None:
        self._console = console
        self._quiet = level == "error"
        self._only_warnings = level == "warning"
        self._live: Live | None = None
        self._phase = ""
        self._started = self._printed = 0.0
        self._first_done = 0

    def say(self, text: str) -> None:
        is_warning = text.startswith("warning")
        if self._quiet or (self._only_warnings and not is_warning):
            return
        self._console.print(Text(text, style="yellow" if is_warning else ""), soft_wrap=True)

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if self._quiet or self._only_warnings:
            return
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started, self._first_done, self._printed = phase, now, done, 0.0
        line = self._line(now, done, total, detail)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
        elif done == total or now - self._printed >= _PLAIN_LINE_SECONDS:
            self._printed = now
            self._console.print(Text(line), soft_wrap=True)

    def _line(self, now: float, done: int, total: int, detail: str) -> str:
        from ..runtime import peak_rss

        measured = done - self._first_done
        eta = ""
        if measured > 0 and done < total:
            eta = f" · ETA {_clock((now - self._started) / measured * (total - done))}"
        more = f" · {detail}" if detail else ""
        return f"{self._phase} {done}/{total}{more}{eta} · memory {peak_rss() / 2**30:.2f} GiB"

    def close(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
