"""`export`: another format from the same integers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shell import (
    Debug,
    Json,
    flag,
    guarded,
    messages,
    print_json,
    quiet_libraries,
    results,
)


def export(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint: an output of `quant`.")],
    save_path: Annotated[Path, flag("save_path", "Folder to write; empty, new, or that of a stopped export.")],
    save_format: Annotated[str, flag("save_format", "awq, compressed_tensors or ascendv1_saver.")],
    thinker_only: Annotated[
        bool, flag("thinker_only", "Leave out talker and token2wav; the output answers in text only.", is_flag=True)
    ] = False,
    part_file_size: Annotated[int, flag("part_file_size", "GB of a shard; 0: one file.", min=0)] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in SAVE_PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, without quantizing again."""
    from .live_progress import TerminalProgress
    from .tables import table

    progress = TerminalProgress(messages)
    quiet_libraries()

    def work() -> None:
        from ..quantized import export as run_export
        from ..report import human_bytes

        done = run_export(
            path, save_path, save_format, thinker_only=thinker_only, part_file_size=part_file_size, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
        progress.close()
        if as_json:
            print_json(asdict(done))
            return
        rows = [
            [done.source_format, done.source, human_bytes(done.source_bytes)],
            [done.save_format, done.path, human_bytes(done.output_bytes)],
            *([["left out", "talker, token2wav", human_bytes(done.left_out_bytes)]] if thinker_only else []),
        ]
        results.print(table(f"{done.linears} quantized Linears", ["format", "folder", "bytes"], rows, numeric=2))

    try:
        guarded(work, debug, stopped="run the same command again to go on")
    finally:
        progress.close()
