"""Check and decode local image, audio and video files with Pillow and PyAV.

No ffmpeg program is needed, because PyAV bundles the codecs. Datasets are untrusted input, so the limits below are
checked before and during decoding. URLs are never opened.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError

SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    "audio": (".wav", ".mp3", ".flac", ".m4a"),
    "video": (".mp4", ".mkv", ".mov", ".webm"),
}
MAX_FILE_BYTES = 1 << 30
MAX_PIXELS = 64_000_000
MAX_SECONDS = 600.0
MAX_SAMPLING_RATE = 384_000
MAX_FRAMES = 100_000  # 600 s at 166 frames/s; frames may have no timestamp
MAX_VIDEO_PIXELS = 400_000_000  # in all sampled frames of a video
SAMPLING_RATE = 16_000

# By the name of the package, what it is imported as.
_LIBRARIES = {
    "torchvision": "torchvision",
    "qwen_omni_utils": "qwen_omni_utils",
    "av": "av",
    "soxr": "soxr",
    "pillow": "PIL",
}

# Only the formats of the suffixes above, whatever the file contains: other readers of Pillow and FFmpeg run programs
# (EPS), or read further files and open connections that the file names (playlists, SDP).
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_CONTAINERS = {"format_whitelist": "wav,mp3,flac,mov,matroska", "protocol_whitelist": "file"}


@functools.cache
def require_libraries() -> None:
    """Raise QuantError that names the extra, if a library is missing that decodes samples or makes tokens of them."""
    missing = [name for name, module in _LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise QuantError(
            f"samples cannot be read: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "pip install 'msmodelslim_omni[media]', or choose a recipe without samples, e.g. --quant_type w8a8_minmax",
        )


def probe(kind: str, path: Path) -> bool:
    """Check that a file is a readable image, audio or video file, decoding as little as possible.

    Returns whether a video has an audio track; False for images and audio files. Raises QuantError with the reason.
    """
    if path.suffix.lower() not in SUFFIXES[kind]:
        raise QuantError(f"{kind} {str(path)!r}: unsupported suffix; allowed: {' '.join(SUFFIXES[kind])}")
    if not path.is_file():
        raise QuantError(f"{kind} {str(path)!r} does not exist")
    if not path.stat().st_size:  # files under /proc have size 0, and some never end
        raise QuantError(f"{kind} {str(path)!r} is empty")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise QuantError(f"{kind} {str(path)!r} is larger than {MAX_FILE_BYTES} bytes")
    if kind == "image":
        _probe_image(path)
        return False
    with _open_container(kind, path) as container:
        streams = container.streams.video if kind == "video" else container.streams.audio
        if not streams:
            raise QuantError(f"{kind} {str(path)!r} has no {kind} stream")
        if container.duration and container.duration / 1e6 > MAX_SECONDS:
            raise QuantError(f"{kind} {str(path)!r} is longer than {MAX_SECONDS:.0f} s")
        if kind == "video":
            # Checked before a frame of that size is allocated. Streams of unknown codecs have no size.
            _check_pixels(path, getattr(streams[0], "width", 0), getattr(streams[0], "height", 0))
        frame = next(container.decode(streams[0]), None)
        if frame is None:
            raise QuantError(f"{kind} {str(path)!r} has no frames")
        if kind == "video":
            _check_pixels(path, frame.width, frame.height)
        return kind == "video" and bool(container.streams.audio)


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise QuantError(f"video {str(path)!r} has {width} x {height} pixels; the limit is {MAX_PIXELS}")


def _probe_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise QuantError(f"image {str(path)!r} has {size} pixels; the limit is {MAX_PIXELS}")
            if max(image.size) > 200 * min(image.size):
                raise QuantError(f"image {str(path)!r} has an aspect ratio above 200")
            image.convert("RGB")
    except QuantError:
        raise
    except Exception as error:  # the exceptions of Pillow's readers share no base class
        raise QuantError(f"image {str(path)!r} cannot be decoded: {error}") from error


@contextmanager
def _open_container(kind: str, path: Path) -> Iterator[Any]:
    """Open a PyAV container. FFmpeg errors in the body of the `with` become QuantErrors that name the file."""
    import av

    try:
        with av.open(str(path), metadata_errors="ignore", options=_CONTAINERS) as container:
            yield container
    except (av.error.FFmpegError, ValueError, OSError, EOFError, ArithmeticError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuantError(f"{kind} {str(path)!r} cannot be decoded: {reason}") from error


def load_audio(path: Path) -> np.ndarray:
    """Decode the first audio track of an audio or video file: float32 [samples], mono, 16 kHz.

    As in librosa.load, channels are averaged, then soxr's HQ filter resamples. Raises QuantError with the reason.
    """
    import soxr

    chunks: list[np.ndarray] = []
    rate, length = 0, 0
    with _open_container("audio", path) as container:
        if not container.streams.audio:
            raise QuantError(f"{str(path)!r} has no audio track")
        resampler = None
        for frame in container.decode(container.streams.audio[0]):
            if resampler is None:
                rate, resampler = frame.sample_rate, _planar_float_converter()
                if not 0 < rate <= MAX_SAMPLING_RATE:
                    raise QuantError(f"{str(path)!r} is sampled at {rate} Hz; the limit is {MAX_SAMPLING_RATE} Hz")
            chunks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(frame)]
            length += frame.samples
            if length > MAX_SECONDS * rate:  # the header's duration may be wrong
                raise QuantError(f"{str(path)!r} is longer than {MAX_SECONDS:.0f} s")
        if resampler is not None:
            chunks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(None)]
    samples = np.concatenate(chunks).astype(np.float32) if chunks else np.zeros(0, np.float32)
    if len(samples) == 0:
        raise QuantError(f"{str(path)!r} has no audio samples")
    if rate == SAMPLING_RATE:
        return samples
    resampled = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ").astype(np.float32)
    length = math.ceil(len(samples) * SAMPLING_RATE / rate)
    return np.pad(resampled[:length], (0, max(0, length - len(resampled))))


def _planar_float_converter() -> Any:
    """A converter of audio frames to float32 [channels, samples] at the same rate."""
    import av

    return av.AudioResampler(format="fltp")


def load_image(path: Path) -> Any:
    """Decode an image; of a GIF or TIFF with several, the first.

    Transparency is kept, because the model's processor replaces it by white.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            image.load()
            return image.convert("RGBA") if image.mode in ("P", "LA") else image.copy()
    except Exception as error:  # see _probe_image
        raise QuantError(f"image {str(path)!r} cannot be decoded: {error}") from error


def ensure_video_reader() -> None:
    """Make sure that qwen_omni_utils has a working video reader.

    Its fallback reader calls torchvision.io.read_video, which newer torchvision no longer has. Its other two readers
    need decord or torchcodec, which have no wheels for many machines. Only the fallback reader is replaced.
    """
    import torchvision
    from qwen_omni_utils.v2_5 import vision_process

    with redirect_stderr(io.StringIO()):  # the first call of this cached function prints which reader it chose
        vision_process.get_video_reader_backend()
    if not hasattr(torchvision.io, "read_video"):
        vision_process.VIDEO_READER_BACKENDS["torchvision"] = _read_video


def _read_video(element: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
    """Read the frames of a video at about the element's `fps`, with the interface of qwen_omni_utils' readers.

    Returns uint8 [frames, 3, height, width], the metadata dict, and the frame rate after sampling.
    """
    import torch
    from qwen_omni_utils.v2_5.vision_process import smart_nframes

    path = Path(element["video"])
    total, pixels, fps = 0, 0, 0.0
    with _open_container("video", path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        for frame in container.decode(stream):  # headers of webm and mkv have no frame count
            total += 1
            pixels = max(pixels, frame.width * frame.height)  # the header's size may be wrong
            _check_pixels(path, frame.width, frame.height)
            if total > MAX_FRAMES or (frame.time is not None and frame.time > MAX_SECONDS):
                raise QuantError(f"video {str(path)!r} is longer than {MAX_SECONDS:.0f} s or {MAX_FRAMES} frames")
    if not fps or not total:
        raise QuantError(f"video {str(path)!r} has no frame rate or no frames")
    count = smart_nframes(element, total_frames=total, video_fps=fps)
    if count * pixels > MAX_VIDEO_PIXELS:
        size = f"{count} frames of {pixels} pixels"
        raise QuantError(f"video {str(path)!r} has {size}; the limit is {MAX_VIDEO_PIXELS} pixels in total")
    indices = torch.linspace(0, total - 1, count).round().long().tolist()
    video = _decode_frames(path, indices)
    metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total, "video_backend": "pyav"}
    return video, metadata, count / total * fps


def sample_frames(path: Path, count: int) -> Any:
    """`count` frames (an even number) of a video, from its first to its last: uint8 [frames, 3, height, width]."""
    return _read_video({"video": str(path), "nframes": count})[0]


def _decode_frames(path: Path, indices: list[int]) -> Any:
    """The frames at the given indices (ascending) as one uint8 tensor [frames, 3, height, width]."""
    import torch

    video, filled = None, 0
    with _open_container("video", path) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            while filled < len(indices) and indices[filled] == index:
                pixels = frame.to_ndarray(format="rgb24")
                if video is None:
                    video = np.empty((len(indices), *pixels.shape), dtype=np.uint8)
                if pixels.shape != video.shape[1:]:
                    raise QuantError(f"video {str(path)!r} changes its frame size")
                video[filled] = pixels
                filled += 1
    if video is None or filled < len(indices):
        raise QuantError(f"video {str(path)!r} could not be decoded to the end")
    return torch.from_numpy(video).permute(0, 3, 1, 2)
