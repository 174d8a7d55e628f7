"""A finding of doctor, and how a check's findings become a short list. The kinds of findings are in codes.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .codes import CODES

Level = Literal["ok", "warning", "error"]

# Of one kind of finding a check lists this many; the others are counted. What is kept in memory stays bounded.
LISTED = 8


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    level: `ok` stands for a whole check that found nothing. check: `files`, `names`, `scales` and so on. code: a key of
    CODES, empty for `ok`. where: tensor, file or key. what: the fault with its value. why: what it does, and to which
    runtimes. todo: what to do.
    """

    level: Level
    check: str
    code: str
    where: str
    what: str
    why: str = ""
    runtimes: tuple[str, ...] = ()
    todo: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What doctor found. `unlisted` counts the findings of a code beyond those listed."""

    path: str
    format: str
    findings: tuple[Finding, ...]
    unlisted: dict[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        return sum(finding.level == "warning" for finding in self.findings)

    @property
    def healthy(self) -> bool:
        return self.errors == 0

    def codes(self) -> set[str]:
        return {finding.code for finding in self.findings if finding.code}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "errors": self.errors, "warnings": self.warnings, "healthy": self.healthy}


def found(code: str, where: object, what: str) -> Finding:
    """A finding of a known kind; `check` is set by the check that hands it on."""
    kind = CODES[code]
    return Finding(kind.level, "", code, shortened(str(where)), shortened(what), kind.why, kind.runtimes, kind.todo)


def shortened(text: str, length: int = 300) -> str:
    """Text of a damaged file, printable and of bounded length."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: length + 1])
    return printable if len(text) <= length else f"{printable[:length]}..."


def some(names: Iterable[str], count: int = 3) -> str:
    """`a, b, c and 5 more`."""
    listed = sorted(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


class Collector:
    """Findings of all checks, each kind listed a few times per check and counted beyond."""

    def __init__(self, on_check: Callable[[str], None]) -> None:
        self._on_check = on_check
        self.findings: list[Finding] = []
        self.unlisted: dict[str, int] = {}

    def run(self, check: str, findings: Iterator[Finding], ok: str, where: str = "") -> None:
        """Take a check's findings; `ok` is its line if there are none.

        What a check did not foresee in a damaged file ends this check alone, and is a finding itself.
        """
        self._on_check(check)
        listed: dict[str, int] = {}
        try:
            for finding in findings:
                self._take(check, finding, listed)
        except Exception as error:  # whatever a damaged file may raise; the other checks go on
            self._take(check, found("check_failed", where or check, f"{type(error).__name__}: {error}"), listed)
        if not listed:
            self.findings.append(Finding("ok", check, "", where, ok))

    def _take(self, check: str, finding: Finding, listed: dict[str, int]) -> None:
        listed[finding.code] = listed.get(finding.code, 0) + 1
        if listed[finding.code] > LISTED:
            self.unlisted[finding.code] = self.unlisted.get(finding.code, 0) + 1
            return
        self.findings.append(
            Finding(
                finding.level, check, finding.code, finding.where, finding.what, finding.why, finding.runtimes,
                finding.todo,
            )
        )  # fmt: skip
