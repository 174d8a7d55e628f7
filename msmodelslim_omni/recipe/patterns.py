"""include / exclude patterns: shell wildcards with `{a,b}` braces, matched against a Linear's full checkpoint name."""

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
    """Expand `a.{b,c}` to (`a.b`, `a.c`), also nested.

    Raises QuantError above 4096 alternatives, because a recipe is untrusted input.
    """
    pending, expanded = [pattern], []
    while pending:
        current = pending.pop()
        braces = _BRACES.search(current)
        if braces is None:
            expanded.append(current)
        else:
            prefix, suffix = current[: braces.start()], current[braces.end() :]
            pending += [prefix + choice + suffix for choice in reversed(braces.group(1).split(","))]
        if len(pending) + len(expanded) > _MAX_ALTERNATIVES:
            raise QuantError(
                f"pattern {pattern[:80]!r} expands to more than {_MAX_ALTERNATIVES} alternatives",
                "use a wildcard instead of braces",
            )
    return tuple(expanded)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether `name` matches any of the patterns. Case matters; `*` also matches dots."""
    return any(fnmatch.fnmatchcase(name, choice) for pattern in patterns for choice in expand_braces(pattern))
