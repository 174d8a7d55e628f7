"""compressed_tensors: W8A8, W8A16, W4A16, FP8, NVFP4 and NVFP4A16, also mixed in one checkpoint (mixed-precision).

vLLM, vLLM-Ascend and transformers load these checkpoints. Each layout of the tensors of a Linear is one module
(ct_layout.py); LAYOUTS lists them. Biases are untouched.

quantization_config is written wherever a loader looks for it (top level, and in thinker_config for the thinker class).
Its ignore list uses `re:` patterns: exact names silently miss vLLM's fused visual qkv, and transformers 5 renamed
the modules. With several config groups the targets are `re:` patterns too; a single group targets every Linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import QuantError
from ..numerics import CacheDtype, QuantScheme
from ..storage import TensorInfo
from . import ct_float8, ct_int8, ct_nvfp4, ct_packed
from .ct_layout import Layout
from .job import OutLinear, OutputJob, OutTensor
from .stored import (
    PartFault,
    Parts,
    StoredLinear,
    StoredLinears,
    describe_missing_parts,
    group_parts,
)

_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

LAYOUTS: tuple[Layout, ...] = (ct_int8, ct_packed, ct_float8, ct_nvfp4)

weights_stem = "model"
quant_method: str | None = "compressed-tensors"
kv_cache: CacheDtype | None = "fp8"
kv_cache_reason = "vLLM caches fp8 and has no int8 cache"


def refusal(schemes: frozenset[QuantScheme]) -> str:
    for scheme in schemes:
        if not any(layout.stores(scheme) for layout in LAYOUTS):
            return (
                "compressed_tensors supports W8A8_DYNAMIC, W8A16, FP8, NVFP4, NVFP4A16, and int4 weights per group with"
                f" float activations, not {scheme.name}"
            )
    # The tensors distinguish schemes of different layouts. Only config patterns distinguish two of the same layout.
    for layout in LAYOUTS:
        for bits in (4, 8):
            same = sorted({scheme.name for scheme in schemes if layout.stores(scheme) and scheme.weight_bits == bits})
            if len(same) > 1:
                kind = f"int{bits}" if layout is ct_packed else layout.FORM
                return f"compressed_tensors supports one {kind} scheme, not {' and '.join(same)}"
    return ""


def _layout(scheme: QuantScheme) -> Layout:
    return next(layout for layout in LAYOUTS if layout.stores(scheme))


def linear_tensors(linear: OutLinear) -> list[OutTensor]:
    return _layout(linear.scheme).linear_tensors(linear)


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
        form, groups = _layout(scheme).FORM, [{"targets": ["Linear"], **_arguments(scheme)}]
    else:
        form = "mixed-precision"
        groups = [
            {"targets": _targets(job.linears, name), "format": _layout(scheme).FORM, **_arguments(scheme)}
            for name, scheme in sorted(schemes.items())
        ]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [*job.ignore_patterns, *floats],
        "kv_cache_scheme": None if job.kv_cache is None else dict(_CACHE_SCHEME),
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


def _arguments(scheme: QuantScheme) -> dict[str, Any]:
    return {**_layout(scheme).arguments(scheme), "output_activations": None}


def _ending(name: str) -> str:
    """The end of a decoder Linear's name, for example `.layers.3.mlp.down_proj`."""
    return name[name.rindex(".layers.") :]


# --- reading -------------------------------------------------------------------------------------------------

# Other tools may store zeros for a symmetric scheme, and the group of each input if they reordered the inputs.
_OPTIONAL_PARTS = ("weight_zero_point", "weight_g_idx")

_Stored = tuple[Layout, QuantScheme]


def read_linears(
    settings: dict[str, Any], tensors: Mapping[str, TensorInfo], float_dtype: Callable[[str], str]
) -> StoredLinears:
    """See Format.read_linears. Supports the schemes written here, and int8 or int4 per channel with float activations.

    In a mixed checkpoint, the tensors of a Linear show its scheme. The patterns of the settings are not used.
    """
    schemes = _stored_schemes(settings)
    endings = {ending for layout, scheme in schemes for ending in layout.required(scheme)}
    linears: dict[str, StoredLinear] = {}
    faults = []
    for name, parts in group_parts(tensors, (*sorted(endings), *_OPTIONAL_PARTS)).items():
        if set(parts) == {"weight"} and parts["weight"].dtype not in ("I8", "F8_E4M3"):
            continue  # a float Linear, a norm, an embedding
        layout, scheme = _recognized(parts, schemes)
        if why := describe_missing_parts(parts, layout.required(scheme)) or layout.fault(parts, scheme):
            faults.append(PartFault(name, why))
        else:
            linears[name] = StoredLinear(layout.stored_linear(name, parts, scheme, float_dtype(name)), parts)
    return StoredLinears(linears, tuple(faults))


def _recognized(parts: Parts, schemes: list[_Stored]) -> _Stored:
    """The scheme that these tensors look like; the first one if they look like none."""
    # The last layout that recognizes the parts is the most specific one.
    return next(((layout, s) for layout, s in reversed(schemes) if layout.recognizes(parts, s)), schemes[0])


def _stored_schemes(settings: dict[str, Any]) -> list[_Stored]:
    """The schemes of a quantization_config with their layouts, in the order of LAYOUTS."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise QuantError("quantization_config: config_groups contains no group")
    schemes = [_stored_scheme(group, group.get("format") or settings.get("format")) for group in groups.values()]
    if len({(layout.FORM, scheme.weight_bits) for layout, scheme in schemes}) < len(schemes):
        raise QuantError(
            "quantization_config: config_groups contains two groups with the same bits",
            "supported is one group of each format and number of bits",
        )
    return sorted(schemes, key=lambda stored: LAYOUTS.index(stored[0]))


def _stored_scheme(group: dict[str, Any], form: object) -> _Stored:
    """The layout and scheme of one config group. Raises QuantError if it is not supported."""
    weights, act = group.get("weights"), group.get("input_activations")
    weights = weights if isinstance(weights, dict) else {}
    for layout in LAYOUTS:
        if form == layout.FORM and (scheme := layout.stored_scheme(weights, act if isinstance(act, dict) else None)):
            return layout, scheme
    values = [form, *(weights.get(key) for key in ("num_bits", "type", "strategy"))]
    if isinstance(act, dict):
        values += [act.get(key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")]
    symmetric = bool(weights.get("symmetric", True))
    raise QuantError(
        f"quantization_config: {' '.join(map(str, values))}{'' if symmetric else ' asymmetric'} is not supported",
        f"supported are {'; '.join(layout.SUPPORTED for layout in LAYOUTS)}",
    )
