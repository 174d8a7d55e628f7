"""`recipes`: list, show, validate, schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .shell import (
    Debug,
    Json,
    print_json,
    results,
    run_verb,
)


def recipes_list(as_json: Json = False, debug: Debug = False) -> None:
    """List the shipped recipes, best first."""

    def work() -> None:
        from ..recipe import shipped_recipes
        from .tables import table

        entries = [
            {
                "name": recipe.metadata.config_id,
                "quant_type": recipe.quant_type,
                "model_types": list(recipe.metadata.verified_model_types),
                "processors": [config.type for _, config in recipe.processors()],
                "savers": [saver.type for saver in recipe.spec.save],
                "path": str(recipe.path),
            }
            for recipe in shipped_recipes()
        ]
        if as_json:
            print_json(entries)
            return
        keys = ["name", "quant_type", "model_types", "processors", "savers"]
        rows = [["\n".join(v) if isinstance(v := entry[k], list) else str(v) for k in keys] for entry in entries]
        results.print(table("Shipped recipes", keys, rows, numeric=9))

    run_verb(work, debug)


def recipes_show(name: Annotated[str, typer.Argument(help="Name or path of a recipe.")], debug: Debug = False) -> None:
    """Print the YAML of a recipe."""

    def work() -> None:
        from ..recipe import resolve_recipe

        typer.echo(resolve_recipe(name).text, nl=False)

    run_verb(work, debug)


def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Names or paths of recipes.")], debug: Debug = False
) -> None:
    """Check recipes and report every error with file and line."""

    def work() -> None:
        from ..recipe import resolve_recipe

        for name in names:
            recipe = resolve_recipe(name)
            typer.echo(f"{recipe.path}: valid ({recipe.quant_type or 'no label'})")

    run_verb(work, debug)


def recipes_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of recipes, for use in editors."""

    def work() -> None:
        from ..recipe import recipe_schema

        print_json(recipe_schema())

    run_verb(work, debug)


VERBS: dict[str, Callable[..., None]] = {
    "list": recipes_list,
    "show": recipes_show,
    "validate": recipes_validate,
    "schema": recipes_schema,
}
