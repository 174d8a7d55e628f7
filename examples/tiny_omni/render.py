"""Make the pictures, clips and speech that the tiny Omni learns from, with Pillow and espeak-ng.

Everything is a function of a `random.Random` or a numpy generator, so the same seed gives the same media.
"""

from __future__ import annotations

import io
import random
import subprocess
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PICTURE = 112  # pixels of a picture's side: 4 x 4 tokens
CLIP_HEIGHT, CLIP_WIDTH = 224, 448  # the smallest clip that the processors do not enlarge: 8 x 16 tokens
GROUND_RANGE = 64  # increase of red (or green), of 255, from one side of a picture's ground to the other
FRAMES = 4  # the minimum that qwen_omni_utils reads
RATE = 16_000

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 225, 50),
    "purple": (165, 50, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    "apple", "bridge", "camel", "candle", "castle", "cloud", "dragon", "engine", "feather", "flower",
    "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder", "lemon", "mirror", "monkey",
)  # fmt: skip
WRITTEN = WORDS[:12]
SPOKEN = DIGITS + WORDS

_FONT_ROOT = Path("/usr/share/fonts/truetype")
TRAIN_FONTS = tuple(
    str(_FONT_ROOT / name)
    for name in (
        "dejavu/DejaVuSans.ttf", "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSerif.ttf", "dejavu/DejaVuSerif-Bold.ttf",
        "dejavu/DejaVuSansMono.ttf", "dejavu/DejaVuSansCondensed.ttf", "dejavu/DejaVuSerifCondensed-Bold.ttf",
        "liberation/LiberationSans-Regular.ttf", "liberation/LiberationSans-Bold.ttf",
        "liberation/LiberationSerif-Regular.ttf", "liberation/LiberationSerif-Bold.ttf",
        "liberation/LiberationMono-Bold.ttf", "liberation/LiberationSans-Italic.ttf",
    )
)  # fmt: skip
HELD_FONTS = tuple(
    str(_FONT_ROOT / "noto" / name)
    for name in ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf", "NotoSerif-Regular.ttf", "NotoSerif-Bold.ttf")
)

# Accents and speakers of espeak-ng. Training uses none of the held-out speakers, but all accents.
_TRAIN_ACCENTS = ("en-us", "en-gb", "en-029", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_TRAIN_SPEAKERS = (
    "m1", "m2", "m3", "m4", "m5", "m8", "f1", "f2", "f3", "adam", "Alex", "Alicia", "Andy", "Annie", "antonio",
    "belinda", "benjamin", "boris", "caleb", "david", "Denis", "ed", "edward", "Gene", "Hugo", "john", "linda",
    "Marco", "max", "Michael", "miguel", "pablo", "pedro", "rob", "robert", "sandro", "shelby", "travis", "Diogo",
    "Gene2", "Henrique", "Jacky", "Mario", "Nguyen", "RicishayMax", "Storm", "Tweaky", "anika", "announcer", "aunty",
    "croak", "edward2", "gustave", "grandma", "grandpa", "iven", "iven2", "iven3", "kaukovalta", "klatt", "klatt2",
    "klatt3", "klatt4", "marcelo", "michel", "norbert", "quincy", "zac",
)  # fmt: skip
_HELD_ACCENTS = ("en-us", "en-gb", "en-029", "en-gb-x-rp")
_HELD_SPEAKERS = ("m6", "m7", "f4", "f5", "Andrea", "Lee", "Mike", "paul", "steph", "victor")


# ------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Thing:
    """One drawn shape: centre and size in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


def background(rng: random.Random) -> tuple[int, int, int]:
    """A dark colour that matches no name in COLOURS."""
    grey = rng.randint(5, 70)
    red, green, blue = (max(0, grey + rng.randint(-8, 8)) for _ in range(3))
    return red, green, blue


def shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """The named colour with a small random change."""
    red, green, blue = (min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[colour])
    return red, green, blue


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    """Draw one shape; all shapes have about the same area."""
    x, y, r = thing.x, thing.y, thing.size / 2
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - 1.05 * r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=fill)
    elif thing.shape == "cross":
        w = 0.36 * r
        draw.rectangle((x - w, y - 1.05 * r, x + w, y + 1.05 * r), fill=fill)
        draw.rectangle((x - 1.05 * r, y - w, x + 1.05 * r, y + w), fill=fill)
    else:
        raise ValueError(thing.shape)


def ground(rng: random.Random) -> Image.Image:
    """The ground of a picture: dark, redder to the right and greener to the bottom.

    The gradient shows the position of each part. On a uniform ground, attention without absolute positions would have
    to count tokens to find the position, and a model this small did not learn that.
    """
    across = np.linspace(0, GROUND_RANGE, PICTURE)
    pixels = np.zeros((PICTURE, PICTURE, 3)) + [value * 0.6 for value in background(rng)]
    pixels[..., 0] += across[None, :]
    pixels[..., 1] += across[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_scene(things: Sequence[Thing], rng: random.Random) -> np.ndarray:
    """A picture of the shapes: uint8 [PICTURE, PICTURE, 3]."""
    image = ground(rng)
    draw = ImageDraw.Draw(image)
    for thing in things:
        draw_thing(draw, thing, shade(thing.colour, rng))
    return np.asarray(image)


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)


def draw_text(text: str, colour: str, font: str, rng: random.Random) -> np.ndarray:
    """A picture of a digit, number or word near the centre: uint8 [PICTURE, PICTURE, 3]."""
    image = ground(rng)
    size = {1: rng.randint(66, 80), 2: rng.randint(56, 68)}.get(len(text), rng.randint(27, 33))
    while True:
        left, top, right, bottom = _font(font, size).getbbox(text)
        if right - left <= PICTURE - 4:
            break
        size -= 1
    slack = (min(4.0, (PICTURE - 2 - (right - left)) / 2), min(4.0, (PICTURE - 2 - (bottom - top)) / 2))
    x = PICTURE / 2 - (left + right) / 2 + rng.uniform(-slack[0], slack[0])
    y = PICTURE / 2 - (top + bottom) / 2 + rng.uniform(-slack[1], slack[1])
    ImageDraw.Draw(image).text((x, y), text, fill=shade(colour, rng), font=_font(font, size))
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------- clips


def draw_clip(places: Sequence[Sequence[Thing]], rng: random.Random) -> np.ndarray:
    """A clip, from one list of shapes per frame: uint8 [frames, CLIP_HEIGHT, CLIP_WIDTH, 3]. Colours stay the same."""
    behind = background(rng)
    shades: dict[str, tuple[int, int, int]] = {}
    frames = []
    for things in places:
        image = Image.new("RGB", (CLIP_WIDTH, CLIP_HEIGHT), behind)
        draw = ImageDraw.Draw(image)
        for thing in things:
            draw_thing(draw, thing, shades.setdefault(thing.colour, shade(thing.colour, rng)))
        frames.append(np.asarray(image))
    return np.stack(frames)


def write_clip(path: Path, frames: np.ndarray, sound: np.ndarray | None = None, lossless: bool = False) -> None:
    """Write frames uint8 [n, height, width, 3] at 2 frames per second as H.264, and the sound (float32, 16 kHz).

    The sound is FLAC in MKV, which is lossless. A model trained only on lossless sounds loses a fifth of the words to
    MP3 at 48 kbit/s. AAC, and MP3 in MP4, would also make the sound longer.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=2)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        stream.options = {"crf": "0" if lossless else "20", "preset": "veryslow"}
        track = None if sound is None else _add_track(container)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            _write_track(container, track, sound)


def write_sound(path: Path, sound: np.ndarray) -> None:
    """Write float32 samples at 16 kHz as FLAC."""
    import av

    with av.open(str(path), "w") as container:
        track = _add_track(container)
        _write_track(container, track, sound)


def _add_track(container: Any) -> Any:
    return container.add_stream("flac", rate=RATE, layout="mono", format="s16")


def _write_track(container: Any, track: Any, sound: np.ndarray) -> None:
    import av

    samples = np.clip(np.round(sound * 32768), -32768, 32767).astype(np.int16)
    for start in range(0, len(samples), 4096):
        part = np.ascontiguousarray(samples[None, start : start + 4096])
        frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, start
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


# --------------------------------------------------------------------------------------------- speech


@dataclass(frozen=True)
class Utterance:
    """One word spoken by one voice: float16 samples at 16 kHz, trimmed, with peak 1."""

    word: str
    voice: str
    samples: np.ndarray


def _speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    import soxr

    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(raw)) as file:
        rate = file.getframerate()
    samples = np.frombuffer(raw[44:], dtype="<i2").astype(np.float32) / 32768
    samples = soxr.resample(samples, rate, RATE, quality="HQ")
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[max(0, loud[0] - 160) : loud[-1] + 320]
    return (samples / np.abs(samples).max()).astype(np.float16)


def utterances(held_out: bool, per_word: int, seed: int) -> list[Utterance]:
    """Every word of SPOKEN, `per_word` times, with random speeds and pitches, by held-out or training voices."""
    rng = random.Random(f"{seed} {held_out}")
    accents, speakers = (_HELD_ACCENTS, _HELD_SPEAKERS) if held_out else (_TRAIN_ACCENTS, _TRAIN_SPEAKERS)
    jobs = []
    for word in SPOKEN:
        for _ in range(per_word):
            voice = f"{rng.choice(accents)}+{rng.choice(speakers)}"
            jobs.append((word, voice, rng.randint(150, 210), rng.randint(25, 75)))
    with ThreadPoolExecutor(4) as pool:
        waves = list(pool.map(lambda job: _speak(*job), jobs))
    return [Utterance(word, voice, samples) for (word, voice, *_), samples in zip(jobs, waves, strict=True)]


def at_speed(word: Utterance, speed: float) -> Utterance:
    """The word played faster (speed above 1) or slower. The pitch changes too, as with another voice."""
    times = np.arange(0, len(word.samples) - 1, speed)
    samples = np.interp(times, np.arange(len(word.samples)), word.samples.astype(np.float32))
    return Utterance(word.word, word.voice, samples.astype(np.float16))


def say(parts: Sequence[Utterance], seconds: float, noise_db: float, rng: np.random.Generator) -> np.ndarray:
    """The sound of `say_with_spans`, without the spans."""
    return say_with_spans(parts, seconds, noise_db, rng)[0]


def say_with_spans(
    parts: Sequence[Utterance], seconds: float, noise_db: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The words one after another, with noise, as a sound float32 [samples] of the given length; and each word's span.

    Words that would not fit are spoken faster. `noise_db`: level of the noise below the speech.
    """
    length = round(seconds * RATE)
    waves = [_tempo(part.samples.astype(np.float32), float(rng.uniform(0.9, 1.12))) for part in parts]
    gap = round(0.04 * RATE)
    room = length - gap * (len(waves) + 1)
    total = sum(map(len, waves))
    if total > room:
        waves = [_tempo(word, total / room) for word in waves]
        total = sum(map(len, waves))
    cuts = np.sort(rng.uniform(0, max(0, room - total), len(waves)))
    sound = np.zeros(length, np.float32)
    start = 0
    spans = []
    for word, cut in zip(waves, cuts, strict=True):
        at = gap + start + int(cut)
        heard = word[: length - at]
        sound[at : at + len(heard)] += heard * float(rng.uniform(0.7, 1.0))
        start += len(heard) + gap
        spans.append((at, at + len(heard)))
    level = float(np.sqrt(np.mean(sound[sound != 0] ** 2))) * 10 ** (-noise_db / 20)
    hiss = rng.standard_normal(length).astype(np.float32)
    if rng.random() < 0.5:  # half of the noises are low-pass, like an engine
        hiss = np.convolve(hiss, np.ones(6, np.float32) / 6**0.5, mode="same").astype(np.float32)
    sound = (sound + level * hiss) * float(rng.uniform(0.25, 0.55))
    # Round to 16-bit values, so that training and files agree.
    return np.clip(np.round(sound * 32768), -32768, 32767).astype(np.float32) / 32768, spans


def _tempo(sound: np.ndarray, factor: float) -> np.ndarray:
    """The sound played `factor` times as fast (the pitch rises too)."""
    count = max(2, int(len(sound) / factor))
    return np.interp(np.linspace(0, len(sound) - 1, count), np.arange(len(sound)), sound).astype(np.float32)
