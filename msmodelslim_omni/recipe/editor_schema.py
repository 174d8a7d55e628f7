"""The JSON Schema of recipes, for completion, descriptions and checks in an editor.

pydantic makes it; this module only gives it a name, closes its top level, and turns choices by `type` into conditions,
so that an editor reports the faults of the block that the user means. Checks that compare several keys, and those that
need the model, are not in it: see `recipes validate`.
"""

from __future__ import annotations

from typing import Any

from .schema import Recipe

SCHEMA_FILE = "recipe.schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ID = "urn:msmodelslim_omni:recipe:multimodal_vlm_modelslim_v1"
# Blocks that a top-level key with a YAML anchor may hold.
_ANCHORED = ("LinearQConfig", "ActConfig", "WeightConfig", "WeightExt", "CalibrationConfig", "Label")


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe.

    An unknown top-level key may only hold what YAML anchors are used for: a block of a recipe, or a list.
    """
    schema = _with_conditions(Recipe.model_json_schema())
    schema["additionalProperties"] = {
        "description": "A block with a YAML anchor, which other keys refer to.",
        "anyOf": [*({"$ref": f"#/$defs/{name}"} for name in _ANCHORED), {"type": "array"}],
    }
    return {"$schema": _DIALECT, "$id": _ID, **schema}


def _with_conditions(node: Any) -> Any:
    """The schema with `oneOf` + `discriminator` as one condition per value of `type`, and without pydantic's titles."""
    if isinstance(node, list):
        return [_with_conditions(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "discriminator" in node:
        branches: dict[str, str] = node["discriminator"]["mapping"]
        rest = {key: _with_conditions(value) for key, value in node.items() if key not in ("discriminator", "oneOf")}
        conditions = [
            {"if": {"properties": {"type": {"const": name}}, "required": ["type"]}, "then": {"$ref": reference}}
            for name, reference in branches.items()
        ]
        return {
            **rest,
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": list(branches)}},
            "allOf": conditions,
        }
    is_title = isinstance(node.get("title"), str)
    return {key: _with_conditions(value) for key, value in node.items() if not (key == "title" and is_title)}
