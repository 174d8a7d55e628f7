"""Shared by all verbs: consoles, common flags, paths as argument or flag, and error reporting."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from ..errors import QuantError
from .completion import devices
from .interrupts import EXIT_CODE, Interrupts

if TYPE_CHECKING:
    from .live_progress import TerminalProgress


class _PipedConsole(Console):
    """A console whose reader may have had enough: `msmodelslim ... | head` is no error."""

    def on_broken_pipe(self) -> None:
        _forget_stdout()
        raise typer.Exit(0)


# Progress and messages go to stderr, results to stdout.
messages = Console(stderr=True, highlight=False)
results = _PipedConsole(highlight=False)


class TrueFalse(str, Enum):
    true = "True"
    false = "False"


class LogLevel(str, Enum):
    info = "info"
    warning = "warning"
    error = "error"


class OnBadSample(str, Enum):
    fail = "fail"
    skip = "skip"


class Effort(str, Enum):
    fast = "fast"
    best = "best"


class ComputeFormat(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


# Flags use underscores like msModelSlim's; hyphens are accepted too.
VERB_SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
}

# Groups of options in the help of a verb.
RECIPE, DATA, MACHINE, OUTPUT = "How to quantize", "Samples", "Machine", "Messages and results"


def flag(name: str, help_text: str, group: str | None = None, **more: Any) -> Any:
    """Return an option spelled with underscores, like msModelSlim's."""
    return typer.Option(f"--{name}", help=help_text, rich_help_panel=group, **more)


def same_as(argument: str, name: str) -> Any:
    """Return the option that gives a positional argument by name, as msModelSlim does."""
    return typer.Option(f"--{name}", help=f"The same as {argument}.", metavar="PATH", show_default=False)


def argument(metavar: str, help_text: str) -> Any:
    """Return a positional argument that may also be given as a flag; `required` checks that it is given."""
    return typer.Argument(help=help_text, metavar=metavar, show_default=False)


# The limits of calibration/, repeated because --help does not import it. A test compares them.
MEDIA_LIMITS = (
    "Media: local files in the formats that Pillow and PyAV decode, known by their content; each at most 1 GiB,"
    " 64 megapixels, 600 s."
)
INDEX_LIMITS = "At most 64 MiB and 100000 samples."

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, also an error.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
LogFile = Annotated[
    Path | None,
    flag(
        "log_file",
        "Also append messages and progress to this file, with times.",
        OUTPUT,
        show_default=False,
        envvar="MSMODELSLIM_LOG_FILE",
    ),
]

LogLevelFlag = Annotated[
    LogLevel,
    flag(
        "log_level",
        "Lowest level of messages to print; error also hides progress.",
        OUTPUT,
        envvar="MSMODELSLIM_LOG_LEVEL",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The same as --log_level error.", rich_help_panel=OUTPUT)]

Device = Annotated[
    str,
    typer.Option(
        help="Device: auto (npu, else cuda, else cpu), cpu, cuda[:i], npu[:i].",
        rich_help_panel=MACHINE,
        envvar="MSMODELSLIM_DEVICE",
        autocompletion=devices,
    ),
]
TrustRemoteCode = Annotated[
    TrueFalse, flag("trust_remote_code", "Allow code from the checkpoint to run.", MACHINE, case_sensitive=False)
]


class Verb(TyperCommand):
    """A verb that also takes msModelSlim's `--tag WORD...`, whose words choose among recipes that this tool lacks."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _without_tags(args))


def _without_tags(args: list[str]) -> list[str]:
    """The arguments without `--tag` and its words, which end at the next flag."""
    kept: list[str] = []
    dropping = False
    for position, word in enumerate(args):
        if word == "--":
            return kept + args[position:]
        dropping = word == "--tag" or (dropping and not word.startswith("-"))
        if word == "--tag":
            messages.print("--tag is ignored: recipes are chosen by --model_type and --quant_type")
        if not dropping:
            kept.append(word)
    return kept


def required(context: typer.Context, **given: tuple[str, str | None, str | None]) -> list[str]:
    """The values of arguments that may also be given as flags, in order.

    given: by the flag's name, (argument, its value, the flag's value). Wrong usage is reported for all of them at once.
    """
    faults, values = [], []
    for name, (metavar, positional, by_flag) in given.items():
        if positional is not None and by_flag is not None:
            faults.append(f"{metavar} is given twice, as {positional!r} and as --{name} {by_flag!r}.")
        value = by_flag if positional is None else positional
        if value is None:
            faults.append(f"Missing {metavar} (or --{name}).")
        elif not value.strip():
            faults.append(f"{metavar} (--{name}) is empty.")
        values.append(value or "")
    if faults:
        context.fail(" ".join(faults))
    return values


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def run_verb(
    work: Callable[[], None],
    debug: bool,
    stopped: Callable[[], str] = str,
    *,
    can_share: bool = False,
    interrupts: Interrupts | None = None,
    as_json: bool = False,
) -> None:
    """Run a verb; print an error as one message and exit with code 1, or 130 after Ctrl-C.

    stopped: returns the message after Ctrl-C. can_share: whether several processes can share the work. interrupts:
    those that the verb's progress raises again. as_json: also print an error as JSON on stdout.
    """
    if not can_share and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ["RANK"] == "0":
            messages.print("[bold red]error:[/] only `quant` runs in several processes under torchrun")
            messages.print("[bold]hint:[/] run this command without torchrun")
        raise typer.Exit(1)
    interrupts = interrupts or Interrupts()
    with interrupts.watch():
        try:
            work()
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(0) from None
        except (QuantError, OSError) as error:  # OSError: e.g. a path that is too long, a folder without permission
            if interrupts.noted:
                _print_stopped(stopped())
            if debug:
                traceback.print_exc()
            _print_error(error, as_json)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _print_stopped(stopped())
        except Exception:
            if interrupts.noted:  # a library that Ctrl-C left half imported
                _print_stopped(stopped())
            raise


def run_with_progress(
    check: Callable[[], None],
    work: Callable[[TerminalProgress], None],
    debug: bool,
    *,
    stopped: Callable[[], str] = str,
    can_share: bool = False,
    as_json: bool = False,
    log_level: LogLevel = LogLevel.info,
    quiet: bool = False,
    log_file: Path | None = None,
) -> None:
    """Run a verb that takes minutes: `check` before torch is imported, then `work`, which shows its progress.

    quiet: the same as the log level `error`.
    """
    shown = LogLevel.error if quiet else log_level
    interrupts = Interrupts()

    def check_and_work() -> None:
        check()
        # Seconds, in which a terminal would show nothing.
        with nullcontext() if shown is LogLevel.error else messages.status("loading libraries"):
            from .live_progress import TerminalProgress

        progress = TerminalProgress(messages, shown.value, interrupts, log_file)
        try:
            work(progress)
        except QuantError as error:
            progress.log(f"error: {error}")
            raise
        except KeyboardInterrupt:
            progress.log("stopped")
            raise
        finally:
            progress.close()

    quiet_libraries()
    run_verb(check_and_work, debug, stopped, can_share=can_share, interrupts=interrupts, as_json=as_json)


def _print_stopped(stopped: str) -> None:
    messages.print(f"[bold]stopped{':' if stopped else ''}[/] {escape(stopped)}", soft_wrap=True)
    raise typer.Exit(EXIT_CODE) from None


def _print_error(error: QuantError | OSError, as_json: bool) -> None:
    message, hint = (error.message, error.hint) if isinstance(error, QuantError) else (str(error), "")
    messages.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        messages.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)
    if as_json:
        print_json({"error": message, "hint": hint})


def _forget_stdout() -> None:
    """Write what follows to nowhere, so that Python does not fail again when it flushes stdout at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_libraries() -> None:
    """Silence the messages of libraries; environment variables that the user sets take precedence."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
