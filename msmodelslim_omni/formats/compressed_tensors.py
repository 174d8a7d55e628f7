"""compressed_tensors: int-quantized W8A8 and pack-quantized W4A16, as vLLM, vLLM-Ascend and transformers read them.

W8A8, per Linear [out, in]: `.weight` int8 [out, in] and `.weight_scale` [out, 1] in the checkpoint's float dtype.
W4A16 with groups of g inputs: `.weight_packed` int32 [out, in / 8], packed along the input in plain order (see
nibbles.py); `.weight_scale` [out, in / g] in the checkpoint's float dtype; `.weight_shape` int64 [2]; if asymmetric
also `.weight_zero_point` int32 [ceil(out / 8), in / g], packed along the output. Biases are untouched.

quantization_config stands wherever a loader looks for it (top level, and in thinker_config for the thinker class).
Its ignore list uses `re:` patterns: exact names silently miss vLLM's fused visual qkv, and transformers 5 renamed
the modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import QuantError
from ..safetensors_io import TORCH_DTYPES, TensorInfo, TensorSpec, load_tensor
from ..scheme import QuantScheme
from .job import OutLinear, OutputJob, OutTensor
from .nibbles import PER_WORD, pack_plain, unpack_plain
from .stored import FLOATS, PartFault, Parts, StoredLinear, StoredLinears, group_parts, missing_parts, wrong_parts

weights_stem = "model"


def refusal(schemes: frozenset[QuantScheme]) -> str:
    for scheme in schemes:
        if scheme.name != "W8A8_DYNAMIC" and not _is_packed(scheme):
            return f"it holds W8A8_DYNAMIC, and int4 weights per group with float activations; not {scheme.name}"
    names = sorted({scheme.name for scheme in schemes})
    # Several groups are possible, but each has to name its Linears, and loaders disagree on the names.
    return f"it is written with one scheme for all Linears, not {' and '.join(names)}" if len(names) > 1 else ""


def _is_packed(scheme: QuantScheme) -> bool:
    return scheme.weight_bits == 4 and scheme.act_bits is None and scheme.group_size is not None


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    return _packed_tensors(linear) if _is_packed(linear.scheme) else _int8_tensors(linear)


def _int8_tensors(linear: OutLinear) -> list[OutTensor]:
    def scales() -> torch.Tensor:
        dtype = TORCH_DTYPES[linear.float_dtype]
        return linear.scales().to(dtype).clamp_min(torch.finfo(dtype).tiny)  # float16 ends where float32 does not

    kind, column = linear.scheme.name, (linear.shape[0], 1)
    return [
        OutTensor(TensorSpec(f"{linear.name}.weight", "I8", linear.shape), linear.qweight, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_scale", linear.float_dtype, column), scales, kind),
    ]


def _packed_tensors(linear: OutLinear) -> list[OutTensor]:
    (out_features, in_features), group_size = linear.shape, linear.scheme.group_size
    assert group_size is not None  # _is_packed
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


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    return tensor


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    return {"config.json": job.config_with(quantization_config(job))}


def quantization_config(job: OutputJob) -> dict[str, Any]:
    """One group for all Linears, minus those that stay float."""
    # Only the end of a float Linear's name is the same for transformers 4, 5 and vLLM.
    floats = [f"re:.*{re.escape(_ending(name))}$" for name in job.float_linears]
    scheme = next((linear.scheme for linear in job.linears), None)
    packed = scheme is not None and _is_packed(scheme)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                **(_packed_arguments(scheme) if scheme is not None and packed else _int8_arguments()),
                "output_activations": None,
            }
        },
        "ignore": [*job.ignore_patterns, *floats],
        "kv_cache_scheme": None,
    }


def _int8_arguments() -> dict[str, Any]:
    return {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }


def _packed_arguments(scheme: QuantScheme) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"weights": weights, "input_activations": None}


def _ending(name: str) -> str:
    """`.layers.3.mlp.down_proj` of a decoder Linear's name."""
    return name[name.rindex(".layers.") :]


# --- reading -------------------------------------------------------------------------------------------------

_INT8_PARTS = ("weight", "weight_scale")
_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
# Zeros beside a symmetric scheme; the group of each input, of a rounding in another order.
_MORE_PARTS = ("weight_zero_point", "weight_g_idx")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See stored.Reader. Read is what is written here, and int8 or int4 per channel with float activations."""
    scheme = _stored_scheme(settings)
    required = _INT8_PARTS if scheme.weight_bits == 8 else _PACKED_PARTS
    if not scheme.symmetric:
        required = (*required, "weight_zero_point")
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in group_parts(tensors, (*required, *_MORE_PARTS)).items():
        if set(parts) == {"weight"} and parts["weight"].dtype != "I8":
            continue  # a float Linear, a norm, an embedding
        if why := missing_parts(parts, required) or _misfit(parts, scheme):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(_stored_linear(name, parts, scheme, float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _stored_scheme(settings: dict[str, Any]) -> QuantScheme:
    """The one scheme of a quantization_config. Raises QuantError for any that is not read."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise QuantError("quantization_config: config_groups does not hold one group; only that is read")
    weights, act = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, dict) else {}
    said = [settings.get("format"), *(weights.get(key) for key in ("num_bits", "type", "strategy"))]
    if isinstance(act, dict):
        said += [act.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")]
    symmetric, group_size = bool(weights.get("symmetric", True)), weights.get("group_size")
    if said[:4] == ["int-quantized", 8, "int", "channel"] and symmetric:
        if act is None or said[4:] == [8, "int", "token", True, True]:
            return QuantScheme(8, 8 if act else None)
    elif said == ["pack-quantized", 4, "int", "channel"]:
        return QuantScheme(4, None, symmetric=symmetric)
    elif said == ["pack-quantized", 4, "int", "group"] and type(group_size) is int and group_size > 0:
        return QuantScheme(4, None, group_size=group_size, symmetric=symmetric)
    raise QuantError(
        f"quantization_config: {' '.join(map(str, said))}{'' if symmetric else ' asymmetric'} is not read",
        "read are int-quantized int8 per channel, alone or with dynamic int8 activations per token, and pack-quantized"
        " int4 per group or channel",
    )


def _misfit(parts: Parts, scheme: QuantScheme) -> str:
    if "weight_g_idx" in parts:
        return "weight_g_idx is there; weights with an order of their own are not read"
    main = "weight" if scheme.weight_bits == 8 else "weight_packed"
    if len(parts[main].shape) != 2 or len(parts["weight_scale"].shape) != 2 or not parts[main].numel:
        return f"{main} and weight_scale have shapes {list(parts[main].shape)} and {list(parts['weight_scale'].shape)}"
    (out_features, columns), groups = parts[main].shape, parts["weight_scale"].shape[1]
    if scheme.weight_bits == 8:
        return wrong_parts(
            parts, {"weight": (("I8",), (out_features, columns)), "weight_scale": (FLOATS, (out_features, 1))}
        )
    in_features = _inputs(parts, scheme)
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("I32",), (out_features, -(-in_features // PER_WORD))),
        "weight_scale": (FLOATS, (out_features, groups if scheme.group_size else 1)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = (("I32",), (-(-out_features // PER_WORD), groups))
    return wrong_parts(parts, expected)


def _inputs(parts: Parts, scheme: QuantScheme) -> int:
    """From the headers alone. Per channel they say it to the word only, which is enough: inputs come by eights."""
    if scheme.group_size is None:
        return parts["weight_packed"].shape[1] * PER_WORD
    return parts["weight_scale"].shape[1] * scheme.group_size


def _stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    def scales() -> torch.Tensor:
        return load_tensor(parts["weight_scale"]).to(torch.float32)

    if scheme.weight_bits == 8:
        rows, columns = parts["weight"].shape
        return OutLinear(name, scheme, (rows, columns), float_dtype, lambda: load_tensor(parts["weight"]), scales)
    out_features, in_features = parts["weight_packed"].shape[0], _inputs(parts, scheme)
    return OutLinear(
        name,
        scheme,
        (out_features, in_features),
        float_dtype,
        lambda: unpack_plain(load_tensor(parts["weight_packed"]), axis=1, size=in_features),
        scales,
        None
        if scheme.symmetric
        else lambda: unpack_plain(load_tensor(parts["weight_zero_point"]), axis=0, size=out_features),
    )
