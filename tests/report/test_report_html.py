"""The HTML page: complete, self-contained, deterministic, and safe with untrusted names."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import MINMAX, fast_recipe, quant
from reports import HOSTILE, LINEARS, MODALITIES, data_free, made_evaluation, made_report

from msmodelslim_omni.report.eval_report import layer_rows
from msmodelslim_omni.report.fidelity import AnswerPair, Preview, ShownAnswer, ShownSpeech, SpokenPair
from msmodelslim_omni.report.html import charts
from msmodelslim_omni.report.html.page import as_html
from msmodelslim_omni.report.report import Report
from msmodelslim_omni.report.report import as_markdown as quant_markdown

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "formaction", "background"}


class Page(HTMLParser):
    """The tags, ids, links, labels and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._record(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._record(tag, attrs)

    def _record(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in LOADING:
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name == "aria-label":
                self.labels.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def report() -> Report:
    return made_report(36)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return as_html(report, made_evaluation(), "apiversion: x\n")


def test_page_shows_the_quantization_report(report: Report) -> None:
    parsed = Page(as_html(report, None, "apiversion: the recipe\n  indented: yes\n"))
    expected = (
        "5.00 MiB", "2.00 MiB", "40% of 5.00 MiB", "4.25", "12.50 s", "3.00 GiB",  # headline
        "decoder layers", "W4A16_G64", "43 samples, 1,000 tokens", "60.0%",
        "Output error of each Linear", "layer 35, down_proj, W4A16_G64: 7 % (text 1 %, image 2 %",
        "Fell back to plain rounding: layer 1.", "36 of 72 groups of Linears are scaled", "the identity is best",
        "Time by phase", "Increase of peak memory by phase", "1.00 GiB", "/models/source", "2.13.0",
        "apiversion: the recipe", "a tensor is odd",
    )  # fmt: skip
    for words in expected:
        assert words in parsed.text, words
    assert parsed.tags.count("h1") == 1 and "script" not in parsed.tags
    for kind in LINEARS:
        assert kind.rsplit(".", 1)[-1] in parsed.text


def test_massive_tokens_get_a_second_figure(report: Report) -> None:
    """Columns for ordinary tokens, only where a layer has massive ones."""
    layers = (replace(report.layers[0], output_error_ordinary=0.1234, massive_tokens=3), *report.layers[1:])
    massive = replace(report, layers=layers)
    evaluation = made_evaluation()
    drift = (replace(evaluation.layers[0], error_ordinary=0.4321, massive=5), *evaluation.layers[1:])
    assert "| layer | ordinary | text |" in quant_markdown(massive) and "| 0.1234 |" in quant_markdown(massive)
    assert "| layer | text |" in quant_markdown(report)
    assert "without massive tokens" in as_html(massive, None, "") and "12.3 %" in as_html(massive, None, "")
    assert "without massive tokens" not in as_html(report, None, "")
    assert layer_rows(evaluation)[0] == ["layer", "all", *MODALITIES]
    columns, rows = layer_rows(replace(evaluation, layers=drift))
    assert columns == ["layer", "all", "ordinary", *MODALITIES]
    assert [row[2] for row in rows] == ["0.4321", "", ""]


def test_page_shows_the_evaluation_report(page: str) -> None:
    parsed = Page(page)
    for words in (
        "KL divergence by modality", "same most likely token", "overlap of the 5 most likely tokens",
        "perplexity, float", "exact answers, quantized", "Exact answers before and after", "Drift of the hidden states",
        "(72.0 to 88.0)", "0.004 (0.0036 to 0.0044)", "highest KL video", "40 samples", "few samples: data",
    ):  # fmt: skip
        assert words in parsed.text, words
    assert parsed.text.index("Evaluation:") < parsed.text.index("Quantization:")
    assert "no-repeat local" in page  # the edge of a table that scrolls
    assert "embeddings, cosine" in page and "overlap of the 5 most likely tokens" in page
    overall = replace(made_evaluation().overall, embedding_error=0.0, embedding_cosine=1.0)
    same = replace(made_evaluation(), overall=overall, by_modality=dict.fromkeys(MODALITIES, overall))
    assert "embeddings, " not in as_html(None, same)
    evaluation_only = Page(as_html(None, made_evaluation()))
    assert "Quantization:" not in evaluation_only.text and "Evaluation:" in evaluation_only.text


def test_page_has_two_players_per_spoken_answer() -> None:
    pair = SpokenPair("a:1", "What <is> it?", (), "A cat", "A cut", 100, 0.9, 1.0, 2.0, 3.0, 1.0, 1.5, "f", "q")
    before, after = (Preview("audio", f"data:audio/wav;base64,{name}", f"speech of {name}") for name in "FQ")
    shown = ShownSpeech(pair, (), before, after)
    page = as_html(None, replace(made_evaluation(), speech=(pair,)), "", (), [shown])
    assert page.count("<audio controls") == 2 and 'aria-label="speech of Q"' in page
    assert page.index("Speech, side by side") < page.index("What &lt;is&gt; it?") < page.index("A cut")
    assert "same at 90.0% of 100 steps" in page and "two float takes, dB" in page


def test_page_shows_answers_side_by_side() -> None:
    pair = AnswerPair(
        "index.jsonl:7", "What <b>is</b> it?", (("image", "x"),), "a cat", "a cat", True, "a dog", False, 0.5
    )
    previews = (Preview("image", "data:image/jpeg;base64,AAAA", "x"), Preview("audio", "data:audio/wav;base64,AA", "y"))
    page = as_html(None, made_evaluation(), "", [ShownAnswer(pair, previews)])
    text = Page(page).text
    assert "What <b>is</b> it?" in text and "<b>is</b>" not in page
    assert "float model, exact" in text and "quantized model, not exact" in text and "a dog …" in text
    assert '<img src="data:image/jpeg;base64,AAAA" alt="x">' in page and "<audio controls" in page
    assert "img-src data:; media-src data:" in page


def test_page_lists_the_worst_linears_with_lines_for_a_recipe(report: Report) -> None:
    text = Page(as_html(report, None)).text
    assert "The Linears that lose most" in text and "exclude:" in text and '- "thinker.model.layers.' in text
    assert "SHA-256 of its index" in text and "--config_path recipe.yaml" in text


def test_page_has_no_requests_and_no_scripts(page: str) -> None:
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"script", "link", "iframe", "img", "image", "object", "embed", "form", "base"} & set(parsed.tags)
    assert "url(http" not in page and "@import" not in page and "default-src &#39;none&#39;" not in page
    assert (
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:\"" in page
    )  # browsers enforce it


def test_accessibility_and_dark_mode(page: str) -> None:
    parsed = Page(page)
    assert '<html lang="en">' in page and "width=device-width" in page and "prefers-color-scheme: dark" in page
    assert len(parsed.labels) >= parsed.tags.count("svg") > 8
    assert all(len(label) > 20 for label in parsed.labels if ". " in label)
    assert parsed.tags.count("caption") == parsed.tags.count("table")
    assert len(parsed.ids) == len(set(parsed.ids))
    # Drawings take their colours from the style sheet, except the cells of heat maps.
    colours = set(re.findall(r"#[0-9a-f]{6}", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))
    assert not {colour for colour in colours if colour.startswith("#0102")}
    assert "color: currentColor" not in page and "fill: currentColor" in page


def test_page_is_deterministic(report: Report, page: str) -> None:
    assert as_html(report, made_evaluation(), "apiversion: x\n") == page
    assert not re.search(r"20\d\d-\d\d-\d\d", page)


def test_hostile_names_do_not_become_markup() -> None:
    text = as_html(made_report(2, HOSTILE), made_evaluation(HOSTILE, 2), HOSTILE)
    parsed = Page(text)
    assert "script" not in parsed.tags and "<script" not in text
    assert "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text
    assert all(link.startswith("#") for link in parsed.links)


def test_data_free_page_shows_weight_errors(report: Report) -> None:
    text = Page(as_html(data_free(report), None)).text
    assert "Weight error of each Linear" in text and "8 %" in text and "has no inputs" in text
    assert "None. The recipe is data-free" in text and "Error of each layer's output" not in text


def test_nearly_empty_report() -> None:
    bare = replace(
        made_report(0), tokens_by_modality={}, parts=(), output_bytes={}, source_bytes=0, seconds=0.0,
        seconds_by_phase={}, peak_rise_by_phase={}, warnings=(), bits_per_weight=0.0,
    )  # fmt: skip
    assert "Calibration data" in Page(as_html(bare, None)).text
    empty = tuple(replace(layer, linears=()) for layer in made_report(2).layers)
    assert "no Linear was quantized" in as_html(replace(bare, layers=empty), None)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e300])
def test_extreme_error_values(value: float) -> None:
    report = made_report(2)
    first = report.layers[0]
    linears = (replace(first.linears[0], output_error=value), *first.linears[1:])
    odd = replace(first, linears=linears, output_error_by_modality={"text": value}, error_over_plain=value)
    Page(as_html(replace(report, layers=(odd, report.layers[1])), None))


def test_zero_is_at_the_left_end_of_a_logarithmic_axis() -> None:
    """A model compared with itself has a KL of zero."""
    svg = charts.interval_chart("kl", ["a", "b"], {"after": [(0.0, 0.0, 0.0), (1e-3, 1e-4, 1e-2)]}, "nats", True)
    assert "0.0001" in svg and "0.01" in svg


@pytest.mark.parametrize(("span", "logarithmic"), [((99.9, 99.6, 100.0), False), ((5e-5, 2e-5, 9e-5), True)])
def test_labels_of_an_axis_are_inside_the_chart(span: charts.Span, logarithmic: bool) -> None:
    """A label is centred on its tick, at 6.3 units per character, and the last tick is at the right end."""
    svg = charts.interval_chart("chart", ["text"], {"after": [span]}, "axis", logarithmic)
    match = re.search(r'viewBox="0 0 (\d+)', svg)
    assert match is not None
    labels = re.findall(r'text-anchor: middle[^"]*" x="([\d.]+)"[^>]*>([^<]+)<', svg)
    assert max(len(label) for _, label in labels) >= 5
    for x, label in labels:
        assert float(x) + 6.3 * len(label) / 2 <= float(match[1])


# --- through the command -------------------------------------------------------------------------------------


def test_quant_writes_the_page(tiny: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--dataset", dataset, "--config_path", fast_recipe(tmp_path), "--save_format", "compressed_tensors")
    result = quant(tiny, tmp_path / "out", *words).done()
    text = Page((tmp_path / "out" / "quant_report.html").read_text(encoding="utf-8")).text
    assert "Output error of each Linear" in text and "Scales by layer and group: 16 rows" in text
    assert "alpha: 0.5" in text and "iter_smooth" in text and "pip install" not in result.err


def test_quant_works_without_the_extra(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the import system then reports it as missing
    result = quant(tiny, tmp_path / "without", "--config_path", MINMAX).done()
    assert result.err.count("for an HTML report, run: pip install 'msmodelslim_omni[report]'") == 1
    assert not (tmp_path / "without" / "quant_report.html").exists()
    assert (tmp_path / "without" / "quant_report.md").is_file() and (tmp_path / "without" / "README.md").is_file()


def test_report_has_the_peak_rise_of_every_phase(tiny: Path, tmp_path: Path) -> None:
    report = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--json").done().json
    rises = report["peak_rise_by_phase"]
    assert rises.keys() == report["seconds_by_phase"].keys() and all(rise >= 0 for rise in rises.values())
    assert sum(rises.values()) <= report["peak_rss_bytes"]
