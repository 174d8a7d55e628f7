"""Values that the shell completes for options whose values are known. Nothing here imports torch.

Each function returns (value, help) pairs for what is typed so far. Paths are completed by the shell itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Pairs = list[tuple[str, str]]
Complete = Callable[[str], Pairs]

_DEVICES = (("auto", "npu, else cuda, else cpu"), ("cpu", ""), ("cuda", "or cuda:1"), ("npu", "or npu:1"))


def quant_types(incomplete: str) -> Pairs:
    """Types, variants and the names that other tools use, e.g. int4."""
    from ..recipe import quant_type_names

    return _that_begin(incomplete, quant_type_names().items())


def save_formats(incomplete: str) -> Pairs:
    """Formats; after a comma, the next one."""
    from ..recipe import SAVER_CONFIGS

    before, comma, word = incomplete.rpartition(",")
    found = _that_begin(word, ((name, _first_sentence(config)) for name, config in SAVER_CONFIGS.items()))
    return [(f"{before}{comma}{name}", text) for name, text in found]


def model_types(incomplete: str) -> Pairs:
    from ..recipe import shipped_recipes

    known = {name for recipe in shipped_recipes() for name in recipe.metadata.verified_model_types}
    return _that_begin(incomplete, ((name, "") for name in sorted(known)))


def recipe_names(incomplete: str) -> Pairs:
    from ..recipe import shipped_recipes, summary

    named = sorted((recipe.metadata.config_id, summary(recipe)) for recipe in shipped_recipes())
    return _that_begin(incomplete, named)


def datasets(incomplete: str) -> Pairs:
    from ..files import dataset_names, shipped_folder

    folders = dataset_names(shipped_folder("lab_calib"))
    return _that_begin(incomplete, ((name, "shipped samples") for name in folders))


def devices(incomplete: str) -> Pairs:
    return _that_begin(incomplete, _DEVICES)


def _that_begin(incomplete: str, pairs: Iterable[tuple[str, str]]) -> Pairs:
    return [(name, _short(text)) for name, text in pairs if name.startswith(incomplete)]


def _short(text: str) -> str:
    """`W4A16 for the thinker of Qwen2.5-Omni: AWQ ...` -> `W4A16`."""
    return text.split(" for ")[0].split(":")[0]


def _first_sentence(described: type) -> str:
    return (described.__doc__ or "").split("\n")[0].split(", ")[0].rstrip(".")
