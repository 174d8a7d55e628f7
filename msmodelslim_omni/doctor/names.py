"""What each loader would make of every Linear: its renaming of modules and its rule of what stays float.

A loader is a name, a renaming (name on disk -> names of its modules) and a rule. Written from the sources of:

- transformers 4.57: quantizers/quantizers_utils.py, and integrations/awq.py (a substring of the name);
- transformers 5: quantizers_utils.py, should_convert_module (from the name's start up to a dot, or the name's end;
  up to 5.17 without the dot, and with the module tree of 4.57);
- AutoAWQ 0.2.9: models/base.py (Linears of decoder layers only, a substring of the name within the layer);
- compressed-tensors: utils/match.py (`re:` from the name's start, else the exact name, or the class);
- vLLM: the model's hf_to_vllm_mapper, quantization/utils/quant_utils.py (is_layer_skipped),
  compressed_tensors/utils.py (should_ignore_layer); fused modules ask for their parts.

What the modules are called is the model type's own: see models/spec.py, LoaderNames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from ..models import ModelSpec, Renaming, renamed

Rename = Callable[[str], str | None]
Skips = Callable[[str], bool]

# A list of patterns is untrusted: matching is given up after this time, and a pattern that may backtrack without end
# is not tried. Few repetitions in it and names of this length keep a single match fast.
_MATCHING_SECONDS = 30.0
_MAX_REPETITIONS = 4
_MAX_PATTERN = 500
MAX_NAME = 200

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_VISUAL = {"qkv": ("q", "k", "v")}


# --- renamings -----------------------------------------------------------------------------------------------


def to_modules(renaming: Renaming) -> Rename:
    return lambda name: renamed(name, renaming)


def mapped_by_vllm(model: ModelSpec, entry: str) -> str:
    """An entry of a list as vLLM's mapper leaves it: what is not loaded there matches nothing in any case."""
    return renamed(entry, model.loaders.vllm) or entry


def vllm_name(model: ModelSpec, name: str) -> str | None:
    return renamed(name, model.loaders.vllm)


def fused_name(name: str) -> str:
    """The vLLM module that a vLLM Linear is a part of, or itself."""
    name = re.sub(r"\b[qkv]_proj$", "qkv_proj", re.sub(r"\b(gate|up)_proj$", "gate_up_proj", name))
    return re.sub(r"^(visual\..*\.attn)\.[qkv]$", r"\1.qkv", name)


# --- rules ---------------------------------------------------------------------------------------------------


def refused_patterns(entries: Iterable[str]) -> list[str]:
    """Entries that are not tried as regular expressions, since one could take for ever, or that are none."""
    refused = []
    for entry in entries:
        pattern = entry.removeprefix("re:")
        repetitions = sum(pattern.count(c) for c in "*+{?") - pattern.count("(?")
        if len(pattern) > _MAX_PATTERN or repetitions > _MAX_REPETITIONS or _repeats_repetitions(pattern):
            refused.append(entry)
            continue
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            refused.append(entry)
    return refused


def _repeats_repetitions(pattern: str) -> bool:
    """Whether a repeated group holds a repetition or a choice, as in (a+)+ or (a|a)*: such can match in 2^n ways."""
    groups: list[bool] = []  # of each open group, whether it holds one
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
    """Raises TimeoutError once matching has taken too long."""

    def __init__(self) -> None:
        self._end = monotonic() + _MATCHING_SECONDS

    def check(self) -> None:
        if monotonic() > self._end:
            raise TimeoutError(f"matching names takes more than {_MATCHING_SECONDS:g} s; is the list hostile?")

    def matches(self, patterns: Iterable[re.Pattern[str]], name: str) -> bool:
        """Whether any pattern fits from the start of the name."""
        for pattern in patterns:
            self.check()
            if pattern.match(name):
                return True
        return False


def substring_rule(entries: Sequence[str]) -> Skips:
    return lambda name: any(entry in name for entry in entries)


def path_part_rule(entries: Sequence[str]) -> Skips:
    """transformers 4 for bitsandbytes: the module's own name, its whole path, or a part of it that ends at a dot."""
    exact, parts = set(entries), [f"{entry}." for entry in entries]
    return lambda name: name.rpartition(".")[2] in exact or name in exact or any(part in name for part in parts)


def prefix_or_end_rule(entries: Sequence[str], whole_words: bool, deadline: Deadline) -> Skips:
    """transformers 5; `whole_words`: since 5.18 the match must end at a dot."""
    boundary = r"(?:(?<=\.)|(?=\.|$))" if whole_words else ""
    patterns = [re.compile(f"(?:{entry}){boundary}") for entry in entries]
    ends = tuple(entries)
    return lambda name: name.endswith(ends) or deadline.matches(patterns, name)


def listed_rule(entries: Sequence[str], deadline: Deadline) -> Skips:
    """compressed-tensors: `re:` from the name's start, the exact name, or the class, which is Linear here."""
    patterns = [re.compile(entry[3:]) for entry in entries if entry.startswith("re:")]
    exact = {entry for entry in entries if not entry.startswith("re:")}
    everything = "Linear" in exact
    return lambda name: everything or name in exact or deadline.matches(patterns, name)


# --- loaders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """name: as a finding tells it. config_path: the block of config.json whose quantization_config it reads."""

    name: str
    rename: Rename
    skips: Skips
    config_path: tuple[str, ...] = ()
    fuses: bool = False


@dataclass(frozen=True)
class Answer:
    """What one loader takes for quantized among the Linears it knows; split: fused modules it finds half listed."""

    loader: str
    known: frozenset[str]
    taken: frozenset[str]
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()


def awq_loaders(model: ModelSpec, entries: Sequence[str] | None, stored: Collection[str]) -> list[Loader]:
    """Loaders of an awq checkpoint. entries: modules_to_not_convert; without it vLLM takes what the files hold.

    transformers 5 is left out where an entry is not safe to try as a pattern.
    """
    listed, deadline = list(entries or ()), Deadline()
    in_files = {vllm_name(model, name) for name in stored}
    words = substring_rule(listed)
    in_vllm = substring_rule([mapped_by_vllm(model, entry) for entry in listed])
    loaders = [
        Loader("AutoAWQ", _within_layer(model), words),
        *_library_loaders(model, "4.57", words),
        Loader("vLLM", _vllm_linear(model), in_vllm if listed else lambda name: name not in in_files, fuses=True),
    ]
    if not refused_patterns(listed):
        tf5, early_5 = prefix_or_end_rule(listed, True, deadline), prefix_or_end_rule(listed, False, deadline)
        full = model.loaders.classes[0]
        loaders += _library_loaders(model, "5.x", tf5)
        loaders.append(Loader(f"transformers 5.0 to 5.17, {full.name}", to_modules(full.modules), early_5))
    return loaders


def bitsandbytes_loaders(model: ModelSpec, entries: Sequence[str]) -> list[Loader]:
    """Loaders of a bitsandbytes checkpoint. entries: llm_int8_skip_modules. vLLM has no method for it."""
    loaders = _library_loaders(model, "4.57", path_part_rule(entries))
    if not refused_patterns(entries):
        loaders += _library_loaders(model, "5.x", prefix_or_end_rule(entries, True, Deadline()))
    return loaders


def compressed_tensors_loaders(model: ModelSpec, ignore: Sequence[str], targets: Sequence[str]) -> list[Loader]:
    """Loaders of a compressed-tensors checkpoint: not ignored, and among the targets. None if a pattern is unsafe."""
    if refused_patterns(entry for entry in [*ignore, *targets] if entry.startswith("re:")):
        return []
    deadline = Deadline()

    def rule(mapped: Callable[[str], str]) -> Skips:
        ignored = listed_rule([mapped(entry) for entry in ignore], deadline)
        targeted = listed_rule([mapped(entry) for entry in targets], deadline)
        return lambda name: ignored(name) or not targeted(name)

    def in_vllm(entry: str) -> str:
        return entry if entry.startswith("re:") or "." not in entry else mapped_by_vllm(model, entry)

    plain = rule(lambda entry: entry)
    return [
        *_library_loaders(model, "4.57", plain),
        *_library_loaders(model, "5.x", plain),
        Loader("vLLM", _vllm_linear(model), rule(in_vllm), fuses=True),
    ]


def _library_loaders(model: ModelSpec, version: str, skips: Skips) -> list[Loader]:
    """A loader for each class of transformers 4.57 or 5.x."""
    return [
        Loader(
            f"transformers {version}, {loaded.name}",
            to_modules(loaded.modules if version == "4.57" else loaded.modules_5),
            skips,
            loaded.config_path,
        )
        for loaded in model.loaders.classes
    ]


def _within_layer(model: ModelSpec) -> Rename:
    def rename(name: str) -> str | None:
        return name.removeprefix(model.layers_prefix).partition(".")[2] if is_decoder_linear(model, name) else None

    return rename


def is_decoder_linear(model: ModelSpec, name: str) -> bool:
    return name.startswith(model.layers_prefix)


def _vllm_linear(model: ModelSpec) -> Rename:
    """vLLM's lm_head is of a class of its own, quantized only where it is asked for by name."""
    return lambda name: None if f"{name}.weight" == model.head else vllm_name(model, name)


def answers(loaders: Iterable[Loader], linears: Iterable[str]) -> Iterator[Answer]:
    """What each loader takes for quantized, over the names on disk of all Linears."""
    linears, deadline = sorted(linears), Deadline()
    for loader in loaders:
        known, skipped = {}, {}
        for name in linears:
            if (theirs := loader.rename(name)) is not None:
                known[name] = theirs
                skipped[name] = loader.skips(_asked_for(theirs) if loader.fuses else theirs)
            deadline.check()
        yield Answer(
            loader.name,
            frozenset(known),
            frozenset(name for name in known if not skipped[name]),
            tuple(_split(known, skipped)) if loader.fuses else (),
        )


def _asked_for(name: str) -> str:
    """vLLM knows the parts of the fused modules of its table; the visual qkv is asked for by its fused name."""
    fused = fused_name(name)
    return fused if fused.rpartition(".")[2] in FUSED_VISUAL else name


def _split(known: dict[str, str], skipped: dict[str, bool]) -> Iterator[tuple[str, tuple[str, ...]]]:
    modules: dict[str, list[str]] = {}
    for name, theirs in known.items():
        modules.setdefault(fused_name(theirs), []).append(name)
    for module, parts in modules.items():
        if len({skipped[part] for part in parts}) > 1:
            yield module, tuple(parts)


# --- vLLM-Ascend ---------------------------------------------------------------------------------------------


def ascend_modules(model: ModelSpec, linears: Iterable[str]) -> dict[str, list[str]]:
    """Modules that vLLM-Ascend looks up in the description, each with the names on disk of its parts."""
    modules: dict[str, list[str]] = {}
    for name in sorted(linears):
        if (theirs := vllm_name(model, name)) is not None:
            modules.setdefault(fused_name(theirs), []).append(name)
    return modules
