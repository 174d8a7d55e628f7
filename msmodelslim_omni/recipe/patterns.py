"""include / exclude patterns: shell wildcards on a Linear's full checkpoint name, with `{a,b}` braces."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable

from ..errors import QuantError

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_ALTERNATIVES = 4096


@functools.lru_cache(maxsize=1024)
def expand_braces(pattern: str) -> tuple[str, ...]:
    """`a.{b,c}` -> (`a.b`, `a.c`); nests. Raises QuantError beyond 4096 alternatives: a recipe is untrusted input."""
    pending, done = [pattern], []
    while pending:
        current = pending.pop()
        braces = _BRACES.search(current)
        if braces is None:
            done.append(current)
        else:
            head, tail = current[: braces.start()], current[braces.end() :]
            pending += [head + choice + tail for choice in reversed(braces.group(1).split(","))]
        if len(pending) + len(done) > _MAX_ALTERNATIVES:
            raise QuantError(
                f"pattern {pattern[:80]!r} stands for more than {_MAX_ALTERNATIVES} alternatives",
                "use a wildcard instead of so many braces",
            )
    return tuple(done)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` fits any of the patterns (case matters, `*` crosses dots)."""
    return any(fnmatch.fnmatchcase(name, choice) for pattern in patterns for choice in expand_braces(pattern))
