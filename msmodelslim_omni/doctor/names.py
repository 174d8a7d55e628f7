"""Emulation of the loaders: how each one renames Linears, and its rule that decides which Linears stay float.

A loader has a name, a renaming (name on disk -> name of its module) and a rule. The rules follow these sources:

- transformers 4.57: quantizers/quantizers_utils.py, and integrations/awq.py (a substring of the name);
- transformers 5: quantizers_utils.py, should_convert_module (a match from the start of the name up to a dot, or the end
  of the name; up to 5.17 without the dot, and with the module tree of 4.57);
- AutoAWQ 0.2.9: models/base.py (Linears of decoder layers only, a substring of the name within the layer);
- compressed-tensors: utils/match.py (`re:` from the start of the name, else the exact name, or the class);
- vLLM: the model's hf_to_vllm_mapper, quantization/utils/quant_utils.py (is_layer_skipped),
  compressed_tensors/utils.py (should_ignore_layer); fused modules look up their parts.

The module names of each model type are in models/spec.py, LoaderNames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from ..models import ModelSpec, Renaming, apply_renaming

Rename = Callable[[str], str | None]
Skips = Callable[[str], bool]

# Patterns come from untrusted files. Matching stops after this time, and patterns that may backtrack exponentially are
# not tried. The limits on repetitions and on the length of names keep a single match fast.
_MATCHING_SECONDS = 30.0
_MAX_REPETITIONS = 4
_MAX_PATTERN = 500
MAX_NAME = 200

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_VISUAL = {"qkv": ("q", "k", "v")}
_FUSED_OF_PART = {part: fused for fused, parts in FUSED.items() for part in parts}


# --- renamings -----------------------------------------------------------------------------------------------


def renamer(renaming: Renaming) -> Rename:
    return lambda name: apply_renaming(name, renaming)


def map_entry(entry: str, renaming: Renaming) -> str:
    """Rename a list entry as vLLM's mapper does. Entries of modules that it does not load match nothing anyway."""
    return apply_renaming(entry, renaming) or entry


def vllm_name(model: ModelSpec, name: str) -> str | None:
    return apply_renaming(name, model.loaders.vllm)


def fused_name(name: str) -> str:
    """Return the name of the fused vLLM module that contains the vLLM Linear, or `name` if it is not fused."""
    parent, dot, leaf = name.rpartition(".")
    fused = _FUSED_OF_PART.get(leaf, leaf)
    if leaf in FUSED_VISUAL["qkv"] and parent.startswith("visual.") and parent.endswith(".attn"):
        fused = "qkv"
    return parent + dot + fused


# --- rules ---------------------------------------------------------------------------------------------------


def refused_patterns(entries: Iterable[str]) -> list[str]:
    """Return the entries that are invalid as regular expressions, or could take forever to match."""
    refused = []
    for entry in entries:
        pattern = entry.removeprefix("re:")
        repetitions = sum(pattern.count(c) for c in "*+{?") - pattern.count("(?")
        if len(pattern) > _MAX_PATTERN or repetitions > _MAX_REPETITIONS or _has_nested_repetition(pattern):
            refused.append(entry)
            continue
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            refused.append(entry)
    return refused


def _has_nested_repetition(pattern: str) -> bool:
    """Whether a repeated group contains a repetition or a choice, as in (a+)+ or (a|a)*: it can match in 2^n ways."""
    groups: list[bool] = []  # for each open group, whether it contains a repetition or a choice
    escaped = False
    for character, following in zip(pattern, pattern[1:] + " ", strict=True):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "(":
            groups.append(False)
        elif character in "*+{|":
            groups = [True] * len(groups)
        elif character == ")" and groups and groups.pop() and following in "*+{":
            return True
    return False


class Deadline:
    """Raises TimeoutError when matching takes too long."""

    def __init__(self) -> None:
        self._end = monotonic() + _MATCHING_SECONDS

    def check(self) -> None:
        if monotonic() > self._end:
            raise TimeoutError(f"matching names takes more than {_MATCHING_SECONDS:g} s; the list may be malicious")

    def matches(self, patterns: Iterable[re.Pattern[str]], name: str) -> bool:
        """Whether any pattern matches from the start of the name."""
        for pattern in patterns:
            self.check()
            if pattern.match(name):
                return True
        return False


def substring_rule(entries: Sequence[str]) -> Skips:
    return lambda name: any(entry in name for entry in entries)


def path_part_rule(entries: Sequence[str]) -> Skips:
    """transformers 4, bitsandbytes: an entry is the module's last name, its full path, or a part of it before a dot."""
    exact, parts = set(entries), [f"{entry}." for entry in entries]
    return lambda name: name.rpartition(".")[2] in exact or name in exact or any(part in name for part in parts)


def prefix_or_end_rule(entries: Sequence[str], to_dot: bool, deadline: Deadline) -> Skips:
    """transformers 5. to_dot: whether a match must end at a dot, as since 5.18."""
    boundary = r"(?:(?<=\.)|(?=\.|$))" if to_dot else ""
    patterns = [re.compile(f"(?:{entry}){boundary}") for entry in entries]
    ends = tuple(entries)
    return lambda name: name.endswith(ends) or deadline.matches(patterns, name)


def exact_or_pattern_rule(entries: Sequence[str], deadline: Deadline) -> Skips:
    """compressed-tensors: `re:` from the start of the name, the exact name, or the class, which is Linear here."""
    patterns = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]
    exact = {entry for entry in entries if not entry.startswith("re:")}
    has_class = "Linear" in exact
    return lambda name: has_class or name in exact or deadline.matches(patterns, name)


# --- loaders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """A loader of a checkpoint.

    name: as findings show it. rename: name on disk -> name of the module, None if the loader does not load or quantize
    it. skips: whether a module stays float. config_path: the block of config.json whose quantization_config the loader
    reads. fuses: whether it fuses q, k, v and gate, up.
    """

    name: str
    rename: Rename
    skips: Skips
    config_path: tuple[str, ...] = ()
    fuses: bool = False


@dataclass(frozen=True)
class LoaderView:
    """The Linears as one loader sees them, by name on disk.

    known: Linears that the loader can quantize. converted: Linears for which it builds quantized modules. split: fused
    modules of which only some parts are converted, with their parts.
    """

    loader: str
    known: frozenset[str]
    converted: frozenset[str]
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()


def awq_loaders(model: ModelSpec, entries: Sequence[str] | None, stored: Collection[str]) -> list[Loader]:
    """Return the loaders of an awq checkpoint.

    entries: modules_to_not_convert; if it is empty, vLLM converts the Linears that the files store quantized.
    transformers 5 is omitted if an entry is not safe to try as a pattern.
    """
    listed, deadline = list(entries or ()), Deadline()
    by_substring = substring_rule(listed)

    def in_vllm(renaming: Renaming) -> Skips:
        if listed:
            return substring_rule([map_entry(entry, renaming) for entry in listed])
        converted = {apply_renaming(name, renaming) for name in stored}
        return lambda name: name not in converted

    loaders = [
        Loader("AutoAWQ", _rename_within_layer(model), by_substring),
        *_library_loaders(model, "4.57", by_substring),
        *_vllm_loaders(model, in_vllm),
    ]
    if not refused_patterns(listed):
        tf5, early_5 = prefix_or_end_rule(listed, True, deadline), prefix_or_end_rule(listed, False, deadline)
        full = model.loaders.classes[0]
        loaders += _library_loaders(model, "5.x", tf5)
        loaders.append(Loader(f"transformers 5.0 to 5.17, {full.name}", renamer(full.modules), early_5))
    return loaders


def bitsandbytes_loaders(model: ModelSpec, entries: Sequence[str]) -> list[Loader]:
    """Return the loaders of a bitsandbytes checkpoint, without vLLM. entries: llm_int8_skip_modules."""
    loaders = _library_loaders(model, "4.57", path_part_rule(entries))
    if not refused_patterns(entries):
        loaders += _library_loaders(model, "5.x", prefix_or_end_rule(entries, True, Deadline()))
    return loaders


def compressed_tensors_loaders(model: ModelSpec, ignore: Sequence[str], targets: Sequence[str]) -> list[Loader]:
    """Return the loaders of a compressed-tensors checkpoint, or no loaders if a pattern is not safe to try."""
    if refused_patterns(entry for entry in [*ignore, *targets] if entry.startswith("re:")):
        return []
    deadline = Deadline()

    def rule(mapped: Callable[[str], str]) -> Skips:
        ignored = exact_or_pattern_rule([mapped(entry) for entry in ignore], deadline)
        targeted = exact_or_pattern_rule([mapped(entry) for entry in targets], deadline)
        return lambda name: ignored(name) or not targeted(name)

    def in_vllm(renaming: Renaming) -> Skips:
        return rule(lambda e: e if e.startswith("re:") or "." not in e else map_entry(e, renaming))

    plain = rule(lambda entry: entry)
    return [
        *_library_loaders(model, "4.57", plain),
        *_library_loaders(model, "5.x", plain),
        *_vllm_loaders(model, in_vllm),
    ]


def _library_loaders(model: ModelSpec, version: str, skips: Skips) -> list[Loader]:
    """Return a loader for each class of transformers 4.57 or 5.x."""
    return [
        Loader(
            f"transformers {version}, {loaded.name}",
            renamer(loaded.modules if version == "4.57" else loaded.modules_5),
            skips,
            loaded.config_path,
        )
        for loaded in model.loaders.classes
    ]


def _rename_within_layer(model: ModelSpec) -> Rename:
    def rename(name: str) -> str | None:
        return name.removeprefix(model.layers_prefix).partition(".")[2] if is_decoder_linear(model, name) else None

    return rename


def is_decoder_linear(model: ModelSpec, name: str) -> bool:
    return name.startswith(model.layers_prefix)


def _vllm_loaders(model: ModelSpec, skips: Callable[[Renaming], Skips]) -> list[Loader]:
    """Return vLLM, and vLLM-Omni if its names are known. lm_head is left out: it is only quantized if named."""

    def without_head(renaming: Renaming) -> Rename:
        return lambda name: None if f"{name}.weight" == model.head else apply_renaming(name, renaming)

    names = {"vLLM": model.loaders.vllm, "vLLM-Omni": model.loaders.vllm_omni}
    return [
        Loader(name, without_head(renaming), skips(renaming), fuses=True)
        for name, renaming in names.items()
        if renaming
    ]


def loader_views(loaders: Iterable[Loader], linears: Iterable[str]) -> Iterator[LoaderView]:
    """Yield the view of each loader. linears: names on disk of all Linears."""
    linears, deadline = sorted(linears), Deadline()
    for loader in loaders:
        known, skipped = {}, {}
        for name in linears:
            if (module := loader.rename(name)) is not None:
                known[name] = module
                skipped[name] = loader.skips(_name_in_rule(module) if loader.fuses else module)
            deadline.check()
        yield LoaderView(
            loader.name,
            frozenset(known),
            frozenset(name for name in known if not skipped[name]),
            tuple(_split_modules(known, skipped)) if loader.fuses else (),
        )


def _name_in_rule(name: str) -> str:
    """Return the name that vLLM tests: the Linear's own, except for the visual qkv, which has only its fused name."""
    fused = fused_name(name)
    return fused if fused.rpartition(".")[2] in FUSED_VISUAL else name


def _split_modules(known: dict[str, str], skipped: dict[str, bool]) -> Iterator[tuple[str, tuple[str, ...]]]:
    modules: dict[str, list[str]] = {}
    for name, vllm_linear in known.items():
        modules.setdefault(fused_name(vllm_linear), []).append(name)
    for module, parts in modules.items():
        if len({skipped[part] for part in parts}) > 1:
            yield module, tuple(parts)


# --- vLLM-Ascend ---------------------------------------------------------------------------------------------


def ascend_modules(model: ModelSpec, linears: Iterable[str]) -> dict[str, list[str]]:
    """Return the modules that vLLM-Ascend looks up in the description, each with the names on disk of its parts."""
    modules: dict[str, list[str]] = {}
    for name in sorted(linears):
        if (vllm_linear := vllm_name(model, name)) is not None:
            modules.setdefault(fused_name(vllm_linear), []).append(name)
    return modules
