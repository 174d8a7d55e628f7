"""ascendv1_saver: msModelSlim's output, as vLLM-Ascend's `ascend` quantization reads it.

W8A8_DYNAMIC per Linear [out, in]: `.weight` int8 [out, in], `.weight_scale` float32 [out, 1], `.weight_offset`
float32 zeros [out, 1] (loaded but not used in the product, hence zero), `.bias` float32. All names are the
checkpoint's, which vLLM's mapper expects; config.json holds no quantization_config, since the file
quant_model_description.json is what selects the method. It has an entry for every tensor: a Linear that the runtime
asks for and does not find there ends its loading.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..safetensors_io import TensorSpec
from ..scheme import QuantScheme
from .job import FLOAT, Data, OutLinear, OutputJob, OutTensor

weights_stem = "quant_model_weights"

_DESCRIPTION_VERSION = "1.0.0"


def refusal(scheme: QuantScheme) -> str:
    if scheme.name == "W8A8_DYNAMIC":
        return ""
    return f"no Ascend runtime serves {scheme.name} for dense Linears"


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    column = (linear.shape[0], 1)
    kind = linear.scheme.name
    return [
        OutTensor(TensorSpec(f"{linear.name}.weight", "I8", linear.shape), linear.qweight, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_scale", "F32", column), linear.scales, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_offset", "F32", column), lambda: torch.zeros(column), kind),
    ]


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    if not is_quantized_bias or tensor.spec.dtype == "F32":
        return tensor

    def load() -> Data:
        data = tensor.load()
        assert isinstance(data, torch.Tensor)  # biases are small and handed over whole
        return data.to(torch.float32)

    return replace(tensor, spec=replace(tensor.spec, dtype="F32"), load=load)


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    kinds = {tensor.spec.name: tensor.kind for tensor in tensors}
    description: dict[str, Any] = {
        **dict(sorted(kinds.items())),
        "version": _DESCRIPTION_VERSION,
        "model_quant_type": next((linear.scheme.name for linear in job.linears), FLOAT),
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    return {"quant_model_description.json": description, "config.json": job.config}
