"""What pydantic finds wrong with a recipe, in words: `file:line: key: what is wrong; what is allowed`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import nearest
from .yaml_lines import Location, node_at

_MAX_FAULTS = 10

# What pydantic puts into a location beside keys and tags.
_NOISE = re.compile(r"^(constrained-|dict\[|\[key\]$|literal\[|function-|float$|int$|tuple\[)")


@dataclass(frozen=True)
class FaultsInWords:
    """model: what was validated. tags: of its unions, which pydantic inserts after a list index. root: the document."""

    model: type[BaseModel]
    tags: frozenset[str]
    root: yaml.Node
    path: Path

    def all(self, error: ValidationError) -> list[str]:
        """The first ten, one line a key: the branches of a union are joined, a container's own echo is dropped."""
        by_key: dict[Location, list[str]] = {}
        for fault in error.errors():
            by_key.setdefault(self._user_location(tuple(fault["loc"])), []).append(self._explain(fault))
        inner = [key for key in by_key if not any(other != key and other[: len(key)] == key for other in by_key)]
        lines = (by_key[key] for key in inner)
        joined = ["; or ".join([first, *(other.split(": ", 1)[1] for other in rest)]) for first, *rest in lines]
        return joined[:_MAX_FAULTS]

    def _explain(self, fault: Any) -> str:
        location: Location = tuple(fault["loc"])
        shown = self._user_location(location)
        where = f"{self.path}:{node_at(self.root, shown).start_mark.line + 1}"
        kind, context = fault["type"], fault.get("ctx", {})
        if kind == "extra_forbidden":
            allowed = sorted(self._block_at(location[:-1]).model_fields)
            guess = nearest(str(location[-1]), allowed)
            return f"{where}: {_dotted(shown)}: unknown key. Allowed here: {', '.join(allowed)}.{guess}"
        if kind == "missing":
            return f"{where}: {_dotted(shown)}: this key is missing"
        if kind == "literal_error":
            return f"{where}: {_dotted(shown)} is {fault['input']!r}; allowed: {context['expected']}"
        if kind == "union_tag_invalid":
            what = "saver" if "save" in location else "processor"
            guess = nearest(str(context["tag"]), re.findall(r"'([^']+)'", context["expected_tags"]))
            return f"{where}: {what} {context['tag']!r} is not supported; supported: {context['expected_tags']}.{guess}"
        if kind == "union_tag_not_found":
            return f"{where}: {_dotted(shown)}: the key `type` is missing"
        return f"{where}: {_dotted(shown)} is {str(fault['input'])[:80]!r}: {fault['msg']}"

    def _user_location(self, location: Location) -> Location:
        """The keys alone."""
        return tuple(s for s in location if not (isinstance(s, str) and (s in self.tags or _NOISE.match(s))))

    def _block_at(self, location: Location) -> type[BaseModel]:
        """The model that governs a location of a pydantic error."""
        candidates = [self.model]
        for step in location:
            tagged = [
                c
                for c in candidates
                if c.model_fields.get("type") and step in get_args(c.model_fields["type"].annotation)
            ]
            if tagged:
                candidates = tagged
            elif isinstance(step, str) and step in candidates[0].model_fields:
                candidates = _blocks_in(candidates[0].model_fields[step].annotation) or candidates
        return candidates[0]


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    """All models named in an annotation, through Annotated, unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        return [block for part in get_args(annotation) for block in _blocks_in(part)]
    return []


def _dotted(location: Location) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".") or "recipe"
