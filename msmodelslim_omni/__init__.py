"""msmodelslim_omni: quantize multimodal models, first of all Qwen2.5-Omni.

The whole public API: quantize, load_recipe, Recipe, QuantError. torch is imported only when quantize is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import QuantError
from .recipe import Recipe, load_recipe
from .version import __version__

if TYPE_CHECKING:
    from .run import quantize

__all__ = ["QuantError", "Recipe", "__version__", "load_recipe", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "quantize":
        from .run import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
