"""msmodelslim_omni: quantize multimodal models, first of all Qwen2.5-Omni.

The whole public API: quantize, load_recipe, Recipe, QuantError. Each is imported when it is first used, and only
quantize imports torch, so that the command starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import QuantError
    from .recipe import Recipe, load_recipe
    from .run import quantize

__all__ = ["QuantError", "Recipe", "__version__", "load_recipe", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "quantize":
        from .run import quantize

        return quantize
    if name == "QuantError":
        from .errors import QuantError

        return QuantError
    if name in ("Recipe", "load_recipe"):
        from . import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
