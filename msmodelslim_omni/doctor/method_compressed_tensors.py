"""The format of compressed-tensors, as doctor reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..models import ModelSpec
from .findings import Finding
from .method import Method, field_fault, is_name_list
from .names import Loader, compressed_tensors_loaders
from .quantization import Declared, DeclaredGroup, integer, name_list


def _declare(block: dict[str, Any]) -> Declared:
    groups = _config_groups(block)
    all_weights = [w if isinstance(w := group.get("weights"), dict) else {} for group in groups.values()] or [{}]
    weights = next((w for w in all_weights if w.get("strategy") == "group"), all_weights[0])
    symmetric = weights.get("symmetric")
    bits = [integer(w.get("num_bits")) for w in all_weights]
    targets = [name_list(group.get("targets")) or () for group in groups.values()]
    return Declared(
        "compressed-tensors",
        bits=bits[0] if len(set(bits)) == 1 else None,
        group_size=integer(weights.get("group_size")),
        grouped=weights.get("strategy") == "group",
        symmetric=symmetric if isinstance(symmetric, bool) else None,
        entries=name_list(block.get("ignore")) or (),
        groups=tuple(map(DeclaredGroup, bits, map(_declared_form, groups.values()), targets)),
        where="quantization_config.config_groups.*.weights",
        bits_key="num_bits",
    )


def _declared_form(group: dict[str, Any]) -> str | None:
    """The form of the Linears that a config group declares, see linears.FORMS."""
    weights = weights if isinstance(weights := group.get("weights"), dict) else {}
    if weights.get("type") == "float" and weights.get("num_bits") == 4:
        return "nvfp4_act" if group.get("input_activations") else "nvfp4"
    if weights.get("type") == "float":
        return "float8_block" if weights.get("strategy") == "block" else "float8"
    int8 = "int8" if group.get("input_activations") else "packed8"
    return {4: "packed", 8: int8}.get(integer(weights.get("num_bits")) or 0)


def _config_groups(block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config groups of compressed-tensors, without those that are not objects."""
    groups = block.get("config_groups")
    return {k: v for k, v in groups.items() if isinstance(v, dict)} if isinstance(groups, dict) else {}


# Strategy and `dynamic` of activations, by the strategy of float weights.
_FLOAT_ACTIVATIONS: dict[Any, tuple[Any, ...]] = {
    "channel": (("token", True),),
    "block": (("group", True),),
    "tensor_group": (None, ("tensor_group", "local")),
}
_ACTIVATION_KINDS = {
    "block": "per group of 128 and dynamic",
    "tensor_group": 'null, or per tensor_group with dynamic "local"',
}


def _check(block: dict[str, Any], declared: Declared) -> Iterator[Finding]:
    groups = _config_groups(block)
    if not groups:
        yield field_fault("config_groups", block.get("config_groups"), "an object of groups")
    if not is_name_list(block.get("ignore", [])):
        yield field_fault("ignore", block.get("ignore"), "a list of names")
    if block.get("quantization_status") not in ("compressed", None):
        yield field_fault("quantization_status", block.get("quantization_status"), "compressed")
    for name, group in groups.items():
        weights, act = group.get("weights"), group.get("input_activations")
        if not is_name_list(group.get("targets")):
            yield field_fault(f"config_groups.{name}.targets", group.get("targets"), "a list of names")
        if not isinstance(weights, dict):
            yield field_fault(f"config_groups.{name}.weights", weights, "an object")
            continue
        is_int8 = weights.get("num_bits") == 8 and weights.get("type") != "float"
        is_float8 = weights.get("type") == "float"
        expected: dict[str, tuple[Any, ...]]
        is_nvfp4 = is_float8 and weights.get("num_bits") == 4
        if is_nvfp4:
            expected = {"strategy": ("tensor_group",), "group_size": (16,)}
        elif is_float8:
            expected = {"num_bits": (8,), "strategy": ("channel", "block")}
        else:
            expected = {"type": ("int",), "strategy": ("channel",) if is_int8 and act else ("group", "channel")}
        for key, values in expected.items():
            if weights.get(key) not in values:
                place = f"config_groups.{name}.weights.{key}"
                yield field_fault(place, weights.get(key), " or ".join(map(str, values)))
        if weights.get("actorder") not in (None, "weight", "static", False):
            yield field_fault(f"config_groups.{name}.weights.actorder", weights["actorder"], "null; vLLM rejects it")
        activation = (act.get("strategy"), act.get("dynamic")) if isinstance(act, dict) else None
        allowed = _FLOAT_ACTIVATIONS.get(str(weights.get("strategy"))) if is_float8 else None
        if activation not in (allowed or (None, ("token", True), ("tensor", False))):
            kind = _ACTIVATION_KINDS.get(str(weights.get("strategy")), "per token and dynamic")
            yield field_fault(f"config_groups.{name}.input_activations", act, kind)
        elif isinstance(act, dict) and act.get("type", "int") != weights.get("type", "int"):
            yield field_fault(f"config_groups.{name}.input_activations.type", act.get("type"), weights.get("type"))
        form = (
            "nvfp4-pack-quantized"
            if is_nvfp4
            else "float-quantized"
            if is_float8
            else "int-quantized"
            if is_int8 and act
            else "pack-quantized"
        )
        place = f"config_groups.{name}.format" if group.get("format") is not None else "format"
        declared_form = group.get("format") or block.get("format")
        if declared_form not in (form, None):
            yield field_fault(place, declared_form, form)


def _targets(declared: Declared) -> list[str]:
    return [target for group in declared.groups for target in group.targets]


def _loaders(model: ModelSpec, declared: Declared, stored: Collection[str]) -> list[Loader]:
    return compressed_tensors_loaders(model, declared.entries or (), _targets(declared) or ["Linear"])


def _patterns(declared: Declared) -> list[str]:
    return [entry for entry in (*(declared.entries or ()), *_targets(declared)) if entry.startswith("re:")]


COMPRESSED_TENSORS = Method(
    ("packed", "packed8", "int8", "float8", "float8_block", "nvfp4", "nvfp4_act"),
    frozenset({"weight_packed", "weight_scale"}),
    _declare,
    _check,
    _loaders,
    _patterns,
)
