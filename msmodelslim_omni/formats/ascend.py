"""ascendv1_saver: the format of msModelSlim, which vLLM-Ascend loads with its `ascend` quantization.

W8A8_DYNAMIC and W8A16 per Linear [out, in]: `.weight` int8 [out, in], `.weight_scale` float32 [out, 1],
`.weight_offset` float32 zeros [out, 1] (W8A8_DYNAMIC loads but does not use it), `.bias` float32. W4A8_DYNAMIC, for
experts: `.weight` int8 [out / 2, in], two rows of int4 per byte (nibbles.py); scale and offset as above; `.scale_bias`
float32, 8 times the sum of each dequantized row, which the runtime's product needs: [out, 1], and [out, 16] for down, a
sum for each sixteenth of the inputs, because tensor parallelism splits them. Tensors keep the
names of the source checkpoint, as vLLM's mapper expects. config.json has no quantization_config, because the presence
of quant_model_description.json selects the method. That file has an entry for every tensor, and for an lm_head that is
tied to the embedding: loading fails if the runtime looks up a Linear that has no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import QuantError
from ..numerics import CacheDtype, QuantScheme
from ..storage import TensorInfo, TensorSpec, load_tensor
from .job import (
    FLOAT,
    Data,
    OutLinear,
    OutputJob,
    OutTensor,
)
from .nibbles import pack_row_pairs, unpack_row_pairs
from .stored import (
    FLOATS,
    PartFault,
    Parts,
    StoredLinear,
    StoredLinears,
    describe_missing_parts,
    describe_wrong_part,
    group_parts,
    stored_per_channel,
)

weights_stem = "quant_model_weights"
quant_method: str | None = None
kv_cache: CacheDtype | None = "int8"
kv_cache_reason = "vLLM-Ascend on A2 and A3 caches int8 (C8) and computes in no FP8"
DESCRIPTION_FILE = "quant_model_description.json"

_DESCRIPTION_VERSION = "1.0.0"

# Types of Linears by their names in the description; the last one of a checkpoint is its model_quant_type.
_SCHEMES = {"W8A16": QuantScheme(8, None), "W8A8_DYNAMIC": QuantScheme(8, 8), "W4A8_DYNAMIC": QuantScheme(4, 8)}

_SUMS_OF_DOWN = 16  # of scale_bias, for a Linear whose inputs are split between cards


def refusal(schemes: frozenset[QuantScheme]) -> str:
    others = sorted({scheme.name for scheme in schemes} - _SCHEMES.keys())
    if any(name.startswith("FP8") for name in others):
        return "Ascend A2 and A3 do not compute in FP8; use w8a8, or save FP8 as compressed_tensors"
    # vLLM-Ascend registers W4A16 and W4A8_DYNAMIC for mixture-of-experts layers only.
    return f"no Ascend runtime supports {' or '.join(others)} for dense Linears" if others else ""


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    column = (linear.shape[0], 1)
    kind = linear.scheme.name
    if linear.scheme.weight_bits == 4:
        (rows, columns), sums = linear.shape, _scale_bias_columns(linear.name)
        packed = TensorSpec(f"{linear.name}.weight", "I8", (rows // 2, columns))
        weight = OutTensor(packed, lambda: pack_row_pairs(linear.qweight()), kind)
        bias = TensorSpec(f"{linear.name}.scale_bias", "F32", (rows, sums))
        extra = [OutTensor(bias, lambda: scale_bias(linear.qweight(), linear.scales(), sums), kind)]
    else:
        weight, extra = OutTensor(TensorSpec(f"{linear.name}.weight", "I8", linear.shape), linear.qweight, kind), []
    return [
        weight,
        OutTensor(TensorSpec(f"{linear.name}.weight_scale", "F32", column), linear.scales, kind),
        OutTensor(TensorSpec(f"{linear.name}.weight_offset", "F32", column), lambda: torch.zeros(column), kind),
        *extra,
    ]


def _scale_bias_columns(name: str) -> int:
    return _SUMS_OF_DOWN if name.endswith((".down_proj", ".o_proj")) else 1


def scale_bias(q: torch.Tensor, scales: torch.Tensor, columns: int) -> torch.Tensor:
    """8 Σ q s over each of `columns` equal parts of the inputs: float32 [out, columns]. scales: [out, 1]."""
    sums = q.view(len(q), columns, -1).sum(dim=2, dtype=torch.int32)  # exact
    return sums.to(torch.float32) * scales * 8


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    if not is_quantized_bias or tensor.spec.dtype == "F32":
        return tensor

    def load() -> Data:
        data = tensor.load()
        assert isinstance(data, torch.Tensor)  # biases are small and never chunked
        return data.to(torch.float32)

    return replace(tensor, spec=replace(tensor.spec, dtype="F32"), load=load)


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    kinds = {**dict.fromkeys(job.tied, FLOAT), **{tensor.spec.name: tensor.kind for tensor in tensors}}
    description: dict[str, Any] = {
        **dict(sorted(kinds.items())),
        "version": _DESCRIPTION_VERSION,
        "model_quant_type": max(
            (linear.scheme.name for linear in job.linears), key=list(_SCHEMES).index, default=FLOAT
        ),
        **({} if job.kv_cache is None else {"kv_cache_type": "C8"}),
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    return {DESCRIPTION_FILE: description, "config.json": job.config}


# --- reading -------------------------------------------------------------------------------------------------

_PARTS = ("weight", "weight_scale", "weight_offset")
_PARTS_OF_INT4 = (*_PARTS, "scale_bias")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. settings: the description, which tells the scheme of each Linear."""
    grouped = group_parts(tensors, _PARTS_OF_INT4)
    if other := sorted({str(settings.get(f"{name}.weight", FLOAT)) for name in grouped} - {FLOAT, *_SCHEMES}):
        supported = ", ".join(reversed(_SCHEMES))
        raise QuantError(f"the description lists {', '.join(other)[:200]}; supported are {supported}")
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in grouped.items():
        kind = settings.get(f"{name}.weight")
        if set(parts) == {"weight"} and parts["weight"].dtype != "I8" and kind not in _SCHEMES:
            continue  # a float Linear, a norm, an embedding
        is_int4 = kind == "W4A8_DYNAMIC"
        missing = describe_missing_parts(parts, _PARTS_OF_INT4 if is_int4 else _PARTS)
        if why := missing or _layout_fault(parts, _scale_bias_columns(name) if is_int4 else 0) or _kind_fault(kind):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(_stored_linear(name, parts, _SCHEMES[str(kind)], float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _stored_linear(name: str, parts: Parts, scheme: QuantScheme, float_dtype: str) -> OutLinear:
    linear = stored_per_channel(name, parts, scheme, float_dtype)
    if scheme.weight_bits == 8:
        return linear
    rows, columns = linear.shape
    return replace(linear, shape=(2 * rows, columns), qweight=lambda: unpack_row_pairs(load_tensor(parts["weight"])))


def _layout_fault(parts: Parts, sums: int) -> str:
    """sums: columns of scale_bias, for packed int4; 0 for int8."""
    shape = parts["weight"].shape
    if len(shape) != 2 or not parts["weight"].numel:
        return f"weight has shape {list(shape)}, not [out, in]"
    rows = 2 * shape[0] if sums else shape[0]
    column = (rows, 1)
    expected = {"weight": (("I8",), shape), "weight_scale": (FLOATS, column), "weight_offset": (FLOATS, column)}
    return describe_wrong_part(parts, expected | ({"scale_bias": (("F32",), (rows, sums))} if sums else {}))


def _kind_fault(kind: object) -> str:
    if kind in _SCHEMES:
        return ""
    return f"the description lists {kind or 'no kind'} for its weight, not {' or '.join(reversed(_SCHEMES))}"
