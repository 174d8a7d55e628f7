"""`inspect`: show the contents of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .shell import (
    Debug,
    Json,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)


def inspect(
    path: Annotated[str, typer.Argument(help="Folder of a float or quantized checkpoint.", metavar="PATH")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the contents of a checkpoint: parts, schemes, dtypes, sizes, and estimated memory at run time."""

    def work() -> None:
        from ..quantized import inspect_checkpoint
        from ..report import RUN_MEMORY_COLUMNS, human_bytes, run_memory_rows
        from .tables import table

        inspection = inspect_checkpoint(path)
        if as_json:
            print_json({**asdict(inspection), "bytes": inspection.nbytes})
            return
        rows = [
            [
                part.name,
                part.scheme,
                ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in sorted(part.dtypes.items())),
                f"{part.tensors}",
                f"{part.parameters / 1e6:,.1f} M",
                human_bytes(part.nbytes),
            ]
            for part in inspection.parts
        ]
        rows.append(
            [
                "total",
                inspection.scheme,
                f"{inspection.files} files",
                *_totals(inspection.parts),
                human_bytes(inspection.nbytes),
            ]
        )
        columns = ["part", "scheme", "dtypes", "tensors", "parameters", "bytes"]
        results.print(table(f"{inspection.path}: {inspection.model_type}", columns, rows, numeric=3))
        rows = run_memory_rows(inspection.run_memory)
        results.print(table("Estimated memory at run time", list(RUN_MEMORY_COLUMNS), rows, numeric=1))

    quiet_libraries()
    run_verb(work, debug, as_json=as_json)


def _totals(parts: Any) -> list[str]:
    return [
        f"{sum(part.tensors for part in parts)}",
        f"{sum(part.parameters for part in parts) / 1e6:,.1f} M",
    ]
