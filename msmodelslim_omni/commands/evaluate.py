"""`eval`: compare a quantized model with its float model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from ..report import EvalReport

# Minimum width of the terminal for the intervals of every modality.
_MIN_WIDTH_FOR_INTERVALS = 120


class PositionsFlag(str, Enum):
    auto = "auto"
    answer = "answer"
    text = "text"


class OnBadSample(str, Enum):
    fail = "fail"
    skip = "skip"


def eval_(
    float_: Annotated[Path, flag("float", "Folder of the float checkpoint.")],
    quant: Annotated[Path, flag("quant", "Folder of the checkpoint to compare: any supported format, or float.")],
    dataset: Annotated[
        str,
        flag(
            "dataset", f"Path of index.json(l) or its folder, or a name under lab_calib/. {INDEX_LIMITS} {MEDIA_LIMITS}"
        ),
    ],
    device: Device = "auto",
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", min=1)
    ] = None,
    max_tokens: Annotated[int, flag("max_tokens", "Maximum length of a sample in tokens.", min=1)] = 8192,
    max_pixels: Annotated[
        int, flag("max_pixels", "Downscale images and video frames to at most N pixels.", min=784)
    ] = 200704,
    video_fps: Annotated[
        float, flag("video_fps", "Frames per second that are read from a video.", min=0.01, max=100.0)
    ] = 2.0,
    positions: Annotated[
        PositionsFlag,
        flag(
            "positions", "Tokens to score: the answer, all text, or (auto) the answer if there is one, else all text."
        ),
    ] = PositionsFlag.auto,
    exact_match: Annotated[
        TrueFalse, flag("exact_match", "Fail if the dataset has no answers.", case_sensitive=False)
    ] = TrueFalse.false,
    seed: Annotated[int, flag("seed", "Seed for the intervals and for --max_samples.", min=0)] = 0,
    save_path: Annotated[
        Path | None, flag("save_path", "Folder for eval_report.json and .md. Default: eval/ in a quantized checkpoint.")
    ] = None,
    on_bad_sample: Annotated[
        OnBadSample, flag("on_bad_sample", "Fail on a sample that cannot be used, or skip it.")
    ] = OnBadSample.fail,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized checkpoint with its float model on your samples, overall and by modality.

    Reports KL of next-token distributions, top-1 and top-5 agreement, perplexity, exact match of answers, and drift of
    the states that the talker reads, with bootstrap intervals. Both models run layer by layer, in the memory of one
    layer.
    """
    from .live_progress import TerminalProgress

    progress = TerminalProgress(messages)
    quiet_libraries()

    def work() -> None:
        from ..evaluation import default_save_path, evaluate

        folder = save_path or default_save_path(quant)
        report = evaluate(
            float_, quant, dataset, device=device, max_samples=max_samples, max_tokens=max_tokens,
            max_pixels=max_pixels, video_fps=video_fps, exact_match=exact_match is TrueFalse.true,
            positions=positions.value, seed=seed, save_path=folder,
            trust_remote_code=trust_remote_code is TrueFalse.true, on_bad_sample=on_bad_sample.value,
            progress=progress,
        )  # fmt: skip
        progress.close()
        for warning in report.warnings:
            progress.say(f"warning: {warning}")
        if folder is not None:
            progress.say(f"report: {folder}")
        if as_json:
            from dataclasses import asdict

            print_json(asdict(report))
        else:
            _print_report(report)

    try:
        run_verb(work, debug)
    finally:
        progress.close()


def _print_report(report: EvalReport) -> None:
    from ..report import FIGURES_NOTE, figure_rows
    from .tables import table

    columns, rows = figure_rows(report, all_intervals=results.width >= _MIN_WIDTH_FOR_INTERVALS, separator="\n")
    title = f"{report.quant_path} ({report.quant_format}) compared with {report.float_path}; scored: {report.scored}"
    results.print(table(title, columns, rows, numeric=1))
    results.print(FIGURES_NOTE)
