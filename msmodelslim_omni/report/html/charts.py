"""The figures of the HTML report: matplotlib drawings as SVG text, to stand inside the page.

Text and lines take their colours from the page's style sheet, so that one drawing serves light and dark. A figure is
350 units wide, so that its text can be read on a phone, where it is shown at about that many pixels. The same data give
the same bytes. pyplot is left out on purpose: it would change settings of the whole process.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

P = ParamSpec("P")
Cells = Sequence[Sequence[float | None]]
Texts = Sequence[Sequence[str]]
Span = tuple[float, float, float]  # a value, and the ends of its interval

_WIDTH = 350
_LONGEST_LABEL = 22
_TALLEST = 1200  # of a heat map's cells, however many layers there are
_NUMBERED_ROWS = 12  # a heat map with more has no text in its cells: it would be too small to read
_BAR_STEPS = 48
_MARKED_POINTS = 40  # a line with more has no marks at its points

# Stand-ins for colours that the style sheet sets.
_VARIABLES = {
    "ink": ("#010203", "currentColor"),
    "faint": ("#010204", "var(--line)"),
    "before": ("#010205", "var(--before)"),
    "after": ("#010206", "var(--after)"),
    "text": ("#010207", "var(--text)"),
    "image": ("#010208", "var(--image)"),
    "audio": ("#010209", "var(--audio)"),
    "video": ("#01020a", "var(--video)"),
}
# A mark beside the colour, for who cannot tell two colours apart.
_MARKERS = {"text": "o", "image": "s", "audio": "^", "video": "D", "before": "o", "after": "D"}


def _colour(name: str) -> str:
    return _VARIABLES.get(name, _VARIABLES["after"])[0]


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """`draw` under our settings; those of the process come back behind it."""

    @functools.wraps(draw)
    def inside(*arguments: P.args, **keywords: P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_settings()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the measuring font lacks
            return draw(*arguments, **keywords)

    return inside


def _settings() -> Any:
    ink, faint = _colour("ink"), _colour("faint")
    sized = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    return {
        "svg.fonttype": "none",  # text stays text: it can be found, selected and scaled
        "svg.hashsalt": "msmodelslim_omni",
        "text.parse_math": False,  # a name with dollar signs is a name
        "font.family": "DejaVu Sans",  # to measure with; the page's own font is narrower
        **dict.fromkeys(sized, 10.6),
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), faint),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    }


# --- the kinds of figures ------------------------------------------------------------------------------------


@_styled
def bars(name: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], texts: Sequence[str]) -> str:
    """Horizontal bars from top to bottom, one for each series above another; the label's text stands behind them.

    One series: the bars take the colours of their labels where these have one (modalities).
    """
    figure, axes = _figure(len(labels) * (14 + 11 * len(series)), _beside(labels), top=24 if len(series) > 1 else 2)
    height = 0.78 / len(series)
    for number, (key, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * height
        colours = [_colour(key if len(series) > 1 else label) for label in labels]
        axes.barh([i + offset for i in range(len(labels))], _finite(values), height * 0.9, color=colours, label=key)
    longest = [max(column) for column in zip(*map(_finite, series.values()), strict=True)]
    for position, (value, text) in enumerate(zip(longest, texts, strict=True)):
        axes.annotate(text, (value, position), (5, 0), textcoords="offset points", va="center")
    _label_rows(axes, labels)
    characters = max(map(len, texts), default=0)
    axes.set_xlim(0, (max(longest, default=0.0) or 1.0) * (1.05 + 0.032 * characters))
    axes.xaxis.set_visible(False)
    if len(series) > 1:
        _legend(figure, len(series))
    return _svg(name, figure)


@_styled
def lines(
    name: str,
    layers: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    axis: str,
    level: tuple[float, str] | None = None,
) -> str:
    """One line for each series over the layers. level: a value to compare with, and what it is. Values in percent."""
    figure, axes = _figure(180, left=46, top=26, bottom=38)
    for label, values in series.items():
        marker = _MARKERS.get(label, "o") if len(layers) <= _MARKED_POINTS else None
        ys = [math.nan if v is None or not math.isfinite(v) else v for v in values]
        axes.plot(layers, ys, color=_colour(label), marker=marker, markersize=4, linewidth=1.6, label=_label(label))
    if level is not None:
        axes.axhline(level[0], color=_colour("ink"), linewidth=1, linestyle=(0, (4, 3)), label=level[1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel(axis)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=10)
    axes.grid(axis="y", linewidth=0.7)
    _legend(figure, 2 if len(series) == 1 else 4)
    return _svg(name, figure)


@_styled
def spans(
    name: str, labels: Sequence[str], series: Mapping[str, Sequence[Span | None]], axis: str, logarithmic: bool = False
) -> str:
    """A mark and its interval for each label and series: percentages, or logarithmic, with zeros at the left end."""
    top = 26 if len(series) > 1 else 4
    figure, axes = _figure(len(labels) * (22 + 8 * len(series)), _beside(labels) + 8, right=14, top=top, bottom=36)
    ends = [end for values in series.values() for span in values if span for end in span if math.isfinite(end)]
    left, right = _decades(ends) if logarithmic else _margins(ends)
    for number, (key, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * 0.3
        own, marker = _colour(key), _MARKERS.get(key, "o")
        for position, span in enumerate(values):
            if span is not None and all(map(math.isfinite, span)):
                value, *interval = (min(max(end, left), right) for end in span)
                y = position + offset
                axes.plot(interval, [y, y], color=own, linewidth=2.4, solid_capstyle="butt")
                axes.plot([value], [y], color=own, marker=marker, markersize=7, clip_on=False)
        axes.plot([], [], color=own, marker=marker, markersize=7, linewidth=2.4, label=key)
    _label_rows(axes, labels)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left, right)
    axes.minorticks_off()
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", pad=11)  # a mark at the left end stays off the labels
    axes.grid(axis="x", linewidth=0.7)
    axes.set_xlabel(axis)
    if len(series) > 1:
        _legend(figure, len(series))
    return _svg(name, figure)


@_styled
def heat_map(
    name: str, rows: Sequence[str], columns: Sequence[str], values: Cells, hints: Texts, texts: Texts, axis: str
) -> str:
    """A cell for each layer and column, in the colours of cividis; what is None is left empty.

    hints: what a cell says when it is pointed at. texts: what is written into it, where it is
    empty or the rows are few.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    numbered = len(rows) <= _NUMBERED_ROWS
    height = 24.0 if numbered else min(13.0, _TALLEST / len(rows))
    labels = [_label(column) for column in columns]
    slanted = max(map(len, labels), default=0) * len(labels) > 48
    top = 8 + 4.4 * max(map(len, labels), default=0) if slanted else 16
    figure, axes = _figure(height * len(rows), left=42, top=top, bottom=46)
    finite = [v for row in values for v in row if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    scale: Any = ScalarMappable(Normalize(low, high if high > low else low + 1.0), "cividis")
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    known = {(i, j): v for i, j in places if (v := values[i][j]) is not None and math.isfinite(v)}
    faces = [scale.to_rgba(known[place]) if place in known else (0, 0, 0, 0) for place in places]
    cells = PatchCollection([Rectangle((j, i), 1, 1) for i, j in places], facecolors=faces, linewidths=0.6)
    cells.set_edgecolor(_colour("faint"))
    cells.set_urls([f"cell-{i}-{j}" for i, j in places])  # a link for each cell, made a title below
    axes.add_collection(cells, autolim=False)
    for i, j in places:
        if (i, j) not in known:
            axes.text(j + 0.5, i + 0.5, texts[i][j], size=min(10, 0.65 * height), ha="center", va="center_baseline")
        elif numbered:
            ink = "#ffffff" if scale.norm(known[i, j]) < 0.5 else "#000000"
            axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center_baseline", color=ink)
    axes.set_xlim(0, len(columns) or 1)
    axes.set_ylim(len(rows), 0)
    axes.xaxis.tick_top()
    slant: dict[str, Any] = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks([j + 0.5 for j in range(len(labels))], labels, **slant)
    step = 2 ** math.ceil(math.log2(max(1.0, 12 / height)))
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), step)], [_label(row) for row in rows[::step]])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _colour_bar(figure, scale, axis)
    return _svg(name, figure, {f"cell-{i}-{j}": hints[i][j] for i, j in places})


def _colour_bar(figure: Any, scale: Any, label: str) -> None:
    """What the colours mean, in steps. Not matplotlib's own bar, which is a picture of pixels within the SVG."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    bar = _axes(figure, left=62, right=22, bottom=32, height=8)
    low, high = scale.get_clim()
    step = (high - low) / _BAR_STEPS
    starts = [low + step * number for number in range(_BAR_STEPS)]
    # A little wider than a step: no seam shows.
    patches = [Rectangle((start, 0), min(step * 1.2, high - start), 1) for start in starts]
    faces = [scale.to_rgba(start + step / 2) for start in starts]
    bar.add_collection(PatchCollection(patches, facecolors=faces, linewidths=0), autolim=False)
    bar.set_xlim(low, high)
    bar.set_yticks([])
    bar.set_xlabel(label, labelpad=1)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


# --- the frame -----------------------------------------------------------------------------------------------


def _figure(inner: float, left: float, *, right: float = 4, top: float = 4, bottom: float = 4) -> tuple[Any, Any]:
    """A figure whose axes are `inner` units high, with room around them for what stands there.

    The room is reckoned, not measured: matplotlib's layout engines take as long as all the drawing.
    """
    from matplotlib.figure import Figure

    height = inner + top + bottom
    figure = Figure((_WIDTH / 72, height / 72), dpi=72)
    return figure, _axes(figure, left, right, bottom, inner)


def _axes(figure: Any, left: float, right: float, bottom: float, height: float) -> Any:
    whole = 72 * figure.get_figheight()
    return figure.add_axes((left / _WIDTH, bottom / whole, (_WIDTH - left - right) / _WIDTH, height / whole))


def _beside(labels: Sequence[str]) -> float:
    """The room that labels take to the left of the axes."""
    return 10 + 6.3 * max((len(_label(label)) for label in labels), default=0)


def _svg(name: str, figure: Any, hints: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> element whose ids begin with its name."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(written, metadata=nothing)  # not savefig, which draws twice
    text = written.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} aria-hidden="true" focusable="false">', text, count=1)
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # kept are those of clips and marks, which are used
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    if hints:
        text = re.sub(r'<a xlink:href="(cell-\d+-\d+)"[^>]*>', lambda m: _hint(hints[m[1]]), text).replace(
            "</a>", "</g>"
        )
    for stand_in, variable in _VARIABLES.values():
        text = text.replace(stand_in, variable)
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _hint(text: str) -> str:
    return f"<g><title>{html.escape(_printable(text))}</title>"


def _label_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _legend(figure: Any, columns: int) -> None:
    figure.legend(
        loc="upper left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.1, handlelength=1.4,
        columnspacing=1.2,
    )  # fmt: skip


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the values that are positive."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _margins(values: Sequence[float]) -> tuple[float, float]:
    """The range of percentages with a little room. Not from zero: marks are compared by place, not by length."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    room = 0.08 * (high - low) or 5.0
    return max(0.0, low - room), min(100.0, high + room)


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else 0.0 for value in values]


def _printable(text: str) -> str:
    """Names come from checkpoints: what cannot be printed, or stands for half a letter, becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _label(text: str) -> str:
    return text if len(text := _printable(text)) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
