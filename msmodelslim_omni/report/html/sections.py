"""The contents of a page as data: articles, sections, charts and tables. page.html renders them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...models import MODALITIES
from ..fidelity import Preview
from ..report import root_mean_square

Row = tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A headline figure: its label, its value, and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """An SVG drawing with a caption and, for screen readers, its values as text. tall: spans two rows of charts."""

    title: str
    svg: str
    caption: str
    alt_text: str
    tall: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first `text_columns` columns are aligned left, the others right.

    folded: collapsed until the reader opens it. wide: takes the full width of the page.
    """

    caption: str
    columns: Row
    rows: tuple[Row, ...]
    text_columns: int = 1
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Answer:
    """The answers of the float model (before) and the quantized model (after) to one question."""

    question: str
    previews: tuple[Preview, ...]
    expected: str
    before: str
    before_exact: bool
    after: str
    after_exact: bool
    note: str


@dataclass(frozen=True)
class Heard:
    """The spoken answers of the float model (before) and the quantized model (after) to one question."""

    question: str
    previews: tuple[Preview, ...]
    before: str
    before_sound: Preview | None
    after: str
    after_sound: Preview | None
    note: str


@dataclass(frozen=True)
class Section:
    """A heading and its contents, in display order."""

    title: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    code: str = ""
    answers: tuple[Answer, ...] = ()
    heard: tuple[Heard, ...] = ()


@dataclass(frozen=True)
class Article:
    """One of the two parts of a page: the results of a quantization or of an evaluation."""

    title: str
    text: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...] = field(default=())


def format_percent(value: float | None) -> str:
    """Format a ratio with three digits: 0.05271 -> `5.27 %`; `n/a` for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{100 * value:.3g} %" if abs(value) < 9.995 else f"{100 * value:,.0f} %"


def to_percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Root mean square of the known, finite errors, or None."""
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return root_mean_square(known) if known else None


def all_keys(groups: Sequence[Mapping[str, float]]) -> list[str]:
    """Keys of all groups without duplicates: modalities in the order of MODALITIES, then any other keys."""
    keys = dict.fromkeys(name for group in groups for name in group)
    return [*(name for name in MODALITIES if name in keys), *(name for name in keys if name not in MODALITIES)]


def format_seconds(value: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    return f"{value:.2f} s" if value < 60 else f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.2f} h"
