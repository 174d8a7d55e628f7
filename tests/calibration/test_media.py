"""Audio, image and video decoding against other decoders, and errors on broken files."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from growth import python_calls
from library_videos import use_in_library
from librosa_uncompiled import librosa
from media_files import probe_error, tone, write_video, write_wav
from PIL import Image

from msmodelslim_omni.calibration import clips, containers, media
from msmodelslim_omni.calibration.clips import VideoClip, sample_frames
from msmodelslim_omni.calibration.media import MediaFacts
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files.resources import shipped_folder
from msmodelslim_omni.models.frames import FrameRules, frame_size, load_clip
from msmodelslim_omni.models.inputs import ClipSize, FrameChoice
from msmodelslim_omni.models.torchvision_shim import ensure_torchvision_imports

SHIPPED = shipped_folder("lab_calib") / "calibVideos"


def shipped_files(kind: str) -> list[Path]:
    return sorted((SHIPPED / kind).iterdir())


def file_name(path: Path) -> str:
    return path.name


# --- audio ---------------------------------------------------------------------------------------------------


def test_16_khz_wav_is_decoded_exactly(tmp_path: Path) -> None:
    samples = tone(5000)
    path = write_wav(tmp_path / "a.wav", samples, 16_000)
    loaded = media.load_audio(path)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, samples.astype(np.float32) / 32768)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(3000, 1), tone(3000, 2)
    path = write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000)
    expected = (left.astype(np.float64) + right) / 2 / 32768
    np.testing.assert_allclose(media.load_audio(path), expected, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_resampling_equals_librosa(tmp_path: Path, rate: int, channels: int) -> None:
    samples = np.stack([tone(rate // 3 + 17, seed) for seed in range(channels)], axis=1)
    path = write_wav(tmp_path / "a.wav", samples, rate)
    expected, _ = librosa.load(path, sr=16_000)
    loaded = media.load_audio(path)
    assert loaded.shape == expected.shape
    np.testing.assert_allclose(loaded, expected, atol=1e-4)


@pytest.mark.parametrize("path", shipped_files("audio"), ids=file_name)
def test_shipped_audio_files(path: Path) -> None:
    loaded = media.load_audio(path)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert 0.5 < len(loaded) / 16_000 < 30
    assert 0.01 < np.abs(loaded).max() <= 1.5
    if path.suffix in (".wav", ".flac"):
        expected, _ = librosa.load(path, sr=16_000)
        assert loaded.shape == expected.shape
        np.testing.assert_allclose(loaded, expected, atol=1e-4)


def test_flac_24_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(4000).astype(np.float64) / 32768, 16_000, subtype="PCM_24")
    np.testing.assert_allclose(media.load_audio(path), tone(4000) / 32768, atol=1e-6)


def test_audio_track_of_a_video(tmp_path: Path) -> None:
    loaded = media.load_audio(write_video(tmp_path / "a.mp4", 5, sound=True))
    assert abs(len(loaded) - 16_000) < 3000
    assert np.abs(loaded).max() > 0.2


def test_video_without_audio_track(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(QuantError, match=r"a\.mp4' has no audio track"):
        media.load_audio(path)


def test_audio_without_samples(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.zeros(0, np.int16), 16_000)
    with pytest.raises(QuantError, match=r"a\.wav"):
        media.load_audio(path)


def test_long_audio_is_refused_while_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_SECONDS", 0.5)
    path = write_wav(tmp_path / "a.wav", tone(16_000), 16_000)
    with pytest.raises(QuantError, match=r"a\.wav' is longer than 0 s"):
        media.load_audio(path)
    assert "longer than" in probe_error("audio", path)


# --- probing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_shipped_files_are_accepted(kind: str) -> None:
    for path in shipped_files({"image": "images", "audio": "audio", "video": "videos"}[kind]):
        media.probe(kind, path)


def test_probe_returns_whether_a_video_has_audio(tmp_path: Path) -> None:
    assert media.probe("video", write_video(tmp_path / "a.mp4", 2)) == MediaFacts("video", 64 * 48, 0.4)
    assert media.probe("video", write_video(tmp_path / "b.MKV", 2, sound=True)).has_sound
    assert media.probe("audio", write_wav(tmp_path / "c.wav", tone(8000), 16_000)) == MediaFacts("audio", 0, 0.5, 8000)


@pytest.mark.parametrize(("samples", "rate"), [(320, 16_000), (960, 48_000), (1, 16_000)])
def test_sound_that_is_too_short(tmp_path: Path, samples: int, rate: int) -> None:
    path = write_wav(tmp_path / "a.wav", tone(samples), rate)
    with pytest.raises(QuantError, match=r"ms; the model needs at least 20\.1 ms$"):
        media.probe("audio", path, 321)
    assert media.probe("audio", write_wav(path, tone(321 * rate // 16_000), rate), 321).samples


def test_clip_with_a_sound_track_that_is_too_short(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 2, sound=True)  # a second
    assert media.probe("video", path, 16_000).has_sound
    assert not media.probe("video", path, 60_000).has_sound


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in probe_error("image", tmp_path / "a.png")


def test_file_above_the_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "a.mp4").open("wb") as stream:
        stream.truncate(media.MAX_FILE_BYTES + 1)
    assert f"larger than {media.MAX_FILE_BYTES} bytes" in probe_error("video", tmp_path / "a.mp4")


GARBAGE = {"zeros": bytes(2000), "text": b"this is not a media file " * 50, "empty": b""}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("image", "a.png"),
        ("image", "a"),
        ("audio", "a.wav"),
        ("audio", "a.mp3"),
        ("video", "a.mp4"),
        ("video", "a.txt"),
    ],
)
def test_garbage(tmp_path: Path, kind: str, name: str, garbage: str) -> None:
    (tmp_path / name).write_bytes(GARBAGE[garbage])
    message = probe_error(kind, tmp_path / name)
    assert message.startswith(f"{kind} ")


@pytest.mark.parametrize("path", shipped_files("images"), ids=file_name)
def test_truncated_image(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    (tmp_path / path.name).write_bytes(content[: len(content) // 2])
    assert "cannot be decoded" in probe_error("image", tmp_path / path.name)


@pytest.mark.parametrize("path", [*shipped_files("videos"), *shipped_files("audio")], ids=file_name)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_truncated_audio_and_video(tmp_path: Path, path: Path, share: float) -> None:
    """Half a file may still decode (wav, mp3 and webm do). The result is audio or a QuantError, never a traceback."""
    content = path.read_bytes()
    truncated = tmp_path / path.name
    truncated.write_bytes(content[: int(len(content) * share)])
    kind = "video" if path.parent.name == "videos" else "audio"
    if path.suffix in (".mp4", ".mov", ".m4a") and share < 0.1:
        probe_error(kind, truncated)
        return
    try:
        media.probe(kind, truncated)
        media.load_audio(truncated)
    except QuantError as error:
        assert path.name in error.message


@pytest.mark.parametrize("path", [*shipped_files("images")[:6], *shipped_files("videos")[:4]], ids=file_name)
def test_damaged_bytes(tmp_path: Path, path: Path) -> None:
    """Random bytes are changed. The result is an image or a QuantError."""
    rng = random.Random(0)
    damaged = tmp_path / path.name
    kind = "image" if path.parent.name == "images" else "video"
    for _ in range(8):
        content = bytearray(path.read_bytes())
        for _ in range(5):
            content[rng.randrange(min(len(content), 3000))] = rng.randrange(256)
        damaged.write_bytes(content)
        try:
            media.probe(kind, damaged)
            if kind == "image":
                media.load_image(damaged)
        except QuantError as error:
            assert path.name in error.message


def test_video_file_with_audio_only(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(write_wav(tmp_path / "a.wav", tone(100), 16_000).read_bytes())
    assert "is no video; its content can be given as audio" in probe_error("video", tmp_path / "a.mp4")


def test_audio_file_with_video_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    assert "is no audio; its content can be given as video" in probe_error("audio", path.rename(tmp_path / "a.m4a"))


def test_image_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_PIXELS", 32 * 24 - 1)
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    assert "has 32 x 24 pixels; the limit is 767" in probe_error("image", tmp_path / "a.png")


def test_decompression_bomb(tmp_path: Path) -> None:
    """A PNG of a few bytes whose header says 60000 x 60000 is refused by its header."""
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    message = probe_error("image", tmp_path / "a.png")
    assert "60000 x 60000" in message or "cannot be decoded" in message


def test_video_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(containers, "MAX_PIXELS", 64 * 48 - 1)
    assert "has 64 x 48 pixels; the limit is 3071" in probe_error("video", path)


@pytest.mark.parametrize("size", [(201, 1), (1, 201)])
def test_image_with_an_extreme_aspect_ratio(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert "has an aspect ratio above 200" in probe_error("image", tmp_path / "a.png")


# --- images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "loaded_mode"), [("RGB", "RGB"), ("L", "L"), ("RGBA", "RGBA"), ("P", "RGBA"), ("LA", "RGBA")]
)
def test_image_modes(tmp_path: Path, mode: str, loaded_mode: str) -> None:
    image = Image.new("RGB", (30, 20), (200, 30, 90)).convert(mode)
    image.save(tmp_path / "a.png")
    loaded = media.load_image(tmp_path / "a.png")
    assert loaded.mode == loaded_mode
    assert np.array_equal(np.asarray(loaded.convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["bmp", "tif", "tiff", "gif"])
def test_first_picture_of_other_formats(tmp_path: Path, suffix: str) -> None:
    red, blue = Image.new("RGB", (30, 20), (200, 30, 90)), Image.new("RGB", (30, 20), (0, 0, 255))
    path = tmp_path / f"a.{suffix}"
    red.save(path, **({} if suffix == "bmp" else {"save_all": True, "append_images": [blue]}))
    assert media.probe("image", path) == MediaFacts("image", 30 * 20)
    assert np.array_equal(np.asarray(media.load_image(path).convert("RGB")), np.asarray(red))


def test_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(QuantError, match=r"a\.png' cannot be decoded"):
        media.load_image(tmp_path / "a.png")


# --- video frames --------------------------------------------------------------------------------------------


def all_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    ensure_torchvision_imports()


def rules(fps: float = 2.0, side: int = 28, bounds: tuple[int, int] | None = None, tokens: int = 10**6) -> FrameRules:
    return FrameRules(fps, side, bounds, tokens)


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("bounds", [None, (50_176, 200_704), (12_544, 25_088), (3_136, 6_272)])
@pytest.mark.parametrize("path", shipped_files("videos"), ids=file_name)
def test_frames_equal_those_of_qwen_omni_utils(path: Path, bounds: tuple[int, int] | None, side: int) -> None:
    """The library decodes and resizes all frames at once; bit for bit the same comes out."""
    from qwen_omni_utils.v2_5.vision_process import fetch_video

    use_in_library()
    limits = dict(zip(("min_pixels", "max_pixels"), bounds, strict=True)) if bounds else {}
    (expected, metadata), rate = fetch_video(
        {"video": str(path), "fps": 2.0, **limits},
        image_patch_size=side // 2,
        return_video_sample_fps=True,
        return_video_metadata=True,
    )
    sampled = load_clip(VideoClip(path), rules(side=side, bounds=bounds))
    assert torch.equal(sampled.frames, expected) and sampled.frames.dtype == expected.dtype
    assert (sampled.rate, sampled.metadata) == (rate, metadata)


@pytest.mark.parametrize("size", [(48, 64), (720, 1280), (1080, 1920), (31, 500), (2160, 3840), (29, 29), (200, 2)])
@pytest.mark.parametrize("bounds", [None, (50_176, 200_704), (12_544, 25_088)])
@pytest.mark.parametrize("count", [2, 60, 500, 768])
def test_size_of_frames_equals_that_of_qwen_omni_utils(
    size: tuple[int, int], bounds: tuple[int, int] | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device the library decides without computing."""
    from qwen_omni_utils.v2_5 import vision_process

    def reader(_: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
        return torch.empty((count, 3, *size), dtype=torch.uint8, device="meta"), {}, 2.0

    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchvision", reader)
    limits = dict(zip(("min_pixels", "max_pixels"), bounds, strict=True)) if bounds else {}
    expected = vision_process.fetch_video({"video": "a.mp4", **limits}).shape[2:]
    assert frame_size(count, ClipSize(count, 2.0, *size), rules(bounds=bounds)) == tuple(expected)


def test_frames_are_in_order(tmp_path: Path) -> None:
    sampled = load_clip(VideoClip(write_video(tmp_path / "a.mp4", 20, rate=10)), rules())
    levels = sampled.frames.mean(dim=(1, 2, 3)).tolist()
    assert levels == sorted(levels) and levels[0] < levels[-1] - 50
    assert sampled.metadata["frames_indices"][0] == 0 and sampled.metadata["frames_indices"][-1] == 19


def test_frames_agree_with_decord() -> None:
    """decord is the reader that qwen_omni_utils prefers if it is installed."""
    decord = pytest.importorskip("decord")
    path = SHIPPED / "videos" / "crossing_shapes.mov"
    frames = sample_frames(path, 8)
    expected = decord.VideoReader(str(path))
    indices = torch.linspace(0, len(expected) - 1, 8).round().long().tolist()
    difference = np.abs(expected.get_batch(indices).asnumpy().astype(int) - frames.permute(0, 2, 3, 1).numpy())
    assert difference.mean() < 2


def test_error_names_a_broken_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(QuantError, match=r"video .*a\.mp4' cannot be decoded"):
        load_clip(VideoClip(tmp_path / "a.mp4"), rules())


def test_only_frame_of_a_clip_is_repeated(tmp_path: Path) -> None:
    sampled = load_clip(VideoClip(write_video(tmp_path / "a.mp4", 1)), rules())
    assert len(sampled.frames) == 2 and torch.equal(*sampled.frames)
    assert sampled.rate == 5.0 and sampled.metadata["frames_indices"] == [0, 0]
    assert len(sample_frames(tmp_path / "a.mp4", 4)) == 1


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7])
def test_clips_of_few_frames(tmp_path: Path, frames: int) -> None:
    sampled = load_clip(VideoClip(write_video(tmp_path / "a.mp4", frames)), rules())
    assert len(sampled.frames) == min(frames // 2 * 2, 4)


@pytest.mark.parametrize("promised", [1, 12, 25])
def test_clip_whose_packets_promise_other_frames(
    promised: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames are chosen again from those that there are."""
    clip = VideoClip(write_video(tmp_path / "a.mp4", 20, rate=10))
    expected = load_clip(clip, rules())
    true_size = clips._promised_size(clip.path)
    monkeypatch.setattr(clips, "_promised_size", lambda _: replace(true_size, frames=promised))
    sampled = load_clip(clip, rules())
    assert torch.equal(sampled.frames, expected.frames)
    assert (sampled.rate, sampled.metadata) == (expected.rate, expected.metadata)


def test_limit_below_one_token_of_a_frame(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"max_pixels 1000 is too small for frames of 64 x 48 pixels"):
        load_clip(VideoClip(write_video(tmp_path / "a.mp4", 2)), rules(bounds=(500, 1000)))


def test_clip_with_too_many_tokens_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    clip = VideoClip(write_video(tmp_path / "a.mp4", 40))
    with pytest.raises(QuantError, match=r"16 frames of 392 x 280 pixels of clip .*a\.mp4' make 1120") as caught:
        load_clip(clip, rules(tokens=1119))
    assert "lower max_pixels or video_fps" in caught.value.hint
    decoded = python_calls(lambda: load_clip(clip, rules(tokens=1120)))

    def refuse() -> None:
        with pytest.raises(QuantError):
            load_clip(clip, rules(tokens=1119))

    assert python_calls(refuse) < decoded


def test_long_clip_takes_the_memory_of_its_small_frames(tmp_path: Path) -> None:
    """500 frames of 320 x 240 are 115 MB as decoded."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2, width=320, height=240, pix_fmt="yuv420p")
        for index in range(500):
            frame = av.VideoFrame(320, 240, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([index % 200]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    largest = 0

    def change(frame: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, frame.numel())
        return frame[:, :, ::10, ::10]

    size, frames = VideoClip(path).frames(lambda size: FrameChoice(list(range(size.frames)), change))
    assert size == ClipSize(500, 2.0, 240, 320) and frames.shape == (500, 3, 24, 32)
    assert largest == 3 * 240 * 320  # never more than one frame at once
