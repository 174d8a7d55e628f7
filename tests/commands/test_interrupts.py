"""Ctrl-C: exit code, message, and an exception that a library swallows."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command import MINMAX
from rich.console import Console

from msmodelslim_omni.commands.interrupts import Interrupts
from msmodelslim_omni.commands.live_progress import TerminalProgress
from msmodelslim_omni.commands.shell import run_verb

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """The tests may run where SIGINT is ignored, as in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallow_interrupt() -> None:
    """What a library does that is interrupted inside `except BaseException` or a callback."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    except BaseException:
        return


def test_swallowed_interrupt_stops_the_run_at_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    interrupts = Interrupts()
    progress = TerminalProgress(Console(file=io.StringIO()), "info", interrupts)
    reached = []

    def work() -> None:
        progress.step("layers", 0, 2)
        swallow_interrupt()
        reached.append("after the swallowed interrupt")
        progress.step("layers", 1, 2)
        reached.append("after the next step")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as stop:
        run_verb(work, False, lambda: "run it again", interrupts=interrupts)
    assert stop.value.exit_code == 130
    assert reached == ["after the swallowed interrupt"]
    assert signal.getsignal(signal.SIGINT) is before


def test_error_that_an_interrupt_caused_is_not_shown() -> None:
    """A library that is half imported fails with errors of its own."""

    def work() -> None:
        swallow_interrupt()
        raise AttributeError("partially initialized module")

    with pytest.raises(typer.Exit) as stop:
        run_verb(work, False)
    assert stop.value.exit_code == 130


def test_ignored_interrupt_stays_ignored() -> None:
    """A background job of a shell script ignores SIGINT, and must go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts = Interrupts()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.raise_if_noted()

    run_verb(work, False, interrupts=interrupts)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_errors_are_not_hidden() -> None:
    def work() -> None:
        raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        run_verb(work, False)


def test_loop_of_a_shell_stops_with_the_command(tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the shell too, which ends its loop only if the command dies of the signal."""
    (tmp_path / "run.py").write_text(
        "import os, signal\n"
        "import msmodelslim_omni.commands.live_progress as live\n"
        "live.TerminalProgress.say = lambda *_: os.killpg(0, signal.SIGINT)\n"
        "from msmodelslim_omni.__main__ import main\n"
        "main()\n"
    )
    words = f"quant {tiny} {tmp_path / 'out'} --config_path {MINMAX} --device cpu"
    line = f"for i in 1 2; do echo run $i; {sys.executable} {tmp_path / 'run.py'} {words}; done; echo not reached"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run where it is ignored
    )  # fmt: skip
    assert done.stdout == "run 1\n" and done.returncode == -signal.SIGINT  # shells show it as 130
    assert "stopped: nothing was written" in done.stderr and "Traceback" not in done.stderr
