"""ascendv1_saver: msModelSlim's output, as vLLM-Ascend's `ascend` quantization reads it.

W8A8_DYNAMIC per Linear [out, in]: `.weight` int8 [out, in], `.weight_scale` float32 [out, 1], `.weight_offset`
float32 zeros [out, 1] (loaded but not used in the product, hence zero), `.bias` float32. All names are the
checkpoint's, which vLLM's mapper expects; config.json holds no quantization_config, since the file
quant_model_description.json is what selects the method. It has an entry for every tensor, and for an lm_head that is
tied to the embedding: a Linear that the runtime asks for and does not find there ends its loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import QuantError
from ..numerics import QuantScheme
from ..storage import TensorInfo, TensorSpec, load_tensor
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
    group_parts,
    describe_missing_parts,
    describe_wrong_part,
)

weights_stem = "quant_model_weights"
quant_method: str | None = None
DESCRIPTION_FILE = "quant_model_description.json"

_DESCRIPTION_VERSION = "1.0.0"


def refusal(schemes: frozenset[QuantScheme]) -> str:
    others = sorted({scheme.name for scheme in schemes} - {"W8A8_DYNAMIC"})
    # vLLM-Ascend registers W4A16 and W4A8_DYNAMIC for mixture-of-experts layers only.
    return f"no Ascend runtime serves {' or '.join(others)} for dense Linears" if others else ""


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
        assert isinstance(data, torch.Tensor)  # biases are small and handed over whole
        return data.to(torch.float32)

    return replace(tensor, spec=replace(tensor.spec, dtype="F32"), load=load)


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    kinds = {**dict.fromkeys(job.tied, FLOAT), **{tensor.spec.name: tensor.kind for tensor in tensors}}
    description: dict[str, Any] = {
        **dict(sorted(kinds.items())),
        "version": _DESCRIPTION_VERSION,
        "model_quant_type": next((linear.scheme.name for linear in job.linears), FLOAT),
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    return {DESCRIPTION_FILE: description, "config.json": job.config}


# --- reading -------------------------------------------------------------------------------------------------

_W8A8 = "W8A8_DYNAMIC"
_PARTS = ("weight", "weight_scale", "weight_offset")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See stored.Reader. `settings` is the description; of its kinds only W8A8_DYNAMIC is read."""
    grouped = group_parts(tensors, _PARTS)
    if other := sorted({str(settings.get(f"{name}.weight", FLOAT)) for name in grouped} - {FLOAT, _W8A8}):
        raise QuantError(f"the description says {', '.join(other)[:200]}; read is {_W8A8} only")
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in grouped.items():
        said = settings.get(f"{name}.weight")
        if set(parts) == {"weight"} and parts["weight"].dtype != "I8" and said != _W8A8:
            continue  # a float Linear, a norm, an embedding
        if why := describe_missing_parts(parts, _PARTS) or _layout_fault(parts) or _mislabelled(said):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(_stored_linear(name, parts, float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _layout_fault(parts: Parts) -> str:
    shape = parts["weight"].shape
    if len(shape) != 2 or not parts["weight"].numel:
        return f"weight has shape {list(shape)}, not [out, in]"
    column = (shape[0], 1)
    return describe_wrong_part(
        parts, {"weight": (("I8",), shape), "weight_scale": (FLOATS, column), "weight_offset": (FLOATS, column)}
    )


def _mislabelled(said: object) -> str:
    return "" if said == _W8A8 else f"the description says {said or 'nothing'} of it, not {_W8A8}"


def _stored_linear(name: str, parts: Parts, float_dtype: str) -> OutLinear:
    rows, columns = parts["weight"].shape
    return OutLinear(
        name,
        QuantScheme(8, 8),
        (rows, columns),
        float_dtype,
        lambda: load_tensor(parts["weight"]),
        lambda: load_tensor(parts["weight_scale"]).to(torch.float32),
    )
