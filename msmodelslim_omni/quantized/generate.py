"""generate(): a float or quantized checkpoint answers, in plain transformers, in text and aloud.

For looking at a result at once, not for serving: no kernel for quantized weights is used. Weights that are multiplied
with float activations are dequantized as they are loaded; those with int8 activations stay integers, held in the
compute dtype, and their activations are rounded as a runtime does it. Either way every weight takes its float size in
memory, which is said before anything is loaded. Beyond the model, one tensor at a time is in memory.
"""

from __future__ import annotations

import time
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..calibration import CalibSample, parse_sample, prepare_sample
from ..errors import QuantError, nearest
from ..formats import OutLinear
from ..models import (
    MediaLimits,
    ModelInputs,
    ModelSpec,
    RunnableModel,
    Running,
    Speaking,
    SpeakingModel,
    derive_model_type,
)
from ..numerics import (
    QuantizedLinear,
    dequantize,
    linear_rows,
    quantize_act,
    row_blocks,
)
from ..report import human_bytes
from ..runtime import Device, Progress, out_of_memory_as_error, resolve_device
from ..storage import TensorInfo, load_finite, load_json_object, open_checkpoint
from .reader import (
    is_quantized,
    load_linear,
    open_quantized,
    without_quantization,
)

DEFAULT_SPEAKER = "Chelsie"

# 768 visual tokens of a picture or frame; two frames a second, as the models were trained.
_LIMITS = MediaLimits(max_tokens=32768, max_pixels=768 * 28 * 28, video_fps=2.0)

# What the answer itself takes besides the weights: cache, activations, the libraries.
_HEADROOM = 2 << 30


@dataclass(frozen=True)
class Answer:
    """tokens: of the answer. speech: the wav that was written, and its length in seconds."""

    text: str
    tokens: list[int]
    seconds: float
    speech: str | None = None
    speech_seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """A float or quantized checkpoint, as what fills a model: float tensors and quantized Linears by name.

    disk_bytes: what each takes on disk, by the name that its tensor has in a float checkpoint.
    """

    path: Path
    config: dict[str, Any]
    model: ModelSpec
    floats: dict[str, TensorInfo]
    linears: dict[str, OutLinear]
    disk_bytes: dict[str, int]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor of a float checkpoint has here, quantized or not; None where there is none."""
        linear = self.linears.get(name.removesuffix(".weight"))
        if linear is not None and name.endswith(".weight"):
            return linear.shape
        return self.floats[name].shape if name in self.floats else None


def generate(
    path: str | Path,
    text: str = "",
    *,
    images: Sequence[str] = (),
    audios: Sequence[str] = (),
    videos: Sequence[str] = (),
    speech: str | Path | None = None,
    speaker: str = DEFAULT_SPEAKER,
    max_new_tokens: int = 128,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> Answer:
    """One greedy answer to one prompt, its text handed to `on_text` as it comes.

    speech: a wav file to write, 24 kHz mono. Raises QuantError for whatever the user can mend, before the weights are
    loaded where that is possible.
    """
    progress = progress or Progress()
    if max_new_tokens < (2 if speech else 1):
        raise QuantError(f"max_new_tokens is {max_new_tokens}", "give at least 1, and 2 with --speech")
    chosen = resolve_device(device)
    source = open_source(path)
    speaking = _check_speech(source, speaker, Path(speech)) if speech else None
    sample = _prompt(source.model, text, images, audios, videos)
    model = open_model(source, bool(speech))
    inputs = prepare_sample(sample, source.model.family.open_media_processor(source.path, _LIMITS, trust_remote_code))
    started = time.perf_counter()
    with out_of_memory_as_error(chosen, "give smaller media, or --device cpu"):
        fill_model(model, source, chosen, progress)
        inputs = _on_device(inputs, chosen.torch)
        pieces: list[str] = []

        def heard(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        with torch.inference_mode():
            if speech is None or speaking is None:
                tokens = model.answer(inputs, source.path, max_new_tokens, heard)
                return Answer("".join(pieces), tokens, time.perf_counter() - started)
            speaks = cast(SpeakingModel, model)  # opened with its speech
            tokens, samples = speaks.speak(inputs, source.path, speaker, max_new_tokens, heard)
    write_wav(Path(speech), samples, speaking.SPEECH_RATE)
    seconds = len(samples) / speaking.SPEECH_RATE
    return Answer("".join(pieces), tokens, time.perf_counter() - started, str(speech), seconds)


# --- before the weights --------------------------------------------------------------------------------------


def open_source(path: str | Path) -> Source:
    """A checkpoint, float or of one of our formats, from its headers."""
    folder = Path(path)
    config = load_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if is_quantized(folder, config):
        found = open_quantized(folder)
        linears = {name: stored.linear for name, stored in found.linears.items()}
        sizes = {name: info.nbytes for name, info in found.floats.items()}
        sizes |= {f"{name}.weight": stored.nbytes for name, stored in found.linears.items()}
        return Source(folder, without_quantization(config), found.model, found.floats, linears, sizes)
    checkpoint = open_checkpoint(folder)
    sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    return Source(folder, checkpoint.config, derive_model_type(checkpoint.config), checkpoint.tensors, {}, sizes)


def _check_speech(source: Source, speaker: str, file: Path) -> Speaking:
    speaking = source.model.speaking
    if speaking is None:
        raise QuantError(f"{source.path}: a {source.model.hf_model_type} answers in text alone", "leave --speech out")
    there = any(name.startswith(source.model.speech_prefixes) for name in source.floats)
    if not speaking.speaks(source.config) or not there:
        raise QuantError(f"{source.path} holds no parts that speak", "leave --speech out, or use the whole checkpoint")
    known = speaking.speakers(source.path)
    if speaker not in known:
        raise QuantError(f"unknown speaker {speaker!r}. Known: {', '.join(known)}.{nearest(speaker, known)}")
    if file.suffix.lower() != ".wav":
        raise QuantError(f"--speech {str(file)!r} is no .wav file", "speech is written as wav")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise QuantError(f"--speech {str(file)!r} cannot be written there", "give a file in a folder that exists")
    return speaking


def _prompt(
    model: ModelSpec, text: str, images: Sequence[str], audios: Sequence[str], videos: Sequence[str]
) -> CalibSample:
    """The prompt under the same checks as a calibration sample, media before the text. No URL is fetched."""
    parts = [
        {"type": kind, kind: file}
        for kind, files in (("image", images), ("audio", audios), ("video", videos))
        for file in files
    ]
    parts += [{"type": "text", "text": text}] if text.strip() else []
    if not parts:
        raise QuantError("there is nothing to answer", "give --text, --image, --audio or --video")
    return parse_sample("prompt", {"messages": [{"role": "user", "content": parts}]}, Path.cwd(), "", model)


def _on_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    tensors = {name: tensor.to(device) for name, tensor in inputs.tensors.items()}
    return ModelInputs(tensors, inputs.use_audio_in_video, inputs.modality)


# --- the model -----------------------------------------------------------------------------------------------


def open_model(source: Source, speech: bool) -> RunnableModel:
    """The library's model, still without weights. Raises QuantError where the checkpoint lacks one, or its shape."""
    model = source.model.running.open_model(source.config, speech)
    expected = model.module.state_dict()
    for name, disk in model.slots().items():
        shape = source.shape_of(disk)
        if shape is None:
            raise QuantError(f"{source.path}: tensor {disk} is missing", "write or fetch the checkpoint again")
        if shape != tuple(expected[name].shape):
            raise QuantError(
                f"{source.path}: {disk} has shape {list(shape)}, config.json implies {list(expected[name].shape)}",
                "config.json and the weights are of different models",
            )
    return model


def fill_model(model: RunnableModel, source: Source, device: Device, progress: Progress) -> None:
    """Load the weights in a dtype that fits. Says what that takes."""
    runs, slots = source.model.running, model.slots()
    dtype, needed = _choose_dtype(source, device, runs, set(slots.values()))
    on_disk = sum(source.disk_bytes[disk] for disk in set(slots.values()))
    kept = "; int8 activations are emulated" if any(lin.scheme.act_bits for lin in source.linears.values()) else ""
    progress.say(
        f"{device.name} ({device.reason}), {str(dtype).removeprefix('torch.')}: the weights take"
        f" {human_bytes(needed)} of memory"
        + (f", dequantized, for {human_bytes(on_disk)} on disk{kept}" if source.linears else "")
    )
    filled: dict[str, str] = {}
    for done, (name, disk) in enumerate(slots.items(), 1):
        if disk in filled:
            _share(model.module, filled[disk], name)
        else:
            wanted = torch.float32 if disk.startswith(runs.FLOAT32_PREFIXES) else dtype
            _fill(model.module, name, disk, source, wanted, device.torch)
            filled[disk] = name
        progress.step("load", done, len(slots), "tensors")
    for module in model.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device.torch))


def _choose_dtype(source: Source, device: Device, runs: Running, used: set[str]) -> tuple[torch.dtype, int]:
    """float32 on a CPU where it fits, since few CPUs are fast at bfloat16; else bfloat16; and the bytes it takes."""
    by_dtype = {}
    for dtype in (torch.float32, torch.bfloat16):
        by_dtype[dtype] = sum(
            torch.Size(source.shape_of(disk) or ()).numel()
            * (4 if disk.startswith(runs.FLOAT32_PREFIXES) else dtype.itemsize)
            for disk in used
        )
    if device.torch.type != "cpu":
        return torch.bfloat16, by_dtype[torch.bfloat16]
    available = available_memory()
    for dtype, needed in by_dtype.items():
        if available is None or needed + _HEADROOM <= available:
            return dtype, needed
    raise QuantError(
        f"the model takes {human_bytes(by_dtype[torch.bfloat16])} in bfloat16 and {human_bytes(_HEADROOM)} to work;"
        f" {human_bytes(available or 0)} of memory are available",
        "use a machine with more memory, or serve the checkpoint with vLLM",
    )


def available_memory() -> int | None:
    """Bytes that a process may still take, as Linux tells it and its container allows; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or `max`: no limit
        return free


def _fill(
    module: torch.nn.Module, name: str, disk: str, source: Source, dtype: torch.dtype, device: torch.device
) -> None:
    """Put one tensor of the checkpoint into its place in the model."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    place: Any = getattr(owner, attribute)
    linear = source.linears.get(disk.removesuffix(".weight")) if attribute == "weight" else None
    if linear is None:
        tensor = load_finite(source.floats[disk]).to(dtype).to(device)
        is_parameter = isinstance(place, torch.nn.Parameter)
        setattr(owner, attribute, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return
    loaded = load_linear(linear)
    if linear.scheme.act_bits is None:
        owner.weight = torch.nn.Parameter(dequantized(loaded, dtype).to(device), requires_grad=False)
        return
    parent, _, child = owner_name.rpartition(".")
    setattr(module.get_submodule(parent), child, RoundingLinear(loaded, owner.bias, dtype, device))


def _share(module: torch.nn.Module, one: str, other: str) -> None:
    """Let another place of the model hold what is in one, as an lm_head holds the embedding it is tied to."""
    owner, _, attribute = other.rpartition(".")
    setattr(module.get_submodule(owner), attribute, module.get_parameter(one))


def dequantized(linear: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`, made by blocks of rows so that no float32 copy of it exists beside it."""
    weight = torch.empty(linear.qweight.shape, dtype=dtype)
    for rows in row_blocks(weight):
        weight[rows] = dequantize(linear_rows(linear, rows)).to(dtype)
    return weight


class RoundingLinear(torch.nn.Module):
    """A Linear that rounds its inputs to int8 per token: y = (q_x @ q_w^T) * s_x * s_w + bias, as quantized_matmul.

    The integers lie in the compute dtype, which holds them all exactly; in bfloat16 their product is rounded once.
    """

    def __init__(self, linear: QuantizedLinear, bias: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert linear.scheme.act_bits is not None  # others are dequantized
        self._bits = linear.scheme.act_bits
        self.weight = torch.nn.Parameter(linear.qweight.to(dtype).to(device), requires_grad=False)
        self._scales = linear.scales.squeeze(1).to(device)  # [out]
        self.bias = bias  # None, or filled after the weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_x, s_x = quantize_act(x.to(torch.float32), self._bits)
        y = torch.nn.functional.linear(q_x.to(self.weight.dtype), self.weight).to(torch.float32) * s_x * self._scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)


# --- the sound -----------------------------------------------------------------------------------------------


def write_wav(file: Path, samples: torch.Tensor, rate: int) -> None:
    """16-bit mono. samples: float [n] in [-1, 1], clipped; raises QuantError where there are none, or NaN or Inf."""
    if not samples.numel() or not bool(torch.isfinite(samples).all()):
        raise QuantError("the talker gave no sound" if not samples.numel() else "the talker's sound holds NaN or Inf")
    # wav is little-endian, and so is every machine that torch is built for
    pcm = (samples.clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).numpy().astype("<i2").tobytes()
    temporary = file.with_name(file.name + ".partial")
    try:
        with wave.open(str(temporary), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(rate)
            stream.writeframes(pcm)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
