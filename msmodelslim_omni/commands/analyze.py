"""`analyze`: sensitivity of the Linears to quantization, and a mixed-precision recipe for a size or a KL."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import completion
from .shell import (
    DATA,
    OUTPUT,
    RECIPE,
    Debug,
    Device,
    Json,
    LogFile,
    LogLevel,
    LogLevelFlag,
    Quiet,
    TrueFalse,
    TrustRemoteCode,
    argument,
    flag,
    messages,
    print_json,
    required,
    results,
    run_with_progress,
    same_as,
)

if TYPE_CHECKING:
    from ..analysis import Analysis
    from .live_progress import TerminalProgress

# Limits for the terminal; analysis.md has all rows and columns.
_SHOWN_UNIT_COLUMNS, _SHOWN_ROUND_COLUMNS = 6, 7


def analyze(
    context: typer.Context,
    path: Annotated[str | None, argument("PATH", "Folder of the float checkpoint, or a hub name in the cache.")] = None,
    save: Annotated[
        str | None,
        argument(
            "SAVE_PATH",
            "Empty or new folder, or of an interrupted analysis: for analysis.json, .md and .html, and for recipe.yaml"
            " and model/ of a recipe. Without it, the result is only printed.",
        ),
    ] = None,
    model_path: Annotated[str | None, same_as("PATH", "model_path")] = None,
    save_path: Annotated[str | None, same_as("SAVE_PATH", "save_path")] = None,
    model_type: Annotated[
        str | None,
        flag(
            "model_type",
            "Model type, e.g. Qwen2.5-Omni-7B. Default: derived from config.json.",
            RECIPE,
            autocompletion=completion.model_types,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        flag(
            "target_size",
            "Choose a mixed recipe whose output is at most this large: 4.2GiB, 6G, 900MB, or bytes.",
            RECIPE,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        flag(
            "max_kl",
            "Choose the smallest mixed recipe whose mean KL(float || quant) is at most this many nats.",
            RECIPE,
        ),
    ] = None,
    dataset: Annotated[
        str,
        flag(
            "dataset",
            "Path of an index.jsonl, its folder, or a .txt file; or a name under lab_calib/.",
            DATA,
            autocompletion=completion.datasets,
        ),
    ] = "calibVideos",
    eval_dataset: Annotated[
        str | None,
        flag(
            "eval_dataset",
            "Samples to evaluate a recipe on. Default: a fifth of the dataset, held out from calibration.",
            DATA,
        ),
    ] = None,
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", DATA, min=1)
    ] = None,
    pattern: Annotated[
        list[str] | None,
        flag(
            "pattern",
            "Measure only units with a Linear whose full name matches, e.g. '*.layers.{0,1}.*' or '*.down_proj', as"
            " include of a recipe does. May be repeated. Not with --target_size or --max_kl.",
            RECIPE,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        list[str] | None,
        flag(
            "steps",
            "What to measure between int4 and float, and to use in a recipe: w8a8, w8a16, fp8. Several, repeated or"
            " joined by commas. Default: w8a8.",
            RECIPE,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, flag("seed", "Seed for selecting samples.", DATA)] = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    topk: Annotated[int, flag("topk", "Rows to print; all are in analysis.md.", OUTPUT, min=1)] = 20,
    overwrite: Annotated[
        bool, flag("overwrite", "Replace an earlier analysis in SAVE_PATH.", OUTPUT, is_flag=True)
    ] = False,
    log_level: LogLevelFlag = LogLevel.info,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank the Linears by sensitivity to quantization, and choose a mixed-precision recipe.

    The ranking lists the most sensitive Linears first, as names for include and exclude of a recipe. With
    --target_size or --max_kl, analyze also writes a recipe with int4 Linears, the most sensitive ones in 8 bits or
    float, and its compressed_tensors checkpoint, evaluated on held-out samples. Exit code 1: no recipe meets --max_kl.
    """
    if save is None and save_path is None:
        (model,) = required(context, model_path=("PATH", path, model_path))
        folder = None
    else:
        model, target = required(
            context, model_path=("PATH", path, model_path), save_path=("SAVE_PATH", save, save_path)
        )
        folder = Path(target)
    if target_size is not None and max_kl is not None:
        raise typer.BadParameter("--target_size and --max_kl exclude each other; give only one")

    def check() -> None:
        from ..files import find_model_folder, parse_size
        from .early_checks import check_output, check_samples

        found = find_model_folder(model)
        if folder is not None:
            check_output(folder, found)
        check_samples(dataset)
        check_samples(eval_dataset)
        if target_size is not None:
            parse_size(target_size)

    def work(progress: TerminalProgress) -> None:
        from ..analysis import analyze as run_analyze
        from ..files import parse_size

        analysis = run_analyze(
            model, dataset, model_type=model_type, device=device, max_samples=max_samples,
            target_size=None if target_size is None else parse_size(target_size), max_kl=max_kl, save_path=folder,
            eval_dataset=eval_dataset, patterns=tuple(pattern or ()), steps=tuple(steps or ("w8a8",)), seed=seed,
            trust_remote_code=trust_remote_code is TrueFalse.true,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
        progress.close()
        if as_json:
            print_json(asdict(analysis))
        else:
            _show(analysis, folder, topk)
        if analysis.choice is not None and not analysis.choice.satisfied:
            messages.print(f"none of the tested recipes has a KL of at most {max_kl:g}; the best one is kept")
            raise typer.Exit(1)

    def stopped() -> str:
        return "run the same command again to continue" if folder is not None else ""

    run_with_progress(
        check, work, debug, stopped=stopped, as_json=as_json, log_level=log_level, quiet=quiet, log_file=log_file
    )


def _show(analysis: Analysis, save_path: Path | None, shown_units: int) -> None:
    from ..analysis import (
        exclude_text,
        round_columns,
        round_rows,
        unit_columns,
        unit_rows,
    )
    from .tables import table

    rows = [row[:_SHOWN_UNIT_COLUMNS] for row in unit_rows(analysis.units, shown_units)]
    counts = f" ({len(rows)} of {len(analysis.units)})" if len(rows) < len(analysis.units) else ""
    results.print(
        table(f"Units by damage of int4{counts}", list(unit_columns(analysis.units)[:_SHOWN_UNIT_COLUMNS]), rows, 1)
    )
    if analysis.scope:
        results.print(analysis.scope, soft_wrap=True, markup=False)
    results.print("Smallest set of units that causes half of the damage:")
    results.print(exclude_text(analysis.exclude), soft_wrap=True, markup=False)
    if analysis.choice is not None:
        rows = [row[:_SHOWN_ROUND_COLUMNS] for row in round_rows(analysis.choice)]
        results.print(table("Rounds (* chosen)", list(round_columns(analysis.choice)[:_SHOWN_ROUND_COLUMNS]), rows, 1))
        results.print(f"recipe {analysis.choice.recipe}, model {analysis.choice.model}", soft_wrap=True, markup=False)
    for warning in analysis.warnings:
        messages.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if save_path is not None:
        results.print(f"report {save_path / 'analysis.md'}", soft_wrap=True, markup=False)
    else:
        messages.print("nothing was saved; give SAVE_PATH to keep all rows")
