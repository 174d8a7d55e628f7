"""Writers of small audio and video files, and the error message of a broken file."""

from __future__ import annotations

import wave
from pathlib import Path

import av
import numpy as np
import pytest

from msmodelslim_omni.calibration import media
from msmodelslim_omni.errors import QuantError


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """Write a WAV file. samples: int16 [samples] or [samples, channels]."""
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        sound.writeframes(samples.astype("<i2").tobytes())
    return path


def tone(count: int, seed: int = 0) -> np.ndarray:
    """A sine of 12 000 with noise, int16 [count]."""
    noise = np.random.default_rng(seed).normal(size=count) * 500
    return np.asarray(np.sin(np.arange(count) / 20) * 12_000 + noise).astype(np.int16)


def write_video(path: Path, frames: int, *, sound: bool = False, rate: int = 5, codec: str = "mpeg4") -> Path:
    """Write a video of grey frames. The grey level rises with the frame index, so that frames differ.

    sound: add one second of audio.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, width=64, height=48, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 + index * 8 % 230, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            chunk = av.AudioFrame.from_ndarray(tone(16_000)[None], format="s16", layout="mono")
            chunk.sample_rate = 16_000
            container.mux(audio.encode(chunk))
            container.mux(audio.encode(None))
    return path


def probe_error(kind: str, path: Path) -> str:
    """The error message of `media.probe`, which must name the file."""
    with pytest.raises(QuantError) as caught:
        media.probe(kind, path)
    assert str(path) in caught.value.message or repr(str(path)) in caught.value.message
    return caught.value.message
