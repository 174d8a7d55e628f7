"""`inspect`: what is in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .shell import (
    Debug,
    Json,
    guarded,
    print_json,
    quiet_libraries,
    results,
)


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a float or quantized checkpoint.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What is in a checkpoint: parts, dtypes, bytes, scheme."""

    def work() -> None:
        from ..quantized import inspect_checkpoint
        from ..report import RUN_MEMORY_COLUMNS, human_bytes, run_memory_rows
        from .tables import table

        found = inspect_checkpoint(path)
        if as_json:
            print_json({**asdict(found), "bytes": found.nbytes})
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
            for part in found.parts
        ]
        rows.append(["total", found.scheme, f"{found.files} files", *_totals(found.parts), human_bytes(found.nbytes)])
        columns = ["part", "scheme", "dtypes", "tensors", "parameters", "bytes"]
        results.print(table(f"{found.path}: {found.model_type}", columns, rows, numeric=3))
        rows = run_memory_rows(found.run_memory)
        results.print(table("At run time, foretold", list(RUN_MEMORY_COLUMNS), rows, numeric=1))

    quiet_libraries()
    guarded(work, debug)


def _totals(parts: Any) -> list[str]:
    return [
        f"{sum(part.tensors for part in parts)}",
        f"{sum(part.parameters for part in parts) / 1e6:,.1f} M",
    ]
