"""The `msmodelslim` command. Each verb is one function in commands/, whose arguments are its flags.

Exit codes: 0 success; 1 an error, printed as one message with a hint; 2 wrong usage. Only the verbs that need torch
import it, so `--help` and `recipes` are fast.
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
    help="Quantize multimodal models: Qwen2.5-Omni and Qwen2.5-VL, 3B and 7B.",
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
    name = verb.__name__.rstrip("_")  # eval_ avoids the built-in eval
    app.command(name, context_settings=EITHER_SPELLING)(verb)

recipes_app = typer.Typer(help="List, show and validate recipes, or print their JSON Schema.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
for name, recipes_verb in recipes.VERBS.items():
    recipes_app.command(name)(recipes_verb)


def main() -> None:
    """The entry point of the console script."""
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
        app()
    except KeyboardInterrupt:  # outside of a verb
        sys.exit(1)


if __name__ == "__main__":
    main()
