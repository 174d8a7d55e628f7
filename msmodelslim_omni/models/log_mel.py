"""The log-mel spectrogram of speech, in decibels."""

from __future__ import annotations

from typing import Any

_MELS, _WINDOW, _HOP, _RANGE_DB = 80, 1024, 256, 80.0
_FLOOR = 1e-10  # of the power


def log_mel(samples: Any, rate: int) -> Any:
    """The spectrogram [80, frames] of samples [n], float64, at most 80 dB below its loudest point."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(_WINDOW // 2 + 1, _MELS, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return spectrogram(
        samples, window_function(_WINDOW, "hann"), _WINDOW, _HOP,
        power=2.0, mel_filters=filters, mel_floor=_FLOOR, log_mel="dB", db_range=_RANGE_DB,
    )  # fmt: skip
