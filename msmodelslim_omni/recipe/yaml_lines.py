"""YAML node trees that keep line numbers; duplicate keys and documents that are too large are refused.

A recipe is untrusted input: only the safe loader's plain types are built, and only after all nodes are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import QuantError

MAX_NODES = 20_000
# Exceptions of the YAML library for values like `!!int abc`, the date 2001-99-99 or a fraction in base 60.
_VALUE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_MAX_BITS = 1024  # hexadecimal integers have no length limit, and Python refuses to print a long integer

Location = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """The safe loader, which also records the nodes that define an anchor."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.anchored: set[int] = set()
        self._composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._composed += 1
        if self._composed > MAX_NODES:  # a node takes a kilobyte of memory
            raise yaml.YAMLError(f"more than {MAX_NODES} nodes")
        is_alias = self.check_event(yaml.AliasEvent)
        anchor = getattr(self.peek_event(), "anchor", None)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if anchor is not None and not is_alias:
            self.anchored.add(id(node))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except _VALUE_ERRORS as error:
            raise yaml.constructor.ConstructorError(None, None, f"bad value: {error}", node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise yaml.constructor.ConstructorError(None, None, "bad value: the number is too long", node.start_mark)
        return value


def compose(text: str, path: Path) -> tuple[yaml.Node, set[int]]:
    """Parse a document with a mapping as root. Returns its node tree and the ids of the nodes that define an anchor."""
    loader = _with_quant_errors(lambda: Loader(text), path)
    root = _with_quant_errors(loader.get_single_node, path)
    if not isinstance(root, yaml.MappingNode):
        raise QuantError(f"{path}: a recipe must be a mapping with apiversion, metadata and spec")
    return root, loader.anchored


def build(root: yaml.Node, path: Path) -> Any:
    """Build the plain Python values of a node tree."""
    return _with_quant_errors(lambda: Loader("").construct_document(root), path)


def _with_quant_errors(step: Callable[[], Any], path: Path) -> Any:
    """Run a step of the YAML library and turn its exceptions into a QuantError with file and line."""
    try:
        return step()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        hint = "fix the file at that line; quote a pattern that starts with *"
        raise QuantError(f"{path}{line}: not valid YAML: {problem}", hint) from error
    except RecursionError as error:
        raise QuantError(f"{path}: the YAML is nested too deeply", "a recipe needs only five levels") from error


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def check_duplicates_and_size(root: yaml.Node, path: Path) -> None:
    """Raise QuantError for a duplicate key and for an expanded tree that is too large.

    Aliases are followed and counted at each use, so that a YAML bomb is detected before it is built.
    """
    visited, pending = 0, [(root, 0)]
    while pending:
        node, depth = pending.pop()
        visited += 1
        if visited > MAX_NODES or depth > 50 or len(node.value) > MAX_NODES:
            raise QuantError(f"{path}: the expanded YAML is too large for a recipe", "remove nested aliases")
        pending += [(child, depth + 1) for child in _children(node)]
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<" and keys[key.value] > 1:
                    line = max(k.start_mark.line for k, _ in node.value if k.value == key.value) + 1
                    raise QuantError(f"{path}:{line}: key {key.value!r} appears twice", "remove one of them")


def drop_anchor_holders(data: Any, root: yaml.Node, anchored: set[int], known: Iterable[str]) -> Any:
    """Drop unknown top-level keys that define an anchor: such keys only hold blocks that other keys refer to."""

    def defines_anchor(node: yaml.Node, first: int, last: int) -> bool:
        inside = first <= node.start_mark.index <= last  # an aliased node keeps the mark of its definition
        return inside and (id(node) in anchored or any(defines_anchor(c, first, last) for c in _children(node)))

    holders = {
        key.value for key, value in root.value if defines_anchor(value, key.start_mark.index, value.end_mark.index)
    } - set(known)
    return {key: value for key, value in data.items() if key not in holders}


def node_at(root: yaml.Node, location: Location) -> yaml.Node:
    """Return the deepest node on the path to a location. Skips union tags, which pydantic inserts into the path."""
    node, deepest = root, root
    for step in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if getattr(key, "value", None) == str(step):
                    node, deepest = value, key
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = deepest = node.value[step]
    return deepest
