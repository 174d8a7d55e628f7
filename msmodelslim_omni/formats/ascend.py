"""ascendv1_saver: the format of msModelSlim, which vLLM-Ascend loads with its `ascend` quantization.

W8A8_DYNAMIC and W8A16 per Linear [out, in]: `.weight` int8 [out, in], `.weight_scale` float32 [out, 1],
`.weight_offset` float32 zeros [out, 1] (W8A8_DYNAMIC loads but does not use it), `.bias` float32. Tensors keep the
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
from ..storage import TensorInfo, TensorSpec
from .job import (
    FLOAT,
    Data,
    OutLinear,
    OutputJob,
    OutTensor,
)
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
_SCHEMES = {"W8A16": QuantScheme(8, None), "W8A8_DYNAMIC": QuantScheme(8, 8)}


def refusal(schemes: frozenset[QuantScheme]) -> str:
    others = sorted({scheme.name for scheme in schemes} - _SCHEMES.keys())
    if any(name.startswith("FP8") for name in others):
        return "Ascend A2 and A3 do not compute in FP8; use w8a8, or save FP8 as compressed_tensors"
    # vLLM-Ascend registers W4A16 and W4A8_DYNAMIC for mixture-of-experts layers only.
    return f"no Ascend runtime supports {' or '.join(others)} for dense Linears" if others else ""


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


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. settings: the description, which tells the scheme of each Linear."""
    grouped = group_parts(tensors, _PARTS)
    if other := sorted({str(settings.get(f"{name}.weight", FLOAT)) for name in grouped} - {FLOAT, *_SCHEMES}):
        supported = " and ".join(reversed(_SCHEMES))
        raise QuantError(f"the description lists {', '.join(other)[:200]}; supported are {supported}")
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in grouped.items():
        kind = settings.get(f"{name}.weight")
        if set(parts) == {"weight"} and parts["weight"].dtype != "I8" and kind not in _SCHEMES:
            continue  # a float Linear, a norm, an embedding
        if why := describe_missing_parts(parts, _PARTS) or _layout_fault(parts) or _kind_fault(kind):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(stored_per_channel(name, parts, _SCHEMES[str(kind)], float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _layout_fault(parts: Parts) -> str:
    shape = parts["weight"].shape
    if len(shape) != 2 or not parts["weight"].numel:
        return f"weight has shape {list(shape)}, not [out, in]"
    column = (shape[0], 1)
    return describe_wrong_part(
        parts, {"weight": (("I8",), shape), "weight_scale": (FLOATS, column), "weight_offset": (FLOATS, column)}
    )


def _kind_fault(kind: object) -> str:
    if kind in _SCHEMES:
        return ""
    return f"the description lists {kind or 'no kind'} for its weight, not {' or '.join(reversed(_SCHEMES))}"
