"""Each loader's view of the Linears against what is stored: it converts those that are quantized, and no other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from ..models import ModelSpec
from ..storage import config_block
from .config import KEY
from .findings import Finding, found, some
from .linears import StoredLinear, linear_of
from .names import (
    MAX_NAME,
    Answer,
    Loader,
    answers,
    ascend_modules,
    awq_loaders,
    bitsandbytes_loaders,
    compressed_tensors_loaders,
    fused_name,
    is_decoder_linear,
    refused_patterns,
    vllm_name,
)
from .quantization import Declared

FLOAT = "FLOAT"

# vLLM-Ascend's types of dense Linears, as msModelSlim names them.
_ASCEND_TYPES = {
    "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP",
    "W4A4_MXFP4",
}  # fmt: skip
_FORM_OF_TYPE = {"W8A8_DYNAMIC": "ascend", "W8A8": "ascend_static"}


def check_groups(model: ModelSpec, linears: dict[str, StoredLinear]) -> Iterator[Finding]:
    """Parts of what runtimes fuse have one form, one group size and zero points all or none; towers stay float."""
    modules: dict[str, list[StoredLinear]] = {}
    for linear in linears.values():
        if (theirs := vllm_name(model, linear.name)) is not None:
            modules.setdefault(fused_name(theirs), []).append(linear)
        if linear.quantized and model.part_of(linear.name).prefix and not is_decoder_linear(model, linear.name):
            yield found("tower_quantized", linear.name, f"is stored as {linear.form}")
    for parts in modules.values():
        forms = {part.name: _form(part) for part in parts}
        if len(set(forms.values())) > 1:
            told = ", ".join(f"{name.rpartition('.')[2]} {form}" for name, form in sorted(forms.items()))
            yield found("fused_split", ", ".join(sorted(forms)), told)


def _form(linear: StoredLinear) -> str:
    if linear.form not in ("gemm", "packed") or not linear.sound or linear.shape is None:
        return linear.form
    zeros = " with zero points" if linear.form == "gemm" or "weight_zero_point" in linear.tensors else ""
    return f"{linear.form} in groups of {linear.shape[1] // linear.groups}{zeros}"


def check_lists(
    model: ModelSpec,
    linears: dict[str, StoredLinear],
    declared: Declared,
    config: dict[str, Any],
    all_linears: Sequence[str],
) -> Iterator[Finding]:
    """What each loader of awq, bitsandbytes or compressed-tensors takes for quantized, against what is stored."""
    stored = {name for name, linear in linears.items() if linear.quantized}
    if declared.format == "awq":
        loaders = awq_loaders(model, declared.entries, stored)
        suspicious = list(declared.entries or ())
    elif declared.format == "bitsandbytes":
        loaders = bitsandbytes_loaders(model, declared.entries or ())
        suspicious = list(declared.entries or ())
    else:
        targets = [target for group in declared.groups for target in group.targets]
        loaders = compressed_tensors_loaders(model, declared.entries or (), targets or ["Linear"])
        suspicious = [e for e in (*(declared.entries or ()), *targets) if e.startswith("re:")]
    for entry in refused_patterns(suspicious):
        yield found("pattern_refused", "config.json: quantization_config", repr(entry))
    names = [name for name in all_linears if len(name) <= MAX_NAME]
    for answer in answers(_asked(loaders, config), names):
        yield from _differences(answer, stored)
    if len(declared.groups) > 1:
        yield from _check_targets(model, linears, declared, config, names)


def _asked(loaders: Iterable[Loader], config: dict[str, Any]) -> list[Loader]:
    """Those whose part of config.json says anything."""
    return [loader for loader in loaders if not loader.config_path or KEY in config_block(config, loader.config_path)]


def _check_targets(
    model: ModelSpec, linears: dict[str, StoredLinear], declared: Declared, config: dict[str, Any], names: list[str]
) -> Iterator[Finding]:
    """Every quantized Linear is among the targets of a group of its own bits, to each loader."""
    for bits in sorted({group.bits for group in declared.groups if group.bits is not None}):
        stored = {n for n, linear in linears.items() if linear.form == ("packed" if bits == 4 else "int8")}
        targets = [target for group in declared.groups if group.bits == bits for target in group.targets]
        for answer in answers(_asked(compressed_tensors_loaders(model, (), targets), config), names):
            if strays := (stored & answer.known) - answer.taken:
                told = f"{answer.loader}: {len(strays)} Linears of {bits} bits are no targets of a group of {bits} bits"
                yield found("loader_expects_other_bits", some(strays), told)


def _differences(answer: Answer, stored: set[str]) -> Iterator[Finding]:
    wanted, surplus = answer.taken - stored, (stored & answer.known) - answer.taken
    if answer.loader == "AutoAWQ":
        quantized = {_inner(name) for name in stored}
        unsayable = {name for name in wanted if _inner(name) in quantized}
        wanted -= unsayable
        if unsayable:
            yield found("autoawq_cannot_say", some(unsayable), "is float in this layer and quantized in others")
    if wanted:
        told = f"{answer.loader}: {len(wanted)} float Linears are not excepted"
        yield found("loader_expects_quantized", some(wanted), told)
    if surplus:
        told = f"{answer.loader}: {len(surplus)} quantized Linears are excepted"
        yield found("loader_expects_float", some(surplus), told)
    for module, parts in answer.split:
        if not set(parts) & (wanted | surplus):
            told = f"{answer.loader}: some parts of {module} are excepted, not all"
            yield found("fused_split", ", ".join(parts), told)


def _inner(name: str) -> str:
    return name.rpartition(".layers.")[2].partition(".")[2]


def check_description(
    model: ModelSpec,
    linears: dict[str, StoredLinear],
    description: dict[str, Any],
    tensors: Sequence[str],
    optional: Collection[str],
    all_linears: Sequence[str],
) -> Iterator[Finding]:
    """quant_model_description.json: an entry for every tensor, of the stored type; one type per fused module.

    optional: tensors that need not be there; a tied lm_head has an entry all the same.
    """
    entries = {name: value for name, value in description.items() if isinstance(value, str)}
    asked = ascend_modules(model, all_linears)
    missing = {f"{part}.weight" for parts in asked.values() for part in parts} - entries.keys()
    for name in sorted(missing):
        yield found("description_missing_entry", name, "has no entry in quant_model_description.json")
    if others := {name for name in tensors if name not in entries and name not in missing}:
        yield found("description_incomplete", some(others), f"{len(others)} tensors have no entry")
    is_there = set(tensors)
    of_tensors = {name for name in entries if name.endswith((".weight", ".bias", "_scale", "_offset"))}
    stale = of_tensors - is_there - set(optional)
    if stale:
        yield found("description_stale", some(stale), f"{len(stale)} entries for tensors that are not there")
    for name in sorted(entries.keys() & is_there):
        if linear_of(name)[0] not in linears and entries[name] != FLOAT:
            yield found("description_wrong_type", name, f"is described as {entries[name]}, stored is a float tensor")
    for name in all_linears:
        if f"{name}.weight" in entries:
            yield from _check_type(name, entries[f"{name}.weight"], linears.get(name))
    for module, parts in asked.items():
        types = {entries[f"{part}.weight"] for part in parts if f"{part}.weight" in entries}
        if len(types) > 1:
            yield found("fused_split", ", ".join(parts), f"{module} is described as {' and '.join(sorted(types))}")


def _check_type(name: str, said: str, linear: StoredLinear | None) -> Iterator[Finding]:
    where = f"{name}.weight"
    if said != FLOAT and said not in _ASCEND_TYPES:
        yield found("description_unsupported", where, f"is described as {said!r}")
        return
    if linear is None:
        return
    stored = linear.form
    if (said == FLOAT) != (stored == "float") or _FORM_OF_TYPE.get(said, stored) != stored:
        yield found("description_wrong_type", where, f"is described as {said}, stored is {stored}")
