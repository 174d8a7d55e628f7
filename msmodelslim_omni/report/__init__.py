"""Documents about a run: quant_report as JSON, Markdown and HTML, the model card, the evaluation report.

report.py and fidelity.py define the data, the other files render them, and html/ builds the HTML page.
May import: processors, compatibility, formats, models, runtime, storage, files, errors.
Not here, on purpose: measurements. run/measure.py and evaluation/ compute the numbers.
"""

from __future__ import annotations

from .documents import stored_recipe, stored_report, write_documents, write_evaluation
from .eval_report import (
    FIGURES_NOTE,
    check_fewer_samples,
    figure_rows,
    judge_speech,
    judgement,
    speech_rows,
    write_eval_report,
)
from .fidelity import (
    AnswerPair,
    EvalReport,
    Fidelity,
    Interval,
    LayerDrift,
    Preview,
    ShownAnswer,
    ShownSpeech,
    SpokenPair,
)
from .html.charts import heat_map
from .html.page import INSTALL_HINT, can_write_html, render_page
from .html.sections import Article, Chart, Section, Table, Tile
from .kept import KeptUnit
from .next_steps import next_steps
from .report import (
    LEFT_OUT,
    RUN_MEMORY_COLUMNS,
    LayerRecord,
    LinearRecord,
    PartSize,
    Report,
    TuningRecord,
    human_bytes,
    kept_units,
    layer_record,
    markdown_table,
    part_errors,
    peak_text,
    read_report,
    run_memory_rows,
    tuning_record,
)
from .run_memory import RunMemory, run_memory

__all__ = [
    "FIGURES_NOTE",
    "INSTALL_HINT",
    "LEFT_OUT",
    "RUN_MEMORY_COLUMNS",
    "AnswerPair",
    "Article",
    "Chart",
    "EvalReport",
    "Fidelity",
    "Interval",
    "KeptUnit",
    "LayerDrift",
    "LayerRecord",
    "LinearRecord",
    "PartSize",
    "Preview",
    "Report",
    "RunMemory",
    "Section",
    "ShownAnswer",
    "ShownSpeech",
    "SpokenPair",
    "Table",
    "Tile",
    "TuningRecord",
    "can_write_html",
    "check_fewer_samples",
    "figure_rows",
    "heat_map",
    "human_bytes",
    "judge_speech",
    "judgement",
    "kept_units",
    "layer_record",
    "markdown_table",
    "next_steps",
    "part_errors",
    "peak_text",
    "read_report",
    "render_page",
    "run_memory",
    "run_memory_rows",
    "speech_rows",
    "stored_recipe",
    "stored_report",
    "tuning_record",
    "write_documents",
    "write_eval_report",
    "write_evaluation",
]
