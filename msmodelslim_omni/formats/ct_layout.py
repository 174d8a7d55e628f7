"""The interface of a layout of compressed-tensors. A module that defines these names is a Layout."""

from __future__ import annotations

from typing import Any, Protocol

from ..numerics import QuantScheme
from .job import OutLinear, OutTensor
from .stored import Parts


class Layout(Protocol):
    """How compressed-tensors stores the Linears of some schemes. LAYOUTS in compressed_tensors.py lists all of them.

    FORM: the `format` in quantization_config. SUPPORTED: the schemes that `stored_scheme` reads, for errors.
    """

    FORM: str
    SUPPORTED: str

    def stores(self, scheme: QuantScheme) -> bool:
        """Whether this layout writes the scheme."""
        ...

    def linear_tensors(self, linear: OutLinear) -> list[OutTensor]:
        """The tensors that store one quantized Linear."""
        ...

    def arguments(self, scheme: QuantScheme) -> dict[str, Any]:
        """`weights` and `input_activations` of the config group."""
        ...

    def stored_scheme(self, weights: dict[str, Any], act: dict[str, Any] | None) -> QuantScheme | None:
        """The scheme of a config group with this FORM; None if it is not supported."""
        ...

    def required(self, scheme: QuantScheme) -> tuple[str, ...]:
        """The endings of the tensors that every Linear of the scheme has."""
        ...

    def recognizes(self, parts: Parts, scheme: QuantScheme) -> bool:
        """Whether these tensors look like this layout, to tell the schemes of a mixed checkpoint apart."""
        ...

    def fault(self, parts: Parts, scheme: QuantScheme) -> str:
        """What is wrong with the dtypes and shapes of all required tensors; an empty string if nothing is."""
        ...

    def stored_linear(self, name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
        """The Linear that is stored in these tensors."""
        ...
