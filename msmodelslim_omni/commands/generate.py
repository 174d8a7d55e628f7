"""`generate`: generate an answer with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import (
    Debug,
    Device,
    LogLevel,
    LogLevelFlag,
    Quiet,
    TrueFalse,
    TrustRemoteCode,
    flag,
    run_with_progress,
)

if TYPE_CHECKING:
    from .live_progress import TerminalProgress


def generate(
    path: Annotated[str, typer.Argument(help="Folder of a float or quantized checkpoint.", metavar="PATH")],
    text: Annotated[str, typer.Option(help="Text of the prompt.")] = "",
    image: Annotated[list[str] | None, typer.Option(help="Image file. Repeat for several.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="Audio file: wav mp3 flac m4a. Repeat for several.")] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(help="Video file; its audio track is used too. Repeat for several."),
    ] = None,
    speech: Annotated[Path | None, typer.Option(help="Also write spoken output to this WAV file (24 kHz).")] = None,
    speaker: Annotated[str, typer.Option(help="Voice: a name in spk_dict.pt.")] = "Chelsie",
    max_new_tokens: Annotated[int, flag("max_new_tokens", "Maximum length of the answer in tokens.", min=1)] = 128,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    log_level: LogLevelFlag = LogLevel.info,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate a text (and speech) answer with plain transformers; the text streams to stdout.

    No quantized kernels are used: weights are dequantized and take their float size in memory (float32 on a CPU if it
    fits, else bfloat16), and int8 activations are emulated. Media are local files, decoded as in calibration: each at
    most 1 GiB, 64 megapixels, 600 s.
    """
    if not (text.strip() or image or audio or video):
        raise typer.BadParameter("give a prompt: --text, --image, --audio or --video")

    def check() -> None:
        from ..files import find_model_folder

        find_model_folder(path)

    def work(progress: TerminalProgress) -> None:
        from ..quantized import generate as run_generate

        def show(piece: str) -> None:
            progress.close()
            typer.echo(piece, nl=False)

        def end_line() -> None:
            show("\n")

        answer = run_generate(
            path, text, images=image or (), audios=audio or (), videos=video or (), speech=speech, speaker=speaker,
            max_new_tokens=max_new_tokens, device=device, trust_remote_code=trust_remote_code is TrueFalse.true,
            on_text=show, on_text_end=end_line, progress=progress,
        )  # fmt: skip
        progress.close()
        if not answer.speech:
            end_line()
        progress.say(f"{len(answer.tokens)} tokens in {answer.seconds:.1f} s, loading included")
        if answer.speech:
            progress.say(f"{answer.speech_seconds:.1f} s of speech in {answer.speech}")

    run_with_progress(check, work, debug, log_level=log_level, quiet=quiet)
