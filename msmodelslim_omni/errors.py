"""The one exception that a user's fault raises: what, where with the value, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What a terminal would obey instead of showing (control characters, changes of direction), or could not encode.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 6000  # two paths and more


class QuantError(Exception):
    """A fault the user can mend. `message` says what and where, `hint` what to do; the CLI prints the two."""

    def __init__(self, message: str, hint: str = "") -> None:
        message = "\n".join(_shown(line) for line in message.split("\n"))
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


def _shown(line: str) -> str:
    """One line of a message, which may quote a damaged or hostile file."""
    cut = line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""
