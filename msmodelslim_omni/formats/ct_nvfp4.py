"""nvfp4-pack-quantized: NVFP4 weights (e2m1 with an e4m3 scale per 16 inputs and a global scale), activations alike or
float.

Per Linear [out, in]: `.weight_packed` uint8 [out, in / 2], two codes per byte, the even column in the lower half; a
code is the index of the magnitude in 0, 0.5, 1, 1.5, 2, 3, 4, 6, plus 8 if negative; `.weight_scale` float8_e4m3fn
[out, in / 16]; `.weight_global_scale` float32 [1], by which the scales are divided. If the activations are rounded too,
`.input_global_scale` float32 [1], by which their scales are divided, which are computed at run time ("local").

Example: the values 1, -0.5, 6, 0 have the codes 2, 9, 7, 0 and are stored as 92 07.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import QuantError
from ..numerics import GLOBAL_SCALE, NVFP4_GROUP, QuantScheme
from ..storage import TensorSpec, load_tensor
from .job import OutLinear, OutTensor
from .stored import Parts, describe_wrong_part

FORM = "nvfp4-pack-quantized"
SUPPORTED = "nvfp4-pack-quantized with float activations or with dynamic local ones of the same type"

# Doubled magnitudes by code; see numerics/float4.py.
_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)


def stores(scheme: QuantScheme) -> bool:
    return scheme.number == "e2m1"


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    (rows, columns), kind = linear.shape, linear.scheme.name

    def scales() -> torch.Tensor:
        wanted = linear.scales() * (2 * GLOBAL_SCALE)
        stored = wanted.to(torch.float8_e4m3fn)
        if not torch.equal(stored.to(torch.float32), wanted):  # from another tool, with another global scale
            raise QuantError(
                f"{linear.name}: its scales are not exact with a global scale of {GLOBAL_SCALE:g}, which is written",
                "quantize the float checkpoint instead",
            )
        return stored

    tensors = [
        OutTensor(
            TensorSpec(f"{linear.name}.weight_packed", "U8", (rows, columns // 2)),
            lambda: pack_e2m1(linear.qweight()),
            kind,
        ),
        OutTensor(
            TensorSpec(f"{linear.name}.weight_scale", "F8_E4M3", (rows, columns // NVFP4_GROUP)),
            scales,
            kind,
        ),
        OutTensor(
            TensorSpec(f"{linear.name}.weight_global_scale", "F32", (1,)), lambda: torch.tensor([GLOBAL_SCALE]), kind
        ),
    ]
    if linear.input_global is not None:
        tensors.append(
            OutTensor(TensorSpec(f"{linear.name}.input_global_scale", "F32", (1,)), linear.input_global, kind)
        )
    return tensors


def pack_e2m1(q: torch.Tensor) -> torch.Tensor:
    """Pack doubled values, int8 [rows, columns], two per byte: uint8 [rows, columns / 2]."""
    codes = torch.bucketize(q.abs(), torch.tensor(_MAGNITUDES, dtype=torch.int8), out_int32=True).to(torch.uint8)
    codes |= (q < 0).to(torch.uint8) << 3
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_e2m1, which does not tell -0 from 0. packed: uint8 [rows, columns / 2]."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.int8)
    codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)  # [rows, columns]
    return table[codes.to(torch.int32)]


def arguments(scheme: QuantScheme) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": NVFP4_GROUP,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    return {"weights": weights, "input_activations": {**weights, "dynamic": "local"} if scheme.act_bits else None}


# --- reading -------------------------------------------------------------------------------------------------


def stored_scheme(weights: dict[str, Any], act: dict[str, Any] | None) -> QuantScheme | None:
    keys, expected = ("num_bits", "type", "strategy", "group_size"), [4, "float", "tensor_group", NVFP4_GROUP]
    if [weights.get(key) for key in keys] != expected:
        return None
    if act is not None and [act.get(key) for key in (*keys, "dynamic")] != [*expected, "local"]:
        return None
    return QuantScheme(4, None if act is None else 4, group_size=NVFP4_GROUP, number="e2m1")


def required(scheme: QuantScheme) -> tuple[str, ...]:
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    return (*parts, "input_global_scale") if scheme.stores_input_scale else parts


def recognizes(parts: Parts, scheme: QuantScheme) -> bool:
    return "weight_global_scale" in parts


def fault(parts: Parts, scheme: QuantScheme) -> str:
    shape = parts["weight_packed"].shape
    if len(shape) != 2 or not parts["weight_packed"].numel or 2 * shape[1] % NVFP4_GROUP:
        return f"weight_packed has shape {list(shape)}, not [out, in / 2]"
    scale_shape = (shape[0], 2 * shape[1] // NVFP4_GROUP)
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("U8",), shape),
        "weight_scale": (("F8_E4M3",), scale_shape),
        "weight_global_scale": (("F32",), (1,)),
    }
    if scheme.stores_input_scale:
        expected["input_global_scale"] = (("F32",), (1,))
    return describe_wrong_part(parts, expected)


def stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    rows, half_columns = parts["weight_packed"].shape
    return OutLinear(
        name,
        scheme,
        (rows, 2 * half_columns),
        float_dtype,
        lambda: unpack_e2m1(load_tensor(parts["weight_packed"])),
        lambda: nvfp4_stored_scales(parts),
        input_global=(lambda: load_tensor(parts["input_global_scale"])) if scheme.stores_input_scale else None,
    )


def nvfp4_stored_scales(parts: Parts) -> torch.Tensor:
    """The scales of the doubled values: block scale / global scale / 2, float32 [out, in / 16]."""
    block_scales = load_tensor(parts["weight_scale"]).to(torch.float32)
    return block_scales / load_tensor(parts["weight_global_scale"]) / 2
