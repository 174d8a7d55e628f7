"""Messages for pydantic's validation errors: `file:line: key: what is wrong; what is allowed`."""

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

# Steps that pydantic inserts into a location in addition to keys and union tags.
_INSERTED_STEP = re.compile(r"^(constrained-|dict\[|\[key\]$|literal\[|function-|float$|int$|tuple\[)")


@dataclass(frozen=True)
class FaultFormatter:
    """Turns the errors of one validation into messages.

    model: the validated class. tags: tags of its unions, which pydantic inserts after a list index. root: the document.
    """

    model: type[BaseModel]
    tags: frozenset[str]
    root: yaml.Node
    path: Path

    def describe(self, error: ValidationError) -> list[str]:
        """Return the first ten faults, one line per key.

        Faults of the branches of a union are joined. Faults of a container are dropped if one of its keys has a fault.
        """
        by_key: dict[Location, list[str]] = {}
        for fault in error.errors():
            by_key.setdefault(self._user_location(tuple(fault["loc"])), []).append(self._describe_fault(fault))
        inner = [key for key in by_key if not any(other != key and other[: len(key)] == key for other in by_key)]
        messages = (by_key[key] for key in inner)
        joined = ["; or ".join([first, *(other.split(": ", 1)[1] for other in rest)]) for first, *rest in messages]
        return joined[:_MAX_FAULTS]

    def _describe_fault(self, fault: Any) -> str:
        location: Location = tuple(fault["loc"])
        keys = self._user_location(location)
        where = f"{self.path}:{node_at(self.root, keys).start_mark.line + 1}"
        kind, context = fault["type"], fault.get("ctx", {})
        if kind == "extra_forbidden":
            fields = self._block_at(location[:-1]).model_fields
            allowed = sorted(field.alias or name for name, field in fields.items())
            guess = nearest(str(location[-1]), allowed)
            return f"{where}: {_dotted(keys)}: unknown key. Allowed here: {', '.join(allowed)}.{guess}"
        if kind == "missing":
            return f"{where}: {_dotted(keys)}: this key is missing"
        if kind == "literal_error":
            return f"{where}: {_dotted(keys)} is {fault['input']!r}; allowed: {context['expected']}"
        if kind == "union_tag_invalid":
            noun = "saver" if "save" in location else "processor"
            guess = nearest(str(context["tag"]), re.findall(r"'([^']+)'", context["expected_tags"]))
            return f"{where}: {noun} {context['tag']!r} is not supported; supported: {context['expected_tags']}.{guess}"
        if kind == "union_tag_not_found":
            return f"{where}: {_dotted(keys)}: the key `type` is missing"
        return f"{where}: {_dotted(keys)} is {str(fault['input'])[:80]!r}: {_reason(fault)}"

    def _user_location(self, location: Location) -> Location:
        """Return the location without the steps that pydantic inserted: the keys as written in the file."""
        return tuple(s for s in location if not (isinstance(s, str) and (s in self.tags or _INSERTED_STEP.match(s))))

    def _block_at(self, location: Location) -> type[BaseModel]:
        """Return the model class at a location of a pydantic error."""
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


def _reason(fault: Any) -> str:
    """Return pydantic's message in YAML terms (list, not tuple), and a validator's message without prefix."""
    if fault["type"] == "tuple_type":
        example = f", e.g. [{fault['input'][:80]!r}]" if isinstance(fault["input"], str) else ""
        return f"must be a list{example}"
    if fault["type"] == "too_short":
        return f"must have at least {fault['ctx']['min_length']} item"
    return str(fault["msg"]).removeprefix("Value error, ")


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    """Return all model classes in an annotation, including those inside Annotated, unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        return [block for part in get_args(annotation) for block in _blocks_in(part)]
    return []


def _dotted(location: Location) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".") or "recipe"
