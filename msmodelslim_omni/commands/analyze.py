"""`analyze`: which Linears lose most by quantization, and a mixed recipe for a size or a KL."""

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
    guarded,
    messages,
    print_json,
    quiet_libraries,
    results,
)

if TYPE_CHECKING:
    from ..analysis import Analysis

# What fits a terminal; analysis.md has all.
_SHOWN_UNITS, _SHOWN_UNIT_COLUMNS, _SHOWN_ROUND_COLUMNS = 20, 6, 7


def analyze(
    model_path: Annotated[Path, flag("model_path", "Folder of the float checkpoint (config.json, safetensors).")],
    dataset: Annotated[
        str, typer.Option(help=f"index.jsonl, its folder, or a name under lab_calib/. {INDEX_LIMITS} {MEDIA_LIMITS}")
    ] = "calibVideos",
    model_type: Annotated[
        str | None, flag("model_type", "e.g. Qwen2.5-Omni-7B; left out: derived from config.json.")
    ] = None,
    device: Device = "auto",
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most this many samples, a seeded choice.", min=1)
    ] = None,
    target_size: Annotated[
        str | None,
        flag("target_size", "Choose a mixed recipe whose whole output keeps within this: 4.2GiB, 900MB, or bytes."),
    ] = None,
    max_kl: Annotated[
        float | None,
        flag("max_kl", "Choose the smallest mixed recipe whose mean KL(float || quant) keeps within so many nats."),
    ] = None,
    save_path: Annotated[
        Path | None,
        flag("save_path", "Empty or new folder for analysis.json and .md; of a choice also recipe.yaml and model/."),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        flag(
            "eval_dataset", "Samples to judge a recipe by; left out: a fifth of the dataset, kept out of calibration."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier analysis in SAVE_PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which Linears lose most by quantization, worst first, ready for include and exclude of a recipe.

    With --target_size or --max_kl also a recipe of int4 Linears, with the worst raised to int8 or left float, and the
    compressed_tensors checkpoint it makes, judged on samples that it has not seen. Exit 1 if no recipe keeps within
    --max_kl.
    """
    if target_size is not None and max_kl is not None:
        raise typer.BadParameter("--target_size and --max_kl exclude each other; give one of them")
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
            messages.print(f"no recipe that was tried keeps within a KL of {max_kl:g}; kept is the best of them")
            raise typer.Exit(1)

    try:
        guarded(work, debug)
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
    more = f" ({len(rows)} of {len(analysis.units)})" if len(rows) < len(analysis.units) else ""
    results.print(table(f"Units by the damage of int4{more}", list(UNIT_COLUMNS[:_SHOWN_UNIT_COLUMNS]), rows, 1))
    results.print("The fewest units that make half of that damage:")
    results.print(exclude_text(analysis.exclude), soft_wrap=True, markup=False)
    if analysis.choice is not None:
        rows = [row[:_SHOWN_ROUND_COLUMNS] for row in round_rows(analysis.choice)]
        results.print(table("Rounds, the chosen one marked *", list(ROUND_COLUMNS[:_SHOWN_ROUND_COLUMNS]), rows, 1))
        results.print(f"recipe {analysis.choice.recipe}, model {analysis.choice.model}", soft_wrap=True, markup=False)
    for warning in analysis.warnings:
        messages.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if save_path is not None:
        results.print(f"report {save_path / 'analysis.md'}", soft_wrap=True, markup=False)
