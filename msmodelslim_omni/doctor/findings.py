"""The findings of doctor, collected into a short list. The kinds of findings are in codes.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..compatibility import Loads
from .codes import CODES

Level = Literal["ok", "warning", "error"]

# A check lists at most this many findings of one kind and counts the rest, so that memory stays bounded.
MAX_LISTED = 8


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    level: `ok` means that the check found no fault. check: `files`, `names`, `scales` and so on. code: a key of CODES,
    empty for `ok`. where: tensor, file or key. what: the fault with its value. why: its effect. runtimes: the runtimes
    it affects. todo: what to do.
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
    """All findings of doctor. `unlisted` counts, by code, the findings that are not in the list.

    format: empty if none is declared, `float` for a float checkpoint. loads: the verdict by runtime, empty for a float
    checkpoint. stopped: why later checks were not made, or an empty string.
    """

    path: str
    format: str
    findings: tuple[Finding, ...]
    unlisted: dict[str, int] = field(default_factory=dict)
    loads: dict[str, Loads] = field(default_factory=dict)
    stopped: str = ""

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
        """Return the diagnosis as a dict for JSON."""
        loads = {
            runtime: {"verdict": found.verdict, "how": found.how, "proof": found.proof}
            for runtime, found in self.loads.items()
        }
        return {
            **asdict(self),
            "loads": loads,
            "errors": self.errors,
            "warnings": self.warnings,
            "healthy": self.healthy,
        }


def make_finding(code: str, where: object, what: str) -> Finding:
    """Return a finding of a known kind; the Collector sets its `check`."""
    kind = CODES[code]
    return Finding(
        kind.level, "", code, shorten_text(str(where)), shorten_text(what), kind.why, kind.runtimes, kind.todo
    )


def shorten_text(text: str, length: int = 300) -> str:
    """Return text of a damaged file as printable text of bounded length."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: length + 1])
    return printable if len(text) <= length else f"{printable[:length]}..."


def shorten_list(names: Iterable[str], count: int = 3) -> str:
    """Join sorted names as in `a, b, c and 5 more`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - count} more" if len(ordered) > count else ""
    return ", ".join(ordered[:count]) + more


class Collector:
    """Collects the findings of all checks: at most MAX_LISTED of each kind per check, and a count of the rest."""

    def __init__(self, on_check: Callable[[str], None]) -> None:
        self._on_check = on_check
        self.findings: list[Finding] = []
        self.unlisted: dict[str, int] = {}

    def run(self, check: str, findings: Iterator[Finding], ok: str, where: str = "") -> None:
        """Collect the findings of a check; `ok` is the text of its line if there are none.

        An exception that a damaged file raises ends only this check and becomes a finding.
        """
        self._on_check(check)
        counts: dict[str, int] = {}
        try:
            for finding in findings:
                self._add(check, finding, counts)
        except Exception as error:  # a damaged file may raise anything; the other checks continue
            self._add(check, make_finding("check_failed", where or check, f"{type(error).__name__}: {error}"), counts)
        if not counts:
            self.findings.append(Finding("ok", check, "", where, ok))

    def _add(self, check: str, finding: Finding, counts: dict[str, int]) -> None:
        counts[finding.code] = counts.get(finding.code, 0) + 1
        if counts[finding.code] > MAX_LISTED:
            self.unlisted[finding.code] = self.unlisted.get(finding.code, 0) + 1
            return
        self.findings.append(
            Finding(
                finding.level, check, finding.code, finding.where, finding.what, finding.why, finding.runtimes,
                finding.todo,
            )
        )  # fmt: skip
