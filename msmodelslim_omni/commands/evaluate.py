"""`eval`: how close a quantized model is to its float model."""

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
    guarded,
    messages,
    print_json,
    quiet_libraries,
    results,
)

if TYPE_CHECKING:
    from ..report import EvalReport

# A narrower terminal has no room for the intervals of every modality.
_ROOM_FOR_INTERVALS = 120


class PositionsFlag(str, Enum):
    auto = "auto"
    answer = "answer"
    text = "text"


class OnBadSample(str, Enum):
    fail = "fail"
    skip = "skip"


def eval_(
    float_: Annotated[Path, flag("float", "Folder of the float checkpoint.")],
    quant: Annotated[Path, flag("quant", "Folder of the checkpoint to compare: any format that is read, or float.")],
    dataset: Annotated[
        str, flag("dataset", f"index.json(l), its folder, or a name under lab_calib/. {INDEX_LIMITS} {MEDIA_LIMITS}")
    ],
    device: Device = "auto",
    max_samples: Annotated[int | None, flag("max_samples", "At most so many samples, a seeded choice.", min=1)] = None,
    max_tokens: Annotated[int, flag("max_tokens", "The longest sample, in tokens.", min=1)] = 8192,
    max_pixels: Annotated[int, flag("max_pixels", "Pictures and frames are made this small.", min=784)] = 200704,
    video_fps: Annotated[float, flag("video_fps", "Frames a second.", min=0.01, max=100.0)] = 2.0,
    positions: Annotated[
        PositionsFlag, flag("positions", "Which tokens count: of the answer, all text, or what a sample has.")
    ] = PositionsFlag.auto,
    exact_match: Annotated[
        TrueFalse, flag("exact_match", "Refuse a dataset without answers.", case_sensitive=False)
    ] = TrueFalse.false,
    seed: Annotated[int, flag("seed", "Of the intervals and of --max_samples.", min=0)] = 0,
    save_path: Annotated[
        Path | None, flag("save_path", "Folder of eval_report.json and .md. Default: eval/ in a quantized checkpoint.")
    ] = None,
    on_bad_sample: Annotated[
        OnBadSample, flag("on_bad_sample", "What to do about a sample that cannot be used.")
    ] = OnBadSample.fail,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How close a quantized checkpoint is to its float model, overall and by modality, on samples of yours.

    KL of next-token distributions, top-1 and top-5 agreement, perplexity, exact match of answers, drift of what the
    talker reads; with bootstrap intervals. Both models pass layer by layer, in the memory of one layer.
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
            progress.say(f"the report is in {folder}")
        if as_json:
            from dataclasses import asdict

            print_json(asdict(report))
        else:
            _print_report(report)

    try:
        guarded(work, debug)
    finally:
        progress.close()


def _print_report(report: EvalReport) -> None:
    from ..report import NOTE, figure_rows
    from .tables import table

    columns, rows = figure_rows(report, all_intervals=results.width >= _ROOM_FOR_INTERVALS, between="\n")
    title = f"{report.quant_path} ({report.quant_format}) against {report.float_path}; scored: {report.scored}"
    results.print(table(title, columns, rows, numeric=1))
    results.print(NOTE)
