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
    assert re.fullmatch(r"layers 1/3 · 16 samples · memory \d+\.\d\d GiB", lines[2])
    assert re.fullmatch(r"layers 3/3 · 16 samples · memory \d+\.\d\d GiB", lines[-1])
    assert "\x1b" not in "".join(lines)


def test_live_line_in_a_terminal_is_removed_at_the_end() -> None:
    text = output("info", is_terminal=True)
    assert "layers 3/3" in text and "\x1b[2K" in text  # redrawn, then erased


@pytest.mark.parametrize(("level", "expected"), [("warning", ["warning: a pattern matches nothing"]), ("error", [])])
def test_log_levels(level: str, expected: list[str]) -> None:
    assert output(level, is_terminal=False).splitlines() == expected


def test_eta_is_shown_between_the_first_and_the_last_unit() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=100), "info")
    progress.step("layers", 1, 3)
    progress.step("layers", 2, 3)
    progress.close()
    assert re.search(r"layers 2/3 · ETA 0:00", stream.getvalue())
