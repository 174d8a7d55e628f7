"""Writes the documents of an output: the report as JSON, Markdown and HTML, and the model card.

The HTML page needs the extra `report`. Without the extra, one message says so and the other documents are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from ..errors import QuantError
from ..files import read_regular, write_atomically
from ..models import ModelSpec
from ..processors import SmoothingRecord
from ..runtime import Progress
from .fidelity import EvalReport, ShownAnswer, ShownSpeech
from .html.page import (
    EVAL_HTML_NAME,
    HTML_NAME,
    INSTALL_HINT,
    as_html,
    can_write_html,
)
from .model_card import CARD_NAME, samples_in_card, update_evaluation, write_card
from .report import Report, human_bytes, read_report, write_report

_MAX_RECIPE = 1 << 20


def write_documents(
    report: Report, folders: Mapping[str, Path], model: ModelSpec, recipe_text: str, progress: Progress
) -> None:
    """Write the report and the model card into the finished output of each saver."""
    page = _render_page(report, None, (), (), recipe_text, progress)
    for saver, folder in folders.items():
        write_report(report, folder)
        write_card(folder, report, saver, model, recipe_text)
        if page:
            (folder / HTML_NAME).write_text(page, encoding="utf-8")


def write_evaluation(
    evaluation: EvalReport,
    answers: Sequence[ShownAnswer],
    folder: Path,
    progress: Progress,
    *,
    speech: Sequence[ShownSpeech] = (),
    update_card: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the HTML page of an evaluation to `folder`; with update_card, its figures to the output's model card.

    The page also covers the quantization if the output holds a readable quantization report. overwrite: figures of
    fewer samples may replace those of more. answers, speech: those that the page shows.
    """
    output = Path(evaluation.quant_path)
    report = stored_report(output)
    recipe_text = stored_recipe(output, report) if report else ""
    try:
        if page := _render_page(report, evaluation, answers, speech, recipe_text, progress):
            write_atomically(folder / EVAL_HTML_NAME, page)
            progress.say(f"page: {folder / EVAL_HTML_NAME}, {human_bytes(len(page.encode()))}, one file without links")
    except OSError as error:
        raise QuantError(
            f"the report cannot be written to {str(folder)!r}: {error.strerror or error}", "give another --save_path"
        ) from error
    if not update_card:
        return
    card = output / CARD_NAME
    try:
        if (stored := samples_in_card(output)) > evaluation.samples and not overwrite:
            progress.say(
                f"warning: {card} keeps its figures of {stored} samples; --overwrite puts those of"
                f" {evaluation.samples} in their place"
            )
        elif update_evaluation(output, evaluation):
            progress.say(f"added the figures to the model card {card}")
        else:
            progress.say(f"warning: {card} is not a card of msmodelslim, so it was not changed")
    except OSError as error:  # e.g. a shared, read-only folder; the evaluation itself is complete
        progress.say(f"warning: cannot add the figures to {card}: {error.strerror or error}")


def stored_report(output: Path) -> Report | None:
    """Return the report of an output, or None if there is no report or it has another tool's or version's fields."""
    try:
        report = read_report(output)
        smoothing = [entry for layer in report.layers for entry in layer.smoothing]
        TypeAdapter(Report).validate_json(json.dumps(asdict(report)), strict=True)
        TypeAdapter(list[SmoothingRecord]).validate_json(json.dumps(smoothing), strict=True)
    except (QuantError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return report


def stored_recipe(output: Path, report: Report) -> str:
    """Return the text of the recipe in an output, or an empty string if it cannot be read."""
    file = output / f"{Path(report.recipe).stem}.yaml"
    try:
        return read_regular(file, _MAX_RECIPE).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _render_page(
    report: Report | None,
    evaluation: EvalReport | None,
    answers: Sequence[ShownAnswer],
    speech: Sequence[ShownSpeech],
    recipe_text: str,
    progress: Progress,
) -> str:
    """Return the HTML page, or an empty string if the extra `report` is not installed."""
    if not can_write_html():
        progress.say(INSTALL_HINT)
        return ""
    return as_html(report, evaluation, recipe_text, answers, speech)
