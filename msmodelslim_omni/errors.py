"""QuantError, the only exception for user errors: what is wrong, where with the value, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Characters that a terminal interprets (control, text direction) or cannot encode.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_LINE_LENGTH = 6000  # fits two paths of the maximum length


class QuantError(Exception):
    """An error that the user can fix. `message`: what is wrong and where; `hint`: what to do. The CLI prints both."""

    def __init__(self, message: str, hint: str = "") -> None:
        message = "\n".join(_printable(line) for line in message.split("\n"))
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


def _printable(line: str) -> str:
    """Shorten and escape one line of a message, which may quote a damaged or hostile file."""
    cut = line if len(line) <= _MAX_LINE_LENGTH else f"{line[:_MAX_LINE_LENGTH]}..."
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), cut)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ` Did you mean 'x'?` for the known word closest to `word`, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""
