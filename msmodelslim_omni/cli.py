"""The `msmodelslim` command: the list of its verbs. Each is one function in commands/, its flags are its arguments.

Exit codes: 0 done; 1 a fault named in one message with its hint; 2 wrong usage. torch is imported by the verbs that
need it only, so that `--help` and `recipes` answer at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

import typer

from .commands import analyze, doctor, evaluate, export, generate, inspect, quant, recipes
from .commands.shell import EITHER_SPELLING

app = typer.Typer(
    name="msmodelslim",
    help="Quantize multimodal models, Qwen2.5-Omni and Qwen2.5-VL, 3B and 7B.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
VERBS: tuple[Callable[..., None], ...] = (
    quant.quant,
    analyze.analyze,
    inspect.inspect,
    doctor.doctor,
    export.export,
    generate.generate,
    evaluate.eval_,
)
for verb in VERBS:
    name = verb.__name__.rstrip("_")  # eval_ is not Python's eval
    app.command(name, context_settings=EITHER_SPELLING)(verb)

recipes_app = typer.Typer(help="The recipes: list, show, validate, schema.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
for name, recipes_verb in recipes.VERBS.items():
    recipes_app.command(name)(recipes_verb)


def main() -> None:
    """The entry point of the console script."""
    # Threads that spin while they wait for each other are several times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Pages of 2 MiB for large tensors: a fresh buffer is faulted in three times as fast (torch reads this on the CPU).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A plug-in without its driver makes `import torch` itself fail; device.py imports plug-ins when they are asked for.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Importing the libraries makes a million objects that stay; looking among them for garbage all the while takes a
    # fifth of the time of it. Where memory hangs on it, garbage is collected on purpose (device.py's free_modules).
    gc.set_threshold(20_000)
    try:
        app()
    except KeyboardInterrupt:  # outside any verb
        sys.exit(1)


if __name__ == "__main__":
    main()
