"""Samples of the trained tiny models, made without espeak-ng and fonts, and written as files of a dataset."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_omni import model as omni
from tiny_omni import render, tasks


def tones() -> list[render.Utterance]:
    """One tone per spoken word, because espeak-ng need not be installed."""
    times = np.arange(int(0.3 * render.RATE)) / render.RATE
    waves = [np.sin(2 * np.pi * (200 + 60 * n) * times) for n in range(len(render.SPOKEN))]
    return [render.Utterance(w, "tone", s.astype(np.float16)) for w, s in zip(render.SPOKEN, waves, strict=True)]


def samples(seed: int) -> dict[str, tasks.Sample]:
    """One sample of each kind."""
    rng = random.Random(seed)
    return {
        "text": tasks.text_sample(rng, 1),
        "picture": tasks.scene_sample(rng, 3, 1),
        "sound": tasks.speech_sample(rng, tones(), 3, (5, 20)),
        "clip": tasks.clip_sample(rng, "blink"),
        "talking clip": tasks.clip_sample(rng, "move", tones()),
    }


def write_first_turn(sample: tasks.Sample, folder: Path) -> dict[str, Any]:
    """Write the medium of a sample, without loss, into the folder; return a line of an index with its first turn."""
    entry = {"text": sample.turns[0].question, "answer": sample.turns[0].answer}
    if sample.picture is not None:
        Image.fromarray(sample.picture).save(folder / "a.png")
        entry["image"] = "a.png"
    elif sample.frames is not None:
        render.write_clip(folder / "a.mkv", sample.frames, sample.sound, lossless=True)
        entry["video"] = "a.mkv"
    elif sample.sound is not None:
        render.write_sound(folder / "a.flac", sample.sound)
        entry["audio"] = "a.flac"
    return entry


def assert_trains_on_the_true_logits(maker: Any, thinker: Any, inputs: Any, batch: Any, *, atol: float) -> None:
    """Training computes the logits of the answer that the library's forward has for the processor's inputs.

    maker: the module `model` of a tiny model. inputs: of one sample, by the processor; batch: the same, by training.
    """
    with torch.no_grad():
        expected = thinker(**inputs.tensors, use_audio_in_video=inputs.use_audio_in_video).logits
        maker.speed_up_towers(thinker)
        actual, _ = maker.answer_logits(thinker, batch)
    answer = (batch.labels[0, 1:] != omni.IGNORED).nonzero()[:, 0]
    torch.testing.assert_close(actual, expected[0, answer], atol=atol, rtol=0)
