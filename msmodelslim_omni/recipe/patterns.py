"""include / exclude patterns: shell wildcards with `{a,b}` braces, matched against a Linear's full checkpoint name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable

from ..errors import QuantError

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_ALTERNATIVES = 4096
_WILDCARDS = re.compile(r"[*?\[\]{},]+")


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


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, expand_braces(pattern))))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether `name` matches any of the patterns. Case matters; `*` also matches dots."""
    return any(_compiled(pattern).match(name) is not None for pattern in patterns)


def near_patterns(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Patterns that match some of the names and look like a pattern that matches none, the most similar first.

    The longest text between the wildcards is compared with runs of as many components of the names:
    `*mlp.dwn_proj` with `self_attn.q_proj`, `mlp.down_proj` and so on.
    """
    text = max((part.strip(".") for part in _WILDCARDS.split(pattern)), key=len)
    length = text.count(".") + 1
    runs: dict[str, str] = {}
    for name in names:
        words = name.split(".")
        for start in range(len(words) - length + 1):
            end = start + length
            run = ".".join(words[start:end])
            before, after = "*." if start else "", ".*" if end < len(words) else ""
            runs.setdefault(run, f"{before}{run}{after}")
    return [runs[run] for run in difflib.get_close_matches(text, list(runs), n=count)]
