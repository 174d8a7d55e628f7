"""config.json: the architecture kept whole, the quantization declared where loaders look for it and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..formats import DESCRIPTION_FILE
from ..models import MODEL_TYPES, ModelSpec
from ..storage import config_block
from .findings import Finding, found, some
from .headers import read_json
from .quantization import Declared, config_groups

KEY = "quantization_config"

_METHODS = ("awq", "bitsandbytes", "compressed-tensors")


def read_config(path: Path) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """config.json, or an empty object and what is wrong with it."""
    if not (path / "config.json").is_file():
        return {}, (found("config_missing", "config.json", "is missing"),)
    try:
        return read_json(path / "config.json"), ()
    except QuantError as error:
        return {}, (found("json_broken", "config.json", error.message),)


def read_description(path: Path) -> tuple[dict[str, Any] | None, tuple[Finding, ...]]:
    """msModelSlim's description if there is one; an empty object if it cannot be read."""
    if not (path / DESCRIPTION_FILE).is_file():
        return None, ()
    try:
        return read_json(path / DESCRIPTION_FILE), ()
    except QuantError as error:
        return {}, (found("json_broken", DESCRIPTION_FILE, error.message),)


def blocks(config: dict[str, Any]) -> dict[str, Any]:
    """Every quantization_config of config.json by its place (`quantization_config`, `thinker_config.quant...`)."""
    found_blocks: dict[str, Any] = {}
    pending: list[tuple[str, dict[str, Any]]] = [("", config)]
    while pending:
        prefix, block = pending.pop()
        for key, value in block.items():
            if key == KEY:
                found_blocks[prefix + key] = value
            elif isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))
    return found_blocks


def check_config(
    config: dict[str, Any], model: ModelSpec | None, has_description: bool, declared: Declared
) -> Iterator[Finding]:
    """Architecture and parts, then the places of quantization_config and its fields."""
    yield from _check_architecture(config, model)
    places = blocks(config)
    top = places.pop(KEY, None)
    inner = {place: places.pop(place, None) for place in _inner_places(model)}
    for place in places:
        yield found("quantization_config_stray", f"config.json: {place}", "stands beside what loaders read")
    if has_description:
        for place, block in ((KEY, top), *inner.items()):
            if block is not None:
                yield found("quantization_config_stale", f"config.json: {place}", f"stands beside {DESCRIPTION_FILE}")
        return
    only = next((block for block in inner.values() if block is not None), None)
    if top is None and only is None:
        if declared.format == "ascend":
            yield found("quantization_config_missing", DESCRIPTION_FILE, "is missing; tensors are of the ascend format")
        elif declared.format:
            yield found("quantization_config_missing", f"config.json: {KEY}", f"tensors look like {declared.format}")
        return
    for place, block in inner.items():
        if top is None:
            yield found("quantization_config_only_in_thinker", f"config.json: {place}", "not at the top level")
        elif block is None:
            yield found("quantization_config_not_in_thinker", f"config.json: {place}", "is missing")
        elif top != block:
            told = f"other than at the top level: {_differing(top, block)}"
            yield found("quantization_config_differs", f"config.json: {place}", told)
    yield from _check_block(top if top is not None else only, declared)


def _inner_places(model: ModelSpec | None) -> list[str]:
    """Where loaders look for quantization_config besides the top level."""
    paths = () if model is None else model.config_paths
    return [".".join([*path, KEY]) for path in paths if path]


def _differing(one: Any, other: Any) -> str:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "one is no object"
    return some(str(key) for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _check_architecture(config: dict[str, Any], model: ModelSpec | None) -> Iterator[Finding]:
    names, model_type = config.get("architectures"), config.get("model_type")
    if _is_part_of_a_model(names, model_type):
        yield found("config_thinker_only", "config.json", f"model_type {model_type!r}, architectures {names!r}")
        return
    if model is None:
        return  # told by the check of what config.json implies
    known = model.loaders.architectures
    if not isinstance(names, list) or not any(name in known for name in names):
        yield found("config_architecture", "config.json: architectures", f"is {names!r}; known are {known}")
    for path in model.loaders.config_parts:
        if not config_block(config, path):
            yield found("config_part_missing", f"config.json: {'.'.join(path)}", "is missing")


def _is_part_of_a_model(names: Any, model_type: Any) -> bool:
    """Whether config.json is that of a part, e.g. of the thinker alone."""
    specs = MODEL_TYPES.values()
    parts = {loaded.architecture for spec in specs for loaded in spec.loaders.classes if loaded.config_path}
    of_part = isinstance(names, list) and any(str(name) in parts for name in names)
    return of_part or any(str(model_type).startswith(f"{spec.hf_model_type}_") for spec in specs)


def _check_block(block: Any, declared: Declared) -> Iterator[Finding]:
    if not isinstance(block, dict):
        yield found("quantization_field", f"config.json: {KEY}", f"is {str(block)[:80]!r}, not an object")
        return
    method = block.get("quant_method")
    if method is None:
        yield found("quantization_config_no_method", f"config.json: {KEY}", "has no quant_method")
    elif method not in _METHODS:
        yield found("quantization_method_unknown", f"config.json: {KEY}.quant_method", f"is {str(method)[:80]!r}")
    elif method == "awq":
        yield from _check_awq(block, declared)
    elif method == "bitsandbytes":
        yield from _check_bitsandbytes(block)
    else:
        yield from _check_compressed(block)


def _field(place: str, value: Any, wanted: str) -> Finding:
    return found("quantization_field", f"config.json: {KEY}.{place}", f"is {str(value)[:80]!r}, not {wanted}")


def _check_awq(block: dict[str, Any], declared: Declared) -> Iterator[Finding]:
    if declared.bits is None:
        yield _field("bits", block.get("bits"), "4")
    if declared.group_size is None:
        yield _field("group_size", block.get("group_size"), "a number")
    if not isinstance(block.get("zero_point"), bool):
        yield _field("zero_point", block.get("zero_point"), "true")
    if str(block.get("version", "gemm")).lower() != "gemm":
        yield _field("version", block.get("version"), "gemm")
    entries = block.get("modules_to_not_convert")
    if entries is not None and not _is_names(entries):
        yield _field("modules_to_not_convert", entries, "a list of names")


def _check_bitsandbytes(block: dict[str, Any]) -> Iterator[Finding]:
    wanted = {"load_in_4bit": (True,), "bnb_4bit_quant_type": ("nf4",), "bnb_4bit_quant_storage": ("uint8", None)}
    for key, values in wanted.items():
        if block.get(key) not in values:
            yield _field(key, block.get(key), str(values[0]))
    entries = block.get("llm_int8_skip_modules")
    if entries is not None and not _is_names(entries):
        yield _field("llm_int8_skip_modules", entries, "a list of names")


def _check_compressed(block: dict[str, Any]) -> Iterator[Finding]:
    groups = config_groups(block)
    if not groups:
        yield _field("config_groups", block.get("config_groups"), "an object of groups")
    if not _is_names(block.get("ignore", [])):
        yield _field("ignore", block.get("ignore"), "a list of names")
    if block.get("quantization_status") not in ("compressed", None):
        yield _field("quantization_status", block.get("quantization_status"), "compressed")
    for name, group in groups.items():
        weights, act = group.get("weights"), group.get("input_activations")
        if not _is_names(group.get("targets")):
            yield _field(f"config_groups.{name}.targets", group.get("targets"), "a list of names")
        if not isinstance(weights, dict):
            yield _field(f"config_groups.{name}.weights", weights, "an object")
            continue
        is_int8 = weights.get("num_bits") == 8
        wanted = {"type": ("int",), "strategy": ("channel",) if is_int8 and act else ("group", "channel")}
        for key, values in wanted.items():
            if weights.get(key) not in values:
                yield _field(f"config_groups.{name}.weights.{key}", weights.get(key), " or ".join(values))
        if weights.get("actorder") not in (None, "weight", "static", False):
            yield _field(f"config_groups.{name}.weights.actorder", weights["actorder"], "null; vLLM refuses it")
        rounded = (act.get("strategy"), act.get("dynamic")) if isinstance(act, dict) else None
        if rounded not in (None, ("token", True), ("tensor", False)):
            yield _field(f"config_groups.{name}.input_activations", act, "per token and dynamic")
        form = "int-quantized" if is_int8 and act else "pack-quantized"
        own = f"config_groups.{name}.format" if group.get("format") is not None else "format"
        said = group.get("format") or block.get("format")
        if said not in (form, None):
            yield _field(own, said, form)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
