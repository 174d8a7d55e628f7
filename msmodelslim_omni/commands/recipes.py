"""`recipes`: list, show, copy, validate, schema."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import QuantError
from .completion import recipe_names
from .shell import (
    Debug,
    Json,
    flag,
    messages,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)


def recipes_list(as_json: Json = False, debug: Debug = False) -> None:
    """List the shipped recipes: name, what it is for, and whether it needs samples."""

    def work() -> None:
        from ..recipe import needs_samples, shipped_recipes, summary
        from .tables import table

        recipes = shipped_recipes()
        entries = [
            {
                "name": recipe.metadata.config_id,
                "quant_type": recipe.quant_type,
                "summary": summary(recipe),
                "needs_samples": needs_samples(recipe),
                "model_types": list(recipe.metadata.verified_model_types),
                "processors": [config.type for _, config in recipe.processors()],
                "savers": [saver.type for saver in recipe.spec.save],
                "path": str(recipe.path),
            }
            for recipe in recipes
        ]
        if as_json:
            print_json(entries)
            return
        rows = [
            [recipe.metadata.config_id, "yes" if needs_samples(recipe) else "no", _purpose(summary(recipe))]
            for recipe in recipes
        ]
        rows.sort(key=lambda row: row[0])
        results.print(table("Shipped recipes", ["name", "samples", "what it does"], rows, numeric=9, cut=2))
        messages.print("the whole recipe: msmodelslim recipes show NAME")
        messages.print("a recipe of your own: msmodelslim recipes copy NAME FILE.yaml")

    run_verb(work, debug, as_json=as_json)


def _purpose(text: str) -> str:
    """A recipe's summary without the model, which the name beside it says: a line has little room."""
    return re.sub(r" for (the thinker of )?Qwen[\w.-]*\w", "", text, count=1)


def recipes_show(
    name: Annotated[str, typer.Argument(help="Name or path of a recipe.", autocompletion=recipe_names)],
    debug: Debug = False,
) -> None:
    """Print the YAML of a recipe."""

    def work() -> None:
        from ..recipe import resolve_recipe

        typer.echo(resolve_recipe(name).text, nl=False)

    run_verb(work, debug)


def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", autocompletion=recipe_names)],
    file: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
    debug: Debug = False,
) -> None:
    """Copy a shipped recipe to a file of your own, to edit and pass with --config_path."""

    def work() -> None:
        from ..recipe import resolve_recipe

        text = resolve_recipe(name).text
        if file.suffix not in (".yaml", ".yml"):
            raise QuantError(f"{str(file)!r} does not end in .yaml", f"give e.g. {file.name}.yaml")
        try:
            with file.open("x", encoding="utf-8", newline="") as stream:
                stream.write(text)
        except FileExistsError as error:
            raise QuantError(f"{str(file)!r} exists", "give another name") from error
        typer.echo(f"wrote {file}; use it with: msmodelslim quant MODEL OUTPUT --config_path {shlex.quote(str(file))}")

    run_verb(work, debug)


def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Names or paths of recipes.", autocompletion=recipe_names)],
    model_path: Annotated[
        str | None,
        flag(
            "model_path",
            "Also check against this float checkpoint: patterns that match nothing, groups that are split, processors"
            " in the wrong order.",
            metavar="PATH",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check recipes and report every error of every file with its line. Exit code 1 if there is one."""

    def work() -> None:
        checks = {name: _check(name, model_path) for name in names}
        if as_json:
            print_json([{"recipe": n, "errors": errors, "warnings": more} for n, (errors, more) in checks.items()])
        for name, (errors, warnings) in checks.items():
            if not errors and not as_json:
                typer.echo(f"{name}: valid")
            for error in errors:
                messages.print(f"[bold red]error:[/] {escape(error)}", soft_wrap=True)
            for warning in warnings:
                messages.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
        if any(errors for errors, _ in checks.values()):
            raise typer.Exit(1)

    if model_path is not None:
        quiet_libraries()
    run_verb(work, debug)


def _check(name: str, model_path: str | None) -> tuple[list[str], list[str]]:
    """The errors and the warnings of one recipe."""
    from ..recipe import resolve_recipe

    try:
        recipe = resolve_recipe(name)
        if model_path is None:
            return [], []
        from ..run import check_recipe

        return [], check_recipe(recipe, model_path)
    except QuantError as error:
        return [str(error)], []


def recipes_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of recipes, for use in editors."""

    def work() -> None:
        from ..recipe import recipe_schema

        print_json(recipe_schema())

    run_verb(work, debug)


VERBS: dict[str, Callable[..., None]] = {
    "list": recipes_list,
    "show": recipes_show,
    "copy": recipes_copy,
    "validate": recipes_validate,
    "schema": recipes_schema,
}
