"""`export`: convert a quantized checkpoint to another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import completion
from .shell import (
    Debug,
    Json,
    LogFile,
    LogLevel,
    LogLevelFlag,
    Quiet,
    argument,
    flag,
    print_json,
    required,
    results,
    run_with_progress,
    same_as,
)

if TYPE_CHECKING:
    from .live_progress import TerminalProgress


def export(
    context: typer.Context,
    path: Annotated[str | None, argument("PATH", "Folder of a quantized checkpoint, as written by `quant`.")] = None,
    save: Annotated[
        str | None, argument("SAVE_PATH", "Output folder: empty, new, or of an interrupted export.")
    ] = None,
    save_path: Annotated[str | None, same_as("SAVE_PATH", "save_path")] = None,
    save_format: Annotated[
        str | None,
        flag(
            "save_format",
            "Format to write: awq, compressed_tensors, ascendv1_saver, or gguf for llama.cpp (the text decoder).",
            autocompletion=completion.save_formats,
        ),
    ] = None,
    thinker_only: Annotated[
        bool, flag("thinker_only", "Omit talker and token2wav; the output answers in text only.", is_flag=True)
    ] = False,
    part_file_size: Annotated[int, flag("part_file_size", "Shard size in GB; 0: a single file.", min=0)] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output in SAVE_PATH.")] = False,
    log_level: LogLevelFlag = LogLevel.info,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a quantized checkpoint to another format, without quantizing again."""
    source, target, wanted = required(
        context, path=("PATH", path, None), save_path=("SAVE_PATH", save, save_path),
        save_format=("--save_format", save_format, None),
    )  # fmt: skip

    def check() -> None:
        from ..files import find_model_folder
        from ..recipe import saver_names
        from .early_checks import check_output

        check_output(Path(target), find_model_folder(source))
        if not _is_gguf(wanted):
            saver_names([wanted])

    def work(progress: TerminalProgress) -> None:
        if _is_gguf(wanted):
            _to_gguf(source, target, overwrite, progress, as_json)
            return
        from ..quantized import export as run_export
        from ..report import human_bytes
        from .tables import table

        result = run_export(
            source, target, wanted, thinker_only=thinker_only, part_file_size=part_file_size, overwrite=overwrite,
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

    def stopped() -> str:
        return "run the same command again to continue"

    run_with_progress(
        check, work, debug, stopped=stopped, as_json=as_json, log_level=log_level, quiet=quiet, log_file=log_file
    )


def _is_gguf(save_format: str) -> bool:
    return save_format.strip().lower() == "gguf"


def _to_gguf(source: str, target: str, overwrite: bool, progress: TerminalProgress, as_json: bool) -> None:
    from ..quantized import export_gguf
    from ..report import human_bytes

    result = export_gguf(source, target, overwrite=overwrite, progress=progress)
    progress.close()
    if as_json:
        print_json(asdict(result))
        return
    lost = f"{result.lost:.2g} of the weights (float16 constants)" if result.lost else "nothing"
    results.print(f"{result.path}: {human_bytes(result.output_bytes)}, {result.linears} quantized Linears")
    results.print(f"types: {', '.join(result.types)}; lost: {lost}")
    results.print(f"left out: {', '.join(result.left_out)}. The file answers text; towers are another file (mmproj).")
