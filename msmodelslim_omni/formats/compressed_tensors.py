"""compressed_tensors: int-quantized W8A8, pack-quantized W4A16, and both in one checkpoint (mixed-precision).

vLLM, vLLM-Ascend and transformers load these checkpoints.

W8A8, per Linear [out, in]: `.weight` int8 [out, in] and `.weight_scale` [out, 1] in the checkpoint's float dtype.
W4A16 with groups of g inputs: `.weight_packed` int32 [out, in / 8], packed along the input in plain order (see
nibbles.py); `.weight_scale` [out, in / g] in the checkpoint's float dtype; `.weight_shape` int64 [2]; if asymmetric
also `.weight_zero_point` int32 [ceil(out / 8), in / g], packed along the output. Biases are untouched.

quantization_config is written wherever a loader looks for it (top level, and in thinker_config for the thinker class).
Its ignore list uses `re:` patterns: exact names silently miss vLLM's fused visual qkv, and transformers 5 renamed
the modules. With two config groups the targets are `re:` patterns too; a single group targets every Linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import QuantError
from ..numerics import QuantScheme
from ..storage import (
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    load_tensor,
)
from .job import OutLinear, OutputJob, OutTensor
from .nibbles import PER_WORD, pack_plain, unpack_plain
from .stored import (
    FLOATS,
    PartFault,
    Parts,
    StoredLinear,
    StoredLinears,
    describe_missing_parts,
    describe_wrong_part,
    group_parts,
)

weights_stem = "model"
quant_method: str | None = "compressed-tensors"


def refusal(schemes: frozenset[QuantScheme]) -> str:
    for scheme in schemes:
        if scheme.name != "W8A8_DYNAMIC" and not _is_packed(scheme):
            return (
                "compressed_tensors supports W8A8_DYNAMIC and int4 weights per group with float activations,"
                f" not {scheme.name}"
            )
    # The tensors distinguish one int8 scheme from one int4 scheme. Only config patterns distinguish two int4 schemes.
    packed = sorted({scheme.name for scheme in schemes if _is_packed(scheme)})
    return f"compressed_tensors supports one int4 scheme, not {' and '.join(packed)}" if len(packed) > 1 else ""


def _is_packed(scheme: QuantScheme) -> bool:
    return scheme.is_int4 and scheme.act_bits is None and scheme.group_size is not None


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    return _packed_tensors(linear) if _is_packed(linear.scheme) else _int8_tensors(linear)


def _int8_tensors(linear: OutLinear) -> list[OutTensor]:
    def scales() -> torch.Tensor:
        dtype = TORCH_DTYPES[linear.float_dtype]
        return linear.scales().to(dtype).clamp_min(torch.finfo(dtype).tiny)  # float16 would underflow to zero

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
    """One config group for all Linears, or one per scheme. Linears that stay float are in the ignore list."""
    # Only the end of a float Linear's name is the same in transformers 4, transformers 5 and vLLM.
    floats = [f"re:.*{re.escape(_ending(name))}$" for name in job.float_linears]
    schemes = {linear.scheme.name: linear.scheme for linear in job.linears} or {"": QuantScheme(8, 8)}
    if len(schemes) == 1:
        (scheme,) = schemes.values()
        form, groups = _form(scheme), [{"targets": ["Linear"], **_arguments(scheme)}]
    else:
        form = "mixed-precision"
        groups = [
            {"targets": _targets(job.linears, name), "format": _form(schemes[name]), **_arguments(schemes[name])}
            for name in sorted(schemes)
        ]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [*job.ignore_patterns, *floats],
        "kv_cache_scheme": None,
    }


def _targets(linears: list[OutLinear], scheme: str) -> list[str]:
    """The patterns of all Linears of one scheme, one per inner name: `re:.*\\.layers\\.(0|3)\\.mlp\\.down_proj$`.

    The list has no class name, because older vLLM matches the class of a fused Linear before the names of its parts. If
    all quantized Linears of an inner name have this scheme, the pattern covers every layer; `ignore` lists the float
    ones.
    """
    layers: dict[str, list[str]] = {}
    others: set[str] = set()
    for linear in linears:
        layer, inner = _ending(linear.name).removeprefix(".layers.").split(".", 1)
        if linear.scheme.name == scheme:
            layers.setdefault(inner, []).append(layer)
        else:
            others.add(inner)
    choices = {inner: f"({'|'.join(indices)})" if inner in others else r"\d+" for inner, indices in layers.items()}
    return [rf"re:.*\.layers\.{choice}\.{re.escape(inner)}$" for inner, choice in choices.items()]


def _form(scheme: QuantScheme) -> str:
    return "pack-quantized" if _is_packed(scheme) else "int-quantized"


def _arguments(scheme: QuantScheme) -> dict[str, Any]:
    arguments = _packed_arguments(scheme) if _is_packed(scheme) else _int8_arguments()
    return {**arguments, "output_activations": None}


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
    """The end of a decoder Linear's name, for example `.layers.3.mlp.down_proj`."""
    return name[name.rindex(".layers.") :]


# --- reading -------------------------------------------------------------------------------------------------

_INT8_PARTS = ("weight", "weight_scale")
_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
# Other tools may store zeros for a symmetric scheme, and the group of each input if they reordered the inputs.
_OPTIONAL_PARTS = ("weight_zero_point", "weight_g_idx")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. Supports the schemes written here, and int8 or int4 per channel with float activations.

    In a mixed checkpoint, the tensors of a Linear show whether it is int8 or int4. The patterns of the settings are not
    used.
    """
    schemes = _stored_schemes(settings)
    endings = {ending for scheme in schemes.values() for ending in _required(scheme)}
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in group_parts(tensors, (*sorted(endings), *_OPTIONAL_PARTS)).items():
        if set(parts) == {"weight"} and parts["weight"].dtype != "I8":
            continue  # a float Linear, a norm, an embedding
        packed = "weight_packed" in parts or "weight_shape" in parts
        scheme = schemes.get(4 if packed else 8) or next(iter(schemes.values()))
        if why := describe_missing_parts(parts, _required(scheme)) or _layout_fault(parts, scheme):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(_stored_linear(name, parts, scheme, float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _required(scheme: QuantScheme) -> tuple[str, ...]:
    parts = _INT8_PARTS if scheme.weight_bits == 8 else _PACKED_PARTS
    return parts if scheme.symmetric else (*parts, "weight_zero_point")


def _stored_schemes(settings: dict[str, Any]) -> dict[int, QuantScheme]:
    """The schemes of a quantization_config by weight bits: int8, int4, or both."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise QuantError("quantization_config: config_groups contains no group")
    schemes = [_stored_scheme(group, group.get("format") or settings.get("format")) for group in groups.values()]
    by_bits = {scheme.weight_bits: scheme for scheme in schemes}
    if len(by_bits) < len(schemes):
        raise QuantError(
            "quantization_config: config_groups contains two groups with the same bits",
            "supported are one int8 group and one int4 group",
        )
    return by_bits


def _stored_scheme(group: dict[str, Any], form: object) -> QuantScheme:
    """The scheme of one config group. Raises QuantError if it is not supported."""
    weights, act = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, dict) else {}
    settings = [form, *(weights.get(key) for key in ("num_bits", "type", "strategy"))]
    if isinstance(act, dict):
        settings += [act.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")]
    symmetric, group_size = bool(weights.get("symmetric", True)), weights.get("group_size")
    if settings[:4] == ["int-quantized", 8, "int", "channel"] and symmetric:
        if act is None or settings[4:] == [8, "int", "token", True, True]:
            return QuantScheme(8, 8 if act else None)
    elif settings == ["pack-quantized", 4, "int", "channel"]:
        return QuantScheme(4, None, symmetric=symmetric)
    elif settings == ["pack-quantized", 4, "int", "group"] and type(group_size) is int and group_size > 0:
        return QuantScheme(4, None, group_size=group_size, symmetric=symmetric)
    raise QuantError(
        f"quantization_config: {' '.join(map(str, settings))}{'' if symmetric else ' asymmetric'} is not supported",
        "supported are int-quantized int8 per channel with float activations or dynamic int8 activations per token, and"
        " pack-quantized int4 per group or channel with float activations",
    )


def _layout_fault(parts: Parts, scheme: QuantScheme) -> str:
    if "weight_g_idx" in parts:
        return "weight_g_idx is present; weights with reordered inputs are not supported"
    main = "weight" if scheme.weight_bits == 8 else "weight_packed"
    if len(parts[main].shape) != 2 or len(parts["weight_scale"].shape) != 2 or not parts[main].numel:
        return f"{main} and weight_scale have shapes {list(parts[main].shape)} and {list(parts['weight_scale'].shape)}"
    (out_features, columns), groups = parts[main].shape, parts["weight_scale"].shape[1]
    if scheme.weight_bits == 8:
        return describe_wrong_part(
            parts, {"weight": (("I8",), (out_features, columns)), "weight_scale": (FLOATS, (out_features, 1))}
        )
    in_features = _in_features(parts, scheme)
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight_packed": (("I32",), (out_features, -(-in_features // PER_WORD))),
        "weight_scale": (FLOATS, (out_features, groups if scheme.group_size else 1)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = (("I32",), (-(-out_features // PER_WORD), groups))
    return describe_wrong_part(parts, expected)


def _in_features(parts: Parts, scheme: QuantScheme) -> int:
    """The number of inputs, from the headers.

    Without groups the headers give it rounded up to a multiple of 8, which is exact because inputs are multiples of 8.
    """
    if scheme.group_size is None:
        return parts["weight_packed"].shape[1] * PER_WORD
    return parts["weight_scale"].shape[1] * scheme.group_size


def _stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    def scales() -> torch.Tensor:
        return load_tensor(parts["weight_scale"]).to(torch.float32)

    if scheme.weight_bits == 8:
        rows, columns = parts["weight"].shape
        return OutLinear(name, scheme, (rows, columns), float_dtype, lambda: load_tensor(parts["weight"]), scales)
    out_features, in_features = parts["weight_packed"].shape[0], _in_features(parts, scheme)
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
