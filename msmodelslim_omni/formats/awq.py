"""awq: W4A16 in the GEMM layout of AutoAWQ, for vLLM (awq, awq_marlin), transformers and AutoAWQ.

Per Linear [out, in] with groups of g inputs: `.qweight` int32 [in, out / 8] and `.qzeros` int32 [in / g, out / 8], both
packed along the output in GEMM order (see nibbles.py), zeros stored unchanged; `.scales` float16 [in / g, out];
`.bias` float16. W = (q - z) * s. All other tensors keep the bytes of the source.

modules_to_not_convert lists the float Linears. Each loader interprets its entries differently:

- vLLM and transformers 4: an entry is a substring of the module's name (`visual`);
- transformers 5: an entry is a regular expression from the start of the name, or the end of the name (`.*visual`);
- AutoAWQ: an entry is a substring of the name within a decoder layer; modules outside the decoder layers are never
  converted. An entry can exclude a Linear in all layers (`mlp.down_proj`) but not in some layers
  (`layers.3.mlp.down_proj`).
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
    Data,
    OutLinear,
    OutputJob,
    OutTensor,
)
from .nibbles import PER_WORD, pack_gemm, unpack_gemm
from .skip_list import skip_list_entries
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
quant_method: str | None = "awq"
kv_cache: CacheDtype | None = None
kv_cache_reason = "AutoAWQ's layout has no place for them"

_MAX_FLOAT16 = 65504.0


def refusal(schemes: frozenset[QuantScheme]) -> str:
    names = sorted({scheme.name for scheme in schemes})
    for scheme in schemes:
        if not scheme.is_int4 or scheme.act_bits is not None or scheme.group_size is None:
            return f"awq supports int4 weights per group with float activations, not {scheme.name}"
        if scheme.symmetric:
            return (
                f"awq and its runtimes require a zero point for every group, but {scheme.name} has none;"
                " set symmetric: false, or save as compressed_tensors"
            )
    return f"awq supports one group size for all Linears, not {' and '.join(names)}" if len(names) > 1 else ""


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    out_features, in_features = linear.shape
    zeros = linear.zeros
    assert linear.scheme.group_size is not None and zeros is not None  # refused otherwise
    if out_features % PER_WORD:
        raise QuantError(
            f"{linear.name}: awq packs {PER_WORD} output channels into a word, and {out_features} is not a multiple",
            "exclude this Linear, or save as compressed_tensors",
        )
    groups, kind = in_features // linear.scheme.group_size, linear.scheme.name
    words = out_features // PER_WORD
    qweight = TensorSpec(f"{linear.name}.qweight", "I32", (in_features, words))
    qzeros = TensorSpec(f"{linear.name}.qzeros", "I32", (groups, words))
    scales = TensorSpec(f"{linear.name}.scales", "F16", (groups, out_features))
    return [
        OutTensor(qweight, lambda: pack_gemm(linear.qweight()), kind),
        OutTensor(qzeros, lambda: pack_gemm(zeros()), kind),
        OutTensor(scales, lambda: linear.scales().to(torch.float16).t().contiguous(), kind),
    ]


def float_tensor(tensor: OutTensor, is_quantized_bias: bool) -> OutTensor:
    if not is_quantized_bias or tensor.spec.dtype == "F16":
        return tensor

    def load() -> Data:
        data = tensor.load()
        assert isinstance(data, torch.Tensor)  # biases are small and never chunked
        if data.numel() and float(data.abs().max()) > _MAX_FLOAT16:
            raise QuantError(
                f"{tensor.spec.name}: {float(data.abs().max()):g} exceeds the range of float16 (up to"
                f" {_MAX_FLOAT16:g}), in which awq stores the biases of quantized Linears",
                "exclude this Linear, or save as compressed_tensors",
            )
        return data.to(torch.float16)

    return replace(tensor, spec=replace(tensor.spec, dtype="F16"), load=load)


def json_files(job: OutputJob, tensors: list[OutTensor]) -> dict[str, dict[str, Any]]:
    return {"config.json": job.config_with(quantization_config(job))}


def quantization_config(job: OutputJob) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": next((linear.scheme.group_size for linear in job.linears), None),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": modules_to_not_convert(job),
    }


def modules_to_not_convert(job: OutputJob) -> list[str]:
    """The entries that make every loader keep the same modules float; see the module docstring."""
    floats = [_split_name(name) for name in job.float_linears]
    quantized = {_split_name(linear.name)[1] for linear in job.linears}
    # Only the end of a decoder Linear's name is the same in all loaders. `layers.` keeps 1 from matching 11.
    endings = [inner if inner not in quantized else f"{layer}.{inner}" for layer, inner in floats]
    return list(dict.fromkeys([*skip_list_entries(job), *endings]))


def _split_name(name: str) -> tuple[str, str]:
    """`thinker.model.layers.3.mlp.down_proj` -> (`layers.3`, `mlp.down_proj`)."""
    index, _, inner = name.rpartition(".layers.")[2].partition(".")
    return f"layers.{index}", inner


# --- reading -------------------------------------------------------------------------------------------------

_PARTS = ("qweight", "qzeros", "scales")


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. Supports 4 bits in GEMM order with zero points. group_size -1: one group per row."""
    form = {
        "bits": settings.get("bits", settings.get("w_bit")),
        "version": str(settings.get("version", "gemm")).lower(),
        "zero_point": settings.get("zero_point", True),
    }
    if form != {"bits": 4, "version": "gemm", "zero_point": True}:
        listed = ", ".join(f"{key} {value!r}" for key, value in form.items())
        raise QuantError(
            f"an awq checkpoint with {listed} is not supported", "supported are bits 4, version gemm, zero_point true"
        )
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise QuantError(f"quantization_config: group_size is {group_size!r}, expected a positive integer or -1")
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in group_parts(tensors, _PARTS).items():
        if why := describe_missing_parts(parts, _PARTS) or _layout_fault(parts, group_size):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(_stored_linear(name, parts, float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _layout_fault(parts: Parts, group_size: int) -> str:
    if len(parts["qweight"].shape) != 2 or not parts["qweight"].numel:
        return f"qweight has shape {list(parts['qweight'].shape)}, not [in, out / {PER_WORD}]"
    in_features, words = parts["qweight"].shape
    size = in_features if group_size == -1 else group_size
    if in_features % size:
        return f"group_size {size} does not divide the {in_features} inputs"
    groups = in_features // size
    return describe_wrong_part(
        parts,
        {
            "qweight": (("I32",), (in_features, words)),
            "qzeros": (("I32",), (groups, words)),
            "scales": (FLOATS, (groups, words * PER_WORD)),
        },
    )


def _stored_linear(name: str, parts: Parts, float_dtype: str) -> OutLinear:
    (in_features, words), groups = parts["qweight"].shape, parts["scales"].shape[0]
    return OutLinear(
        name,
        QuantScheme(4, None, group_size=in_features // groups, symmetric=False),
        (words * PER_WORD, in_features),
        float_dtype,
        lambda: unpack_gemm(load_tensor(parts["qweight"])),
        lambda: load_tensor(parts["scales"]).to(torch.float32).t().contiguous(),
        lambda: unpack_gemm(load_tensor(parts["qzeros"])),
    )
