"""`export`: convert a quantized checkpoint to another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shell import (
    Debug,
    Json,
    flag,
    messages,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)


def export(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint, as written by `quant`.")],
    save_path: Annotated[Path, flag("save_path", "Output folder: empty, new, or of an interrupted export.")],
    save_format: Annotated[str, flag("save_format", "Format to write: awq, compressed_tensors or ascendv1_saver.")],
    thinker_only: Annotated[
        bool, flag("thinker_only", "Omit talker and token2wav; the output answers in text only.", is_flag=True)
    ] = False,
    part_file_size: Annotated[int, flag("part_file_size", "Shard size in GB; 0: a single file.", min=0)] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output in SAVE_PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a quantized checkpoint to another format, without quantizing again."""
    from .live_progress import TerminalProgress
    from .tables import table

    progress = TerminalProgress(messages)
    quiet_libraries()

    def work() -> None:
        from ..quantized import export as run_export
        from ..report import human_bytes

        result = run_export(
            path, save_path, save_format, thinker_only=thinker_only, part_file_size=part_file_size, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
        progress.close()
        if as_json:
            print_json(asdict(result))
            return
        rows = [
            [result.source_format, result.source, human_bytes(result.source_bytes)],
            [result.save_format, result.path, human_bytes(result.output_bytes)],
            *([["omitted", "talker, token2wav", human_bytes(result.left_out_bytes)]] if thinker_only else []),
        ]
        results.print(table(f"{result.linears} quantized Linears", ["format", "folder", "bytes"], rows, numeric=2))

    try:
        run_verb(work, debug, stopped="run the same command again to continue")
    finally:
        progress.close()
