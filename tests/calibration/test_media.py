"""Audio, image and video decoding against other decoders, and errors on broken files."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from librosa_uncompiled import librosa
from media_files import probe_error, tone, write_video, write_wav
from PIL import Image

from msmodelslim_omni.calibration import media
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files.resources import shipped_folder
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
    monkeypatch.setattr(media, "MAX_SECONDS", 0.5)
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
    assert media.probe("video", write_video(tmp_path / "a.mp4", 2)) is False
    assert media.probe("video", write_video(tmp_path / "b.MKV", 2, sound=True)) is True
    assert media.probe("audio", write_wav(tmp_path / "c.wav", tone(100), 16_000)) is False


@pytest.mark.parametrize(
    ("kind", "name"),
    [("image", "a.svg"), ("audio", "a.ogg"), ("video", "a.avi"), ("image", "a"), ("video", "a.mp4.txt")],
)
def test_unsupported_suffix(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert f"unsupported suffix; allowed: {' '.join(media.SUFFIXES[kind])}" in probe_error(kind, tmp_path / name)


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
    [(kind, f"a{suffix}") for kind, suffixes in media.SUFFIXES.items() for suffix in suffixes],
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
    kind = "video" if path.suffix in media.SUFFIXES["video"] else "audio"
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
    kind = "image" if path.suffix in media.SUFFIXES["image"] else "video"
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
    assert "has no video stream" in probe_error("video", tmp_path / "a.mp4")


def test_audio_file_with_video_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    assert "has no audio stream" in probe_error("audio", path.rename(tmp_path / "a.m4a"))


def test_image_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_PIXELS", 32 * 24 - 1)
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
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 48 - 1)
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
    assert media.probe("image", path) is False
    assert np.array_equal(np.asarray(media.load_image(path).convert("RGB")), np.asarray(red))


def test_choice_of_the_video_reader_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_omni_utils.v2_5 import vision_process

    vision_process.get_video_reader_backend.cache_clear()
    media.ensure_video_reader()
    vision_process.get_video_reader_backend()
    assert capsys.readouterr() == ("", "")


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


@pytest.mark.parametrize("path", shipped_files("videos"), ids=file_name)
def test_sampled_frames_equal_qwen_omni_utils(path: Path) -> None:
    from qwen_omni_utils.v2_5.vision_process import smart_nframes

    frames = all_frames(path)
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    element: dict[str, Any] = {"video": str(path), "fps": 2.0}
    video, metadata, sampled = media._read_video(element)
    count = smart_nframes(element, total_frames=len(frames), video_fps=rate)
    indices = torch.linspace(0, len(frames) - 1, count).round().long().tolist()
    assert metadata["frames_indices"] == indices
    assert metadata["total_num_frames"] == len(frames)
    assert metadata["fps"] == rate
    assert sampled == pytest.approx(count / len(frames) * rate)
    assert video.dtype == torch.uint8 and video.shape == (count, 3, *frames[0].shape[:2])
    for frame, index in zip(video, indices, strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), frames[index])


def test_frames_are_in_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20, rate=10)
    video, metadata, _ = media._read_video({"video": str(path), "fps": 2.0})
    levels = video.float().mean(dim=(1, 2, 3)).tolist()
    assert levels == sorted(levels) and levels[0] < levels[-1] - 50
    assert metadata["frames_indices"][0] == 0 and metadata["frames_indices"][-1] == 19


def test_frames_agree_with_decord() -> None:
    """decord is the reader that qwen_omni_utils prefers if it is installed."""
    decord = pytest.importorskip("decord")
    path = SHIPPED / "videos" / "crossing_shapes.mov"
    video, metadata, _ = media._read_video({"video": str(path), "fps": 2.0})
    expected = decord.VideoReader(str(path)).get_batch(metadata["frames_indices"]).asnumpy()
    difference = np.abs(expected.astype(int) - video.permute(0, 2, 3, 1).numpy().astype(int))
    assert difference.mean() < 2


def test_error_names_a_broken_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(QuantError, match=r"video .*a\.mp4' cannot be decoded"):
        media._read_video({"video": str(tmp_path / "a.mp4"), "fps": 2.0})


def test_video_with_a_single_frame_is_refused(tmp_path: Path) -> None:
    """qwen_omni_utils needs at least two frames."""
    path = write_video(tmp_path / "a.mp4", 1)
    with pytest.raises((QuantError, ValueError)):
        media._read_video({"video": str(path), "fps": 2.0})


def test_ensure_video_reader() -> None:
    from qwen_omni_utils.v2_5 import vision_process

    media.ensure_video_reader()
    assert "torchvision" in vision_process.VIDEO_READER_BACKENDS


def test_video_with_too_many_pixels_in_total_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_video(tmp_path / "clip.mp4", 10)
    element = {"video": str(clip), "fps": 5.0}
    video, _, _ = media._read_video(element)
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", video[:, 0].numel() - 1)
    with pytest.raises(QuantError, match="frames of"):
        media._read_video(element)
