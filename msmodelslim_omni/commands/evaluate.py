"""`eval`: compare a quantized model with its float model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import completion
from .shell import (
    DATA,
    OUTPUT,
    Debug,
    Device,
    Json,
    LogFile,
    LogLevel,
    LogLevelFlag,
    OnBadSample,
    Quiet,
    TrueFalse,
    TrustRemoteCode,
    argument,
    flag,
    print_json,
    required,
    results,
    run_with_progress,
    same_as,
)

if TYPE_CHECKING:
    from ..report import EvalReport
    from .live_progress import TerminalProgress

# Minimum width of the terminal for the intervals of every modality.
_MIN_WIDTH_FOR_INTERVALS = 120


class PositionsFlag(str, Enum):
    auto = "auto"
    answer = "answer"
    text = "text"


def eval_(
    context: typer.Context,
    path: Annotated[
        str | None, argument("PATH", "Folder of the checkpoint to evaluate: any supported format, or float.")
    ] = None,
    quant: Annotated[str | None, same_as("PATH", "quant")] = None,
    float_: Annotated[str | None, flag("float", "Folder of the float checkpoint.", metavar="PATH")] = None,
    dataset: Annotated[
        str | None,
        flag(
            "dataset",
            "Path of an index.jsonl or its folder, or a name under lab_calib/.",
            DATA,
            autocompletion=completion.datasets,
        ),
    ] = None,
    device: Device = "auto",
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", DATA, min=1)
    ] = None,
    max_tokens: Annotated[int, flag("max_tokens", "Maximum length of a sample in tokens.", DATA, min=1)] = 8192,
    max_pixels: Annotated[
        int, flag("max_pixels", "Downscale images and video frames to at most N pixels.", DATA, min=784)
    ] = 200704,
    video_fps: Annotated[
        float, flag("video_fps", "Frames per second that are read from a video.", DATA, min=0.01, max=100.0)
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
    seed: Annotated[int, flag("seed", "Seed for the intervals and for --max_samples.", DATA, min=0)] = 0,
    save_path: Annotated[
        Path | None,
        flag(
            "save_path", "Folder for eval_report.json, .md and .html. Default: eval/ in a quantized checkpoint.", OUTPUT
        ),
    ] = None,
    update_card: Annotated[
        bool,
        flag("update_card", "Write the figures into the model card of the quantized checkpoint.", OUTPUT, is_flag=True),
    ] = False,
    overwrite: Annotated[
        bool, flag("overwrite", "Replace an evaluation of more samples.", OUTPUT, is_flag=True)
    ] = False,
    answers: Annotated[
        Path | None,
        flag("answers", "JSON Lines file for what both models answer to samples with an answer.", OUTPUT),
    ] = None,
    speech: Annotated[
        int,
        flag(
            "speech",
            "Let both models also answer N samples aloud, as complete models in memory, like generate.",
            OUTPUT,
            min=0,
        ),
    ] = 0,
    speaker: Annotated[str, flag("speaker", "Voice of --speech.", OUTPUT)] = "Chelsie",
    on_bad_sample: Annotated[
        OnBadSample, flag("on_bad_sample", "Fail on a sample that cannot be used, or skip it.", DATA)
    ] = OnBadSample.fail,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    log_level: LogLevelFlag = LogLevel.info,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized checkpoint with its float model on your samples, overall and by modality.

    Reports KL of next-token distributions, top-1 agreement, top-5 overlap, perplexity, exact match of answers, and
    drift of the states that the talker reads, with bootstrap intervals. Both models run layer by layer, in the memory
    of one layer.
    """
    quantized, float_path, index = required(
        context, quant=("PATH", path, quant), float=("--float", float_, None), dataset=("--dataset", dataset, None)
    )

    def check() -> None:
        from ..files import find_model_folder
        from .early_checks import check_samples

        find_model_folder(quantized)
        find_model_folder(float_path)
        check_samples(index)

    def work(progress: TerminalProgress) -> None:
        from ..evaluation import default_save_path, evaluate
        from ..files import find_model_folder

        folder = save_path or default_save_path(find_model_folder(quantized))
        report = evaluate(
            find_model_folder(float_path), find_model_folder(quantized), index,
            device=device, max_samples=max_samples, max_tokens=max_tokens,
            max_pixels=max_pixels, video_fps=video_fps, exact_match=exact_match is TrueFalse.true,
            positions=positions.value, seed=seed, save_path=folder,
            trust_remote_code=trust_remote_code is TrueFalse.true, on_bad_sample=on_bad_sample.value,
            update_card=update_card, overwrite=overwrite, answers_file=answers,
            speech=speech, speaker=speaker, progress=progress,
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

    run_with_progress(check, work, debug, as_json=as_json, log_level=log_level, quiet=quiet, log_file=log_file)


def _print_report(report: EvalReport) -> None:
    from ..report import FIGURES_NOTE, figure_rows, judge_speech, judgement, speech_rows
    from .tables import table

    columns, rows = figure_rows(report, all_intervals=results.width >= _MIN_WIDTH_FOR_INTERVALS, separator="\n")
    title = f"{report.quant_path} ({report.quant_format}) compared with {report.float_path}; scored: {report.scored}"
    results.print(table(title, columns, rows, numeric=1))
    if report.speech:
        spoken_columns, spoken_rows = speech_rows(report.speech)
        results.print(table("Spoken answers", spoken_columns, spoken_rows, numeric=1))
        results.print(judge_speech(report.speech))
    results.print(judgement(report))
    results.print(FIGURES_NOTE)
