"""The module names of each loader, and the rule by which compressed-tensors and vLLM ignore modules."""

from __future__ import annotations

import re
from collections.abc import Callable


def to_disk(name: str) -> str:
    """Return the name on disk of a module of transformers 5."""
    for part in ("language_model", "visual", "audio_tower"):
        on_disk = "thinker.model" if part == "language_model" else f"thinker.{part}"
        name = name.replace(f"thinker.model.{part}", on_disk)
    return name


def full_class(disk: str) -> list[str]:
    return [disk]


def thinker_class(disk: str) -> list[str]:
    return [disk.removeprefix("thinker.")] if disk.startswith("thinker.") else []


def full_class_5(disk: str) -> list[str]:
    nested = re.sub(r"^thinker\.(visual|audio_tower)\.", r"thinker.model.\1.", disk)
    return [re.sub(r"^thinker\.model\.(layers)\.", r"thinker.model.language_model.\1.", nested)]


def thinker_class_5(disk: str) -> list[str]:
    return [name.removeprefix("thinker.") for name in full_class_5(disk) if disk.startswith("thinker.")]


def vllm(disk: str) -> list[str]:
    """Return vLLM's name. vLLM does not load talker and token2wav, and never quantizes the audio tower."""
    if not disk.startswith("thinker.") or disk.startswith("thinker.audio_tower."):
        return []
    for prefix, vllm_prefix in (
        ("thinker.lm_head", "language_model.lm_head"),
        ("thinker.model.", "language_model.model."),
    ):
        if disk.startswith(prefix):
            return [vllm_prefix + disk.removeprefix(prefix)]
    return [disk.removeprefix("thinker.")]


def is_ignored(name: str, ignore: list[str]) -> bool:
    """Whether compressed-tensors and vLLM ignore the name: `re:` matches from its start, other entries exactly."""
    return any(re.match(i[3:], name) if i.startswith("re:") else i == name for i in ignore)


Rename = Callable[[str], list[str]]
LOADERS: list[Rename] = [full_class, thinker_class, full_class_5, thinker_class_5, vllm]
