"""bitsandbytes: NF4 for transformers with bitsandbytes installed.

Per Linear [out, in] with blocks of g inputs: `.weight` uint8 [out * in / 2, 1], two codes per byte, the first in the
upper half; `.weight.absmax` float32 [out * in / g]; `.weight.quant_map` float32 [16], the levels;
`.weight.quant_state.bitsandbytes__nf4` uint8, the bytes of a JSON object. With double quantization `.weight.absmax` is
uint8, and there are `.weight.nested_absmax` float32 [ceil(blocks / 256)] and `.weight.nested_quant_map` float32 [256].
All other tensors, including biases, keep the bytes of the source.

llm_int8_skip_modules lists the modules that stay float. transformers 4 matches an entry against a module's own name,
its full path, or a part of the path that ends at a dot; transformers 5 matches a regular expression from the start of
the path, or the end of the path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import QuantError
from ..files import parse_json
from ..numerics import (
    NESTED_BLOCK_SIZE,
    NF4_LEVELS,
    CacheDtype,
    NestedScales,
    QuantScheme,
    pack_nf4,
    unpack_nf4,
)
from ..storage import (
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    load_tensor,
)
from .job import OutLinear, OutputJob, OutTensor
from .skip_list import skip_list_entries
from .stored import (
    PartFault,
    Parts,
    StoredLinear,
    StoredLinears,
    describe_missing_parts,
    describe_wrong_part,
    group_parts,
)

weights_stem = "model"
quant_method: str | None = "bitsandbytes"
kv_cache: CacheDtype | None = None
kv_cache_reason = "bitsandbytes' layout has no place for them"

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"

# The longest JSON text of a float64, including sign and exponent.
_OFFSET_LENGTH = 24
_MAX_STATE_BYTES = 1 << 12

_BLOCK_SIZES = tuple(2**n for n in range(5, 13))  # bitsandbytes has kernels for these


def refusal(schemes: frozenset[QuantScheme]) -> str:
    others = sorted(scheme.name for scheme in schemes if scheme.codebook != "nf4")
    if others:
        return f"bitsandbytes supports nf4, not {' and '.join(others)}"
    names = sorted(scheme.name for scheme in schemes)
    return f"bitsandbytes supports one scheme for all Linears, not {' and '.join(names)}" if len(names) > 1 else ""


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    group_size = linear.scheme.group_size
    assert group_size is not None  # refused otherwise
    (out_features, in_features), kind, nested = linear.shape, linear.scheme.name, linear.nested
    blocks = out_features * in_features // group_size

    def spec(ending: str, dtype: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{linear.name}.{ending}", dtype, shape)

    def state() -> torch.Tensor:
        return torch.tensor(list(_state(linear, nested().offset if nested is not None else 0.0)), dtype=torch.uint8)

    tensors = [
        OutTensor(spec("weight", "U8", out_features * in_features // 2, 1), lambda: pack_nf4(linear.qweight()), kind),
        OutTensor(spec("weight.quant_map", "F32", len(NF4_LEVELS)), lambda: torch.tensor(NF4_LEVELS), kind),
        OutTensor(spec(NF4_STATE, "U8", len(_state(linear, 0.0))), state, kind),
    ]
    if nested is None:
        return [*tensors, OutTensor(spec("weight.absmax", "F32", blocks), lambda: linear.scales().flatten(), kind)]
    scales = -(-blocks // NESTED_BLOCK_SIZE)
    return [
        *tensors,
        OutTensor(spec("weight.absmax", "U8", blocks), lambda: nested().codes, kind),
        OutTensor(spec("weight.nested_absmax", "F32", scales), lambda: nested().scales, kind),
        OutTensor(spec("weight.nested_quant_map", "F32", 256), lambda: nested().levels, kind),
    ]


def _state(linear: OutLinear, offset: float) -> bytes:
    """The JSON that bitsandbytes stores with a weight. Blanks pad it to a length that is independent of `offset`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": linear.scheme.group_size,
        "dtype": _dtype_name(linear.float_dtype),
        "shape": list(linear.shape),
    }
    if linear.nested is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": offset}
    length = len(json.dumps({**state, "nested_offset": 0.0})) + _OFFSET_LENGTH
    return json.dumps(state).ljust(length).encode()


def _dtype_name(dtype: str) -> str:
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    return tensor


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    return {"config.json": job.config_with(quantization_config(job))}


def quantization_config(job: OutputJob) -> dict[str, Any]:
    linear = next(iter(job.linears), None)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": linear is not None and linear.scheme.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(linear.float_dtype if linear is not None else "BF16"),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dict.fromkeys([*skip_list_entries(job), *job.float_modules])),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }


# --- reading -------------------------------------------------------------------------------------------------

NF4_PARTS = ("weight", "weight.absmax", "weight.quant_map", NF4_STATE)
NF4_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. Supports nf4 with codes stored in uint8, with or without nested scales."""
    form = {
        "load_in_4bit": settings.get("load_in_4bit", False),
        "bnb_4bit_quant_type": settings.get("bnb_4bit_quant_type"),
        "bnb_4bit_quant_storage": settings.get("bnb_4bit_quant_storage", "uint8"),
    }
    if form != {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}:
        listed = ", ".join(f"{key} {str(value)[:60]!r}" for key, value in form.items())
        raise QuantError(
            f"a bitsandbytes checkpoint with {listed} is not supported", "the supported form is nf4, stored as uint8"
        )
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in group_parts(tensors, (*NF4_PARTS, *NF4_NESTED)).items():
        if set(parts) == {"weight"}:
            continue  # a float Linear, a norm, an embedding
        try:
            linears[name] = StoredLinear(nf4_linear(name, parts, float_dtype(name)), parts)
        except QuantError as error:
            faults.append(PartFault(name, error.message))
    return StoredLinears(linears, tuple(faults))


def nf4_layout(parts: Parts) -> tuple[tuple[int, int], QuantScheme, float]:
    """Shape (out, in), scheme and offset of the nested scales of one Linear. Raises QuantError for a faulty Linear."""
    if why := describe_missing_parts(parts, NF4_PARTS):
        raise QuantError(why)
    state = _load_state(parts[NF4_STATE])
    shape, block_size, offset = state.get("shape"), state.get("blocksize"), state.get("nested_offset")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or not 0 < n < 2**24 for n in shape):
        raise QuantError(f"quant_state has shape {str(shape)[:60]}, expected [out, in]")
    if block_size not in _BLOCK_SIZES or shape[1] % block_size:
        raise QuantError(f"quant_state has blocksize {str(block_size)[:60]} for {shape[1]} inputs")
    blocks = shape[0] * shape[1] // block_size
    is_nested = offset is not None
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight": (("U8",), (shape[0] * shape[1] // 2, 1)),
        "weight.absmax": (("U8",) if is_nested else ("F32",), (blocks,)),
        "weight.quant_map": (("F32",), (len(NF4_LEVELS),)),
    }
    if is_nested:
        if type(offset) is not float or state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            nested_size = str(state.get("nested_blocksize"))[:60]
            raise QuantError(f"quant_state has nested_offset {str(offset)[:60]}, nested_blocksize {nested_size}")
        if why := describe_missing_parts(parts, NF4_NESTED):
            raise QuantError(why)
        expected |= {
            "weight.nested_absmax": (("F32",), (-(-blocks // NESTED_BLOCK_SIZE),)),
            "weight.nested_quant_map": (("F32",), (256,)),
        }
    if why := describe_wrong_part(parts, expected):
        raise QuantError(why)
    if not torch.allclose(load_tensor(parts["weight.quant_map"]), torch.tensor(NF4_LEVELS), rtol=0, atol=1e-6):
        raise QuantError("weight.quant_map does not hold the levels of nf4")
    scheme = QuantScheme(4, None, group_size=block_size, codebook="nf4", double_quant=is_nested)
    return (shape[0], shape[1]), scheme, float(offset or 0.0)


def _load_state(info: TensorInfo) -> dict[str, Any]:
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _MAX_STATE_BYTES:
        raise QuantError(
            f"quant_state is {info.dtype} {list(info.shape)}, not U8 with at most {_MAX_STATE_BYTES} bytes"
        )
    try:
        state = parse_json(bytes(load_tensor(info).tolist()).decode("utf-8"))
    except ValueError as error:
        raise QuantError(f"quant_state is not valid JSON: {error}") from error
    if not isinstance(state, dict) or state.get("quant_type") != "nf4":
        raise QuantError("quant_state is not a JSON object with quant_type nf4")
    return state


def nf4_linear(name: str, parts: Parts, float_dtype: str) -> OutLinear:
    """The Linear that is stored in these tensors. Raises QuantError if a tensor is missing or faulty."""
    shape, scheme, offset = nf4_layout(parts)

    def nested() -> NestedScales:
        codes, levels, scales = (load_tensor(parts[ending]) for ending in ("weight.absmax", *reversed(NF4_NESTED)))
        return NestedScales(codes, levels, scales, offset)

    def scales() -> torch.Tensor:
        absmax = nested().absmax() if scheme.double_quant else load_tensor(parts["weight.absmax"])
        return absmax.view(shape[0], -1)

    return OutLinear(
        name,
        scheme,
        shape,
        float_dtype,
        lambda: unpack_nf4(load_tensor(parts["weight"]), shape),
        scales,
        nested=nested if scheme.double_quant else None,
    )
