"""Recipes: parse YAML into a frozen, validated Recipe, with file:line in every error.

processors.py holds the pydantic schema of what is done to Linears, schema.py the rest of it; loading.py reads recipes
and chooses a shipped one; patterns.py matches include and exclude; editor_schema.py makes the JSON Schema, which is
shipped as recipe.schema.json.
May import: files, errors. No torch, so that `--help` is fast.
Not here: models. The plan package checks whether a recipe fits a model.
"""

from __future__ import annotations

from .editor_schema import recipe_schema
from .loading import (
    check_quant_type,
    find_recipe,
    load_recipe,
    needs_samples,
    parse_recipe,
    quant_type_names,
    resolve_recipe,
    saver_names,
    shipped_recipes,
    summary,
)
from .patterns import matches, near_patterns
from .processors import (
    GROUP_SIZES,
    ActConfig,
    AwqConfig,
    IterSmoothConfig,
    KeepConfig,
    LinearQConfig,
    LinearQuantConfig,
    ProcessorConfig,
    SmoothQuantConfig,
    WeightConfig,
)
from .schema import SAVER_CONFIGS, CalibrationConfig, Modality, Recipe, SaverConfig
from .yaml_lines import Location

__all__ = [
    "GROUP_SIZES",
    "SAVER_CONFIGS",
    "ActConfig",
    "AwqConfig",
    "CalibrationConfig",
    "IterSmoothConfig",
    "KeepConfig",
    "LinearQConfig",
    "LinearQuantConfig",
    "Location",
    "Modality",
    "ProcessorConfig",
    "Recipe",
    "SaverConfig",
    "SmoothQuantConfig",
    "WeightConfig",
    "check_quant_type",
    "find_recipe",
    "load_recipe",
    "matches",
    "near_patterns",
    "needs_samples",
    "parse_recipe",
    "quant_type_names",
    "recipe_schema",
    "resolve_recipe",
    "saver_names",
    "shipped_recipes",
    "summary",
]
