"""`analyze`: sensitivity of the Linears to quantization, and a mixed-precision recipe for a size or a KL."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import (
    INDEX_LIMITS,
    MEDIA_LIMITS,
    Debug,
    Device,
    Json,
    TrueFalse,
    TrustRemoteCode,
    flag,
    messages,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)

if TYPE_CHECKING:
    from ..analysis import Analysis

# Limits for the terminal; analysis.md has all rows and columns.
_SHOWN_UNITS, _SHOWN_UNIT_COLUMNS, _SHOWN_ROUND_COLUMNS = 20, 6, 7


def analyze(
    model_path: Annotated[Path, flag("model_path", "Folder of the float checkpoint (config.json, safetensors).")],
    dataset: Annotated[
        str,
        typer.Option(
            help=f"Path of index.jsonl or its folder, or a name under lab_calib/. {INDEX_LIMITS} {MEDIA_LIMITS}"
        ),
    ] = "calibVideos",
    model_type: Annotated[
        str | None, flag("model_type", "Model type, e.g. Qwen2.5-Omni-7B. Default: derived from config.json.")
    ] = None,
    device: Device = "auto",
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", min=1)
    ] = None,
    target_size: Annotated[
        str | None,
        flag("target_size", "Choose a mixed recipe whose output is at most this large: 4.2GiB, 900MB, or bytes."),
    ] = None,
    max_kl: Annotated[
        float | None,
        flag("max_kl", "Choose the smallest mixed recipe whose mean KL(float || quant) is at most this many nats."),
    ] = None,
    save_path: Annotated[
        Path | None,
        flag("save_path", "Empty or new folder for analysis.json and .md, and for recipe.yaml and model/ of a recipe."),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        flag(
            "eval_dataset",
            "Samples to evaluate a recipe on. Default: a fifth of the dataset, held out from calibration.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for selecting samples.")] = 0,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier analysis in SAVE_PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank the Linears by sensitivity to quantization, and choose a mixed-precision recipe.

    The ranking lists the most sensitive Linears first, as names for include and exclude of a recipe. With
    --target_size or --max_kl, analyze also writes a recipe with int4 Linears, the most sensitive ones in int8 or float,
    and its compressed_tensors checkpoint, evaluated on held-out samples. Exit code 1 if no recipe meets --max_kl.
    """
    if target_size is not None and max_kl is not None:
        raise typer.BadParameter("--target_size and --max_kl exclude each other; give only one")
    from .live_progress import TerminalProgress

    progress = TerminalProgress(messages)
    quiet_libraries()

    def work() -> None:
        from ..analysis import analyze as run_analyze
        from ..runtime import parse_size

        analysis = run_analyze(
            model_path, dataset, model_type=model_type, device=device, max_samples=max_samples,
            target_size=None if target_size is None else parse_size(target_size), max_kl=max_kl, save_path=save_path,
            eval_dataset=eval_dataset, seed=seed, trust_remote_code=trust_remote_code is TrueFalse.true,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
        progress.close()
        if as_json:
            print_json(asdict(analysis))
        else:
            _show(analysis, save_path)
        if analysis.choice is not None and not analysis.choice.satisfied:
            messages.print(f"none of the tested recipes has a KL of at most {max_kl:g}; the best one is kept")
            raise typer.Exit(1)

    try:
        run_verb(work, debug)
    finally:
        progress.close()


def _show(analysis: Analysis, save_path: Path | None) -> None:
    from ..analysis import (
        ROUND_COLUMNS,
        UNIT_COLUMNS,
        exclude_text,
        round_rows,
        unit_rows,
    )
    from .tables import table

    rows = [row[:_SHOWN_UNIT_COLUMNS] for row in unit_rows(analysis.units, _SHOWN_UNITS)]
    counts = f" ({len(rows)} of {len(analysis.units)})" if len(rows) < len(analysis.units) else ""
    results.print(table(f"Units by damage of int4{counts}", list(UNIT_COLUMNS[:_SHOWN_UNIT_COLUMNS]), rows, 1))
    results.print("Smallest set of units that causes half of the damage:")
    results.print(exclude_text(analysis.exclude), soft_wrap=True, markup=False)
    if analysis.choice is not None:
        rows = [row[:_SHOWN_ROUND_COLUMNS] for row in round_rows(analysis.choice)]
        results.print(table("Rounds (* chosen)", list(ROUND_COLUMNS[:_SHOWN_ROUND_COLUMNS]), rows, 1))
        results.print(f"recipe {analysis.choice.recipe}, model {analysis.choice.model}", soft_wrap=True, markup=False)
    for warning in analysis.warnings:
        messages.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if save_path is not None:
        results.print(f"report {save_path / 'analysis.md'}", soft_wrap=True, markup=False)
