"""`generate`: let a checkpoint answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import (
    Debug,
    Device,
    TrueFalse,
    TrustRemoteCode,
    flag,
    guarded,
    messages,
    quiet_libraries,
)


def generate(
    path: Annotated[Path, typer.Argument(help="Folder of a float or quantized checkpoint.")],
    text: Annotated[str, typer.Option(help="What to say or ask.")] = "",
    image: Annotated[list[str] | None, typer.Option(help="A picture: jpg png webp; repeat for more.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="A recording: wav mp3 flac m4a; repeat for more.")] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="A clip: mp4 mkv mov webm, heard too if it has sound; repeat for more.")
    ] = None,
    speech: Annotated[Path | None, typer.Option(help="Answer aloud too, into this wav file (24 kHz).")] = None,
    speaker: Annotated[str, typer.Option(help="The voice; one of spk_dict.pt.")] = "Chelsie",
    max_new_tokens: Annotated[int, flag("max_new_tokens", "The longest answer, in tokens.", min=1)] = 128,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    debug: Debug = False,
) -> None:
    """Let a checkpoint answer, in plain transformers: text on stdout as it comes, and speech.

    No quantized kernel is used: weights are dequantized and take their float size in memory (float32 on a CPU where
    that fits, else bfloat16); int8 activations are emulated. Media are local files, read as calibration reads them:
    each at most 1 GiB, 64 megapixels, 600 s.
    """
    from .live_progress import TerminalProgress

    progress = TerminalProgress(messages)
    quiet_libraries()

    def show(piece: str) -> None:
        progress.close()
        typer.echo(piece, nl=False)

    def work() -> None:
        from ..quantized import generate as run_generate

        answer = run_generate(
            path, text, images=image or (), audios=audio or (), videos=video or (), speech=speech, speaker=speaker,
            max_new_tokens=max_new_tokens, device=device, trust_remote_code=trust_remote_code is TrueFalse.true,
            on_text=show, progress=progress,
        )  # fmt: skip
        progress.close()
        typer.echo()
        progress.say(f"{len(answer.tokens)} tokens in {answer.seconds:.1f} s, loading included")
        if answer.speech:
            progress.say(f"{answer.speech_seconds:.1f} s of speech in {answer.speech}")

    try:
        guarded(work, debug)
    finally:
        progress.close()
