"""pack-quantized: int4 weights per group of inputs, or int8 weights per output channel; float activations.

int4, per Linear [out, in] with groups of g inputs: `.weight_packed` int32 [out, in / 8], packed along the input in
plain order (see nibbles.py); `.weight_scale` [out, in / g] in the checkpoint's float dtype; `.weight_shape` int64
[2]; if asymmetric also `.weight_zero_point` int32 [ceil(out / 8), in / g], packed along the output.

int8, per Linear [out, in]: `.weight_packed` int32 [out, in / 4], the bytes of each integer + 128; `.weight_scale`
[out, 1] in the checkpoint's float dtype; `.weight_shape`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..numerics import QuantScheme
from ..storage import TORCH_DTYPES, TensorSpec, load_tensor
from .job import OutLinear, OutTensor
from .nibbles import BYTES_PER_WORD, PER_WORD, pack_bytes, pack_plain, unpack_bytes, unpack_plain
from .stored import FLOATS, Parts, describe_wrong_part

FORM = "pack-quantized"
SUPPORTED = "pack-quantized int4 per group or channel, or int8 per channel, with float activations"


def stores(scheme: QuantScheme) -> bool:
    if scheme.weight_bits == 8:
        return scheme.name == "W8A16"
    return scheme.is_int4 and scheme.act_bits is None and scheme.group_size is not None


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    return _int8_tensors(linear) if linear.scheme.weight_bits == 8 else _int4_tensors(linear)


def _int8_tensors(linear: OutLinear) -> list[OutTensor]:
    (out_features, in_features), kind, dtype = linear.shape, linear.scheme.name, TORCH_DTYPES[linear.float_dtype]
    packed = TensorSpec(f"{linear.name}.weight_packed", "I32", (out_features, -(-in_features // BYTES_PER_WORD)))
    scale = TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, (out_features, 1))
    shape = TensorSpec(f"{linear.name}.weight_shape", "I64", (2,))
    smallest = torch.finfo(dtype).tiny  # float16 would underflow to zero
    return [
        OutTensor(packed, lambda: pack_bytes(linear.qweight()), kind),
        OutTensor(scale, lambda: linear.scales().to(dtype).clamp_min(smallest), kind),
        OutTensor(shape, lambda: torch.tensor(linear.shape), kind),
    ]


def _int4_tensors(linear: OutLinear) -> list[OutTensor]:
    (out_features, in_features), group_size = linear.shape, linear.scheme.group_size
    assert group_size is not None  # see stores
    groups, kind, zeros = in_features // group_size, linear.scheme.name, linear.zeros
    dtype = TORCH_DTYPES[linear.float_dtype]
    packed = TensorSpec(f"{linear.name}.weight_packed", "I32", (out_features, -(-in_features // PER_WORD)))
    scale = TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, (out_features, groups))
    shape = TensorSpec(f"{linear.name}.weight_shape", "I64", (2,))
    tensors = [
        OutTensor(packed, lambda: pack_plain(linear.qweight(), axis=1), kind),
        OutTensor(scale, lambda: linear.scales().to(dtype), kind),
        OutTensor(shape, lambda: torch.tensor(linear.shape), kind),
    ]
    if zeros is not None:
        zero_point = TensorSpec(f"{linear.name}.weight_zero_point", "I32", (-(-out_features // PER_WORD), groups))
        tensors.append(OutTensor(zero_point, lambda: pack_plain(zeros(), axis=0), kind))
    return tensors


def arguments(scheme: QuantScheme) -> dict[str, Any]:
    if scheme.weight_bits == 8:
        channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        return {"weights": channel, "input_activations": None}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"weights": weights, "input_activations": None}


# --- reading -------------------------------------------------------------------------------------------------


def stored_scheme(weights: dict[str, Any], act: dict[str, Any] | None) -> QuantScheme | None:
    symmetric, group_size = bool(weights.get("symmetric", True)), weights.get("group_size")
    settings = [weights.get(key) for key in ("num_bits", "type", "strategy")]
    if act is None and settings == [8, "int", "channel"] and symmetric:
        return QuantScheme(8, None)
    if act is not None or settings[:2] != [4, "int"]:
        return None
    if settings[2] == "channel":
        return QuantScheme(4, None, symmetric=symmetric)
    if settings[2] == "group" and type(group_size) is int and group_size > 0:
        return QuantScheme(4, None, group_size=group_size, symmetric=symmetric)
    return None


def required(scheme: QuantScheme) -> tuple[str, ...]:
    parts = ("weight_packed", "weight_scale", "weight_shape")
    return parts if scheme.symmetric else (*parts, "weight_zero_point")


def recognizes(parts: Parts, scheme: QuantScheme) -> bool:
    if "weight_packed" not in parts or "weight_shape" not in parts:
        return "weight_packed" in parts or "weight_shape" in parts
    packed, shape = parts["weight_packed"].shape, parts["weight_shape"]
    if len(packed) != 2 or shape.shape != (2,):
        return True
    return packed[1] == -(-int(load_tensor(shape)[1]) // _per_word(scheme))


def _per_word(scheme: QuantScheme) -> int:
    return BYTES_PER_WORD if scheme.weight_bits == 8 else PER_WORD


def fault(parts: Parts, scheme: QuantScheme) -> str:
    if "weight_g_idx" in parts:
        return "weight_g_idx is present; weights with reordered inputs are not supported"
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    if len(packed.shape) != 2 or len(scale.shape) != 2 or not packed.numel:
        return f"weight_packed and weight_scale have shapes {list(packed.shape)} and {list(scale.shape)}"
    (out_features, _), groups = packed.shape, scale.shape[1]
    in_features = _in_features(parts, scheme)
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("I32",), (out_features, -(-in_features // _per_word(scheme)))),
        "weight_scale": (FLOATS, (out_features, groups if scheme.group_size else 1)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = (("I32",), (-(-out_features // PER_WORD), groups))
    return describe_wrong_part(parts, expected)


def _in_features(parts: Parts, scheme: QuantScheme) -> int:
    """The number of inputs, from the headers.

    Without groups the headers give it rounded up to full words, which is exact because inputs are multiples of 8.
    """
    if scheme.group_size is None:
        return parts["weight_packed"].shape[1] * _per_word(scheme)
    return parts["weight_scale"].shape[1] * scheme.group_size


def stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    out_features, in_features = parts["weight_packed"].shape[0], _in_features(parts, scheme)

    def qweight() -> torch.Tensor:
        words = load_tensor(parts["weight_packed"])
        return unpack_bytes(words, in_features) if scheme.weight_bits == 8 else unpack_plain(words, 1, in_features)

    return OutLinear(
        name,
        scheme,
        (out_features, in_features),
        float_dtype,
        qweight,
        lambda: load_tensor(parts["weight_scale"]).to(torch.float32),
        None
        if scheme.symmetric
        else lambda: unpack_plain(load_tensor(parts["weight_zero_point"]), axis=0, size=out_features),
    )
