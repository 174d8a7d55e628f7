"""The interface of an output format. A module that defines these names is a Format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..numerics import CacheDtype, QuantScheme
from ..storage import TensorInfo
from .job import OutLinear, OutputJob, OutTensor
from .stored import StoredLinears


class Format(Protocol):
    """One output format. FORMATS lists all of them.

    weights_stem: start of the names of weight files: `model` gives model.safetensors, model-00001-of-00003.safetensors
        and model.safetensors.index.json.
    quant_method: the quant_method in quantization_config of config.json; None if the format writes no such config.
    kv_cache: the number format of a rounded KV cache whose scales it stores, see kv_cache.py; None if its readers round
        none. kv_cache_reason: why it stores no other one.
    """

    weights_stem: str
    quant_method: str | None
    kv_cache: CacheDtype | None
    kv_cache_reason: str

    def refusal(self, schemes: frozenset[QuantScheme]) -> str:
        """The reason why this format cannot store these schemes in one checkpoint, or an empty string."""
        ...

    def linear_tensors(self, linear: OutLinear) -> list[OutTensor]:
        """The tensors that store one quantized Linear."""
        ...

    def float_tensor(self, tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
        """The tensor to write for a float tensor of the source, for example in another dtype."""
        ...

    def json_files(self, job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
        """The contents of config.json and of the format's own JSON files, by file name."""
        ...

    def read_linears(
        self, settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
    ) -> StoredLinears:
        """Find the quantized Linears of a checkpoint in this format, from its headers.

        settings: the quantization_config, or the content of quant_model_description.json. float_dtype: gives
        the dtype of the float tensors in a Linear's layer, by the Linear's name. Faults of single Linears are collected
        in the result.
        Raises QuantError for settings that are not supported.
        """
        ...
