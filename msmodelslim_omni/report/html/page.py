"""The report as one HTML page: nothing is fetched, nothing runs, and it is light or dark as its reader's screen is.

Needs the extra `report` (matplotlib, jinja2). Names in a report come from checkpoints and recipes of others, so the
template escapes all that it is handed; only the drawings of charts.py are put in as they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..fidelity import EvalReport
from ..report import Report
from .sections import Story

HTML_NAME = "quant_report.html"
INSTALL = "pip install 'msmodelslim_omni[report]' writes an HTML report too"


def can_write_html() -> bool:
    """Whether the extra is installed."""
    return find_spec("matplotlib") is not None and find_spec("jinja2") is not None


def as_html(report: Report | None, evaluation: EvalReport | None, recipe_text: str = "") -> str:
    """The page of a quantization, of an evaluation, or of both: then what the evaluation found comes first."""
    from jinja2 import Environment, StrictUndefined

    from .evaluation import evaluation_story
    from .quantization import quantization_story

    stories: list[Story] = []
    if evaluation is not None:
        stories.append(evaluation_story(evaluation))
    if report is not None:
        stories.append(quantization_story(report, recipe_text))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = stories[0].title if stories else "Report"
    return page.render(title=title, stories=stories) + "\n"
