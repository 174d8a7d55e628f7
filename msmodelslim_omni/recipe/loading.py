"""Reads recipes, and chooses a shipped one by model type and quant type. Every error names file:line, the key and the
allowed values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import takewhile
from pathlib import Path

from pydantic import ValidationError

from ..errors import QuantError, nearest
from ..files import read_regular, shipped_folder
from .processors import LinearQuantConfig
from .schema import SAVER_CONFIGS, Recipe
from .validation_errors import FaultFormatter
from .yaml_lines import build, check_duplicates_and_size, compose, drop_anchor_holders

MAX_RECIPE_BYTES = 1 << 20

# Other names for a quant type that users know from other tools.
QUANT_TYPE_ALIASES = {
    "awq": "w4a16",
    "gptq": "w4a16",
    "int4": "w4a16",
    "int8": "w8a8",
    "w8a8_dynamic": "w8a8",
    "bnb": "nf4",
    "bitsandbytes": "nf4",
    "fp8_dynamic": "fp8",
    "w8a8_fp8": "fp8",
}
# Other names for a saver.
SAVER_ALIASES = {"ascendv1": "ascendv1_saver", "ascend": "ascendv1_saver", "autoawq": "awq", "bnb": "bitsandbytes"}

# Names of union branches that pydantic inserts into error locations.
_UNION_TAGS = frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq", "group", *SAVER_CONFIGS})


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe: the path of a YAML file, or the name of a shipped recipe.

    Raises QuantError with file:line, key, value and the allowed values.
    """
    return resolve_recipe(str(path))


def _load_file(path: Path) -> Recipe:
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8")  # keeps line endings, for the copy in the output
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: cannot read the recipe: {error}", "give a YAML file in UTF-8 encoding") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path = Path("recipe")) -> Recipe:
    """Validate the text of a recipe. `path` is only used in error messages."""
    root, anchored = compose(text, path)
    check_duplicates_and_size(root, path)
    data = build(root, path)
    data = drop_anchor_holders(data, root, anchored, Recipe.model_fields)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise QuantError(
            "\n".join(FaultFormatter(Recipe, _UNION_TAGS, root, path).describe(error)),
            "see `msmodelslim recipes show` for a working recipe and `msmodelslim recipes schema` for all keys",
        ) from error
    recipe._path, recipe._text, recipe._root = path, text, root
    _check_order(recipe)
    _check_keep(recipe)
    return recipe


def _check_order(recipe: Recipe) -> None:
    """Raise QuantError for a processor that would change weights after they are rounded."""
    after_linear_quant = False
    for location, config in recipe.processors():
        if isinstance(config, LinearQuantConfig):
            after_linear_quant = True
        elif after_linear_quant:
            raise QuantError(
                f"{recipe.where(location)}: {config.type} comes after linear_quant and would smooth rounded weights",
                "move it before linear_quant",
            )


def _check_keep(recipe: Recipe) -> None:
    """Raise QuantError for `keep` in a data-free recipe, which has no samples to measure damage on."""
    for location, config in recipe.processors():
        if isinstance(config, LinearQuantConfig) and config.keep is not None and not needs_samples(recipe):
            raise QuantError(
                f"{recipe.where((*location, 'keep'))}: keep measures damage on samples, and this recipe is data-free",
                "add iter_smooth or awq before linear_quant, use method: gptq, or remove keep and exclude Linears",
            )


def needs_samples(recipe: Recipe) -> bool:
    """Whether the recipe is calibrated: whether a processor looks at activations."""
    return any(
        not isinstance(config, LinearQuantConfig)
        or config.qconfig.weight.method == "gptq"
        or config.qconfig.stores_input_scale
        for _, config in recipe.processors()
    ) or (recipe.spec.kv_cache is not None)


@cache
def _load_shipped(path: Path) -> Recipe:
    """Load a file of configs/ once per process: they do not change, and reading all takes a third of a second."""
    return _load_file(path)


def shipped_recipes() -> list[Recipe]:
    """Load all recipes in configs/, highest score first."""
    recipes = [_load_shipped(path) for path in sorted(shipped_folder("configs").glob("*.yaml"))]
    return sorted(recipes, key=lambda recipe: (-recipe.metadata.score, recipe.metadata.config_id))


def summary(recipe: Recipe) -> str:
    """The first sentence of the comment at the top of the file; empty if there is none."""
    lines = list(takewhile(lambda line: line.startswith("#"), recipe.text.splitlines()))
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"[.;] ", text)[0].removesuffix(".")


def find_recipe(model_type: str, quant_type: str) -> Recipe:
    """Find the shipped recipe with the highest score for a model type and a quant type (e.g. `w8a8`).

    A name with a variant, such as `w8a8_minmax` or `w4a16_sym`, is the end of the recipe's name. Raises QuantError that
    lists the available quant types.
    """
    candidates = [recipe for recipe in shipped_recipes() if model_type in recipe.metadata.verified_model_types]
    if found := _of_type(candidates, quant_type):
        return found
    available = sorted({recipe.quant_type for recipe in candidates})
    raise QuantError(
        f"no recipe for quant_type {quant_type!r} and model_type {model_type!r}."
        f" Quant types with a recipe: {', '.join(available) or 'none'}.{_nearest_type(quant_type, available)}",
        "choose one of them, or write a recipe and pass it with --config_path",
    )


def check_quant_type(quant_type: str) -> None:
    """Raise QuantError if no shipped recipe of any model has this quant type."""
    recipes = shipped_recipes()
    if _of_type(recipes, quant_type) is None:
        available = sorted({recipe.quant_type for recipe in recipes})
        raise QuantError(
            f"no recipe has the quant_type {quant_type!r}. Quant types with a recipe: {', '.join(available)}."
            f"{_nearest_type(quant_type, available)}",
            "choose one of them, or write a recipe and pass it with --config_path",
        )


def quant_type_names() -> dict[str, str]:
    """What --quant_type takes: types and variants with what their recipe does, then other tools' names for them."""
    names: dict[str, str] = {}
    for recipe in shipped_recipes():
        names.setdefault(recipe.quant_type, summary(recipe))
    for recipe in shipped_recipes():
        variant = re.search(rf"_({re.escape(recipe.quant_type)}_\w+)$", recipe.metadata.config_id)
        if variant:
            names.setdefault(variant[1], summary(recipe))
    return dict(sorted(names.items())) | {alias: f"same as {name}" for alias, name in QUANT_TYPE_ALIASES.items()}


def _of_type(recipes: list[Recipe], quant_type: str) -> Recipe | None:
    """The first recipe of a quant type, or the first whose name ends with it."""
    canonical = QUANT_TYPE_ALIASES.get(quant_type.lower(), quant_type.lower())
    of_type = [recipe for recipe in recipes if recipe.quant_type == canonical]
    named = [recipe for recipe in recipes if recipe.metadata.config_id.endswith(f"_{canonical}")]
    return next(iter(of_type + named), None)


def _nearest_type(quant_type: str, available: list[str]) -> str:
    """` Did you mean 'w4a16'?`, also for an alias that is almost right.

    One letter in four is too much: `int5` is no slip for `int8`, nor `w4a8` for `w8a8`.
    """
    guess = nearest(quant_type.lower(), [*available, *QUANT_TYPE_ALIASES], cutoff=0.76)
    for alias, canonical in QUANT_TYPE_ALIASES.items():
        guess = guess.replace(f"'{alias}'", f"'{canonical}'")
    return guess


def resolve_recipe(config_path: str) -> Recipe:
    """Load a recipe by its path, or by the config_id of a shipped recipe."""
    if Path(config_path).exists():
        return _load_file(Path(config_path))
    stem = Path(config_path).stem
    path = shipped_folder("configs") / f"{stem}.yaml"  # a shipped recipe has the name of its file
    if config_path in (stem, path.name) and path.is_file():
        return _load_shipped(path)
    shipped = [recipe.metadata.config_id for recipe in shipped_recipes()]
    raise QuantError(
        f"recipe {config_path!r} does not exist. Shipped recipes: {', '.join(shipped)}.{nearest(stem, shipped)}",
        "give the path of a YAML file or the name of a shipped recipe",
    )


def saver_names(given: Iterable[str]) -> list[str]:
    """Names of savers as a user writes them: with hyphens, several joined by commas, or by another tool's name.

    Raises QuantError for an unknown name.
    """
    names = []
    for word in ",".join(given).split(","):
        spelled = word.strip().lower().replace("-", "_")
        name = SAVER_ALIASES.get(spelled, spelled)
        if name not in SAVER_CONFIGS:
            raise QuantError(
                f"unknown save_format {word!r}. Known: {', '.join(SAVER_CONFIGS)}.{nearest(name, SAVER_CONFIGS)}",
                "choose one of them; for several, repeat the flag or join them with commas",
            )
        names.append(name)
    return names
