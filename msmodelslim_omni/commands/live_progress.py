"""Progress of a run: one live line in a terminal, plain lines elsewhere, and all of it in a log file if asked for."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..errors import QuantError
from ..runtime import Progress
from .interrupts import Interrupts

# Minimum time between two plain lines of a phase.
_PLAIN_LINE_SECONDS = 5.0
# Below this share of the work of a phase, the time that is left cannot be estimated from the time that has passed.
_MIN_SHARE = 0.002


class TerminalProgress(Progress):
    """Progress on a rich console: phase, unit i/N, activity, time passed and left, and memory, redrawn in one line.

    The live line is redrawn four times a second, also while no event comes. interrupts: a Ctrl-C that a library
    swallowed is raised again at the next event. log_file: receives the same lines, with times.
    """

    def __init__(
        self,
        console: Console,
        level: str = "info",
        interrupts: Interrupts | None = None,
        log_file: Path | None = None,
    ) -> None:
        self._console = console
        self._quiet = level == "error"
        self._only_warnings = level == "warning"
        self._interrupts = interrupts or Interrupts()
        self._log = None if log_file is None else _open_log(log_file)
        self._live: Live | None = None
        self._began = time.monotonic()
        self._phase = self._detail = self._activity = ""
        self._done, self._total, self._share = 0, 0, 0.0
        self._first_done = 0
        self._started = self._printed = 0.0

    def say(self, text: str) -> None:
        self._interrupts.raise_if_noted()
        self.log(text)
        is_warning = text.startswith("warning")
        if self._quiet or (self._only_warnings and not is_warning):
            return
        self._console.print(Text(text, style="yellow" if is_warning else ""), soft_wrap=True)

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if phase != self._phase:
            self._phase, self._started, self._first_done, self._printed = phase, time.monotonic(), done, 0.0
        self._done, self._total, self._detail, self._activity, self._share = done, total, detail, "", 0.0
        self._show(is_last=done == total)

    def doing(self, activity: str, share: float | None = None) -> None:
        self._activity = activity
        self._share = max(self._share, share or 0.0)
        if self._phase:
            self._show(is_last=False)

    def close(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> Text:
        """The live line, whenever it is redrawn."""
        return Text(self.line(), overflow="ellipsis", no_wrap=True)

    def line(self) -> str:
        """`layers 3/28 · gptq · 2:10 passed, about 58:00 left · 3.10 GiB`."""
        now = time.monotonic()
        words = [f"{self._phase} {self._done}/{self._total}", self._activity or self._detail]
        passed, left = _clock(now - self._began), self._left(now)
        words.append(f"{passed} passed" if left is None else f"{passed} passed, about {_clock(left)} left")
        if "torch" in sys.modules:
            from ..runtime import peak_rss

            words.append(f"{peak_rss() / 2**30:.2f} GiB")
        return " · ".join(word for word in words if word)

    def _left(self, now: float) -> float | None:
        """Seconds until the phase ends, at the speed of its finished part; None if too little is finished."""
        finished = self._done + self._share - self._first_done
        if self._done >= self._total or finished < _MIN_SHARE * self._total:
            return None
        return (now - self._started) / finished * (self._total - self._done - self._share)

    def _show(self, *, is_last: bool) -> None:
        self._interrupts.raise_if_noted()
        now = time.monotonic()
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        is_due = is_last or now - self._printed >= _PLAIN_LINE_SECONDS
        if is_due:
            self.log(self.line())
        if not (self._quiet or self._only_warnings):
            if is_live:
                if self._live is None:
                    self._live = Live(console=self._console, transient=True, get_renderable=self.__rich__)
                    self._live.start()
            elif is_due:
                self._console.print(Text(self.line()), soft_wrap=True)
        if is_due:
            self._printed = now

    def log(self, text: str) -> None:
        """Write a line to the log file only."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()


def _open_log(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise QuantError(f"log_file {str(path)!r} cannot be written: {error.strerror}", "give another file") from error


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
