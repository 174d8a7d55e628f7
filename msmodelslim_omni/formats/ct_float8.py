"""float-quantized: FP8 (e4m3) weights and activations, per output channel and token or in blocks of 128.

Per Linear [out, in]: `.weight` float8_e4m3fn [out, in], and `.weight_scale` in the checkpoint's float dtype: [out, 1],
or [ceil(out / 128), in / 128] with one scale per block. Activations are rounded at run time, with one scale per token,
or per 128 inputs of a token.
"""

from __future__ import annotations

from typing import Any

import torch

from ..numerics import QuantScheme
from ..storage import TORCH_DTYPES, TensorSpec, load_tensor
from .job import OutLinear, OutTensor
from .stored import FLOATS, Parts, describe_wrong_part

FORM = "float-quantized"
SUPPORTED = (
    "float-quantized float8 per channel with dynamic float8 activations per token, or in blocks of 128 x 128 with"
    " dynamic float8 activations per group of 128"
)

_BLOCK = 128


def stores(scheme: QuantScheme) -> bool:
    return scheme.number == "e4m3"


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    (out_features, in_features), rows = linear.shape, linear.scheme.block_rows
    groups = in_features // linear.scheme.group_size if linear.scheme.group_size else 1
    dtype, kind = TORCH_DTYPES[linear.float_dtype], linear.scheme.name

    def scales() -> torch.Tensor:
        return linear.scales()[:: rows or 1].to(dtype)  # exact, see numerics/float8.py

    return [
        OutTensor(TensorSpec(f"{linear.name}.weight", "F8_E4M3", linear.shape), linear.qweight, kind),
        OutTensor(
            TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, (-(-out_features // (rows or 1)), groups)),
            scales,
            kind,
        ),
    ]


def arguments(scheme: QuantScheme) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    if scheme.block_rows is None:
        return {
            "weights": {**number, "strategy": "channel", "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True},
        }
    return {
        "weights": {
            **number,
            "strategy": "block",
            "block_structure": [scheme.block_rows, scheme.group_size],
            "dynamic": False,
        },
        "input_activations": {**number, "strategy": "group", "group_size": scheme.group_size, "dynamic": True},
    }


# --- reading -------------------------------------------------------------------------------------------------


def stored_scheme(weights: dict[str, Any], act: dict[str, Any] | None) -> QuantScheme | None:
    act = act or {}
    for settings in (weights, act):
        if settings.get("num_bits") != 8 or settings.get("type") != "float" or settings.get("symmetric") is False:
            return None
    form = (weights.get("strategy"), act.get("strategy"), act.get("dynamic"))
    if form == ("channel", "token", True):
        return QuantScheme(8, 8, number="e4m3")
    is_block = weights.get("block_structure") == [_BLOCK, _BLOCK] and act.get("group_size") == _BLOCK
    if form == ("block", "group", True) and is_block:
        return QuantScheme(8, 8, group_size=_BLOCK, number="e4m3", block_rows=_BLOCK)
    return None


def required(scheme: QuantScheme) -> tuple[str, ...]:
    return ("weight", "weight_scale")


def recognizes(parts: Parts, scheme: QuantScheme) -> bool:
    return "weight" in parts and parts["weight"].dtype == "F8_E4M3"


def fault(parts: Parts, scheme: QuantScheme) -> str:
    shape = parts["weight"].shape
    if len(shape) != 2 or not parts["weight"].numel:
        return f"weight has shape {list(shape)}, not [out, in]"
    scale_shape = (shape[0], 1)
    if scheme.block_rows is not None:
        scale_shape = (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK))
        if shape[1] % _BLOCK:
            return f"weight has {shape[1]} inputs, which are not a multiple of {_BLOCK}"
    return describe_wrong_part(parts, {"weight": (("F8_E4M3",), shape), "weight_scale": (FLOATS, scale_shape)})


def stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    rows, columns = parts["weight"].shape

    def scales() -> torch.Tensor:
        stored = load_tensor(parts["weight_scale"]).to(torch.float32)
        return stored if scheme.block_rows is None else stored.repeat_interleave(scheme.block_rows, dim=0)[:rows]

    return OutLinear(name, scheme, (rows, columns), float_dtype, lambda: load_tensor(parts["weight"]), scales)
