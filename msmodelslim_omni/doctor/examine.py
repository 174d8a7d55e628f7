"""Examine a quantized checkpoint: everything that keeps it from loading, or lets it load and speak garbage.

Any damage is a finding, never a crash. Headers first; then one Linear at a time is in memory, so that memory does not
grow with the model. No runtime is started: their rules for names, shapes and config are emulated (names.py).
Left out on purpose: accuracy. A checkpoint that is sound may still be badly quantized; its quant_report tells.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..models import ModelSpec, derive_model_type
from ..storage import config_block
from .companions import check_companions
from .config import (
    KEY,
    blocks,
    check_config,
    read_config,
    read_description,
)
from .content import check_floats, check_integers, check_scales
from .findings import (
    Collector,
    Diagnosis,
    Finding,
    found,
)
from .headers import check_files, check_index, read_folder
from .linears import (
    Shapes,
    check_linears,
    expected_linears,
    linear_of,
    stored_linears,
)
from .loaders import check_description, check_groups, check_lists
from .quantization import declared_quantization
from .source import check_source
from .tensors import check_tensors

__all__ = ["Diagnosis", "Finding", "examine"]


def examine(
    path: str | Path, source: str | Path | None = None, on_check: Callable[[str], None] = lambda check: None
) -> Diagnosis:
    """Every finding about the checkpoint in `path`; with the float checkpoint `source`, about its weights too.

    on_check is told each check before it begins. Raises QuantError where `path` or `source` is no folder.
    """
    path = _folder(path)
    source = None if source is None else _folder(source)
    collector = Collector(on_check)

    config, config_faults = read_config(path)
    description, description_faults = read_description(path)
    folder = read_folder(path)
    names = set(folder.tensors)
    model, expected, optional, model_faults = _implied(config)
    declared = declared_quantization(
        _declared_block(config, model), description is not None, {linear_of(name)[1] for name in names}
    )
    linears = stored_linears(folder, expected, declared)
    quantized = [linear for linear in linears.values() if linear.quantized]
    all_linears = sorted(linears.keys() | expected_linears(expected).keys())

    collector.run("files", check_files(folder), f"{len(folder.files)} safetensors files, whole", str(path))
    listed = f"{len(names)} tensors, each where the index says" if folder.index_name else "one file needs no index"
    collector.run("index", check_index(folder), listed, folder.index_name)
    config_check = [*config_faults, *description_faults, *model_faults]
    if config:
        config_check += check_config(config, model, description is not None, declared)
    collector.run("config", iter(config_check), f"{declared.format}, architecture kept whole", "config.json")
    speaks = model is None or bool(model.speech_prefixes)
    companions = "tokenizer, processor, chat template" + ", voices" * speaks
    collector.run("companions", check_companions(path, speaks), companions, str(path))
    if model is not None and expected:
        tensors = check_tensors(folder, config, model, expected, optional, linears, declared)
        collector.run("tensors", tensors, f"{len(names)} names, as config.json implies", "all")
    collector.run("linears", check_linears(linears, declared), f"{len(quantized)} quantized, all tensors fit", "all")
    if model is not None:
        collector.run("groups", check_groups(model, linears), "q, k, v and gate, up of one form; towers float", "all")
    if model is not None and declared.format == "ascend":
        if description:
            found_names = check_description(model, linears, description, sorted(names), optional, all_linears)
            collector.run("names", found_names, "vLLM-Ascend finds an entry for each Linear", "description")
    elif model is not None and declared.format in ("awq", "bitsandbytes", "compressed-tensors"):
        lists = check_lists(model, linears, declared, config, all_linears)
        collector.run("names", lists, f"every loader converts these {len(quantized)} Linears alone", "config.json")
    collector.run("scales", check_scales(linears.values()), "finite, positive, no denormals", "all")
    collector.run("integers", check_integers(linears.values()), "no constant rows, zero points fit", "all")
    collector.run("floats", check_floats(folder.tensors.values()), "no NaN, no Inf", "all")
    if source is not None:
        if model is not None and expected:
            against = check_source(path, source, config, model, folder, linears)
        else:
            against = iter([found("source_other_model", source, "config.json does not say what model this is")])
        collector.run(
            "source", against, "floats unchanged, weights near the source's up to what was folded", str(source)
        )
    return Diagnosis(str(path), declared.format, tuple(collector.findings), collector.unlisted)


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise QuantError(
            f"{str(path)!r} {'is not a folder' if path.exists() else 'does not exist'}",
            "give the folder that holds config.json and the safetensors files",
        )
    return path


def _declared_block(config: dict[str, Any], model: ModelSpec | None) -> Any:
    """The first quantization_config where a loader looks for it."""
    paths = ((),) if model is None else model.config_paths
    return next((block[KEY] for path in paths if KEY in (block := config_block(config, path))), None)


def _implied(config: dict[str, Any]) -> tuple[ModelSpec | None, Shapes, frozenset[str], tuple[Finding, ...]]:
    """The model of config.json with its tensors, or what keeps it from being known."""
    if not config:
        return None, {}, frozenset(), ()
    try:
        model = derive_model_type(config)
    except QuantError as error:
        return None, {}, frozenset(), (found("config_foreign", "config.json", error.message),)
    try:
        plain = copy.deepcopy(config)
        for place in blocks(config):
            _remove(plain, place.split("."))
        shapes, optional = _expected(json.dumps(plain, sort_keys=True))
    except QuantError as error:
        return model, {}, frozenset(), (found("config_unbuildable", "config.json", error.message),)
    except Exception as error:  # whatever a damaged config.json makes the model's table or the library raise
        what = f"{type(error).__name__}: {error}"
        return model, {}, frozenset(), (found("config_unbuildable", "config.json", what),)
    return model, shapes, optional, ()


def _remove(block: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        block = block[key]
    del block[keys[-1]]


@functools.lru_cache(maxsize=2)
def _expected(config: str) -> tuple[Shapes, frozenset[str]]:
    """Shapes by name for a config.json as text; building them takes the library a second."""
    parsed = json.loads(config)
    return derive_model_type(parsed).family.expected_tensors(parsed)
