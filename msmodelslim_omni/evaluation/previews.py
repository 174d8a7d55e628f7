"""The answers that the page shows: the farthest first, with small pictures and sounds of their samples."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import load_audio, load_image, sample_frames
from ..errors import QuantError
from ..report import AnswerPair, Preview, ShownAnswer, ShownSpeech, SpokenPair

SHOWN_ANSWERS = 10
# Spoken answers are cut to this length: at most 1 MB each on the page. The WAV files hold all of it.
_SHOWN_SPEECH, _SPEECH_SECONDS = 5, 15
_THUMBNAIL = 240  # pixels of the longer side
_FRAMES = 4
# Sounds are cut to this length and halved to 8 kHz: at most 160 KB each.
_SECONDS, _RATE = 10, 16_000
_MAX_MEDIA = 3  # of one sample


def shown_answers(pairs: Sequence[AnswerPair]) -> tuple[ShownAnswer, ...]:
    """SHOWN_ANSWERS pairs with previews of their media: first those that one model alone answers, then by KL."""
    farthest = sorted(pairs, key=lambda pair: (pair.float_exact == pair.quant_exact, -pair.kl))[:SHOWN_ANSWERS]
    return tuple(ShownAnswer(pair, tuple(_previews(pair))) for pair in farthest)


def _previews(pair: AnswerPair | SpokenPair) -> Iterator[Preview]:
    for kind, path in pair.media[:_MAX_MEDIA]:
        try:
            yield from _PREVIEWS[kind](Path(path))
        except QuantError:  # the file was removed since it was evaluated: the answer is shown without it
            continue


def shown_speech(pairs: Sequence[SpokenPair], folder: Path) -> tuple[ShownSpeech, ...]:
    """The first pairs with their sounds, which are files of `folder`."""
    return tuple(
        ShownSpeech(
            pair,
            tuple(_previews(pair)),
            _spoken(folder, pair.float_file, "speech of the float model"),
            _spoken(folder, pair.quant_file, "speech of the quantized model"),
        )
        for pair in pairs[:_SHOWN_SPEECH]
    )


def _spoken(folder: Path, name: str, text: str) -> Preview | None:
    if not name:
        return None
    with wave.open(str(folder / name), "rb") as reader:
        rate = reader.getframerate()
        sound = reader.readframes(_SPEECH_SECONDS * rate)
    return Preview("audio", _wav(sound, rate), text)


def _image(path: Path) -> Iterator[Preview]:
    yield Preview("image", _jpeg(load_image(path)), f"picture {path.name}")


def _video(path: Path) -> Iterator[Preview]:
    from PIL import Image

    for number, frame in enumerate(sample_frames(path, _FRAMES)):
        picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        yield Preview("image", _jpeg(picture), f"frame {number + 1} of {path.name}")


def _audio(path: Path) -> Iterator[Preview]:
    sound = load_audio(path)[: _SECONDS * _RATE]
    halved = sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(axis=1)
    pcm = (np.clip(halved, -1, 1) * 32767).astype("<i2").tobytes()
    yield Preview("audio", _wav(pcm, _RATE // 2), f"sound {path.name}")


def _wav(pcm: bytes, rate: int) -> str:
    """16-bit mono as a data URI."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(pcm)
    return _data_uri("audio/wav", file.getvalue())


def _jpeg(picture: Any) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=70)
    return _data_uri("image/jpeg", file.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


_PREVIEWS = {"image": _image, "video": _video, "audio": _audio}
