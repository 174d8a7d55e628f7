"""Checks that each loader converts exactly the Linears that are stored quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from ..models import ModelSpec
from ..storage import config_block, load_tensor
from .findings import Finding, make_finding, shorten_list
from .linears import StoredLinear, split_tensor_name
from .method import KEY
from .method_compressed_tensors import COMPRESSED_TENSORS
from .methods import METHODS
from .names import (
    MAX_NAME,
    Loader,
    LoaderView,
    ascend_modules,
    compressed_tensors_loaders,
    fused_name,
    is_decoder_linear,
    loader_views,
    refused_patterns,
    vllm_name,
)
from .quantization import Declared

FLOAT = "FLOAT"

# Types of dense Linears that vLLM-Ascend supports, by msModelSlim's names.
_ASCEND_TYPES = {
    "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP",
    "W4A4_MXFP4",
}  # fmt: skip
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")
_EXPERT_TYPES = {"W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8_MIX", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4"}  # of experts
_FORM_OF_TYPE = {
    "W8A8_DYNAMIC": "ascend", "W8A16": "ascend", "W8A8": "ascend_static", "W4A8_DYNAMIC": "ascend_int4",
}  # fmt: skip


def check_groups(model: ModelSpec, linears: dict[str, StoredLinear]) -> Iterator[Finding]:
    """Check that all parts of a fused module have one form and group size, and that towers are float."""
    modules: dict[str, list[StoredLinear]] = {}
    for linear in linears.values():
        if (vllm_linear := vllm_name(model, linear.name)) is not None:
            modules.setdefault(fused_name(vllm_linear), []).append(linear)
        if linear.quantized and model.part_of(linear.name).prefix and not is_decoder_linear(model, linear.name):
            yield make_finding("tower_quantized", linear.name, f"is stored as {linear.form}")
    for parts in modules.values():
        forms = {part.name: _describe_form(part) for part in parts}
        if len(set(forms.values())) > 1:
            what = ", ".join(f"{name.rpartition('.')[2]} is {form}" for name, form in sorted(forms.items()))
            yield make_finding("fused_split", ", ".join(sorted(forms)), what)
        for suffix in _GLOBAL_SCALES:
            yield from _check_equal(parts, suffix)


def _check_equal(parts: list[StoredLinear], suffix: str) -> Iterator[Finding]:
    """Check that the parts of a fused module have the same global scale. NaN is another finding."""
    values = {
        part.name: float(load_tensor(part.tensors[suffix]))
        for part in parts
        if part.sound and suffix in part.tensors and part.tensors[suffix].numel == 1
    }
    if len({value for value in values.values() if value == value}) > 1:
        what = ", ".join(f"{name.rpartition('.')[2]} has {value:g}" for name, value in sorted(values.items()))
        yield make_finding("fused_scales_differ", f"{', '.join(sorted(values))}: {suffix}", what)


def _describe_form(linear: StoredLinear) -> str:
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
    """Compare the Linears that each loader of awq, bitsandbytes or compressed-tensors converts with the stored ones."""
    stored = {name for name, linear in linears.items() if linear.quantized}
    method = METHODS.get(declared.format, COMPRESSED_TENSORS)
    loaders = method.loaders(model, declared, stored)
    for entry in refused_patterns(method.patterns(declared)):
        yield make_finding("pattern_refused", "config.json: quantization_config", repr(entry))
    names = [name for name in all_linears if len(name) <= MAX_NAME]
    for view in loader_views(_active_loaders(loaders, config), names):
        yield from _compare_view(view, stored)
    if len(declared.groups) > 1:
        yield from _check_targets(model, linears, declared, config, names)


def _active_loaders(loaders: Iterable[Loader], config: dict[str, Any]) -> list[Loader]:
    """Return the loaders that find a quantization_config in their block of config.json, or read the top level."""
    return [loader for loader in loaders if not loader.config_path or KEY in config_block(config, loader.config_path)]


def _check_targets(
    model: ModelSpec, linears: dict[str, StoredLinear], declared: Declared, config: dict[str, Any], names: list[str]
) -> Iterator[Finding]:
    """Check that each loader assigns every quantized Linear to a group with the form of the Linear."""
    for bits, form in sorted({(g.bits, g.form) for g in declared.groups if g.bits is not None and g.form is not None}):
        stored = {n for n, linear in linears.items() if linear.form == form}
        targets = [target for group in declared.groups if group.form == form for target in group.targets]
        loaders = _active_loaders(compressed_tensors_loaders(model, (), targets), config)
        for view in loader_views(loaders, names):
            if untargeted := (stored & view.known) - view.converted:
                what = f"{view.loader}: {len(untargeted)} Linears with {bits} bits are not in a group with {bits} bits"
                yield make_finding("loader_expects_other_bits", shorten_list(untargeted), what)


def _compare_view(view: LoaderView, stored: set[str]) -> Iterator[Finding]:
    converted_floats, skipped_quantized = view.converted - stored, (stored & view.known) - view.converted
    if view.loader == "AutoAWQ":
        quantized = {_name_in_layer(name) for name in stored}
        inexpressible = {name for name in converted_floats if _name_in_layer(name) in quantized}
        converted_floats -= inexpressible
        if inexpressible:
            yield make_finding(
                "autoawq_cannot_say", shorten_list(inexpressible), "is float in this layer but quantized in others"
            )
    if converted_floats:
        what = f"{view.loader}: {len(converted_floats)} float Linears are not excluded"
        yield make_finding("loader_expects_quantized", shorten_list(converted_floats), what)
    if skipped_quantized:
        what = f"{view.loader}: {len(skipped_quantized)} quantized Linears are excluded"
        yield make_finding("loader_expects_float", shorten_list(skipped_quantized), what)
    for module, parts in view.split:
        if not set(parts) & (converted_floats | skipped_quantized):
            what = f"{view.loader}: some but not all parts of {module} are excluded"
            yield make_finding("fused_split", ", ".join(parts), what)


def _name_in_layer(name: str) -> str:
    return name.rpartition(".layers.")[2].partition(".")[2]


def check_description(
    model: ModelSpec,
    linears: dict[str, StoredLinear],
    description: dict[str, Any],
    tensors: Sequence[str],
    optional: Collection[str],
    all_linears: Sequence[str],
) -> Iterator[Finding]:
    """Check quant_model_description.json: an entry of the stored type for every tensor, one type per fused module.

    optional: tensors that may be missing; a tied lm_head still has an entry.
    """
    entries = {name: value for name, value in description.items() if isinstance(value, str)}
    modules = ascend_modules(model, all_linears)
    missing = {f"{part}.weight" for parts in modules.values() for part in parts} - entries.keys()
    for name in sorted(missing):
        yield make_finding("description_missing_entry", name, "has no entry in quant_model_description.json")
    if undescribed := {name for name in tensors if name not in entries and name not in missing}:
        yield make_finding(
            "description_incomplete", shorten_list(undescribed), f"{len(undescribed)} tensors have no entry"
        )
    stored = set(tensors)
    tensor_entries = {name for name in entries if name.endswith((".weight", ".bias", "_scale", "_offset"))}
    stale = tensor_entries - stored - set(optional)
    if stale:
        yield make_finding(
            "description_stale", shorten_list(stale), f"{len(stale)} entries are for tensors that do not exist"
        )
    for name in sorted(entries.keys() & stored):
        if split_tensor_name(name)[0] not in linears and entries[name] != FLOAT:
            yield make_finding(
                "description_wrong_type", name, f"is described as {entries[name]}, but the tensor is float"
            )
    for name in all_linears:
        if f"{name}.weight" in entries:
            yield from _check_type(name, entries[f"{name}.weight"], linears.get(name))
    for module, parts in modules.items():
        types = {entries[f"{part}.weight"] for part in parts if f"{part}.weight" in entries}
        if len(types) > 1:
            yield make_finding(
                "fused_split", ", ".join(parts), f"{module} is described as {' and '.join(sorted(types))}"
            )


def _check_type(name: str, described: str, linear: StoredLinear | None) -> Iterator[Finding]:
    where = f"{name}.weight"
    known = _EXPERT_TYPES if ".experts." in name else _ASCEND_TYPES
    if described != FLOAT and described not in known:
        yield make_finding("description_unsupported", where, f"is described as {described!r}")
        return
    if linear is None:
        return
    form = linear.form
    if (described == FLOAT) != (form == "float") or _FORM_OF_TYPE.get(described, form) != form:
        yield make_finding("description_wrong_type", where, f"is described as {described} but stored as {form}")
