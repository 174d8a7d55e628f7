"""`doctor`: check a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .shell import (
    Debug,
    Json,
    messages,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)

if TYPE_CHECKING:
    from ..doctor import Diagnosis


def doctor(
    path: Annotated[
        Path, typer.Argument(help="Folder of a quantized checkpoint, made by msmodelslim or another tool.")
    ],
    source: Annotated[
        Path | None, typer.Option(help="Folder of the float checkpoint it was made from; also compares the weights.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a quantized checkpoint and show which runtimes can load it. Exit code 1 if there is an error."""

    def work() -> None:
        from ..doctor import examine

        with messages.status("examining") as status:
            diagnosis = examine(path, source, on_check=lambda check: status.update(f"examining {check}"))
        if as_json:
            print_json(diagnosis.as_dict())
        else:
            _print_diagnosis(results, diagnosis)
        if not diagnosis.healthy:
            raise typer.Exit(1)

    quiet_libraries()
    run_verb(work, debug, as_json=as_json)


_LEVEL_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print the findings as a table; below it, once per finding code, why it matters and what to do."""
    built = Table(title=f"{diagnosis.path}: {diagnosis.format or 'no format'}", title_justify="left")
    for column in ("", "check", "where", "finding"):
        built.add_column(column, overflow="fold", no_wrap=column in ("", "check"))
    kinds = {}
    for finding in diagnosis.findings:
        style = _LEVEL_STYLES[finding.level]
        description = f"{finding.code}: {finding.what}" if finding.code else finding.what
        built.add_row(Text(finding.level, style), Text(finding.check), Text(finding.where), Text(description))
        if finding.code:
            kinds[finding.code] = finding
    console.print(built)
    for code, finding in kinds.items():
        unlisted = f" ({diagnosis.unlisted[code]} more of this kind)" if code in diagnosis.unlisted else ""
        runtimes = f" [{', '.join(finding.runtimes)}]" if finding.runtimes else ""
        console.print(
            Text.assemble(
                (code, _LEVEL_STYLES[finding.level]), f"{unlisted}: {finding.why}{runtimes}. To do: {finding.todo}."
            ),
            soft_wrap=True,
        )
    if diagnosis.stopped:
        console.print(Text(f"not examined: tensors, names, weights; {diagnosis.stopped}"), soft_wrap=True)
    if diagnosis.loads:
        _print_verdict(console, diagnosis)
    errors, warnings = f"{diagnosis.errors} errors", f"{diagnosis.warnings} warnings"
    console.print(Text(f"{errors}, {warnings}", _LEVEL_STYLES["ok" if diagnosis.healthy else "error"]))


_VERDICT_STYLES = {"yes": "green", "no": "bold red", "unknown": "yellow"}


def _print_verdict(console: Console, diagnosis: Diagnosis) -> None:
    """Print for every runtime whether it loads the checkpoint, how, and by which proof."""
    from ..compatibility import RUNTIMES

    built = Table(title="Loads in", title_justify="left")
    for column in ("runtime", "loads", "how, or why not", "proof"):
        built.add_column(column, overflow="fold", no_wrap=column in ("loads", "proof"))
    for runtime, loads in diagnosis.loads.items():
        verdict = "cannot tell" if loads.verdict == "unknown" else loads.verdict
        built.add_row(
            Text(RUNTIMES[runtime]), Text(verdict, _VERDICT_STYLES[loads.verdict]), Text(loads.how), Text(loads.proof)
        )
    console.print(built)
