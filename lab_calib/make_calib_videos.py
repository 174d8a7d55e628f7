#!/usr/bin/env python3
"""Make the calibration data set ``calibVideos``: texts, pictures, sounds, clips and mixtures of them.

The data set is shipped next to this script. Run the script only to change the data set.

Requirements
    Debian packages: ``ffmpeg`` (with libx264, libvpx, libmp3lame, libopus), ``espeak-ng`` (its voice
    ``cmn-latn-pinyin`` speaks Mandarin), ``asterisk-core-sounds-en-wav`` (recorded speech),
    ``asterisk-moh-opsound-wav`` (recorded music), ``fonts-wqy-microhei`` (Chinese characters).
    Python 3.10 or newer with ``numpy``, ``pillow`` >= 10.1 and ``scikit-image`` (its wheel contains the
    photographs).

How to run
    python make_calib_videos.py                     # writes calibVideos/ next to this script
    python make_calib_videos.py --out elsewhere --sounds <folder> --music <folder> --cjk-font <file>

    The asterisk packages need not be installed: download them with ``apt-get download``, unpack them with
    ``dpkg -x``, and pass the folders of their files with ``--sounds`` and ``--music``. Every random number
    is seeded and the encoders run in one thread, so the same tool versions write the same bytes.

How to add a sample
    Add an entry to SAMPLES. If it needs a new picture, sound or clip, add an entry to IMAGES, SOUNDS or
    CLIPS: the key is the file (its suffix selects the format), the value makes the content. Credit
    third-party files in calibVideos/ATTRIBUTION.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_BOX = (320, 240)  # a picture takes about width * height / 784 tokens: keep it small
CLIP_SIZE = (192, 144)  # yuv420p needs even numbers
SPEECH_RATE = 16000
# espeak-ng 1.51 has two Mandarin voices. The plain "cmn" reads Chinese characters as pinyin spelt in English.
MANDARIN = "cmn-latn-pinyin"


@dataclass(frozen=True)
class Sources:
    """Folders and files of the third-party material."""

    photos: Path
    sounds: Path
    music: Path
    cjk_font: Path


@dataclass(frozen=True)
class Sound:
    """One channel of samples in [-1, 1], and their rate."""

    samples: np.ndarray
    rate: int = SPEECH_RATE

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class Clip:
    """A video: ``frame(t)`` draws the picture at second ``t``; ``sound`` is the optional sound track."""

    frame: Callable[[float], Image.Image]
    seconds: float
    fps: int = 10
    sound: Sound | None = None


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------


def photo(sources: Sources, name: str, crop: tuple[float, float, float, float] | None = None) -> Image.Image:
    """A photograph of scikit-image, cropped (fractions of its sides) and scaled to fit into IMAGE_BOX."""
    image = Image.open(sources.photos / name)
    image.load()
    if crop:
        width, height = image.size
        sides = zip(crop, (width, height, width, height), strict=True)
        image = image.crop(tuple(int(part * side) for part, side in sides))
    image.thumbnail(IMAGE_BOX, Image.Resampling.LANCZOS)
    return image


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in Latin font, so that the letters do not depend on installed fonts."""
    return ImageFont.load_default(size)


def bar_chart(labels: list[str], values: list[int]) -> Image.Image:
    """A bar chart with a title, in palette mode (as office tools often write PNG)."""
    image = Image.new("RGB", (280, 196), "white")
    draw = ImageDraw.Draw(image)
    draw.text((140, 16), "Umbrellas sold per month", fill="black", font=font(15), anchor="mm")
    draw.line((30, 168, 264, 168), fill="black", width=2)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        left, top = 46 + 56 * i, 168 - 6 * value
        draw.rectangle((left, top, left + 36, 166), fill=("#4472c4", "#ed7d31", "#70ad47", "#a855a0")[i % 4])
        draw.text((left + 18, top - 9), str(value), fill="black", font=font(13), anchor="mm")
        draw.text((left + 18, 181), label, fill="black", font=font(13), anchor="mm")
    return image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)


def notice(sources: Sources, lines: list[str]) -> Image.Image:
    """A framed notice in Chinese: a heading with lines below."""
    image = Image.new("RGB", (280, 168), "#fdf6e3")
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 6, 273, 161), outline="#b58900", width=3)
    for i, line in enumerate(lines):
        letters = ImageFont.truetype(str(sources.cjk_font), 26 if i == 0 else 20)
        draw.text((140, 40 + 46 * i), line, fill="#073642", font=letters, anchor="mm")
    return image


IMAGES: dict[str, Callable[[Sources], Image.Image]] = {
    "images/astronaut.jpg": lambda s: photo(s, "astronaut.png"),
    "images/coffee cup.jpg": lambda s: photo(s, "coffee.png"),  # the space in the name is intentional
    "images/cat.webp": lambda s: photo(s, "chelsea.png"),
    "images/cameraman.png": lambda s: photo(s, "camera.png"),  # stays grey: one channel
    "images/rocket.jpg": lambda s: photo(s, "rocket.jpg"),
    "images/deep_field.webp": lambda s: photo(s, "hubble_deep_field.jpg", (0.0, 0.0, 0.6, 0.5)),
    "images/horse.png": lambda s: photo(s, "horse.png"),  # stays RGBA: four channels
    "images/brick.jpg": lambda s: photo(s, "brick.png"),
    "images/gravel.jpg": lambda s: photo(s, "gravel.png"),
    "images/sales_chart.png": lambda s: bar_chart(["Jan", "Feb", "Mar", "Apr"], [12, 18, 9, 15]),
    "images/notice_zh.png": lambda s: notice(s, ["图书馆开放时间", "周一至周五 9:00—21:00", "周末 10:00—18:00"]),
}


# ---------------------------------------------------------------------------------------------------
# Sounds
# ---------------------------------------------------------------------------------------------------


def read_wav(path: Path) -> Sound:
    """Read a 16-bit mono WAV file."""
    with wave.open(str(path)) as file:
        data = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return Sound(data.astype(np.float64) / 32768, file.getframerate())


def trim(sound: Sound, threshold: float = 0.01) -> Sound:
    """The sound without the silence at its ends, except 50 ms."""
    loud = np.flatnonzero(np.abs(sound.samples) > threshold)
    margin = sound.rate // 20
    return Sound(sound.samples[max(loud[0] - margin, 0) : loud[-1] + margin], sound.rate)


def say(text: str, voice: str, speed: int = 160, pitch: int = 50) -> Sound:
    """Speech by espeak-ng; ``speed`` is in words per minute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = ["espeak-ng", "-b", "1", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path)]
        subprocess.run([*command, "--", text], check=True)
        return trim(read_wav(path))


def recorded(sources: Sources, *prompts: str, gap: float = 0.05) -> Sound:
    """Recorded prompts, one after another (``digits/5`` is the file digits/5.wav)."""
    parts = [trim(read_wav(sources.sounds / f"{prompt}.wav")) for prompt in prompts]
    return join(parts, gap)


def music(sources: Sources, name: str, start: float, seconds: float) -> Sound:
    """An excerpt of a recorded piece, faded in and out."""
    piece = read_wav(sources.music / f"{name}.wav")
    first = int(start * piece.rate)
    return faded(Sound(piece.samples[first : first + int(seconds * piece.rate)], piece.rate), 0.3)


def faded(sound: Sound, seconds: float = 0.01) -> Sound:
    """The sound with soft ends; a hard start or end would be audible as a click."""
    count = min(int(seconds * sound.rate), len(sound.samples) // 2)
    gain = np.ones(len(sound.samples))
    gain[:count] = np.linspace(0, 1, count)
    gain[len(gain) - count :] = np.linspace(1, 0, count)
    return Sound(sound.samples * gain, sound.rate)


def tone(hertz: float, seconds: float, to_hertz: float | None = None, level: float = 0.4) -> Sound:
    """A sine tone, or a sweep from ``hertz`` to ``to_hertz``."""
    pitch = np.linspace(hertz, hertz if to_hertz is None else to_hertz, int(seconds * SPEECH_RATE))
    return faded(Sound(level * np.sin(2 * np.pi * np.cumsum(pitch) / SPEECH_RATE)))


def noise(seconds: float, level: float = 0.2, seed: int = 1, rate: int = SPEECH_RATE) -> Sound:
    """White noise."""
    samples = np.random.default_rng(seed).normal(0, level / 2, int(seconds * rate))
    return faded(Sound(np.clip(samples, -1, 1), rate), 0.05)


def click() -> Sound:
    """A short knock: noise that decays within some milliseconds."""
    burst = np.random.default_rng(2).uniform(-1, 1, SPEECH_RATE // 20)
    return Sound(0.8 * burst * np.exp(-np.arange(len(burst)) / (0.008 * SPEECH_RATE)))


def join(sounds: list[Sound], gap: float = 0.0) -> Sound:
    """Sounds of equal rate, one after another, with ``gap`` seconds between them."""
    rate = sounds[0].rate
    pause = np.zeros(int(gap * rate))
    pieces = [piece for sound in sounds for piece in (sound.samples, pause)]
    return Sound(np.concatenate(pieces[:-1]), rate)


def place(seconds: float, parts: list[tuple[float, Sound]]) -> Sound:
    """A track of ``seconds`` with each sound added at its start time; sounds are cut at the end of the track.

    Raises ValueError if the sounds have different rates.
    """
    rate = parts[0][1].rate
    track = np.zeros(int(seconds * rate))
    for start, sound in parts:
        if sound.rate != rate:
            raise ValueError(f"one track has sounds of {sound.rate} and {rate} Hz; use one rate")
        first = int(start * rate)
        piece = sound.samples[: max(len(track) - first, 0)]
        track[first : first + len(piece)] += piece
    return Sound(np.clip(track, -1, 1), rate)


def with_noise(sound: Sound, level: float = 0.05) -> Sound:
    """The sound with white noise added."""
    hiss = noise(sound.seconds + 1, level, seed=3, rate=sound.rate)
    return Sound(np.clip(sound.samples + hiss.samples[: len(sound.samples)], -1, 1), sound.rate)


SOUNDS: dict[str, Callable[[Sources], Sound]] = {
    "audio/weasels.wav": lambda s: recorded(s, "tt-weasels"),
    "audio/appointment.flac": lambda s: recorded(
        s, "digits/day-2", "digits/mon-6", "digits/h-20", "digits/at", "digits/10", "digits/a-m"
    ),
    "audio/five_messages.mp3": lambda s: recorded(s, "vm-youhave", "digits/5", "vm-messages"),
    "audio/monkeys.wav": lambda s: join(
        [
            recorded(s, "tt-monkeysintro"),
            faded(Sound(read_wav(s.sounds / "tt-monkeys.wav").samples[: 8000 * 2], 8000), 0.2),
        ],
        0.3,
    ),
    "audio/letters.wav": lambda s: recorded(s, "phonetic/c_p", "phonetic/a_p", "phonetic/t_p"),
    "audio/capital.wav": lambda s: say("What is the capital of France?", "en-gb", 150),
    "audio/天气.wav": lambda s: say("今天天气晴朗，最高气温二十五度。", MANDARIN, 170),
    "audio/train_zh.m4a": lambda s: with_noise(say("我们明天早上八点在火车站见面。", MANDARIN + "+f2", 170, 60)),
    "audio/three_beeps.wav": lambda s: join([tone(440, 0.4), tone(660, 0.4), tone(880, 0.4)], 0.3),
    "audio/music.mp3": lambda s: music(s, "manolo_camp-morning_coffee", 10, 4),
    "audio/what_drink.mp3": lambda s: say("Which drink is in the cup?", "en-us+f3", 150, 60),
    "audio/which_animal_zh.wav": lambda s: say("图片里是什么动物？", MANDARIN + "+m3", 150, 40),
    "audio/who_zh.flac": lambda s: say("哪一个里面有人，图片还是视频？", MANDARIN, 170),
    "audio/how_many_bounces_zh.wav": lambda s: say("请数一数，球跳了几次？", MANDARIN + "+f2", 170),
    "audio/plus_zh.mp3": lambda s: say("三加五等于几？", MANDARIN, 150),
    "audio/person_en.wav": lambda s: say("Which one shows a person?", "en-gb-scotland", 150, 45),
}


# ---------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------


def canvas(color: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty frame, and the object that draws on it."""
    image = Image.new("RGB", CLIP_SIZE, color)
    return image, ImageDraw.Draw(image)


def camera_move(
    sources: Sources,
    name: str,
    first: tuple[float, float, float],
    last: tuple[float, float, float],
    seconds: float,
) -> Callable[[float], Image.Image]:
    """A camera moving over a photograph; a view is (left, top, width) as fractions of the photograph's width."""
    image = Image.open(sources.photos / name).convert("RGB")
    width, height = CLIP_SIZE

    def frame(t: float) -> Image.Image:
        left, top, wide = ((1 - t / seconds) * a + t / seconds * b for a, b in zip(first, last, strict=True))
        scale = image.width
        box = (left * scale, top * scale, (left + wide) * scale, (top + wide * height / width) * scale)
        return image.resize(CLIP_SIZE, Image.Resampling.LANCZOS, box=box)

    return frame


def ball_frame(color: str, bounces_per_second: float) -> Callable[[float], Image.Image]:
    """A ball that starts at the top and bounces on the ground."""

    def frame(t: float) -> Image.Image:
        image, draw = canvas("#dfefff")
        draw.rectangle((0, 120, CLIP_SIZE[0], CLIP_SIZE[1]), fill="#5a8f4f")
        phase = (t * bounces_per_second + 0.5) % 1
        x, y = 96, 106 - 4 * 86 * phase * (1 - phase)
        draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=color, outline="black")
        return image

    return frame


def crossing_frame(seconds: float) -> Callable[[float], Image.Image]:
    """A red square moves right along the top; a blue circle moves left along the bottom."""

    def frame(t: float) -> Image.Image:
        image, draw = canvas("white")
        x = 10 + (CLIP_SIZE[0] - 50) * t / seconds
        draw.rectangle((x, 25, x + 30, 55), fill="#d62728")
        x = CLIP_SIZE[0] - 30 - x
        draw.ellipse((x - 10, 90, x + 20, 120), fill="#1f4fd6")
        return image

    return frame


def clock_frame(seconds: float, turn: float) -> Callable[[float], Image.Image]:
    """A clock whose single hand starts at twelve and turns clockwise by ``turn`` of a circle."""

    def frame(t: float) -> Image.Image:
        image, draw = canvas("#f2f2f2")
        draw.ellipse((34, 10, 158, 134), fill="white", outline="black", width=3)
        for hour in range(1, 13):
            angle = math.radians(30 * hour)
            spot = (96 + 49 * math.sin(angle), 72 - 49 * math.cos(angle))
            draw.text(spot, str(hour), fill="black", font=font(13), anchor="mm")
        angle = 2 * math.pi * turn * t / seconds
        draw.line((96, 72, 96 + 38 * math.sin(angle), 72 - 38 * math.cos(angle)), fill="#c00000", width=4)
        return image

    return frame


def digit_frame(t: float) -> Image.Image:
    """A new big digit each second, starting with 1."""
    number = int(t) + 1
    image, draw = canvas(("#264653", "#2a9d8f", "#8a5a00", "#9b2226")[(number - 1) % 4])
    draw.text((96, 72), str(number), fill="white", font=font(96), anchor="mm")
    return image


def traffic_light_frame(t: float) -> Image.Image:
    """A traffic light: red, then yellow, then green, one second each."""
    image, draw = canvas("#87a7c7")
    draw.rounded_rectangle((70, 8, 122, 136), 8, fill="#222222")
    for i, color in enumerate(("#ff3b30", "#ffd60a", "#34c759")):
        draw.ellipse((79, 14 + 40 * i, 113, 48 + 40 * i), fill=color if int(t) == i else "#444444")
    return image


def rising_bar_frame(seconds: float) -> Callable[[float], Image.Image]:
    """A bar that grows from the ground to the top."""

    def frame(t: float) -> Image.Image:
        image, draw = canvas("white")
        draw.rectangle((76, 134 - 120 * t / seconds, 116, 134), fill="#7b2cbf")
        draw.line((20, 135, 172, 135), fill="black", width=2)
        return image

    return frame


def rocket_countdown(sources: Sources) -> Clip:
    """The camera moves towards the rocket while a voice counts down; a noise follows."""
    words = [say(word, "en-us", 150) for word in ("three", "two", "one", "lift off!")]
    parts = [(0.1 + 0.8 * i, word) for i, word in enumerate(words)]
    parts.append((3.2, noise(0.8, 0.5, seed=5, rate=words[0].rate)))
    frame = camera_move(sources, "rocket.jpg", (0.05, 0.0, 0.88), (0.32, 0.1, 0.4), 4)
    return Clip(frame, 4, fps=8, sound=place(4, parts))


def counting(sources: Sources) -> Clip:
    """Digits on the screen, spoken at the same time by the recorded voice."""
    parts = [(0.1 + i, recorded(sources, f"digits/{i + 1}")) for i in range(4)]
    return Clip(digit_frame, 4, sound=place(4, parts))


CLIPS: dict[str, Callable[[Sources], Clip]] = {
    # Without sound.
    "videos/bouncing ball.mp4": lambda s: Clip(ball_frame("#ff7f0e", 1), 3),
    "videos/coffee_zoom.mp4": lambda s: Clip(
        camera_move(s, "coffee.png", (0.0, 0.0, 0.88), (0.35, 0.02, 0.45), 3), 3, fps=12
    ),
    "videos/clock_hand.mkv": lambda s: Clip(clock_frame(3, 0.75), 3, fps=8),
    "videos/crossing_shapes.mov": lambda s: Clip(crossing_frame(2.5), 2.5, fps=12),
    "videos/deep_field_pan.mp4": lambda s: Clip(
        camera_move(s, "hubble_deep_field.jpg", (0.0, 0.05, 0.35), (0.6, 0.4, 0.35), 3), 3
    ),
    "videos/cameraman_zoom_out.mp4": lambda s: Clip(
        camera_move(s, "camera.png", (0.25, 0.1, 0.4), (0.0, 0.05, 1.0), 2.5), 2.5, fps=8
    ),
    # With a sound track.
    "videos/counting_digits.mp4": counting,
    "videos/rocket_countdown.webm": rocket_countdown,
    "videos/cat_pan_zh.mp4": lambda s: Clip(
        camera_move(s, "chelsea.png", (0.0, 0.1, 0.6), (0.35, 0.05, 0.6), 3),
        3,
        sound=place(3, [(0.2, say("这是一只可爱的小猫。", MANDARIN + "+f2", 150))]),
    ),
    "videos/ball_with_clicks.mp4": lambda s: Clip(
        ball_frame("#d62728", 1.6),
        2.5,
        fps=15,
        sound=place(2.5, [((i + 0.5) / 1.6, click()) for i in range(4)]),
    ),
    "videos/traffic_light.mp4": lambda s: Clip(
        traffic_light_frame,
        3,
        sound=place(3, [(0.0, tone(440, 0.5)), (1.0, tone(660, 0.5)), (2.0, tone(880, 0.5))]),
    ),
    "videos/rising_bar.mp4": lambda s: Clip(rising_bar_frame(2), 2, sound=tone(200, 2, 1600)),
}


# ---------------------------------------------------------------------------------------------------
# Samples: one line of index.jsonl each
# ---------------------------------------------------------------------------------------------------

SAMPLES: list[dict[str, Any]] = [
    # Text only.
    {
        "text": "Why does the sky look blue during the day?",
        "answer": "Air molecules scatter short wavelengths of sunlight, such as blue, much more than "
        "long ones, such as red. The scattered blue light reaches our eyes from every direction, "
        "so the whole sky looks blue.",
    },
    {
        "text": "Write a Python function that tells whether a string is a palindrome. Ignore case and spaces.",
        "answer": "```python\ndef is_palindrome(text: str) -> bool:\n"
        '    letters = text.lower().replace(" ", "")\n    return letters == letters[::-1]\n```\n'
        "It drops the spaces, makes all letters small and compares the result with its reverse.",
    },
    {
        "text": "A train travels 180 km in 2.5 hours. What is its average speed in km/h? Show the calculation.",
        "answer": "The average speed is the distance divided by the time: 180 km / 2.5 h = 72 km/h.",
    },
    {
        "text": "Translate into Chinese: The library opens at nine every morning except on Sundays.",
        "answer": "除星期日外，图书馆每天早上九点开门。",
    },
    {
        "text": "什么是光合作用？请用简单的话解释。",
        "answer": "光合作用是绿色植物利用阳光，把二氧化碳和水变成有机物（如糖类）并放出氧气的过程。"
        "它为植物自身提供养分，也为其他生物提供食物和氧气。",
    },
    {
        "text": "用 Python 写一个函数，返回列表中所有偶数的和。",
        "answer": "```python\ndef sum_even(numbers):\n    return sum(n for n in numbers if n % 2 == 0)\n```\n"
        "函数用生成器表达式选出能被 2 整除的数，再用 sum 求和。",
    },
    {
        "text": "笼子里有鸡和兔共 10 只，一共有 28 只脚。鸡和兔各有多少只？",
        "answer": "假设全是鸡，应有 20 只脚，实际多出 8 只；每只兔比鸡多 2 只脚，所以兔有 8 ÷ 2 = 4 只，鸡有 6 只。",
    },
    {
        "system": "你是一名编辑，回答简洁、准确。",
        "text": "请用一句话概括下面的短文：\n茶树原产于中国西南地区。"
        "古人最初把茶叶当作药材，后来才逐渐成为日常饮料。"
        "唐代陆羽写了《茶经》，系统地介绍了茶的种植、制作和饮用方法，推动了饮茶风气的传播。"
        "如今，茶已经成为世界上消费量最大的饮料之一，各地也形成了各具特色的茶文化。",
        "answer": "茶起源于中国西南，由药材逐渐变为日常饮料，经陆羽《茶经》推广，如今已风靡世界并形成多样的茶文化。",
    },
    # Image.
    {
        "image": "images/astronaut.jpg",
        "text": "What is the person in this picture wearing, and what can you see around her?",
        "answer": "She is wearing an orange space suit and smiling at the camera. "
        "There is an American flag on the left, a model of a space shuttle behind her, "
        "and a helmet with a dark visor in front of her.",
    },
    {
        "image": "images/coffee cup.jpg",
        "text": "图中的杯子和碟子是什么颜色？旁边还有什么？",
        "answer": "杯子外面和碟子都是红色的，杯子里面是白色的，盛着咖啡。碟子上放着一把小勺，下面是木桌。",
    },
    {
        "image": "images/cat.webp",
        "text": "Which animal is this? Describe its fur and its eyes.",
        "answer": "It is a cat, seen from close up. Its fur is light brown with darker tabby stripes, "
        "and its eyes are yellow-green.",
    },
    {
        "image": "images/cameraman.png",
        "text": "这张黑白照片里的人在做什么？",
        "answer": "一位身穿深色大衣的男子站在草地上，正通过架在三脚架上的摄影机取景，远处能看到一些建筑。",
    },
    {"image": "images/rocket.jpg"},
    {
        "image": "images/deep_field.webp",
        "text": "这张照片里的亮点主要是什么？",
        "answer": "这是哈勃空间望远镜拍摄的深空照片，图中大多数亮点都是极其遥远的星系。",
    },
    {
        "image": "images/sales_chart.png",
        "text": "Read the chart: in which month were the most umbrellas sold, "
        "and how many in all four months together?",
        "answer": "Most umbrellas were sold in February, 18 of them. All four months together make "
        "12 + 18 + 9 + 15 = 54 umbrellas.",
    },
    {
        "image": "images/notice_zh.png",
        "text": "请读出图片中的文字。",
        "answer": "图书馆开放时间；周一至周五 9:00—21:00；周末 10:00—18:00。",
    },
    # Audio.
    {
        "audio": "audio/weasels.wav",
        "text": "Write down what the speaker says.",
        "answer": "Weasels have eaten our phone system.",
    },
    {
        "audio": "audio/appointment.flac",
        "text": "Which day and time does the recording name?",
        "answer": "It names Tuesday, July twentieth, at ten A.M.",
    },
    {
        "audio": "audio/five_messages.mp3",
        "text": "这段英语录音说了什么？请翻译成中文。",
        "answer": "录音说的是“You have five messages”，意思是“您有五条留言”。",
    },
    {
        "audio": "audio/monkeys.wav",
        "text": "What does the woman say, and which sound follows?",
        "answer": 'She says "They have been carried away by monkeys", and then monkeys are heard screaming.',
    },
    {
        "audio": "audio/capital.wav",
        "text": "Please answer the question in the recording.",
        "answer": "The capital of France is Paris.",
    },
    {
        "audio": "audio/天气.wav",
        "text": "请把这段录音转写成文字。",
        "answer": "今天天气晴朗，最高气温二十五度。",
    },
    {
        "audio": "audio/train_zh.m4a",
        "text": "录音里的人约在什么时候、什么地方见面？",
        "answer": "他们约好明天早上八点在火车站见面。",
    },
    {
        "audio": "audio/three_beeps.wav",
        "text": "How many beeps do you hear, and does their pitch go up or down?",
        "answer": "There are three beeps, and each one is higher than the one before.",
    },
    {"audio": "audio/music.mp3", "text": "请描述这段音乐的节奏和给人的感觉。"},
    # Silent video.
    {
        "video": "videos/bouncing ball.mp4",
        "text": "视频里的橙色小球一共落地弹起了几次？",
        "answer": "橙色小球一共落地弹起了三次。",
    },
    {"video": "videos/coffee_zoom.mp4"},
    {
        "video": "videos/clock_hand.mkv",
        "text": "Which way does the hand of the clock turn, and about where does it stop?",
        "answer": "The red hand starts at twelve and turns clockwise until it is close to nine.",
    },
    {
        "video": "videos/crossing_shapes.mov",
        "text": "Describe how the two shapes move.",
        "answer": "A red square moves from left to right along the top, "
        "while a blue circle moves from right to left along the bottom.",
    },
    # Video with sound.
    {
        "video": "videos/counting_digits.mp4",
        "text": "Do the spoken numbers match the ones on the screen? Name them in order.",
        "answer": "Yes, they match: the digits one, two, three and four are shown and spoken in that order.",
    },
    {
        "video": "videos/rocket_countdown.webm",
        "text": "What happens in this clip, and what does the voice say?",
        "answer": "The camera moves closer to a rocket on its launch pad at dusk, while a voice counts "
        '"three, two, one, lift off" and a rushing noise follows.',
    },
    {
        "video": "videos/cat_pan_zh.mp4",
        "text": "视频里的声音说了什么？和画面相符吗？",
        "answer": "声音说“这是一只可爱的小猫”。画面正是一只猫的脸部特写，两者相符。",
    },
    {
        "video": "videos/traffic_light.mp4",
        "text": "红绿灯的颜色按什么顺序变化？提示音有什么变化？",
        "answer": "红绿灯依次变为红色、黄色和绿色，每次变化时的提示音一次比一次高。",
    },
    {
        # The clip has a sound track that must not be used.
        "video": "videos/rising_bar.mp4",
        "use_audio_in_video": False,
        "text": "What does the bar in the clip do?",
        "answer": "The purple bar grows steadily upwards from the ground until it nearly reaches the top.",
    },
    # Mixtures.
    {
        "image": "images/coffee cup.jpg",
        "audio": "audio/what_drink.mp3",
        "text": "Answer the spoken question about the picture.",
        "answer": "The cup holds coffee; it looks like an espresso.",
    },
    {
        "image": "images/horse.png",
        "audio": "audio/which_animal_zh.wav",
        "text": "请回答录音中的问题。",
        "answer": "图片里是一匹马的黑色剪影。",
    },
    {
        "image": ["images/brick.jpg", "images/gravel.jpg"],
        "text": "What is the difference between the two surfaces?",
        "answer": "The first one is made of regular bricks laid in rows, the second one is loose gravel: "
        "small stones of irregular shape.",
    },
    {
        "image": "images/cameraman.png",
        "video": "videos/cameraman_zoom_out.mp4",
        "text": "图片和视频拍的是同一个场景吗？视频的镜头是怎样运动的？",
        "answer": "是同一个场景，都是一名男子在草地上用三脚架上的摄影机取景。视频的镜头从近处逐渐拉远。",
    },
    {
        "audio": "audio/how_many_bounces_zh.wav",
        "video": "videos/ball_with_clicks.mp4",  # a sound in the clip and a separate sound
        "text": "请根据视频回答录音里的问题。",
        "answer": "红色的球一共跳了四次，每次落地都能听到一声响。",
    },
    {
        "audio": ["audio/letters.wav", "audio/music.mp3"],
        "video": "videos/deep_field_pan.mp4",
        "text": "Three code words are spoken in the first recording. Which word do their first letters make? "
        "Then say what the clip shows.",
        "answer": 'The code words are "Charlie, Alpha, Tango", so the letters make the word CAT. '
        "The clip pans over a photograph of many distant galaxies.",
    },
    {
        "image": "images/astronaut.jpg",
        "audio": "audio/person_en.wav",
        "video": "videos/bouncing ball.mp4",
        "text": "Listen to the question, then answer it from the picture and the clip.",
        "answer": "The picture shows a person, an astronaut in an orange suit. The clip only shows a bouncing ball.",
    },
    # Conversations.
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant that answers briefly."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "images/sales_chart.png"},
                    {"type": "text", "text": "What does this chart show?"},
                ],
            },
            {"role": "assistant", "content": "It shows how many umbrellas were sold from January to April."},
            {"role": "user", "content": "Which month was the weakest?"},
            {"role": "assistant", "content": "March, with only 9 umbrellas."},
        ]
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "audio", "audio": "audio/plus_zh.mp3"},
                    {"type": "text", "text": "请回答录音中的问题。"},
                ],
            },
            {"role": "assistant", "content": "三加五等于八。"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "images/cat.webp"},
                    {"type": "audio", "audio": "audio/who_zh.flac"},
                    {"type": "video", "video": "videos/cameraman_zoom_out.mp4"},
                ],
            },
            {"role": "assistant", "content": "视频里有人：一名男子正在用摄影机取景；图片里只有一只猫。"},
        ]
    },
]


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------

AUDIO_CODECS = {
    ".wav": ["-c:a", "pcm_s16le"],
    ".flac": ["-c:a", "flac"],
    ".mp3": ["-c:a", "libmp3lame", "-b:a", "48k"],
    ".m4a": ["-c:a", "aac", "-b:a", "48k"],
}
H264 = ["-c:v", "libx264", "-crf", "25", "-preset", "slow", "-c:a", "aac", "-b:a", "48k"]
VP9 = ["-c:v", "libvpx-vp9", "-crf", "34", "-b:v", "0", "-c:a", "libopus", "-b:a", "32k"]
CLIP_CODECS = {".mp4": [*H264, "-movflags", "+faststart"], ".mov": H264, ".mkv": H264, ".webm": VP9}
# One thread, and no time stamps or version strings, so that the same input gives the same file.
REPRODUCIBLE = ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"]


def run_ffmpeg(arguments: list[str], data: bytes) -> None:
    """Run ffmpeg with ``data`` on its standard input."""
    subprocess.run(["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", *arguments], input=data, check=True)


def pcm(sound: Sound) -> bytes:
    """The sound as 16-bit samples."""
    return (sound.samples * 32767).round().astype("<i2").tobytes()


def pcm_input(sound: Sound, source: str) -> list[str]:
    """The ffmpeg arguments that read ``pcm(sound)`` from ``source``."""
    return ["-f", "s16le", "-ar", str(sound.rate), "-ac", "1", "-i", source]


def write_image(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of the file's suffix."""
    options: dict[str, Any] = {".jpg": {"quality": 85}, ".webp": {"quality": 80}, ".png": {"optimize": True}}
    image.save(path, **options[path.suffix])


def write_sound(sound: Sound, path: Path) -> None:
    """Write a sound in the format of the file's suffix."""
    run_ffmpeg([*pcm_input(sound, "-"), *AUDIO_CODECS[path.suffix], *REPRODUCIBLE, str(path)], pcm(sound))


def write_clip(clip: Clip, path: Path) -> None:
    """Write a clip, with its sound track if it has one."""
    frames = b"".join(clip.frame(i / clip.fps).tobytes() for i in range(round(clip.seconds * clip.fps)))
    size = f"{CLIP_SIZE[0]}x{CLIP_SIZE[1]}"
    inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(clip.fps), "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        if clip.sound is not None:
            track = Path(folder) / "track.pcm"
            track.write_bytes(pcm(clip.sound))
            inputs += pcm_input(clip.sound, str(track))
        run_ffmpeg([*inputs, *CLIP_CODECS[path.suffix], "-pix_fmt", "yuv420p", *REPRODUCIBLE, str(path)], frames)


def media_of(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every (kind, path) of a sample, with or without ``messages``."""
    parts = [sample]
    for message in sample.get("messages", []):
        if not isinstance(message["content"], str):
            parts += message["content"]
    for part in parts:
        for kind in ("image", "audio", "video"):
            paths = part.get(kind, [])
            for path in [paths] if isinstance(paths, str) else paths:
                yield kind, path


def check_tables() -> None:
    """Exit with a message unless every file of the samples is in a table, and every file in a table is used."""
    used = {path for sample in SAMPLES for _, path in media_of(sample)}
    made = {*IMAGES, *SOUNDS, *CLIPS}
    if used != made:
        raise SystemExit(
            f"not in IMAGES, SOUNDS or CLIPS: {sorted(used - made)}; not used by any sample: {sorted(made - used)}"
        )


def summary(out: Path) -> str:
    """The number of samples of each kind, and the size of the files."""
    kinds: Counter[str] = Counter()
    for sample in SAMPLES:
        kinds["+".join(sorted({kind for kind, _ in media_of(sample)})) or "text"] += 1
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    return f"{len(SAMPLES)} samples ({counts}), {size / 1e6:.2f} MB"


def make(sources: Sources, out: Path) -> None:
    """Write all media and index.jsonl."""
    check_tables()
    for folder in ("images", "audio", "videos"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, image in IMAGES.items():
        write_image(image(sources), out / name)
    for name, sound in SOUNDS.items():
        write_sound(sound(sources), out / name)
    for name, clip in CLIPS.items():
        write_clip(clip(sources), out / name)
    lines = [json.dumps(sample, ensure_ascii=False) for sample in SAMPLES]
    (out / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def photo_folder() -> Path:
    """The folder of photographs in the scikit-image wheel."""
    import skimage  # imported here, so that --help and --photos work without it

    return Path(skimage.__file__).parent / "data"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "calibVideos",
        help="folder to write to (default: calibVideos next to this script)",
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: the installed scikit-image's)")
    parser.add_argument(
        "--sounds",
        type=Path,
        default=Path("/usr/share/asterisk/sounds/en_US_f_Allison"),
        help="folder of recorded speech from asterisk-core-sounds-en-wav (default: %(default)s)",
    )
    parser.add_argument(
        "--music",
        type=Path,
        default=Path("/usr/share/asterisk/moh"),
        help="folder of recorded music from asterisk-moh-opsound-wav (default: %(default)s)",
    )
    parser.add_argument(
        "--cjk-font",
        type=Path,
        default=Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc"),
        help="font with Chinese characters (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Make the data set and print a summary."""
    args = parse_args()
    sources = Sources(args.photos or photo_folder(), args.sounds, args.music, args.cjk_font)
    for path in (sources.photos, sources.sounds, sources.music, sources.cjk_font):
        if not path.exists():
            raise SystemExit(f"not found: {path} (see --help for the required packages)")
    make(sources, args.out)
    print(summary(args.out))


if __name__ == "__main__":
    main()
