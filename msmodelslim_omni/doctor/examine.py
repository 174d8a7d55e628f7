"""Examine a quantized checkpoint for faults that prevent loading, or that make it load and generate garbage.

Damage results in a finding, never in a crash. All headers are read first; after that, one Linear is in memory at a
time, so memory does not grow with the model. No runtime is started: names.py emulates the rules for names.
Omitted on purpose: accuracy. A checkpoint without faults may still be inaccurate; see its quant_report.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ..errors import QuantError
from ..models import ModelSpec, derive_model_type
from ..storage import config_block
from .companions import check_companions
from .config import (
    check_config,
    quantization_configs,
    read_config,
    read_description,
)
from .content import check_floats, check_integers, check_scales
from .experts import check_experts, describe_parallel
from .findings import (
    Collector,
    Diagnosis,
    Finding,
    make_finding,
)
from .headers import check_files, check_index, read_folder
from .kv_cache import cache_tensor_shapes, check_cache, check_cache_fields, kv_cache_of
from .linears import (
    Shapes,
    check_linears,
    expected_linears,
    split_tensor_name,
    stored_linears,
)
from .loaders import check_description, check_groups, check_lists
from .method import KEY
from .methods import declared_quantization
from .source import check_source
from .tensors import check_tensors
from .verdict import verdicts

__all__ = ["Diagnosis", "Finding", "examine"]

T = TypeVar("T")


def examine(
    path: str | Path, source: str | Path | None = None, on_check: Callable[[str], None] = lambda check: None
) -> Diagnosis:
    """Run all checks on the checkpoint in `path`; with the float checkpoint `source`, also compare the weights.

    on_check is called with the name of each check before the check starts, and with its progress while it reads
    weights. Raises QuantError if `path` or `source` is not a folder.
    """
    path = _require_folder(path)
    source = None if source is None else _require_folder(source)
    collector = Collector(on_check)

    _require_checkpoint(path)
    config, config_faults = read_config(path)
    description, description_faults = read_description(path)
    folder = read_folder(path)
    names = set(folder.tensors)
    model, expected, optional, model_faults = _model_and_tensors(config)
    declared = declared_quantization(
        _declared_block(config, model), description is not None, {split_tensor_name(name)[1] for name in names}
    )
    linears = stored_linears(folder, expected, declared)
    quantized = [linear for linear in linears.values() if linear.quantized]
    all_linears = sorted(linears.keys() | expected_linears(expected).keys())

    collector.run("files", check_files(folder), f"{len(folder.files)} complete safetensors files", str(path))
    index_text = (
        f"{len(names)} tensors, all in the files that the index names"
        if folder.index_name
        else "one file, no index needed"
    )
    collector.run("index", check_index(folder), index_text, folder.index_name)
    config_check = [*config_faults, *description_faults, *model_faults]
    if config:
        config_check += check_config(config, model, description is not None, declared)
    collector.run(
        "config", iter(config_check), f"{declared.format or 'no quantization'}, full architecture", "config.json"
    )
    has_voices = model is None or bool(model.speech_prefixes and model.voices_file)
    companions = "tokenizer, processor, chat template" + ", voices" * has_voices
    collector.run("companions", check_companions(path, has_voices), companions, str(path))
    block = _declared_block(config, model)
    settings = block if description is None else description
    if stopped := _reason_to_stop(collector.findings):
        loads = verdicts(model, declared.format, settings, folder, collector.findings, stopped)
        return Diagnosis(str(path), declared.format, tuple(collector.findings), collector.unlisted, loads, stopped)
    caches: Shapes = {} if model is None or not expected else cache_tensor_shapes(model, config, kv_cache_of(settings))
    expected = {**expected, **caches}
    is_float = block is None and description is None and not declared.format and not quantized
    if model is not None and expected:
        tensors = check_tensors(folder, config, model, expected, optional, linears, declared)
        collector.run("tensors", tensors, f"{len(names)} names match config.json", "all")
    if is_float:
        finding = make_finding("float_checkpoint", "all Linears", "this is a float checkpoint: no Linear is quantized")
        collector.run("linears", iter([finding]), "", "all")
        floats = check_floats(_counted("floats", folder.tensors.values(), on_check))
        collector.run("floats", floats, "no NaN, no Inf", "all")
        return Diagnosis(str(path), "float", tuple(collector.findings), collector.unlisted)
    collector.run("linears", check_linears(linears, declared), f"{len(quantized)} quantized, with all tensors", "all")
    if model is not None:
        collector.run(
            "groups", check_groups(model, linears), "q, k, v and gate, up have the same form; towers are float", "all"
        )
    if model is not None and expected and model.family.layer_spec(config).experts is not None:
        alike = "all experts of a layer have the same form; routers are float"
        alike += describe_parallel(model, config, linears)
        collector.run("experts", check_experts(model, config, linears), alike, "all")
    if model is not None and declared.format == "ascend":
        if description:
            entries = check_description(model, linears, description, sorted(names), optional, all_linears)
            collector.run("names", entries, "the description has an entry for each Linear", "description")
    elif model is not None and declared.format in ("awq", "bitsandbytes", "compressed-tensors"):
        lists = check_lists(model, linears, declared, config, all_linears)
        collector.run(
            "names", lists, f"{declared.format} loaders convert exactly these {len(quantized)} Linears", "config.json"
        )
    scales = chain(
        check_scales(_counted("scales", linears.values(), on_check)),
        check_cache_fields(settings),
        check_cache(folder, caches),
    )
    collector.run("scales", scales, "finite, positive, no denormals", "all")
    integers = check_integers(_counted("integers", linears.values(), on_check))
    collector.run("integers", integers, "no constant rows, zero points match", "all")
    floats = check_floats(_counted("floats", folder.tensors.values(), on_check))
    collector.run("floats", floats, "no NaN, no Inf", "all")
    if source is not None:
        if model is not None and expected:
            comparison = check_source(path, source, config, model, folder, linears)
        else:
            comparison = iter([make_finding("source_other_model", source, "config.json does not identify the model")])
        collector.run("source", comparison, "floats unchanged, weights near the source's after folding", str(source))
    loads = verdicts(model, declared.format, settings, folder, collector.findings, "")
    return Diagnosis(str(path), declared.format, tuple(collector.findings), collector.unlisted, loads)


def _counted(check: str, items: Collection[T], on_check: Callable[[str], None]) -> Iterator[T]:
    """Yield the items, and report every hundredth to on_check."""
    for number, item in enumerate(items):
        if number and number % 100 == 0:
            on_check(f"{check}, {number} of {len(items)}")
        yield item


# Faults after which the rest of the checkpoint is not there to be examined.
_STOPPING = (
    "no_weights", "file_truncated", "file_broken", "file_trailing_bytes", "file_unreadable",
    "index_names_absent_shard", "config_missing",
)  # fmt: skip


def _reason_to_stop(findings: Sequence[Finding]) -> str:
    """Why tensors, names and weights are not examined; empty if nothing stands against it."""
    is_config = {"json_broken": "config.json"}
    for finding in findings:
        if finding.code in _STOPPING or is_config.get(finding.code) == finding.where:
            return f"{finding.where}: {finding.what}"
    return ""


def _require_folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise QuantError(
            f"{str(path)!r} {'is not a folder' if path.exists() else 'does not exist'}",
            "give the folder that contains config.json and the safetensors files",
        )
    return path


def _require_checkpoint(path: Path) -> None:
    if not (path / "config.json").exists() and not any(path.glob("*.safetensors")):
        raise QuantError(
            f"{str(path)!r} holds no checkpoint: it has neither config.json nor a safetensors file",
            "give the folder that contains config.json and the safetensors files",
        )


def _declared_block(config: dict[str, Any], model: ModelSpec | None) -> Any:
    """Return the first quantization_config in the places where loaders look for it."""
    paths = ((),) if model is None else model.config_paths
    return next((block[KEY] for path in paths if KEY in (block := config_block(config, path))), None)


def _model_and_tensors(config: dict[str, Any]) -> tuple[ModelSpec | None, Shapes, frozenset[str], tuple[Finding, ...]]:
    """Return the model of config.json, the shapes of its tensors, its optional tensors, and findings."""
    if not config:
        return None, {}, frozenset(), ()
    try:
        model = derive_model_type(config)
    except QuantError as error:
        return None, {}, frozenset(), (make_finding("config_foreign", "config.json", error.message),)
    try:
        plain = copy.deepcopy(config)
        for place in quantization_configs(config):
            _remove_key(plain, place.split("."))
        shapes, optional = _expected_tensors(json.dumps(plain, sort_keys=True))
    except QuantError as error:
        return model, {}, frozenset(), (make_finding("config_unbuildable", "config.json", error.message),)
    except Exception as error:  # a damaged config.json may make the library raise anything
        what = f"{type(error).__name__}: {error}"
        return model, {}, frozenset(), (make_finding("config_unbuildable", "config.json", what),)
    return model, shapes, optional, ()


def _remove_key(block: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        block = block[key]
    del block[keys[-1]]


@functools.lru_cache(maxsize=2)
def _expected_tensors(config: str) -> tuple[Shapes, frozenset[str]]:
    """Return the shapes by name and the optional tensors. Cached, because building the model takes a second."""
    parsed = json.loads(config)
    return derive_model_type(parsed).family.expected_tensors(parsed)
