"""The table of compatibility as Markdown, for the documentation. A test compares the documents with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .table import FAMILIES, PROOFS, RUNTIMES, SCHEMES, TABLE, Loads

# The marks in a document between which the table stands.
BEGIN, END = "<!-- table of compatibility -->", "<!-- end of the table of compatibility -->"


def matrix_rows() -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: what is written, and for each runtime the proof, `-` (no) or `?` (unknown)."""
    columns = ["model type", "scheme", "format", *RUNTIMES.values()]
    rows = [
        [
            FAMILIES[entry.family],
            SCHEMES[entry.scheme],
            f"`{entry.format}`",
            *(_cell(entry.loads[runtime]) for runtime in RUNTIMES),
        ]
        for entry in TABLE
    ]
    return columns, rows


def _cell(loads: Loads) -> str:
    if loads.verdict == "no":
        return "-"
    if loads.verdict == "unknown":
        return "?"
    return f"{loads.proof}, dequantized" if loads.answering == "dequantized" else loads.proof


def matrix_markdown() -> str:
    """The table with its marks, the meaning of its words, and what is needed or missing."""
    columns, rows = matrix_rows()
    proofs = [f"- {proof}: {meaning}." for proof, meaning in PROOFS.items()]
    signs = [
        "- -: does not load. ?: unknown.",
        "- dequantized: transformers dequantizes the weights when it loads them.",
    ]
    reasons: dict[str, list[str]] = {}
    for entry in TABLE:
        for runtime, loads in entry.loads.items():
            if loads.how:
                reason = f"{RUNTIMES[runtime]}: {loads.how}"
                outputs = reasons.setdefault(reason, [])
                output = f"`{entry.format}` {SCHEMES[entry.scheme]}"
                outputs += [output] * (output not in outputs)
    listed = [f"- {reason} ({'; '.join(outputs)})." for reason, outputs in reasons.items()]
    lines = [BEGIN, "", *_table(columns, rows), "", *proofs, *signs, "", "What is needed, or missing:"]
    return "\n".join([*lines, "", *listed, "", END])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *body]


def update_document(path: Path) -> None:
    """Replace what stands between the marks of a document by the table."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    path.write_text(before + matrix_markdown() + rest.split(END, 1)[1], encoding="utf-8")
