"""Check local image, audio and video files, and decode pictures and sounds, with Pillow and PyAV.

No ffmpeg program is needed, because PyAV bundles the codecs. A file is what its content says; its suffix does not
matter. Datasets are untrusted input, so the limits here and in containers.py are checked before and during decoding.
URLs are never opened. Clips are decoded in clips.py.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QuantError
from . import containers
from .containers import UnreadableMedia, check_pixels, open_container, video_streams

MAX_FILE_BYTES = 1 << 30
MAX_SAMPLING_RATE = 384_000
SAMPLING_RATE = 16_000

# By the name of the package, what it is imported as.
_LIBRARIES = {
    "torchvision": "torchvision",
    "qwen_omni_utils": "qwen_omni_utils",
    "av": "av",
    "soxr": "soxr",
    "pillow": "PIL",
}

# Other readers of Pillow run programs (EPS), read further files, or take any content for a picture.
_IMAGE_FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "ICO", "JPEG2000", "AVIF",
)  # fmt: skip


@dataclass(frozen=True)
class MediaFacts:
    """What a check of a file finds. pixels: of a picture or frame. seconds: of a sound or clip; 0 if not known.

    samples: of a sound at the file's own rate, by its length; has_sound: whether a clip has a usable sound track.
    """

    kind: str
    pixels: int = 0
    seconds: float = 0.0
    samples: int = 0
    has_sound: bool = False


@functools.cache
def require_libraries() -> None:
    """Raise QuantError that names the extra, if a library is missing that decodes samples or makes tokens of them."""
    missing = [name for name, module in _LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise QuantError(
            f"samples cannot be read: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "pip install 'msmodelslim_omni[media]', or choose a recipe without samples, e.g. --quant_type w8a8_minmax",
        )


def probe(kind: str, path: Path, least_samples: int = 1) -> MediaFacts:
    """Check that a file is a readable image, audio or video file, decoding as little as possible.

    least_samples: of a sound, at 16 kHz; a clip with a shorter sound track counts as one without. Raises QuantError
    with the reason.
    """
    if not path.is_file():
        raise QuantError(f"{kind} {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    if not path.stat().st_size:  # files under /proc have size 0, and some never end
        raise QuantError(f"{kind} {str(path)!r} is empty")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise QuantError(f"{kind} {str(path)!r} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return _probe_image(path) if kind == "image" else _probe_streams(kind, path, least_samples)
    except UnreadableMedia as error:
        if other := _actual_kind(kind, path):
            raise QuantError(f"{kind} {str(path)!r} is no {kind}; its content can be given as {other}") from error
        raise


def _actual_kind(kind: str, path: Path) -> str:
    """A kind that can be read from a file that cannot be read as `kind`; empty if there is none."""
    for other in {"image": ("video", "audio"), "audio": ("image", "video"), "video": ("image", "audio")}[kind]:
        try:
            _probe_image(path) if other == "image" else _probe_streams(other, path, 1)
        except QuantError:
            continue
        return other
    return ""


def _probe_streams(kind: str, path: Path, least_samples: int) -> MediaFacts:
    """See probe, for a sound or a clip."""
    with open_container(kind, path) as container:
        streams = video_streams(container) if kind == "video" else container.streams.audio
        if not streams:
            raise UnreadableMedia(f"{kind} {str(path)!r} has no {kind} stream")
        seconds = (container.duration or 0) / 1e6
        if seconds > containers.MAX_SECONDS:
            raise QuantError(f"{kind} {str(path)!r} is longer than {containers.MAX_SECONDS:.0f} s")
        if kind == "audio":
            samples = max(int(seconds * (streams[0].rate or 0)), 0)
            if (length := _leading_samples(streams[0], least_samples)) < least_samples:
                raise QuantError(
                    f"audio {str(path)!r} has {1000 * length / SAMPLING_RATE:.1f} ms; the model needs at least"
                    f" {1000 * least_samples / SAMPLING_RATE:.1f} ms"
                    if length
                    else f"audio {str(path)!r} has no frames"
                )
            return MediaFacts(kind, seconds=seconds, samples=samples)
        # Checked before a frame of that size is allocated. Streams of unknown codecs have no size.
        check_pixels(path, getattr(streams[0], "width", 0), getattr(streams[0], "height", 0))
        frame = next(container.decode(streams[0]), None)
        if frame is None:
            raise QuantError(f"{kind} {str(path)!r} has no frames")
        check_pixels(path, frame.width, frame.height)
    return MediaFacts(kind, frame.width * frame.height, seconds, has_sound=_has_sound(path, least_samples))


def _leading_samples(stream: Any, enough: int) -> int:
    """The number of samples of a sound at 16 kHz; at least `enough` if there are as many, without decoding the rest."""
    length, at_16_khz = 0, 0
    for frame in stream.container.decode(stream):
        rate = frame.sample_rate
        if not 0 < rate <= MAX_SAMPLING_RATE:
            name = stream.container.name
            raise QuantError(f"{name!r} is sampled at {rate} Hz; the limit is {MAX_SAMPLING_RATE} Hz")
        length += frame.samples
        at_16_khz = math.ceil(length * SAMPLING_RATE / rate)
        if at_16_khz >= enough:
            break
    return at_16_khz


def _has_sound(path: Path, least_samples: int) -> bool:
    with open_container("video", path) as container:
        return bool(container.streams.audio) and (
            _leading_samples(container.streams.audio[0], least_samples) >= least_samples
        )


def _probe_image(path: Path) -> MediaFacts:
    try:
        with _open_image(path) as image:
            if image.width * image.height > containers.MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise QuantError(f"image {str(path)!r} has {size} pixels; the limit is {containers.MAX_PIXELS}")
            if max(image.size) > 200 * min(image.size):
                raise QuantError(f"image {str(path)!r} has an aspect ratio above 200")
            image.convert("RGB")
            return MediaFacts("image", image.width * image.height)
    except QuantError:
        raise
    except Exception as error:  # the exceptions of Pillow's readers share no base class
        raise _undecodable_image(path, error) from error


def _open_image(path: Path) -> Any:
    from PIL import Image

    Image.init()
    return Image.open(path, formats=[name for name in _IMAGE_FORMATS if name in Image.OPEN])


def _undecodable_image(path: Path, error: Exception) -> UnreadableMedia:
    from PIL import UnidentifiedImageError

    is_unknown = isinstance(error, UnidentifiedImageError)
    reason = "its content is no picture that Pillow reads; convert it to PNG or JPEG" if is_unknown else error
    return UnreadableMedia(f"image {str(path)!r} cannot be decoded: {reason}")


def load_audio(path: Path) -> np.ndarray:
    """Decode the first audio track of an audio or video file: float32 [samples], mono, 16 kHz.

    As in librosa.load, channels are averaged, then soxr's HQ filter resamples. Raises QuantError with the reason.
    """
    import soxr

    chunks: list[np.ndarray] = []
    rate, length = 0, 0
    with open_container("audio", path) as container:
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
            if length > containers.MAX_SECONDS * rate:  # the header's duration may be wrong
                raise QuantError(f"{str(path)!r} is longer than {containers.MAX_SECONDS:.0f} s")
        if resampler is not None:
            chunks += [out.to_ndarray().mean(axis=0) for out in resampler.resample(None)]
    samples = np.concatenate(chunks).astype(np.float32) if chunks else np.zeros(0, np.float32)
    if len(samples) == 0:
        raise QuantError(f"{str(path)!r} has no audio samples")
    if not np.isfinite(samples).all():
        raise QuantError(f"{str(path)!r} has NaN or infinite samples")
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
    try:
        with _open_image(path) as image:
            image.load()
            return image.convert("RGBA") if image.mode in ("P", "LA") else image.copy()
    except Exception as error:  # see _probe_image
        raise _undecodable_image(path, error) from error
