"""The processors of a recipe. A new one needs a module here, a line in this table, and fields in the recipe package."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from . import awq, linear_quant, smooth
from .work import LayerWork


class Processor(Protocol):
    """A step that changes the tensors of one layer.

    needs: "" for nothing, "inputs" for the maxima and some tokens of the inputs of the Linears, "gram" for H as well.
    If one processor needs H, the layer is compared with plain rounding. If no processor needs anything, no sample is
    read, and `apply` gets one Linear at a time, without bias and norms: such a processor may only round.
    apply: return the layer after this step. `linears`: relative names of the Linears that the recipe selects for it.
    """

    def needs(self, config: Any) -> Literal["", "inputs", "gram"]: ...

    def apply(self, work: LayerWork, config: Any, linears: frozenset[str]) -> LayerWork: ...


PROCESSORS: dict[str, Processor] = {
    "linear_quant": linear_quant,
    "smooth_quant": smooth,
    "iter_smooth": smooth,
    "awq": awq,
}
