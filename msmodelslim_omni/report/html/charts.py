"""The charts of the HTML report: matplotlib drawings as inline SVG.

Text and lines take their colours from the page's style sheet, so one drawing works in light and dark mode. A chart is
350 units wide, about the pixels of a phone screen, so its text stays readable there. The same data give the same bytes.
pyplot is not used, on purpose: it changes settings of the whole process.
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
Span = tuple[float, float, float]  # a value, and the lower and upper end of its interval

_WIDTH = 350
_LONGEST_LABEL = 22
_MAX_HEAT_MAP_HEIGHT = 1200  # of all rows together
_MAX_NUMBERED_ROWS = 12  # with more rows, text in the cells of a heat map would be too small to read
_COLOUR_BAR_STEPS = 48
_MAX_MARKED_POINTS = 40  # a line with more points has no markers

# Placeholder colours for matplotlib, and the style sheet's colours that replace them in the SVG.
_COLOURS = {
    "ink": ("#010203", "currentColor"),
    "faint": ("#010204", "var(--line)"),
    "before": ("#010205", "var(--before)"),
    "after": ("#010206", "var(--after)"),
    "text": ("#010207", "var(--text)"),
    "image": ("#010208", "var(--image)"),
    "audio": ("#010209", "var(--audio)"),
    "video": ("#01020a", "var(--video)"),
}
# Marker shapes, for readers who cannot tell two colours apart.
_MARKERS = {"text": "o", "image": "s", "audio": "^", "video": "D", "before": "o", "after": "D"}


def _colour(name: str) -> str:
    return _COLOURS.get(name, _COLOURS["after"])[0]


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Wrap `draw` to run with the settings of these charts, without changing matplotlib's global settings."""

    @functools.wraps(draw)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_settings()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glyphs missing from the font used for measuring
            return draw(*arguments, **keywords)

    return wrapper


def _settings() -> Any:
    ink, faint = _colour("ink"), _colour("faint")
    sized = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    return {
        "svg.fonttype": "none",  # keep text as text: searchable, selectable, scalable
        "svg.hashsalt": "msmodelslim_omni",
        "text.parse_math": False,  # dollar signs in names are not math
        "font.family": "DejaVu Sans",  # for measuring only; the page's font is narrower
        **dict.fromkeys(sized, 10.6),
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), faint),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    }


# --- kinds of charts -----------------------------------------------------------------------------------------


@_styled
def bar_chart(name: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], texts: Sequence[str]) -> str:
    """Horizontal bars: for each label a group of one bar per series, followed by the label's text from `texts`.

    With one series, bars labelled with a modality get the modality's colour.
    """
    figure, axes = _new_figure(
        len(labels) * (14 + 11 * len(series)), _label_width(labels), top=24 if len(series) > 1 else 2
    )
    height = 0.78 / len(series)
    for number, (key, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * height
        colours = [_colour(key if len(series) > 1 else label) for label in labels]
        axes.barh(
            [i + offset for i in range(len(labels))], _finite_or_zero(values), height * 0.9, color=colours, label=key
        )
    longest = [max(column) for column in zip(*map(_finite_or_zero, series.values()), strict=True)]
    for position, (value, text) in enumerate(zip(longest, texts, strict=True)):
        axes.annotate(text, (value, position), (5, 0), textcoords="offset points", va="center")
    _label_rows(axes, labels)
    characters = max(map(len, texts), default=0)
    axes.set_xlim(0, (max(longest, default=0.0) or 1.0) * (1.05 + 0.032 * characters))
    axes.xaxis.set_visible(False)
    if len(series) > 1:
        _legend(figure, len(series))
    return _to_svg(name, figure)


@_styled
def line_chart(
    name: str,
    layers: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    axis: str,
    reference: tuple[float, str] | None = None,
) -> str:
    """One line per series over the layers, in percent. reference: value and label of a dashed horizontal line."""
    figure, axes = _new_figure(180, left=46, top=26, bottom=38)
    for label, values in series.items():
        marker = _MARKERS.get(label, "o") if len(layers) <= _MAX_MARKED_POINTS else None
        ys = [math.nan if v is None or not math.isfinite(v) else v for v in values]
        axes.plot(layers, ys, color=_colour(label), marker=marker, markersize=4, linewidth=1.6, label=_label(label))
    if reference is not None:
        axes.axhline(reference[0], color=_colour("ink"), linewidth=1, linestyle=(0, (4, 3)), label=reference[1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel(axis)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=10)
    axes.grid(axis="y", linewidth=0.7)
    _legend(figure, 2 if len(series) == 1 else 4)
    return _to_svg(name, figure)


@_styled
def interval_chart(
    name: str, labels: Sequence[str], series: Mapping[str, Sequence[Span | None]], axis: str, logarithmic: bool = False
) -> str:
    """A marker with its interval for each label and series.

    logarithmic: False for percentages. On a logarithmic axis zeros are drawn at the left end.
    """
    top = 26 if len(series) > 1 else 4
    height = len(labels) * (22 + 8 * len(series))
    figure, axes = _new_figure(height, _label_width(labels) + 8, right=20, top=top, bottom=36)
    ends = [end for values in series.values() for span in values if span for end in span if math.isfinite(end)]
    left, right = _logarithmic_range(ends) if logarithmic else _percent_range(ends)
    for number, (key, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * 0.3
        colour, marker = _colour(key), _MARKERS.get(key, "o")
        for position, span in enumerate(values):
            if span is not None and all(map(math.isfinite, span)):
                value, *interval = (min(max(end, left), right) for end in span)
                y = position + offset
                axes.plot(interval, [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot([value], [y], color=colour, marker=marker, markersize=7, clip_on=False)
        axes.plot([], [], color=colour, marker=marker, markersize=7, linewidth=2.4, label=key)
    _label_rows(axes, labels)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left, right)
    axes.minorticks_off()
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", pad=11)  # keep markers at the left end off the labels
    axes.grid(axis="x", linewidth=0.7)
    axes.set_xlabel(axis)
    if len(series) > 1:
        _legend(figure, len(series))
    return _to_svg(name, figure)


@_styled
def heat_map(
    name: str, rows: Sequence[str], columns: Sequence[str], values: Cells, hints: Texts, texts: Texts, axis: str
) -> str:
    """A cell for each layer and column, coloured by value with cividis; cells without a value have no colour.

    hints: tooltips of the cells. texts: labels of the cells, drawn in cells without a value, and in all cells if there
    are at most _MAX_NUMBERED_ROWS rows. axis: label of the colour bar.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    is_numbered = len(rows) <= _MAX_NUMBERED_ROWS
    height = 24.0 if is_numbered else min(13.0, _MAX_HEAT_MAP_HEIGHT / len(rows))
    labels = [_label(column) for column in columns]
    is_slanted = max(map(len, labels), default=0) * len(labels) > 48
    top = 8 + 4.4 * max(map(len, labels), default=0) if is_slanted else 16
    figure, axes = _new_figure(height * len(rows), left=42, top=top, bottom=46)
    finite = [v for row in values for v in row if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    scale: Any = ScalarMappable(Normalize(low, high if high > low else low + 1.0), "cividis")
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    known = {(i, j): v for i, j in places if (v := values[i][j]) is not None and math.isfinite(v)}
    faces = [scale.to_rgba(known[place]) if place in known else (0, 0, 0, 0) for place in places]
    cells = PatchCollection([Rectangle((j, i), 1, 1) for i, j in places], facecolors=faces, linewidths=0.6)
    cells.set_edgecolor(_colour("faint"))
    cells.set_urls([f"cell-{i}-{j}" for i, j in places])  # a link per cell, which _to_svg replaces by a tooltip
    axes.add_collection(cells, autolim=False)
    for i, j in places:
        if (i, j) not in known:
            axes.text(j + 0.5, i + 0.5, texts[i][j], size=min(10, 0.65 * height), ha="center", va="center_baseline")
        elif is_numbered:
            ink = "#ffffff" if scale.norm(known[i, j]) < 0.5 else "#000000"
            axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center_baseline", color=ink)
    axes.set_xlim(0, len(columns) or 1)
    axes.set_ylim(len(rows), 0)
    axes.xaxis.tick_top()
    slant: dict[str, Any] = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if is_slanted else {}
    axes.set_xticks([j + 0.5 for j in range(len(labels))], labels, **slant)
    step = 2 ** math.ceil(math.log2(max(1.0, 12 / height)))
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), step)], [_label(row) for row in rows[::step]])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _colour_bar(figure, scale, axis)
    return _to_svg(name, figure, {f"cell-{i}-{j}": hints[i][j] for i, j in places})


def _colour_bar(figure: Any, scale: Any, label: str) -> None:
    """Draw the colour scale as rectangles; matplotlib's own colour bar would embed a bitmap in the SVG."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    bar = _add_axes(figure, left=62, right=22, bottom=32, height=8)
    low, high = scale.get_clim()
    step = (high - low) / _COLOUR_BAR_STEPS
    starts = [low + step * number for number in range(_COLOUR_BAR_STEPS)]
    # Rectangles overlap slightly, so that no seams are visible.
    patches = [Rectangle((start, 0), min(step * 1.2, high - start), 1) for start in starts]
    faces = [scale.to_rgba(start + step / 2) for start in starts]
    bar.add_collection(PatchCollection(patches, facecolors=faces, linewidths=0), autolim=False)
    bar.set_xlim(low, high)
    bar.set_yticks([])
    bar.set_xlabel(label, labelpad=1)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


# --- the frame -----------------------------------------------------------------------------------------------


def _new_figure(inner: float, left: float, *, right: float = 4, top: float = 4, bottom: float = 4) -> tuple[Any, Any]:
    """Create a figure whose axes are `inner` units high, with the given margins.

    Callers estimate the margins: matplotlib's layout engines would take as long as the drawing itself.
    """
    from matplotlib.figure import Figure

    height = inner + top + bottom
    figure = Figure((_WIDTH / 72, height / 72), dpi=72)
    return figure, _add_axes(figure, left, right, bottom, inner)


def _add_axes(figure: Any, left: float, right: float, bottom: float, height: float) -> Any:
    total = 72 * figure.get_figheight()
    return figure.add_axes((left / _WIDTH, bottom / total, (_WIDTH - left - right) / _WIDTH, height / total))


def _label_width(labels: Sequence[str]) -> float:
    """Estimated width of the labels left of the axes."""
    return 10 + 6.3 * max((len(_label(label)) for label in labels), default=0)


def _to_svg(name: str, figure: Any, hints: Mapping[str, str] | None = None) -> str:
    """Return the figure as an <svg> element whose ids start with `name`. hints: tooltips by the URL of a cell."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(stream, metadata=no_metadata)  # savefig would draw twice
    text = stream.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} aria-hidden="true" focusable="false">', text, count=1)
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # keep ids of clip paths and markers
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    if hints:
        text = re.sub(r'<a xlink:href="(cell-\d+-\d+)"[^>]*>', lambda m: _open_group(hints[m[1]]), text).replace(
            "</a>", "</g>"
        )
    for placeholder, colour in _COLOURS.values():
        text = text.replace(placeholder, colour)
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _open_group(text: str) -> str:
    """Start of an SVG group with a tooltip."""
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


def _logarithmic_range(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten below and above the positive values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _percent_range(values: Sequence[float]) -> tuple[float, float]:
    """Range of the percentages plus a margin. It need not include zero: markers show positions, not lengths."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    room = 0.08 * (high - low) or 5.0
    return max(0.0, low - room), min(100.0, high + room)


def _finite_or_zero(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else 0.0 for value in values]


def _printable(text: str) -> str:
    """Replace unprintable characters and lone surrogates by `?`; names come from untrusted checkpoints."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _label(text: str) -> str:
    return text if len(text := _printable(text)) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
