"""Result tables in the terminal. They fit 60 columns: words wrap, and only text without spaces is ever folded."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

_NARROW = 90  # below this width, tables have no frame between columns


def table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    numeric: int,
    width: int | None = None,
    cut: int | None = None,
    framed: bool = True,
) -> Group:
    """Build a table whose columns from index `numeric` on are aligned right. No columns: a table without header.

    width: of the terminal; default: that of `results`. Names (first column) and numbers are not wrapped, unless the
    table would be wider than the terminal. cut: the column whose texts are cut with an ellipsis, not wrapped.
    framed: whether a wide terminal shows lines around the table and between columns.
    """
    from .shell import results

    available = width or results.width
    if cut is not None:
        rows = _cut(columns, rows, cut, available)
    is_bare = available < _NARROW or not framed
    frame = box.SIMPLE_HEAD if is_bare else box.HEAVY_HEAD
    built = Table(
        header_style="bold", box=frame, pad_edge=not is_bare, show_edge=not is_bare, show_header=bool(columns)
    )
    columns = columns or [""] * max(map(len, rows), default=0)
    fits = _width_of_names(columns, rows, numeric) <= available - 12
    for number, column in enumerate(columns):
        alignment: Literal["left", "right"] = "right" if number >= numeric else "left"
        is_name = fits and (number == 0 or number >= numeric)
        built.add_column(column, justify=alignment, overflow="fold", no_wrap=is_name)
    for row in rows:
        built.add_row(*(Text(cell) for cell in row))
    # Not the table's own title, which is folded to the width of the table.
    return Group(Text(title, style="bold"), built, *([Text()] if is_bare else []))


def _cut(columns: list[str], rows: list[list[str]], cut: int, available: int) -> list[list[str]]:
    """The rows with the texts of column `cut` shortened to what the others leave; rich would narrow every column."""
    others = [max(len(row[n]) for row in [columns, *rows]) for n in range(len(columns)) if n != cut]
    room = max(len(columns[cut]), available - sum(others) - 3 * len(columns) - 1)
    short = [text if len(text := row[cut]) <= room else f"{text[: room - 1].rstrip()}…" for row in rows]
    return [[*row[:cut], text, *row[cut + 1 :]] for row, text in zip(rows, short, strict=True)]


def _width_of_names(columns: list[str], rows: list[list[str]], numeric: int) -> int:
    """Characters of the columns that are not wrapped, with their gaps."""
    unwrapped = [number for number in range(len(columns)) if number == 0 or number >= numeric]
    cells = [[columns[number], *(row[number] for row in rows)] for number in unwrapped]
    widths = [max((len(line) for cell in column for line in cell.split("\n")), default=0) for column in cells]
    return sum(widths) + 3 * len(widths)
