"""Checks of config.json: full architecture, and quantization_config in the places that loaders read and only there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..formats import DESCRIPTION_FILE
from ..models import MODEL_TYPES, ModelSpec
from ..storage import config_block
from .findings import Finding, make_finding, shorten_list
from .headers import read_json
from .quantization import Declared, config_groups

KEY = "quantization_config"

_METHODS = ("awq", "bitsandbytes", "compressed-tensors")


def read_config(path: Path) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """Return config.json, or an empty object and the finding that explains why."""
    if not (path / "config.json").is_file():
        return {}, (make_finding("config_missing", "config.json", "is missing"),)
    try:
        return read_json(path / "config.json"), ()
    except QuantError as error:
        return {}, (make_finding("json_broken", "config.json", error.message),)


def read_description(path: Path) -> tuple[dict[str, Any] | None, tuple[Finding, ...]]:
    """Return msModelSlim's description: None if it is missing, an empty object and a finding if it is unreadable."""
    if not (path / DESCRIPTION_FILE).is_file():
        return None, ()
    try:
        return read_json(path / DESCRIPTION_FILE), ()
    except QuantError as error:
        return {}, (make_finding("json_broken", DESCRIPTION_FILE, error.message),)


def quantization_configs(config: dict[str, Any]) -> dict[str, Any]:
    """Return every quantization_config in config.json by place (`quantization_config`, `thinker_config.quant...`)."""
    by_place: dict[str, Any] = {}
    pending: list[tuple[str, dict[str, Any]]] = [("", config)]
    while pending:
        prefix, block = pending.pop()
        for key, value in block.items():
            if key == KEY:
                by_place[prefix + key] = value
            elif isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))
    return by_place


def check_config(
    config: dict[str, Any], model: ModelSpec | None, has_description: bool, declared: Declared
) -> Iterator[Finding]:
    """Check the architecture and parts, then the places and fields of quantization_config."""
    yield from _check_architecture(config, model)
    places = quantization_configs(config)
    top = places.pop(KEY, None)
    inner = {place: places.pop(place, None) for place in _inner_places(model)}
    for place in places:
        yield make_finding("quantization_config_stray", f"config.json: {place}", "loaders read other places")
    if has_description:
        for place, block in ((KEY, top), *inner.items()):
            if block is not None:
                yield make_finding(
                    "quantization_config_stale", f"config.json: {place}", f"exists together with {DESCRIPTION_FILE}"
                )
        return
    first_inner = next((block for block in inner.values() if block is not None), None)
    if top is None and first_inner is None:
        if declared.format == "ascend":
            yield make_finding(
                "quantization_config_missing", DESCRIPTION_FILE, "is missing; the tensors have the ascend format"
            )
        elif declared.format:
            yield make_finding(
                "quantization_config_missing",
                f"config.json: {KEY}",
                f"is missing; the tensors look like {declared.format}",
            )
        return
    for place, block in inner.items():
        if top is None:
            yield make_finding(
                "quantization_config_only_in_thinker", f"config.json: {place}", "is missing at the top level"
            )
        elif block is None:
            yield make_finding("quantization_config_not_in_thinker", f"config.json: {place}", "is missing")
        elif top != block:
            what = f"differs from the top level in: {_differing_keys(top, block)}"
            yield make_finding("quantization_config_differs", f"config.json: {place}", what)
    yield from _check_block(top if top is not None else first_inner, declared)


def _inner_places(model: ModelSpec | None) -> list[str]:
    """Return the places where loaders look for quantization_config, except the top level."""
    paths = () if model is None else model.config_paths
    return [".".join([*path, KEY]) for path in paths if path]


def _differing_keys(a: Any, b: Any) -> str:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "one of them is not an object"
    return shorten_list(str(key) for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _check_architecture(config: dict[str, Any], model: ModelSpec | None) -> Iterator[Finding]:
    names, model_type = config.get("architectures"), config.get("model_type")
    if _is_part_config(names, model_type):
        yield make_finding("config_thinker_only", "config.json", f"model_type {model_type!r}, architectures {names!r}")
        return
    if model is None:
        return  # examine() already reports config_foreign
    known = model.loaders.architectures
    if not isinstance(names, list) or not any(name in known for name in names):
        yield make_finding("config_architecture", "config.json: architectures", f"is {names!r}; supported: {known}")
    for path in model.loaders.config_parts:
        if not config_block(config, path):
            yield make_finding("config_part_missing", f"config.json: {'.'.join(path)}", "is missing")


def _is_part_config(names: Any, model_type: Any) -> bool:
    """Whether config.json describes only a part of a model, e.g. the thinker."""
    specs = MODEL_TYPES.values()
    parts = {loaded.architecture for spec in specs for loaded in spec.loaders.classes if loaded.config_path}
    has_part_architecture = isinstance(names, list) and any(str(name) in parts for name in names)
    return has_part_architecture or any(str(model_type).startswith(f"{spec.hf_model_type}_") for spec in specs)


def _check_block(block: Any, declared: Declared) -> Iterator[Finding]:
    if not isinstance(block, dict):
        yield make_finding("quantization_field", f"config.json: {KEY}", f"is {str(block)[:80]!r}, not an object")
        return
    method = block.get("quant_method")
    if method is None:
        yield make_finding("quantization_config_no_method", f"config.json: {KEY}", "has no quant_method")
    elif method not in _METHODS:
        yield make_finding(
            "quantization_method_unknown", f"config.json: {KEY}.quant_method", f"is {str(method)[:80]!r}"
        )
    elif method == "awq":
        yield from _check_awq(block, declared)
    elif method == "bitsandbytes":
        yield from _check_bitsandbytes(block)
    else:
        yield from _check_compressed(block)


def _field_fault(place: str, value: Any, expected: object) -> Finding:
    return make_finding("quantization_field", f"config.json: {KEY}.{place}", f"is {str(value)[:80]!r}, not {expected}")


def _check_awq(block: dict[str, Any], declared: Declared) -> Iterator[Finding]:
    if declared.bits is None:
        yield _field_fault("bits", block.get("bits"), "4")
    if declared.group_size is None:
        yield _field_fault("group_size", block.get("group_size"), "a number")
    if not isinstance(block.get("zero_point"), bool):
        yield _field_fault("zero_point", block.get("zero_point"), "true")
    if str(block.get("version", "gemm")).lower() != "gemm":
        yield _field_fault("version", block.get("version"), "gemm")
    entries = block.get("modules_to_not_convert")
    if entries is not None and not _is_name_list(entries):
        yield _field_fault("modules_to_not_convert", entries, "a list of names")


def _check_bitsandbytes(block: dict[str, Any]) -> Iterator[Finding]:
    expected = {"load_in_4bit": (True,), "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_quant_storage": ("uint8", None)}
    for key, values in expected.items():
        if block.get(key) not in values:
            yield _field_fault(key, block.get(key), str(values[0]))
    entries = block.get("llm_int8_skip_modules")
    if entries is not None and not _is_name_list(entries):
        yield _field_fault("llm_int8_skip_modules", entries, "a list of names")


# Strategy and `dynamic` of activations, by the strategy of FP8 weights.
_FLOAT8_ACTIVATIONS: dict[Any, tuple[Any, ...]] = {"channel": (("token", True),), "block": (("group", True),)}


def _check_compressed(block: dict[str, Any]) -> Iterator[Finding]:
    groups = config_groups(block)
    if not groups:
        yield _field_fault("config_groups", block.get("config_groups"), "an object of groups")
    if not _is_name_list(block.get("ignore", [])):
        yield _field_fault("ignore", block.get("ignore"), "a list of names")
    if block.get("quantization_status") not in ("compressed", None):
        yield _field_fault("quantization_status", block.get("quantization_status"), "compressed")
    for name, group in groups.items():
        weights, act = group.get("weights"), group.get("input_activations")
        if not _is_name_list(group.get("targets")):
            yield _field_fault(f"config_groups.{name}.targets", group.get("targets"), "a list of names")
        if not isinstance(weights, dict):
            yield _field_fault(f"config_groups.{name}.weights", weights, "an object")
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
                yield _field_fault(place, weights.get(key), " or ".join(map(str, values)))
        if weights.get("actorder") not in (None, "weight", "static", False):
            yield _field_fault(f"config_groups.{name}.weights.actorder", weights["actorder"], "null; vLLM rejects it")
        activation = (act.get("strategy"), act.get("dynamic")) if isinstance(act, dict) else None
        allowed = (None,) if is_nvfp4 else _FLOAT8_ACTIVATIONS.get(weights.get("strategy")) if is_float8 else None
        if activation not in (allowed or (None, ("token", True), ("tensor", False))):
            kind = "per group of 128 and dynamic" if weights.get("strategy") == "block" else "per token and dynamic"
            yield _field_fault(f"config_groups.{name}.input_activations", act, kind)
        elif isinstance(act, dict) and act.get("type", "int") != weights.get("type", "int"):
            yield _field_fault(f"config_groups.{name}.input_activations.type", act.get("type"), weights.get("type"))
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
            yield _field_fault(place, declared_form, form)


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
