"""Shared by all verbs: consoles, common flags, and error reporting."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import QuantError

# Progress and messages go to stderr, results to stdout.
messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


class TrueFalse(str, Enum):
    true = "True"
    false = "False"


class LogLevel(str, Enum):
    info = "info"
    warning = "warning"
    error = "error"


# Flags use underscores like msModelSlim's; hyphens are accepted too.
EITHER_SPELLING = {"token_normalize_func": lambda token: token.replace("-", "_")}


def flag(name: str, help_text: str, **more: Any) -> Any:
    """Return an option spelled with underscores, like msModelSlim's."""
    return typer.Option(f"--{name}", help=help_text, **more)


# The limits of calibration/, repeated because --help does not import it. A test compares them.
MEDIA_LIMITS = (
    "Media: jpg png webp, wav mp3 flac m4a, mp4 mkv mov webm, local files only; each at most 1 GiB, 64 megapixels,"
    " 600 s; a video at most 400 megapixels in all frames that are read."
)
INDEX_LIMITS = "At most 64 MiB and 100000 samples."

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Device = Annotated[str, typer.Option(help="Device: auto (npu, else cuda, else cpu), cpu, cuda[:i], npu[:i].")]
TrustRemoteCode = Annotated[
    TrueFalse, flag("trust_remote_code", "Allow code from the checkpoint to run.", case_sensitive=False)
]


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def run_verb(work: Callable[[], None], debug: bool, stopped: str = "", *, can_share: bool = False) -> None:
    """Run a verb; print an error as one message and exit with code 1.

    stopped: message after Ctrl-C. can_share: whether several processes can share the work.
    """
    if not can_share and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ["RANK"] == "0":
            messages.print("[bold red]error:[/] only `quant` runs in several processes under torchrun")
            messages.print("[bold]hint:[/] run this command without torchrun")
        raise typer.Exit(1)
    try:
        work()
    except QuantError as error:
        if debug:
            traceback.print_exc()
        messages.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            messages.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:  # e.g. a path that is too long, a folder without read permission
        if debug:
            traceback.print_exc()
        messages.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        messages.print(f"[bold]stopped{':' if stopped else ''}[/] {escape(stopped)}", soft_wrap=True)
        raise typer.Exit(1) from None


def quiet_libraries() -> None:
    """Silence the messages of libraries; environment variables that the user sets take precedence."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
