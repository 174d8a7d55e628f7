"""Estimates of output sizes, disk space and memory, from the plan only."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import CalibSample, CalibSet, MediaFacts
from ..formats import FORMATS, format_tensors
from ..plan import QuantPlan, card_memory, gram_disk_bytes, peak_memory, with_own_texts
from ..report import RunMemory
from ..runtime import NO_SAMPLES, Extent
from .assembly import make_job
from .summary import memory_of, part_sizes

# Assumptions about a sample of which nothing is known, and about text.
_TOKENS_PER_SAMPLE, _LONGEST = 512, 1024
_BYTES_PER_TOKEN = 3

# Tokens of media by what their files say. A clip has no less than four frames, and two frames share their tokens.
_SOUND_TOKENS_PER_SECOND = 25
_LEAST_FRAMES, _LEAST_FRAME_TOKENS = 4, 128

# Measured with clips of 60 frames: a full frame and FFmpeg's own frames, by pixel; and all frames as the model sees
# them in the library's processor, which copies them six times, by token. A full picture and its copies, by pixel.
_BYTES_PER_FRAME_PIXEL, _BYTES_PER_VISUAL_TOKEN, _BYTES_PER_PICTURE_PIXEL = 20, 128 * 1024, 16
_BYTES_PER_SOUND_SAMPLE = 12


@dataclass(frozen=True)
class Forecast:
    """Bytes of each output, of the work folder at its largest, and of memory at its peak.

    card_bytes: of an accelerator's memory at its peak, if the run uses one.
    run_memory: of a runtime that serves the first output. gram_disk_bytes: a part of work_bytes, by group; see
    plan.gram_disk_bytes.
    """

    output_bytes: dict[str, int]
    work_bytes: int
    peak_memory_bytes: int
    card_bytes: int
    run_memory: RunMemory
    gram_disk_bytes: dict[str, int]

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + sum(self.output_bytes.values())


def assumed_extent(plan: QuantPlan, calib: CalibSet | None) -> Extent:
    """The extent of samples that are not tokenized yet, by what their files say; NO_SAMPLES for a data-free run."""
    if calib is None:
        return NO_SAMPLES
    most = plan.calibration.max_tokens
    known = [
        _text_tokens(sample) + sum(_media_tokens(plan, found) for found in sample.media) for sample in calib.samples
    ]
    unknown = [bool(sample.files()) and not sample.media for sample in calib.samples]
    tokens, longest = (
        [min(count + guess * is_unknown, most) for count, is_unknown in zip(known, unknown, strict=True)]
        for guess in (_TOKENS_PER_SAMPLE, _LONGEST)
    )
    modalities = {kind for sample in calib.samples for kind in sample.modalities()}
    media = max((_media_bytes(plan, found) for sample in calib.samples for found in sample.media), default=0)
    return with_own_texts(plan, Extent(sum(tokens), max(longest), len(modalities), media))


def _sample_media_tokens(plan: QuantPlan, sample: CalibSample, guess: int) -> int:
    """About as many tokens as the media of a sample make; `guess` if its files have not been looked at."""
    if sample.files() and not sample.media:
        return guess
    return sum(_media_tokens(plan, found) for found in sample.media)


def _media_tokens(plan: QuantPlan, found: MediaFacts) -> int:
    """About as many tokens as a file makes."""
    token = plan.model.visual_token_pixels
    largest = plan.calibration.max_pixels or found.pixels
    if found.kind == "audio":
        return int(_SOUND_TOKENS_PER_SECOND * found.seconds) + 1
    if found.kind == "image":
        return min(found.pixels, largest) // token + 1
    frames = max(_LEAST_FRAMES, int(found.seconds * plan.calibration.video_fps))
    sound = int(_SOUND_TOKENS_PER_SECOND * found.seconds) if found.has_sound else 0
    return frames // 2 * (min(max(found.pixels, _LEAST_FRAME_TOKENS * token), largest) // token + 1) + sound


def _media_bytes(plan: QuantPlan, found: MediaFacts) -> int:
    """Bytes that a file takes while it is decoded and made tokens."""
    if found.kind == "audio":
        return _BYTES_PER_SOUND_SAMPLE * found.samples
    tokens = min(_media_tokens(plan, found), plan.calibration.max_tokens)
    per_pixel = _BYTES_PER_PICTURE_PIXEL if found.kind == "image" else _BYTES_PER_FRAME_PIXEL
    return per_pixel * found.pixels + _BYTES_PER_VISUAL_TOKEN * tokens


def _text_tokens(sample: CalibSample) -> int:
    texts = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    return len("".join(texts).encode()) // _BYTES_PER_TOKEN + 1


def forecast(plan: QuantPlan, extent: Extent) -> Forecast:
    """Estimate a run over samples of this extent, measured or assumed."""
    job = make_job(plan)
    other = sum((plan.checkpoint.path / file).stat().st_size for file in plan.checkpoint.other_files())
    tensors = {saver.type: format_tensors(FORMATS[saver.type], job) for saver in plan.savers}
    outputs: dict[str, int] = {
        name: sum(tensor.spec.nbytes for tensor in written) + other for name, written in tensors.items()
    }
    parts = part_sizes(plan, tensors[plan.savers[0].type])
    served = memory_of(plan.model, plan.checkpoint.config, parts)
    grams = gram_disk_bytes(plan, extent)
    # Per token: hidden states at up to four boundaries, features that are added between layers, rotary tables once.
    states = 4 + plan.model.family.deepstack_depth(plan.checkpoint.config)
    work = extent.tokens * (states * plan.layer_spec.hidden_size * 4 + 4096) + sum(grams.values())
    if plan.tunes:  # all layers are kept until they are tuned, a byte per weight and float scales
        work += sum(
            5 * out * width // 4 for out, width in (lin.shape for lin in plan.linears if lin.scheme is not None)
        )
    return Forecast(outputs, work, peak_memory(plan, extent), card_memory(plan, extent), served, grams)
