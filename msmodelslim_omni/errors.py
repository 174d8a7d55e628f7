"""The one exception that a user's fault raises: what, where with the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantError(Exception):
    """A fault the user can mend. `message` says what and where, `hint` what to do; the CLI prints the two."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""
