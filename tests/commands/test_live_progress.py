"""The progress line in the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from msmodelslim_omni.commands.live_progress import TerminalProgress


def output(level: str, *, is_terminal: bool) -> str:
    """Return the output of two messages and three steps."""
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=is_terminal, width=100), level)
    progress.say("device cpu (as requested)")
    progress.say("warning: a pattern matches nothing")
    for layer in range(1, 4):
        progress.step("layers", layer, 3, "16 samples")
    progress.close()
    return stream.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    lines = output("info", is_terminal=False).splitlines()
    assert lines[:2] == ["device cpu (as requested)", "warning: a pattern matches nothing"]
    assert re.fullmatch(r"layers 1/3 · 16 samples · 0:00 passed · \d+\.\d\d GiB", lines[2])
    assert re.fullmatch(r"layers 3/3 · 16 samples · 0:00 passed · \d+\.\d\d GiB", lines[-1])
    assert "\x1b" not in "".join(lines)


def test_live_line_in_a_terminal_is_removed_at_the_end() -> None:
    text = output("info", is_terminal=True)
    assert "layers 3/3" in text and "\x1b[2K" in text  # redrawn, then erased


@pytest.mark.parametrize(("level", "expected"), [("warning", ["warning: a pattern matches nothing"]), ("error", [])])
def test_log_levels(level: str, expected: list[str]) -> None:
    assert output(level, is_terminal=False).splitlines() == expected


def test_line_moves_inside_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the first of 4 layers took 60 s, so 3.5 layers take 420 s more."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = TerminalProgress(Console(file=io.StringIO()))
    progress.step("layers", 0, 4, "16 samples")
    assert progress.line().startswith("layers 0/4 · 16 samples · 0:00 passed · ")
    now[0] += 60
    progress.doing("float forward, sample 8/16", 0.5)
    assert progress.line().startswith("layers 0/4 · float forward, sample 8/16 · 1:00 passed, about 7:00 left · ")
    progress.doing("gptq")
    assert progress.line().startswith("layers 0/4 · gptq · 1:00 passed, about 7:00 left")
    now[0] += 3600
    assert "1:01:00 passed" in progress.line()


def test_resumed_layers_do_not_count_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = TerminalProgress(Console(file=io.StringIO()))
    progress.step("layers", 10, 12)
    now[0] += 30
    progress.step("layers", 11, 12)
    assert "about 0:30 left" in progress.line()


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "layers 3/3" in output("info", is_terminal=True)


def test_eta_is_shown_between_the_first_and_the_last_unit() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=100), "info")
    progress.step("layers", 1, 3)
    progress.step("layers", 2, 3)
    progress.close()
    assert re.search(r"layers 2/3 · 0:00 passed, about 0:00 left", stream.getvalue())
