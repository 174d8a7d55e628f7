"""Inputs that people have: odd pictures, sounds, clips and lines, each with what must come of it.

`python tests/odd_inputs/corpus.py FOLDER` writes the files and an index.jsonl with one line a case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 16_000


@dataclass(frozen=True)
class Odd:
    """A line of an index. outcome: the modalities of a sample that is read, or a part of the message of a refusal.

    entry: a JSON value, or the line itself. texts: pieces that the sample's turns hold, in order, if it is read.
    """

    name: str
    entry: Any
    outcome: frozenset[str] | str
    texts: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        return self.entry if isinstance(self.entry, str) else json.dumps(self.entry, ensure_ascii=False)


def read(name: str, entry: Any, *modalities: str, texts: tuple[str, ...] = ()) -> Odd:
    return Odd(name, entry, frozenset({"text", *modalities}), texts)


def refused(name: str, entry: Any, message: str) -> Odd:
    return Odd(name, entry, message)


def media(kind: str, file: str) -> dict[str, str]:
    return {kind: file, "text": "What is it?"}


# --- files ---------------------------------------------------------------------------------------------------


def _picture(width: int = 60, height: int = 40) -> Image.Image:
    ramp = np.indices((height, width)).sum(axis=0) * 3 % 256
    return Image.fromarray(np.stack([ramp, ramp.T.reshape(height, width) // 2, 255 - ramp], axis=2).astype(np.uint8))


def _sound(seconds: float = 0.3, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def write_clip(
    path: Path,
    frames: int = 6,
    *,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    rate: Fraction = Fraction(5),
    sound: float = 0.0,
    audio_codec: str = "aac",
    container: str | None = None,
) -> None:
    """sound: seconds of the sound track; none by default."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, width=size[0], height=size[1], pix_fmt=pixels)
        track = output.add_stream(audio_codec, rate=RATE, layout="mono") if sound else None
        for index in range(frames):
            level = np.full((size[1], size[0], 3), 20 + 30 * index % 200, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(level)))
        output.mux(stream.encode(None))
        if track is not None:
            _encode(output, track, _sound(sound), RATE)


def _encode(output: Any, track: Any, samples: np.ndarray, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(track.format.name, "mono", track.rate, track.frame_size or None)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        output.mux(track.encode(piece))
    output.mux(track.encode(None))


def _write_sound(path: Path, codec: str, container: str | None = None, rate: int = RATE) -> None:
    with av.open(str(path), "w", format=container) as output:
        track = output.add_stream(codec, rate=rate, layout="mono")
        track.bit_rate = 64_000
        _encode(output, track, _sound(0.3, rate), rate)


def write_files(folder: Path) -> None:
    """Write all media files of the cases."""
    _write_pictures(folder)
    _write_sounds(folder)
    _write_clips(folder)


def _write_pictures(folder: Path) -> None:
    picture = _picture()
    for name in ("a.png", "a.bmp", "a.tiff", "a.webp", "a.ico", "a.ppm", "a.jp2", "a.avif", "a.jpeg"):
        picture.save(folder / name)
    (folder / "jpeg_named.png").write_bytes((folder / "a.jpeg").read_bytes())
    (folder / "no_suffix").write_bytes((folder / "a.png").read_bytes())
    (folder / "a b %20#?.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "猫.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "half.jpg").write_bytes((folder / "a.jpeg").read_bytes()[:400])
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("1").save(folder / "bilevel.tif")
    picture.convert("LAB").save(folder / "lab.tif")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20).save(folder / "sixteen_bit.png")
    picture.convert("RGBA").save(folder / "animated.gif", save_all=True, append_images=[_picture().rotate(90)])
    picture.save(folder / "animated.webp", save_all=True, append_images=[_picture().rotate(90)])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (3, 599)).save(folder / "strip.png")
    Image.new("RGB", (2, 500)).save(folder / "line.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture.save(folder / "phone.jpg", exif=exif)
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20)
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>')
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500))
    (folder / "empty.jpg").write_bytes(b"")


def _write_sounds(folder: Path) -> None:
    for name, subtype in (
        ("pcm16.wav", "PCM_16"),
        ("pcm24.wav", "PCM_24"),
        ("float.wav", "FLOAT"),
        ("law.wav", "ULAW"),
    ):
        soundfile.write(folder / name, _sound(), RATE, subtype=subtype)
    soundfile.write(folder / "a.aiff", _sound(), RATE)
    soundfile.write(folder / "a.ogg", _sound(), RATE)
    soundfile.write(folder / "six_channels.wav", _sound(channels=6), RATE)
    soundfile.write(folder / "fast.wav", _sound(0.3, 192_000), 192_000)
    soundfile.write(folder / "phone.wav", _sound(0.3, 8_000), 8_000)
    soundfile.write(folder / "silence.wav", np.zeros(RATE // 2, np.float32), RATE)
    soundfile.write(folder / "five_ms.wav", _sound(0.005), RATE)
    soundfile.write(folder / "twenty_ms.flac", _sound(0.020, 48_000), 48_000)
    soundfile.write(folder / "thirty_ms.wav", _sound(0.030), RATE)
    soundfile.write(folder / "no_samples.wav", np.zeros(0, np.float32), RATE)
    broken = _sound()
    broken[100] = np.nan
    soundfile.write(folder / "nan.wav", broken, RATE, subtype="FLOAT")
    soundfile.write(folder / "flac_named.wav", _sound(), RATE, format="FLAC")
    _write_sound(folder / "a.opus", "libopus", "ogg", 48_000)
    _write_sound(folder / "a.aac", "aac", "adts")
    _write_sound(folder / "a.wma", "wmav2", "asf")
    _write_sound(folder / "a.mp3", "libmp3lame")
    _write_sound(folder / "speech.webm", "libopus", "webm", 48_000)
    with av.open(str(folder / "cover.m4a"), "w", format="mp4") as output:
        track = output.add_stream("aac", rate=RATE, layout="mono")
        cover = output.add_stream("mjpeg", rate=1, width=64, height=48, pix_fmt="yuvj420p")
        cover.disposition = 1024  # attached picture
        output.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        output.mux(cover.encode(None))
        _encode(output, track, _sound(), RATE)


def _write_clips(folder: Path) -> None:
    for frames in (1, 2, 3, 6):
        write_clip(folder / f"{frames}_frames.mp4", frames)
    write_clip(folder / "sound.mp4", 6, sound=1.0)
    write_clip(folder / "blip.mp4", 6, sound=0.004, audio_codec="pcm_s16le", container="mov")
    write_clip(folder / "a.avi", sound=1.0, audio_codec="libmp3lame")
    write_clip(folder / "a.mpg", codec="mpeg2video", rate=Fraction(25))
    write_clip(folder / "a.m4v", container="mp4")
    write_clip(folder / "a.ts", codec="mpeg2video", rate=Fraction(25), container="mpegts")
    write_clip(folder / "a.wmv", codec="wmv2", container="asf")
    write_clip(folder / "a.flv", codec="flv")
    write_clip(folder / "a.webm", codec="libvpx")
    write_clip(folder / "a.gif", codec="gif", pixels="rgb8")
    write_clip(folder / "odd_size.mkv", codec="libx264", size=(65, 49), pixels="yuv444p")
    write_clip(folder / "slow.mp4", 4, rate=Fraction(1, 5))
    write_clip(folder / "ntsc.mov", 12, rate=Fraction(30_000, 1001))
    write_clip(folder / "long.mp4", 240, rate=Fraction(2))
    content = (folder / "6_frames.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 3])
    (folder / "clip_named.jpg").write_bytes(content)


# --- cases ---------------------------------------------------------------------------------------------------


def _turns(*contents: Any, names: tuple[str, str, str, str] = ("role", "content", "user", "assistant")) -> list[Any]:
    role, content, user, assistant = names
    return [{role: (user, assistant)[n % 2], content: value} for n, value in enumerate(contents)]


SHARE_GPT = ("from", "value", "human", "gpt")

PICTURES = [
    *(read(f"picture {name}", media("image", name), "image") for name in (
        "a.bmp", "a.tiff", "a.webp", "a.ico", "a.ppm", "a.jp2", "a.avif", "animated.gif", "animated.webp",
        "jpeg_named.png", "no_suffix", "a b %20#?.png", "猫.png", "cmyk.jpg", "bilevel.tif", "lab.tif",
        "sixteen_bit.png", "pixel.png", "strip.png", "phone.jpg",
    )),
    refused("half a jpeg", media("image", "half.jpg"), "cannot be decoded"),
    refused("aspect ratio of 250", media("image", "line.png"), "aspect ratio above 200"),
    refused("a web page", media("image", "page.jpg"), "is no picture that Pillow reads; convert it to PNG or JPEG"),
    refused("a pointer of Git LFS", media("image", "pointer.jpg"), "is no picture that Pillow reads"),
    refused("svg", media("image", "drawing.svg"), "is no picture that Pillow reads"),
    refused("heic", media("image", "photo.heic"), "is no picture that Pillow reads"),
    refused("empty", media("image", "empty.jpg"), "is empty"),
    refused("clip as image", media("image", "clip_named.jpg"), "is no image; its content can be given as video"),
    refused("another case", media("image", "A.PNG"), "does not exist"),
    refused("folder", media("image", "."), "is a folder"),
]  # fmt: skip

SOUNDS = [
    *(read(f"sound {name}", media("audio", name), "audio") for name in (
        "pcm16.wav", "pcm24.wav", "float.wav", "law.wav", "a.aiff", "a.ogg", "a.opus", "a.aac", "a.wma", "a.mp3",
        "speech.webm", "six_channels.wav", "fast.wav", "phone.wav", "silence.wav", "thirty_ms.wav", "flac_named.wav",
        "cover.m4a", "sound.mp4",
    )),
    refused("5 ms", media("audio", "five_ms.wav"), "has 5.0 ms; the model needs at least 20.1 ms"),
    refused("20 ms", media("audio", "twenty_ms.flac"), "has 20.0 ms; the model needs at least 20.1 ms"),
    refused("no samples", media("audio", "no_samples.wav"), "no_samples.wav"),
    refused("nan", media("audio", "nan.wav"), "NaN or infinite samples"),
    refused("picture as sound", media("audio", "a.png"), "is no audio; its content can be given as image"),
    refused("silent clip as sound", media("audio", "6_frames.mp4"), "is no audio; its content can be given as video"),
]  # fmt: skip

CLIPS = [
    *(read(f"clip {name}", media("video", name), "video") for name in (
        "1_frames.mp4", "2_frames.mp4", "3_frames.mp4", "a.mpg", "a.m4v", "a.ts", "a.wmv", "a.flv", "a.webm",
        "a.gif", "odd_size.mkv", "slow.mp4", "ntsc.mov", "clip_named.jpg", "blip.mp4",
    )),
    read("clip a.avi", media("video", "a.avi"), "video", "audio"),
    read("clip without its sound", {**media("video", "sound.mp4"), "use_audio_in_video": False}, "video"),
    refused("cut", media("video", "cut.mp4"), "cut.mp4"),
    refused("sound as clip", media("video", "cover.m4a"), "is no video; its content can be given as audio"),
    refused("picture as clip", media("video", "a.png"), "is no video; its content can be given as image"),
    refused("too long", media("video", "long.mp4"), "more than max_tokens 3000 tokens: 240 frames of"),
    refused("no sound", {"video": "2_frames.mp4", "use_audio_in_video": True}, "has no audio track"),
    refused("sound of 4 ms", {"video": "blip.mp4", "use_audio_in_video": True}, "has no audio track"),
]  # fmt: skip

LINES = [
    read("LLaVA", {"id": "1", "image": "a.png", "conversations": _turns("<image>\nWhat?", "A ramp.", names=SHARE_GPT)},
         "image", texts=("What?", "A ramp.")),
    read("ShareGPT, text", {"conversations": _turns("Hi", "Hello", "Bye", "Later", names=SHARE_GPT)},
         texts=("Hi", "Hello", "Bye", "Later")),
    read("ShareGPT, two pictures", {"images": ["a.png", "a.bmp"],
         "conversations": _turns("<image> and <image>: same?", "No", names=SHARE_GPT)}, "image",
         texts=(" and ", ": same?", "No")),
    read("LLaVA without a tag", {"image": "a.png", "conversations": _turns("What?", "A ramp.", names=SHARE_GPT)},
         "image", texts=("What?", "A ramp.")),
    read("MiniCPM", {"image": "a.png", "conversations": _turns("<image>\nWhat?", "A ramp.")}, "image"),
    read("ms-swift", {"messages": _turns("<image><audio>Same?", "No"), "images": ["a.png"], "audios": ["pcm16.wav"]},
         "image", "audio", texts=("Same?", "No")),
    read("ms-swift, query", {"query": "<image>What?", "response": "A ramp.", "images": ["a.png"],
         "history": [["Hi", "Hello"]]}, "image", texts=("Hi", "Hello", "What?", "A ramp.")),
    read("Alpaca", {"instruction": "Translate.", "input": "Hund", "output": "dog"}, texts=("Translate.\nHund", "dog")),
    read("prompt and completion", {"prompt": "2 + 2?", "completion": "4"}, texts=("2 + 2?", "4")),
    read("turns in prompt and completion", {"prompt": _turns("2 + 2?"),
         "completion": [{"role": "assistant", "content": "4"}]}, texts=("2 + 2?", "4")),
    read("OpenAI", {"messages": _turns([{"type": "text", "text": "What?"},
         {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
         {"type": "video_url", "video_url": {"url": "2_frames.mp4"}}])}, "image", "video", texts=("What?",)),
    read("placeholders and lists", {"messages": _turns([{"type": "image"}, {"type": "text", "text": "What?"}]),
         "images": ["a.png"]}, "image", texts=("What?",)),
    read("Hugging Face chat", {"messages": _turns([{"type": "image", "path": "a.png"},
         {"type": "audio", "url": "pcm16.wav"}, {"type": "text", "text": "What?"}])}, "image", "audio"),
    read("parts without a type", {"messages": _turns([{"image": "a.png"}, {"text": "What?"}])}, "image"),
    read("picture as a path and bytes", {"image": {"path": "a.png", "bytes": None}, "text": "What?"}, "image"),
    read("system beside turns", {"system": "Be short.", "messages": _turns("Hi", "Hello")}, texts=("Be short.", "Hi")),
    read("nulls of a table", {"text": "Hi", "image": None, "images": [], "answer": None, "conversations": None},
         texts=("Hi",)),
    read("text about HTML", {"text": "Explain <video> and <audio>."}, texts=("Explain <video> and <audio>.",)),
    read("own keys", {"text": "Hi", "id": 5, "source": "me", "licence": "CC0"}, texts=("Hi",)),
    refused("missing picture of a tag", {"conversations": _turns("<image>\nWhat?", "x", names=SHARE_GPT)},
            "messages have 1 placeholder of image, and image lists 0 files"),
    refused("more tags than files", {"messages": _turns("<image><image>Same?"), "images": ["a.png"]},
            "messages have 2 placeholders of image, and image lists 1 file"),
    refused("Qwen-VL's inline file", {"text": "Picture 1: <img>a.png</img>\nWhat?"}, "text holds '<img>a.png</img>'"),
    refused("address", {"messages": _turns([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}])},
            "is a URL; only local files"),
    refused("encoded picture", {"messages": _turns([{"type": "image_url",
            "image_url": {"url": "data:image/png;base64,AAAA"}}])}, "is a URL; only local files"),
    refused("encoded sound", {"messages": _turns([{"type": "input_audio",
            "input_audio": {"data": "AAAA", "format": "wav"}}])}, "holds encoded data; write it to a file"),
    refused("part of a clip", {"messages": _turns([{"type": "video", "video": "2_frames.mp4", "video_start": 1.0},
            {"type": "text", "text": "What?"}])}, "video_start of video parts is not read"),
    refused("caption", {"image": "a.png", "caption": "A ramp."}, "key 'caption' may hold content and is not read"),
    refused("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "key 'chosen' may hold content"),
    refused("two texts", {"text": "Hi", "prompt": "Hello"}, "prompt and text both give the text"),
    refused("tools", {"messages": _turns("Hi"), "tools": [{"name": "f"}]}, "key 'tools' may hold content"),
    refused("turn of a tool", {"messages": [*_turns("Hi"), {"role": "tool", "content": "5"}]}, "messages[1] needs"),
    refused("turn without words", {"messages": [*_turns("Hi"), {"role": "assistant", "content": None}]},
            "messages[1] needs a role (system, user, assistant) and content"),
    refused("token of a picture", {"text": "<|IMAGE|> What?"}, "a text holds <|IMAGE|>"),
    refused("token of a sound in an answer", {"text": "Hi", "answer": "<|AUDIO|>"}, "a text holds <|AUDIO|>"),
    refused("rendered template", {"text": "<|im_start|>user\nHi<|im_end|>"}, "a text holds <|im_end|>, <|im_start|>"),
    refused("lone surrogate", '{"text": "\\ud800"}', "odd.jsonl"),
    refused("Python's quotes", "{'text': 'Hi'}", "not valid JSON"),
    refused("NaN", '{"text": NaN}', "text must be a non-empty string"),
    refused("list", ["Hi"], "a sample must be a JSON object, not list"),
    refused("key twice", '{"text": "Hi", "text": "Bye"}', "not valid JSON"),
    refused("number as text", {"text": 5}, "text must be a non-empty string"),
]  # fmt: skip

CASES = [*PICTURES, *SOUNDS, *CLIPS, *LINES]


def write_corpus(folder: Path) -> Path:
    """Write the files and the index. Returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder)
    index = folder / "odd.jsonl"
    index.write_text("".join(case.line + "\n" for case in CASES), encoding="utf-8")
    return index


if __name__ == "__main__":
    writer: Callable[[Path], Path] = write_corpus
    print(writer(Path(sys.argv[1])))
