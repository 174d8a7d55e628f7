"""Recipes: parse YAML into a frozen, validated Recipe, with file:line in every error.

schema.py holds the pydantic schema and finds shipped recipes; patterns.py matches include and exclude;
editor_schema.py makes the JSON Schema, which is shipped as recipe.schema.json.
May import: files, errors. No torch.
Not here: models. The plan package checks whether a recipe fits a model.
"""

from __future__ import annotations

from .editor_schema import recipe_schema
from .patterns import matches, near_patterns
from .schema import (
    GROUP_SIZES,
    SAVER_CONFIGS,
    ActConfig,
    AwqConfig,
    CalibrationConfig,
    IterSmoothConfig,
    KeepConfig,
    LinearQConfig,
    LinearQuantConfig,
    Modality,
    ProcessorConfig,
    Recipe,
    SaverConfig,
    SmoothQuantConfig,
    WeightConfig,
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
