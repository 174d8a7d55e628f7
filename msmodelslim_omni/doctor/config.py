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
from .method import KEY
from .methods import check_block
from .quantization import Declared


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
    yield from check_block(top if top is not None else first_inner, declared)


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
