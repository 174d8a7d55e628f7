"""The report as one self-contained HTML page: no requests, no scripts, light or dark as the browser prefers.

Needs the extra `report` (matplotlib, jinja2). Names in a report come from untrusted checkpoints and recipes, so the
template escapes every value except the SVG drawings of charts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..fidelity import EvalReport, ShownAnswer, ShownSpeech
from ..report import Report
from .sections import Article

HTML_NAME, EVAL_HTML_NAME = "quant_report.html", "eval_report.html"
INSTALL_HINT = "for an HTML report, run: pip install 'msmodelslim_omni[report]'"


def can_write_html() -> bool:
    """Return whether the extra `report` is installed."""
    return find_spec("matplotlib") is not None and find_spec("jinja2") is not None


def as_html(
    report: Report | None,
    evaluation: EvalReport | None,
    recipe_text: str = "",
    answers: Sequence[ShownAnswer] = (),
    speech: Sequence[ShownSpeech] = (),
) -> str:
    """Render the page of a quantization, an evaluation, or both; the evaluation comes first.

    answers, speech: those to show in it.
    """
    from .evaluation import evaluation_article
    from .quantization import quantization_article

    articles: list[Article] = []
    if evaluation is not None:
        articles.append(evaluation_article(evaluation, answers, speech))
    if report is not None:
        articles.append(quantization_article(report, recipe_text))
    return render_page(articles)


def render_page(articles: Sequence[Article]) -> str:
    """Render articles as one page, under the title of the first."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = articles[0].title if articles else "Report"
    return template.render(title=title, articles=articles) + "\n"
