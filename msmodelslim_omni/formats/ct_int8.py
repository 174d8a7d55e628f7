"""int-quantized: int8 weights per output channel, int8 activations per token.

Per Linear [out, in]: `.weight` int8 [out, in] and `.weight_scale` [out, 1] in the checkpoint's float dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from ..numerics import QuantScheme
from ..storage import TORCH_DTYPES, TensorSpec
from .job import OutLinear, OutTensor
from .stored import FLOATS, Parts, describe_wrong_part, stored_per_channel

FORM = "int-quantized"
SUPPORTED = "int-quantized int8 per channel with float activations or dynamic int8 activations per token"


def stores(scheme: QuantScheme) -> bool:
    return scheme.name == "W8A8_DYNAMIC"


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    def scales() -> torch.Tensor:
        dtype = TORCH_DTYPES[linear.float_dtype]
        return linear.scales().to(dtype).clamp_min(torch.finfo(dtype).tiny)  # float16 would underflow to zero

    kind, column = linear.scheme.name, (linear.shape[0], 1)
    return [
        OutTensor(TensorSpec(f"{linear.name}.weight", "I8", linear.shape), linear.qweight, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, column), scales, kind),
    ]


def arguments(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }


# --- reading -------------------------------------------------------------------------------------------------


def stored_scheme(weights: dict[str, Any], act: dict[str, Any] | None) -> QuantScheme | None:
    settings = [weights.get(key) for key in ("num_bits", "type", "strategy")]
    if settings != [8, "int", "channel"] or not bool(weights.get("symmetric", True)):
        return None
    if act is None:
        return QuantScheme(8, None)
    act_settings = [act.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")]
    return QuantScheme(8, 8) if act_settings == [8, "int", "token", True, True] else None


def required(scheme: QuantScheme) -> tuple[str, ...]:
    return ("weight", "weight_scale")


def recognizes(parts: Parts, scheme: QuantScheme) -> bool:
    return "weight_packed" not in parts and "weight_shape" not in parts


def fault(parts: Parts, scheme: QuantScheme) -> str:
    if len(parts["weight"].shape) != 2 or len(parts["weight_scale"].shape) != 2 or not parts["weight"].numel:
        shapes = [list(parts[ending].shape) for ending in ("weight", "weight_scale")]
        return f"weight and weight_scale have shapes {shapes[0]} and {shapes[1]}"
    out_features, in_features = parts["weight"].shape
    return describe_wrong_part(
        parts, {"weight": (("I8",), (out_features, in_features)), "weight_scale": (FLOATS, (out_features, 1))}
    )


stored_linear = stored_per_channel
