"""What people see: one live line while a run works, plain lines where the output is no terminal, tables at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .progress import Progress

if TYPE_CHECKING:
    from .doctor import Diagnosis

# Without a terminal a phase says something at most this often.
_PLAIN_SECONDS = 5.0


class TerminalProgress(Progress):
    """Progress on a rich console: phase, unit i/N, ETA and memory in one line that is drawn over."""

    def __init__(self, console: Console, level: str = "info") -> None:
        self._console = console
        self._quiet = level == "error"
        self._only_warnings = level == "warning"
        self._live: Live | None = None
        self._phase = ""
        self._began = self._said = 0.0
        self._first = 0

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
            self._phase, self._began, self._first, self._said = phase, now, done, 0.0
        line = self._line(now, done, total, detail)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
        elif done == total or now - self._said >= _PLAIN_SECONDS:
            self._said = now
            self._console.print(Text(line), soft_wrap=True)

    def _line(self, now: float, done: int, total: int, detail: str) -> str:
        from .device import peak_rss

        measured = done - self._first
        eta = ""
        if measured > 0 and done < total:
            eta = f" · ETA {_clock((now - self._began) / measured * (total - done))}"
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


def table(title: str, columns: list[str], rows: list[list[str]], numeric: int) -> Table:
    """A table whose columns from index `numeric` on are aligned right."""
    built = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        alignment: Literal["left", "right"] = "right" if number >= numeric else "left"
        built.add_column(column, justify=alignment, overflow="fold", no_wrap=number == 0)
    for row in rows:
        built.add_row(*(Text(cell) for cell in row))
    return built


_LEVEL_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """doctor's findings as a table; below it, once for each kind, why it matters and what to do."""
    built = Table(title=f"{diagnosis.path}: {diagnosis.format or 'no format'}", title_justify="left")
    for column in ("", "check", "where", "what"):
        built.add_column(column, overflow="fold", no_wrap=column in ("", "check"))
    kinds = {}
    for finding in diagnosis.findings:
        style = _LEVEL_STYLES[finding.level]
        what = f"{finding.code}: {finding.what}" if finding.code else finding.what
        built.add_row(Text(finding.level, style), Text(finding.check), Text(finding.where), Text(what))
        if finding.code:
            kinds[finding.code] = finding
    console.print(built)
    for code, finding in kinds.items():
        more = f" ({diagnosis.unlisted[code]} more of this kind)" if code in diagnosis.unlisted else ""
        whom = f" [{', '.join(finding.runtimes)}]" if finding.runtimes else ""
        console.print(
            Text.assemble((code, _LEVEL_STYLES[finding.level]), f"{more}: {finding.why}{whom}. To do: {finding.todo}."),
            soft_wrap=True,
        )
    errors, warnings = f"{diagnosis.errors} errors", f"{diagnosis.warnings} warnings"
    console.print(Text(f"{errors}, {warnings}", _LEVEL_STYLES["ok" if diagnosis.healthy else "error"]))
