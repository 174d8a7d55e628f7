"""The processors of a recipe: a new one is one file here and a line in this table (and its fields in recipe.py)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from . import awq, linear_quant, smooth
from .work import LayerWork


class Processor(Protocol):
    """A step on one layer's tensors.

    needs: "" for nothing, "inputs" for maxima and some tokens of the Linears' inputs, "gram" for H as well; if no
    processor needs anything, no sample is read.
    apply: the layer after this step. `linears`: the relative names of the Linears that the recipe gives to it.
    """

    def needs(self, config: Any) -> Literal["", "inputs", "gram"]: ...

    def apply(self, work: LayerWork, config: Any, linears: frozenset[str]) -> LayerWork: ...


PROCESSORS: dict[str, Processor] = {
    "linear_quant": linear_quant,
    "smooth_quant": smooth,
    "iter_smooth": smooth,
    "awq": awq,
}
