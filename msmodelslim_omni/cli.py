"""The `msmodelslim` command. Each verb is one function in commands/, whose arguments are its flags.

Exit codes: 0 success; 1 an error, printed as one message with a hint; 2 wrong usage; 130 stopped by Ctrl-C. Only the
verbs that need torch import it, so `--help` and `recipes` are fast.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from .commands import analyze, doctor, env, evaluate, export, generate, inspect, quant, recipes
from .commands.examples import examples
from .commands.interrupts import EXIT_CODE
from .commands.shell import VERB_SETTINGS, Verb
from .version import __version__

_SHORT_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="msmodelslim",
    help="Quantize multimodal models: Qwen2.5-Omni, Qwen2.5-VL, Qwen3-Omni and Qwen3-VL.",
    invoke_without_command=True,
    context_settings=_SHORT_HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start here: [bold]msmodelslim quant MODEL OUTPUT --dry_run[/]",
)
VERBS: tuple[Callable[..., None], ...] = (
    quant.quant,
    analyze.analyze,
    inspect.inspect,
    doctor.doctor,
    export.export,
    generate.generate,
    evaluate.eval_,
    env.env,
)
for verb in VERBS:
    name = verb.__name__.rstrip("_")  # eval_ avoids the built-in eval
    app.command(name, cls=Verb, context_settings=VERB_SETTINGS, epilog=examples(name))(verb)

recipes_app = typer.Typer(
    help="List, show, copy and validate recipes, or print their JSON Schema.",
    no_args_is_help=True,
    context_settings=_SHORT_HELP,
)
app.add_typer(recipes_app, name="recipes")
for name, recipes_verb in recipes.VERBS.items():
    recipes_app.command(name, context_settings=VERB_SETTINGS)(recipes_verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msmodelslim_omni {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _verbs_that_begin(incomplete: str) -> list[str]:
    names = [verb.__name__.rstrip("_") for verb in VERBS]
    return [name for name in [*names, "recipes"] if name.startswith(incomplete)]


@app.command("help", context_settings=VERB_SETTINGS)
def _help(
    context: typer.Context,
    verb: Annotated[str | None, typer.Argument(help="A verb, e.g. quant.", autocompletion=_verbs_that_begin)] = None,
) -> None:
    """Show the help of a verb."""
    if verb is None:
        assert context.parent is not None  # the group
        typer.echo(context.parent.get_help())
        return
    app([verb, "--help"], prog_name="msmodelslim")


def main() -> None:
    """Run the command and exit with its code; after Ctrl-C, die of the signal so that a shell's loop stops too."""
    if sys.platform == "win32":
        sys.exit("error: Windows is not supported, because the work folder needs POSIX file locks\nhint: use WSL 2")
    # On a busy machine, threads that spin while waiting for each other are several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch uses 2 MiB pages for large CPU tensors, so first access to new buffers takes a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A backend plug-in without its driver makes `import torch` fail; runtime/device.py imports it only on request.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Imports create a million permanent objects, and garbage collection among them takes a fifth of the import time.
    # Code that depends on freed memory collects garbage explicitly (runtime.free_modules).
    gc.set_threshold(20_000)
    try:
        app(prog_name="msmodelslim")
    except SystemExit as end:
        if end.code != EXIT_CODE:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
