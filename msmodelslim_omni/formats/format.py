"""What every output format implements: a module with these names is a Format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..numerics import QuantScheme
from ..storage import TensorInfo
from .job import OutLinear, OutputJob, OutTensor
from .stored import StoredLinears


class Format(Protocol):
    """One output format; see FORMATS.

    weights_stem: `model` gives model-00001-of-00003.safetensors, model.safetensors and the index's name.
    quant_method: the value in quantization_config of config.json; None for a format that writes none.
    """

    weights_stem: str
    quant_method: str | None

    def refusal(self, schemes: frozenset[QuantScheme]) -> str:
        """Why this format cannot hold these schemes in one checkpoint, or an empty string."""
        ...

    def linear_tensors(self, linear: OutLinear) -> list[OutTensor]:
        """The tensors of one quantized Linear."""
        ...

    def float_tensor(self, tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
        """A float tensor as this format keeps it."""
        ...

    def json_files(self, job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
        """config.json and the format's own files, by name."""
        ...

    def read_linears(
        self, settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
    ) -> StoredLinears:
        """The quantized Linears of a checkpoint in this format, from its headers.

        settings: the quantization_config, or the description. float_dtype: of a Linear's other tensors, by its name.
        Raises QuantError for settings that this format's writer never produces and that mean something else.
        """
        ...
