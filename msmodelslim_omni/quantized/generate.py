"""generate(): a text and speech answer from a float or quantized checkpoint, with plain transformers.

This is a quick look at a result, not a server: quantized weights have no kernel here. Weights for float activations
are dequantized while loading. Weights for int8 activations stay integers in the compute dtype, and their activations
are rounded as in a runtime. Either way every weight takes its float size in memory; the size is reported before
loading. Besides the model, one tensor at a time is in memory.
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
from ..files import find_model_folder
from ..formats import OutLinear
from ..models import (
    MediaLimits,
    ModelInputs,
    ModelRunner,
    ModelSpec,
    RunnableModel,
    SpeakingModel,
    SpeechSupport,
    derive_model_type,
)
from ..numerics import (
    CacheDtype,
    QuantizedLinear,
    dequantize,
    linear_rows,
    quantize_tokens,
    round_act,
    row_blocks,
)
from ..report import human_bytes
from ..run import round_cache
from ..runtime import Device, Progress, out_of_memory_as_error, resolve_device
from ..storage import TensorInfo, is_finite, load_finite, load_json_object, open_checkpoint
from .reader import (
    is_quantized,
    load_cache,
    load_linear,
    open_quantized,
    without_quantization,
)

DEFAULT_SPEAKER = "Chelsie"

# 768 visual tokens per image or frame, and two frames per second, as in the models' training.
_MAX_TOKENS, _VISUAL_TOKENS, _VIDEO_FPS = 32768, 768, 2.0

# Memory for the KV cache, activations and libraries, in addition to the weights.
_HEADROOM = 2 << 30

_ACT_NAMES = {"int": "int8", "e4m3": "FP8", "e2m1": "NVFP4"}  # of rounded activations, by QuantScheme.number


@dataclass(frozen=True)
class Answer:
    """tokens: ids of the answer. seconds: loading included. speech: path of the WAV file, if one was written."""

    text: str
    tokens: list[int]
    seconds: float
    speech: str | None = None
    speech_seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """The weights of a float or quantized checkpoint: float tensors and quantized Linears by name.

    disk_bytes: bytes on disk by the tensor's name in a float checkpoint. kv_cache: number format of a rounded KV cache.
    """

    path: Path
    config: dict[str, Any]
    model: ModelSpec
    floats: dict[str, TensorInfo]
    linears: dict[str, OutLinear]
    disk_bytes: dict[str, int]
    kv_cache: CacheDtype | None = None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, quantized or not, by its name in a float checkpoint. None if it is missing."""
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
    on_text_end: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> Answer:
    """Generate one greedy answer to one prompt. Pieces of the text are passed to `on_text` as they are decoded.

    on_text_end: called between the last piece and the first step of speech. speech: a WAV file to write, 24 kHz mono.

    Raises QuantError for every fault that the user can fix, if possible before the weights are loaded.
    """
    progress = progress or Progress()
    if max_new_tokens < (2 if speech else 1):
        raise QuantError(f"max_new_tokens is {max_new_tokens}", "give at least 1, or at least 2 with --speech")
    chosen = resolve_device(device)
    source = open_source(path)
    speech_support = check_speech(source, speaker, Path(speech)) if speech else None
    sample = _make_prompt(source.model, text, images, audios, videos)
    model = open_model(source, bool(speech))
    limits = MediaLimits(_MAX_TOKENS, _VISUAL_TOKENS * source.model.visual_token_pixels, _VIDEO_FPS)
    inputs = prepare_sample(sample, source.model.family.open_media_processor(source.path, limits, trust_remote_code))
    started = time.perf_counter()
    with out_of_memory_as_error(chosen, "give smaller media, or --device cpu"):
        fill_model(model, source, chosen, progress)
        inputs = on_device(inputs, chosen.torch)
        pieces: list[str] = []

        def add_piece(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        def add_code(count: int) -> None:
            if count == 1:
                on_text_end()
                progress.step("speech", 0, 1)
            progress.doing(f"{count} codes of sound")

        with torch.inference_mode():
            if speech is None or speech_support is None:
                tokens = model.answer(inputs, source.path, max_new_tokens, add_piece)
                return Answer("".join(pieces), tokens, time.perf_counter() - started)
            speaking_model = cast(SpeakingModel, model)  # opened with speech=True
            spoken = speaking_model.speak(inputs, source.path, speaker, max_new_tokens, add_piece, on_code=add_code)
            progress.step("speech", 1, 1)
    write_wav(Path(speech), spoken.samples, speech_support.SPEECH_RATE)
    seconds = len(spoken.samples) / speech_support.SPEECH_RATE
    return Answer("".join(pieces), spoken.tokens, time.perf_counter() - started, str(speech), seconds)


# --- checkpoint and prompt, before the weights are loaded ----------------------------------------------------


def open_source(path: str | Path) -> Source:
    """Open a float checkpoint, or a quantized one in any supported format. Only headers are read."""
    folder = find_model_folder(path)
    config = load_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if is_quantized(folder, config):
        quantized = open_quantized(folder)
        linears = {name: stored.linear for name, stored in quantized.linears.items()}
        sizes = {name: info.nbytes for name, info in quantized.floats.items()}
        sizes |= {f"{name}.weight": stored.nbytes for name, stored in quantized.linears.items()}
        config = without_quantization(config)
        return Source(folder, config, quantized.model, quantized.floats, linears, sizes, quantized.kv_cache)
    checkpoint = open_checkpoint(folder)
    sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    return Source(folder, checkpoint.config, derive_model_type(checkpoint.config), checkpoint.tensors, {}, sizes)


def check_speech(source: Source, speaker: str, file: Path | None = None) -> SpeechSupport:
    """The speech part of the model. Raises QuantError if it cannot speak, the speaker is unknown or the file is bad."""
    speech_support = source.model.speech_support
    if speech_support is None:
        raise QuantError(f"{source.path}: a {source.model.hf_model_type} answers in text only", "omit --speech")
    has_weights = any(name.startswith(source.model.speech_prefixes) for name in source.floats)
    if not speech_support.has_speech(source.config) or not has_weights:
        raise QuantError(f"{source.path} holds no speech parts", "omit --speech, or use the complete checkpoint")
    known = speech_support.speakers(source.path)
    if speaker not in known:
        raise QuantError(f"unknown speaker {speaker!r}. Known: {', '.join(known)}.{nearest(speaker, known)}")
    if file is None:
        return speech_support
    if file.suffix.lower() != ".wav":
        raise QuantError(f"--speech {str(file)!r} is not a .wav file", "give a file name that ends in .wav")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise QuantError(f"--speech {str(file)!r} cannot be written", "give a file in a folder that exists")
    return speech_support


def _make_prompt(
    model: ModelSpec, text: str, images: Sequence[str], audios: Sequence[str], videos: Sequence[str]
) -> CalibSample:
    """The prompt as a sample, media before text, with the checks of calibration samples. URLs are not fetched."""
    parts = [
        {"type": kind, kind: file}
        for kind, files in (("image", images), ("audio", audios), ("video", videos))
        for file in files
    ]
    parts += [{"type": "text", "text": text}] if text.strip() else []
    if not parts:
        raise QuantError("the prompt is empty", "give --text, --image, --audio or --video")
    return parse_sample("prompt", {"messages": [{"role": "user", "content": parts}]}, Path.cwd(), "", model)


def on_device(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    tensors = {name: tensor.to(device) for name, tensor in inputs.tensors.items()}
    return ModelInputs(tensors, inputs.use_audio_in_video, inputs.modality)


# --- the model -----------------------------------------------------------------------------------------------


def open_model(source: Source, speech: bool) -> RunnableModel:
    """The library's model without weights. Raises QuantError if a tensor is missing or has the wrong shape."""
    model = source.model.runner.open_model(source.config, speech)
    expected = model.module.state_dict()
    for name, stored_name in model.checkpoint_names().items():
        shape = source.shape_of(stored_name)
        if shape is None:
            raise QuantError(f"{source.path}: tensor {stored_name} is missing", "write or fetch the checkpoint again")
        if shape != tuple(expected[name].shape):
            raise QuantError(
                f"{source.path}: {stored_name} has shape {list(shape)}, config.json implies"
                f" {list(expected[name].shape)}",
                "config.json and the weights belong to different models; fetch the checkpoint again",
            )
    return model


def check_memory(source: Source, model: RunnableModel, device: Device) -> None:
    """Raise QuantError if the weights of the model do not fit into memory in any dtype."""
    _choose_dtype(source, device, source.model.runner, set(model.checkpoint_names().values()))


def fill_model(model: RunnableModel, source: Source, device: Device, progress: Progress) -> None:
    """Load the weights in a dtype that fits into memory, and report the memory they take."""
    runner, checkpoint_names = source.model.runner, model.checkpoint_names()
    dtype, needed = _choose_dtype(source, device, runner, set(checkpoint_names.values()))
    on_disk = sum(source.disk_bytes[stored_name] for stored_name in set(checkpoint_names.values()))
    kinds = {_ACT_NAMES[s.number] for linear in source.linears.values() if (s := linear.scheme).act_bits}
    emulated = f"; {' and '.join(sorted(kinds))} activations are emulated" if kinds else ""
    emulated += f"; the KV cache is rounded to {source.kv_cache}" if source.kv_cache is not None else ""
    progress.say(
        f"{device.name} ({device.reason}), {str(dtype).removeprefix('torch.')}: the weights take"
        f" {human_bytes(needed)} of memory"
        + (f", dequantized from {human_bytes(on_disk)} on disk{emulated}" if source.linears else "")
    )
    filled: dict[str, str] = {}
    for done, (name, stored_name) in enumerate(checkpoint_names.items(), 1):
        if stored_name in filled:
            _share_parameter(model.module, filled[stored_name], name)
        else:
            target_dtype = torch.float32 if stored_name.startswith(runner.FLOAT32_PREFIXES) else dtype
            _fill_tensor(model.module, name, stored_name, source, target_dtype, device.torch)
            filled[stored_name] = name
        progress.step("load", done, len(checkpoint_names), "tensors")
    if source.kv_cache is not None:
        _round_cache(model, source, source.kv_cache)
    for module in model.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device.torch))


def _round_cache(model: RunnableModel, source: Source, kv_cache: CacheDtype) -> None:
    """Let every decoder layer read its keys and values as from a rounded cache."""
    names = {stored: name for name, stored in model.checkpoint_names().items()}
    for index in range(source.model.family.num_layers(source.config)):
        key = "self_attn.k_proj.weight"
        layer = model.module.get_submodule(names[source.model.layer_name(index, key)].removesuffix(f".{key}"))
        round_cache(layer, load_cache(source.model, kv_cache, source.floats, index))


def _choose_dtype(
    source: Source, device: Device, runner: ModelRunner, stored_names: set[str]
) -> tuple[torch.dtype, int]:
    """The compute dtype and the bytes of the weights in it.

    float32 on a CPU if it fits, since few CPUs are fast at bfloat16; else bfloat16.
    """
    by_dtype = {}
    for dtype in (torch.float32, torch.bfloat16):
        by_dtype[dtype] = sum(
            torch.Size(source.shape_of(name) or ()).numel()
            * (4 if name.startswith(runner.FLOAT32_PREFIXES) else dtype.itemsize)
            for name in stored_names
        )
    if device.torch.type != "cpu":
        return torch.bfloat16, by_dtype[torch.bfloat16]
    available = available_memory()
    for dtype, needed in by_dtype.items():
        if available is None or needed + _HEADROOM <= available:
            return dtype, needed
    raise QuantError(
        f"the model needs {human_bytes(by_dtype[torch.bfloat16])} in bfloat16 and {human_bytes(_HEADROOM)} to run;"
        f" {human_bytes(available or 0)} of memory are available",
        "use a machine with more memory, or serve the checkpoint with vLLM",
    )


def available_memory() -> int | None:
    """Bytes that this process can still allocate, limited by Linux and the container. None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup file, or the value `max`: no limit
        return free


def _fill_tensor(
    module: torch.nn.Module, name: str, stored_name: str, source: Source, dtype: torch.dtype, device: torch.device
) -> None:
    """Load one tensor of the checkpoint into the model's parameter or buffer `name`."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    current: Any = getattr(owner, attribute)
    linear = source.linears.get(stored_name.removesuffix(".weight")) if attribute == "weight" else None
    if linear is None:
        tensor = load_finite(source.floats[stored_name]).to(dtype).to(device)
        is_parameter = isinstance(current, torch.nn.Parameter)
        setattr(owner, attribute, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return
    loaded = load_linear(linear)
    if linear.scheme.act_bits is None:
        owner.weight = torch.nn.Parameter(dequantize_by_rows(loaded, dtype).to(device), requires_grad=False)
        return
    parent, _, child = owner_name.rpartition(".")
    setattr(module.get_submodule(parent), child, RoundingLinear(loaded, owner.bias, dtype, device))


def _share_parameter(module: torch.nn.Module, name: str, tied_name: str) -> None:
    """Tie one parameter to another, e.g. lm_head to the embedding."""
    owner, _, attribute = tied_name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, module.get_parameter(name))


def dequantize_by_rows(linear: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype`. Row blocks avoid a full float32 copy."""
    weight = torch.empty(linear.qweight.shape, dtype=dtype)
    for rows in row_blocks(weight):
        weight[rows] = dequantize(linear_rows(linear, rows)).to(dtype)
    return weight


class RoundingLinear(torch.nn.Module):
    """A Linear that rounds its inputs per token: y = (q_x @ q_w^T) * s_x * s_w + bias, as quantized_matmul.

    The codes are stored in the compute dtype, which represents all of them exactly. In bfloat16 their product is
    rounded once. Without one scale per token, the weight is dequantized and the inputs are rounded as round_act does.
    """

    def __init__(self, linear: QuantizedLinear, bias: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert linear.scheme.act_bits is not None  # Linears with float activations are dequantized
        self._scheme = linear.scheme
        self._input_global = None if linear.input_global is None else linear.input_global.to(device)
        weight = linear.qweight.to(dtype) if linear.scheme.rounds_tokens else dequantize_by_rows(linear, dtype)
        self.weight = torch.nn.Parameter(weight.to(device), requires_grad=False)
        self._scales = linear.scales.squeeze(1).to(device)  # [out]
        self.bias = bias  # None, or a parameter that is filled after the weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._scheme.rounds_tokens:
            rounded = round_act(x.to(torch.float32), self._scheme, self._input_global).to(self.weight.dtype)
            y = torch.nn.functional.linear(rounded, self.weight)
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        q_x, s_x = quantize_tokens(x.to(torch.float32), self._scheme)
        y = torch.nn.functional.linear(q_x.to(self.weight.dtype), self.weight).to(torch.float32) * s_x * self._scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)


# --- speech --------------------------------------------------------------------------------------------------


def write_wav(file: Path, samples: torch.Tensor, rate: int) -> None:
    """Write 16-bit mono. samples: float [n], clipped to [-1, 1]. Raises QuantError if empty, NaN or Inf."""
    if not samples.numel():
        raise QuantError("the talker produced no audio")
    if not is_finite(samples):
        raise QuantError("the talker's audio holds NaN or Inf")
    # WAV is little-endian, and so is every machine that torch is built for
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
