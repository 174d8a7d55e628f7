"""Result tables in the terminal."""

from __future__ import annotations

from typing import Literal

from rich.table import Table
from rich.text import Text


def table(title: str, columns: list[str], rows: list[list[str]], numeric: int) -> Table:
    """Build a table whose columns from index `numeric` on are aligned right."""
    built = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        alignment: Literal["left", "right"] = "right" if number >= numeric else "left"
        built.add_column(column, justify=alignment, overflow="fold", no_wrap=number == 0)
    for row in rows:
        built.add_row(*(Text(cell) for cell in row))
    return built
