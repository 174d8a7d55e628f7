"""`recipes`: list, show, validate, schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .shell import (
    Debug,
    Json,
    guarded,
    print_json,
    results,
)


def recipes_list(as_json: Json = False, debug: Debug = False) -> None:
    """The shipped recipes, best first."""

    def work() -> None:
        from ..recipe import shipped_recipes
        from .tables import table

        found = [
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
            print_json(found)
            return
        keys = ["name", "quant_type", "model_types", "processors", "savers"]
        rows = [["\n".join(v) if isinstance(v := entry[k], list) else str(v) for k in keys] for entry in found]
        results.print(table("Shipped recipes", keys, rows, numeric=9))

    guarded(work, debug)


def recipes_show(name: Annotated[str, typer.Argument(help="A recipe's name or path.")], debug: Debug = False) -> None:
    """Print a recipe's YAML."""

    def work() -> None:
        from ..recipe import resolve_recipe

        typer.echo(resolve_recipe(name).text, nl=False)

    guarded(work, debug)


def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Recipes by path or name.")], debug: Debug = False
) -> None:
    """Check recipes; every fault with file:line."""

    def work() -> None:
        from ..recipe import resolve_recipe

        for name in names:
            recipe = resolve_recipe(name)
            typer.echo(f"{recipe.path}: valid ({recipe.quant_type or 'no label'})")

    guarded(work, debug)


def recipes_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of recipes, for editors."""

    def work() -> None:
        from ..recipe import recipe_schema

        print_json(recipe_schema())

    guarded(work, debug)


VERBS: dict[str, Callable[..., None]] = {
    "list": recipes_list,
    "show": recipes_show,
    "validate": recipes_validate,
    "schema": recipes_schema,
}
