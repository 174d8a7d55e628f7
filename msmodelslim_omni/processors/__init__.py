"""The processors of a recipe: a new one is one file here and a line in this table (and its fields in recipe.py)."""

from __future__ import annotations

from typing import Any, Protocol

from . import linear_quant, smooth
from .work import LayerWork


class Processor(Protocol):
    """A step on one layer's tensors.

    needs_calibration: whether it must see the Linears' inputs; if no processor does, no sample is read.
    apply: the layer after this step. `linears`: the relative names of the Linears that the recipe gives to it.
    """

    def needs_calibration(self, config: Any) -> bool: ...

    def apply(self, work: LayerWork, config: Any, linears: frozenset[str]) -> LayerWork: ...


PROCESSORS: dict[str, Processor] = {
    "linear_quant": linear_quant,
    "smooth_quant": smooth,
    "iter_smooth": smooth,
}
