"""What a page is made of: sections with figures and tables, as data; page.html turns them into markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...models import MODALITIES
from ..report import root_mean_square

Row = tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A figure that stands at the top: what it is, how much, and a word beside it."""

    what: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """An SVG, what it shows in one sentence, and the same in words for who does not see it. tall: as two others."""

    title: str
    svg: str
    says: str
    in_words: str
    tall: bool = False


@dataclass(frozen=True)
class Table:
    """The first `texts` columns are words, those behind them figures, aligned right.

    folded: shown when asked for. wide: not beside a figure.
    """

    caption: str
    columns: Row
    rows: tuple[Row, ...]
    texts: int = 1
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One heading with all that belongs to it, in this order."""

    title: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Story:
    """One of a page's two parts: what a quantization or an evaluation found."""

    title: str
    text: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...] = field(default=())


def percent(value: float | None) -> str:
    """0.05271 -> `5.27 %`: three digits, or `n/a`."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{100 * value:.3g} %" if abs(value) < 9.995 else f"{100 * value:,.0f} %"


def in_percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Root mean square of those that are known."""
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return root_mean_square(known) if known else None


def present(groups: Sequence[Mapping[str, float]]) -> list[str]:
    """The modalities that any of these has, in their usual order, and whatever else is in them."""
    found = dict.fromkeys(name for group in groups for name in group)
    return [*(name for name in MODALITIES if name in found), *(name for name in found if name not in MODALITIES)]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 60 else f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.2f} h"
