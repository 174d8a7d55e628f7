"""compressed_tensors: int-quantized W8A8, as vLLM, vLLM-Ascend and transformers read it.

Per Linear [out, in]: `.weight` int8 [out, in] and `.weight_scale` [out, 1] in the checkpoint's float dtype; biases
untouched. quantization_config stands wherever a loader looks for it (top level, and in thinker_config for the thinker
class). Its ignore list uses `re:` patterns: exact names silently miss vLLM's fused visual qkv, and transformers 5
renamed the modules.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from ..safetensors_io import TORCH_DTYPES, TensorSpec
from ..scheme import QuantScheme
from .job import OutLinear, OutputJob, OutTensor

weights_stem = "model"


def refusal(scheme: QuantScheme) -> str:
    return "" if scheme.name == "W8A8_DYNAMIC" else f"{scheme.name} is not written in this format"


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    def scales() -> torch.Tensor:
        dtype = TORCH_DTYPES[linear.float_dtype]
        return linear.scales().to(dtype).clamp_min(torch.finfo(dtype).tiny)  # float16 ends where float32 does not

    kind, column = linear.scheme.name, (linear.shape[0], 1)
    return [
        OutTensor(TensorSpec(f"{linear.name}.weight", "I8", linear.shape), linear.qweight, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, column), scales, kind),
    ]


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    return tensor


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    config = copy.deepcopy(job.config)
    for path in job.config_paths:
        block = config
        for key in path:
            block = block[key]
        block["quantization_config"] = quantization_config(job)
    return {"config.json": config}


def quantization_config(job: OutputJob) -> dict[str, Any]:
    """One group for all Linears, minus those that stay float."""
    # Only the end of a float Linear's name is the same for transformers 4, 5 and vLLM.
    floats = [f"re:.*{re.escape(_ending(name))}$" for name in job.float_linears]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    acts = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": acts,
                "output_activations": None,
            }
        },
        "ignore": [*job.ignore_patterns, *floats],
        "kv_cache_scheme": None,
    }


def _ending(name: str) -> str:
    """`.layers.3.mlp.down_proj` of a decoder Linear's name."""
    return name[name.rindex(".layers.") :]
