"""YAML with positions: node trees that know their lines, refused where they are ambiguous or unfold without bound.

A recipe is untrusted input: only the safe loader's plain types are built, and nothing is built before it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import QuantError

MAX_NODES = 20_000
# What the library raises over `!!int abc`, the date 2001-99-99, a fraction in base 60.
_UNBUILDABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_MAX_BITS = 1024  # hexadecimal ones come at any length, and Python refuses to show a long one

Location = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """The safe loader, remembering which nodes carry an anchor."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.anchored: set[int] = set()
        self._composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._composed += 1
        if self._composed > MAX_NODES:  # a node takes a kilobyte of memory
            raise yaml.YAMLError("more nodes than a recipe can hold")
        is_alias = self.check_event(yaml.AliasEvent)
        anchor = getattr(self.peek_event(), "anchor", None)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if anchor is not None and not is_alias:
            self.anchored.add(id(node))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except _UNBUILDABLE as error:
            raise yaml.constructor.ConstructorError(None, None, f"bad value: {error}", node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise yaml.constructor.ConstructorError(None, None, "bad value: a number too long", node.start_mark)
        return value


def compose(text: str, path: Path) -> tuple[yaml.Node, set[int]]:
    """The node tree of a mapping, and the ids of its nodes that carry an anchor."""
    loader = _told(lambda: Loader(text), path)
    root = _told(loader.get_single_node, path)
    if not isinstance(root, yaml.MappingNode):
        raise QuantError(f"{path}: a recipe is a mapping with apiversion, metadata and spec")
    return root, loader.anchored


def build(root: yaml.Node, path: Path) -> Any:
    """The plain values that the nodes stand for."""
    return _told(lambda: Loader("").construct_document(root), path)


def _told(work: Callable[[], Any], path: Path) -> Any:
    """Run a step of the YAML library; what it raises becomes a QuantError with file and line."""
    try:
        return work()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise QuantError(f"{path}{line}: not valid YAML: {problem}", "mend the file at that line") from error
    except RecursionError as error:
        raise QuantError(f"{path}: YAML nested too deeply", "a recipe needs five levels") from error


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def refuse_duplicates_and_bombs(root: yaml.Node, path: Path) -> None:
    """Walk the tree as it unfolds (aliases counted each time), so that a YAML bomb is met before it is built."""
    seen, pending = 0, [(root, 0)]
    while pending:
        node, depth = pending.pop()
        seen += 1
        if seen > MAX_NODES or depth > 50 or len(node.value) > MAX_NODES:
            raise QuantError(f"{path}: the YAML unfolds to more than a recipe can hold", "remove nested aliases")
        pending += [(child, depth + 1) for child in _children(node)]
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<" and keys[key.value] > 1:
                    line = max(k.start_mark.line for k, _ in node.value if k.value == key.value) + 1
                    raise QuantError(f"{path}:{line}: key {key.value!r} stands twice", "remove one of the two")


def without_anchor_holders(data: Any, root: yaml.Node, anchored: set[int], known: Iterable[str]) -> Any:
    """Drop top-level keys that are not known and define an anchor: they only hold blocks that are used elsewhere."""

    def defines_anchor(node: yaml.Node, first: int, last: int) -> bool:
        here = first <= node.start_mark.index <= last  # an aliased node keeps the mark of its definition
        return here and (id(node) in anchored or any(defines_anchor(c, first, last) for c in _children(node)))

    holders = {
        key.value for key, value in root.value if defines_anchor(value, key.start_mark.index, value.end_mark.index)
    } - set(known)
    return {key: value for key, value in data.items() if key not in holders}


def node_at(root: yaml.Node, location: Location) -> yaml.Node:
    """The deepest node on the way to a location; union tags, which pydantic puts between, are passed over."""
    node, at = root, root
    for step in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if getattr(key, "value", None) == str(step):
                    node, at = value, key
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = at = node.value[step]
    return at
