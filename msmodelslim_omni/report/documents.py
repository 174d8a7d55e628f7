"""What lies beside the weights for people: the report as JSON, Markdown and HTML, and the model card.

The HTML needs the extra `report`; without it everything else is as it would be, and one line says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from ..errors import QuantError
from ..files import read_regular, write_aside
from ..models import ModelSpec
from ..processors import SmoothingRecord
from ..runtime import Progress
from .fidelity import EvalReport
from .html.page import (
    HTML_NAME,
    INSTALL,
    as_html,
    can_write_html,
)
from .model_card import renew_evaluation, write_card
from .report import Report, read_report, write_report

_MAX_RECIPE = 1 << 20


def write_documents(
    report: Report, folders: Mapping[str, Path], model: ModelSpec, recipe_text: str, progress: Progress
) -> None:
    """The report and the card into each saver's finished output."""
    page = _page(report, None, recipe_text, progress)
    for saver, folder in folders.items():
        write_report(report, folder)
        write_card(folder, report, saver, model, recipe_text)
        if page:
            (folder / HTML_NAME).write_text(page, encoding="utf-8")


def write_evaluation(evaluation: EvalReport, folder: Path, progress: Progress) -> None:
    """The page of an evaluation into `folder`, beside its JSON, and its figures into the evaluated output's card.

    The page also tells how the output was quantized, where it holds a report of ours.
    """
    output = Path(evaluation.quant_path)
    report = stored_report(output)
    recipe_text = stored_recipe(output, report) if report else ""
    try:
        if page := _page(report, evaluation, recipe_text, progress):
            write_aside(folder / HTML_NAME, page)
    except OSError as error:
        raise QuantError(
            f"the report cannot be written to {str(folder)!r}: {error.strerror or error}", "give another --save_path"
        ) from error
    try:
        if renew_evaluation(output, evaluation):
            progress.say(f"the figures are in {output / 'README.md'} too")
    except OSError as error:  # a folder that is shared, and not ours to write: the evaluation is done all the same
        progress.say(f"warning: {output / 'README.md'} does not get the figures: {error.strerror or error}")


def stored_report(output: Path) -> Report | None:
    """The report that an output holds; None where it holds none, or one of another tool or version."""
    try:
        report = read_report(output)
        smoothing = [entry for layer in report.layers for entry in layer.smoothing]
        TypeAdapter(Report).validate_json(json.dumps(asdict(report)), strict=True)
        TypeAdapter(list[SmoothingRecord]).validate_json(json.dumps(smoothing), strict=True)
    except (QuantError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return report


def stored_recipe(output: Path, report: Report) -> str:
    """The recipe that lies in an output, or an empty text."""
    file = output / f"{Path(report.recipe).stem}.yaml"
    try:
        return read_regular(file, _MAX_RECIPE).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _page(report: Report | None, evaluation: EvalReport | None, recipe_text: str, progress: Progress) -> str:
    """The HTML; an empty text without the extra."""
    if not can_write_html():
        progress.say(INSTALL)
        return ""
    return as_html(report, evaluation, recipe_text)
