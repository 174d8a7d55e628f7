"""`doctor`: whether a quantized checkpoint loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import Debug, Json, guarded, messages, print_json, quiet_libraries, results


def doctor(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint, of ours or another tool's.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder of the float checkpoint it was made from, to compare the weights too.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Whether a quantized checkpoint loads and where, or what is wrong with it. Exit 1 if anything is."""

    def work() -> None:
        from ..doctor import examine

        with messages.status("examining") as status:
            diagnosis = examine(path, source, on_check=lambda check: status.update(f"examining {check}"))
        if as_json:
            print_json(diagnosis.as_dict())
        else:
            from ..terminal import print_diagnosis

            print_diagnosis(results, diagnosis)
        if not diagnosis.healthy:
            raise typer.Exit(1)

    quiet_libraries()
    guarded(work, debug)
