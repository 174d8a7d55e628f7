"""Device selection for cpu, cuda and npu. No other file names these backends.

torch_npu is imported only when a device is resolved. A broken torch_npu installation is reported and does not break
runs on other devices.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import QuantError

# Raised when the memory of a device is exhausted.
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

_NPU_HINT = "install the driver and CANN, then `pip install 'msmodelslim_omni[npu]'`; or use --device cpu"


@dataclass(frozen=True)
class Device:
    """A compute device and the reason why it was chosen."""

    name: str
    reason: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_ascend(self) -> bool:
        """Whether vLLM-Ascend serves on this kind of device."""
        return self.name.startswith("npu")


@contextmanager
def out_of_memory_as_error(device: Device, remedy: str) -> Iterator[None]:
    """Re-raise out-of-memory errors of the device as QuantError. remedy: the hint for the user."""
    try:
        yield
    except _OUT_OF_MEMORY as error:
        reason = next(iter(str(error).splitlines()), "no details")
        raise QuantError(f"out of memory on {device.name}: {reason}", remedy) from error


def is_device_fault(error: BaseException) -> bool:
    """Whether an error is about memory, the device or an operation that it lacks, not about the data it worked on."""
    faults = (*_OUT_OF_MEMORY, NotImplementedError, getattr(torch, "AcceleratorError", MemoryError))
    return isinstance(error, faults) or "DefaultCPUAllocator" in str(error)


def resolve_device(requested: str, default_index: int = 0) -> Device:
    """Resolve `auto` (npu, else cuda, else cpu), `cpu`, `cuda[:i]` or `npu[:i]` to a Device.

    default_index: the card to use if the request has no index. Raises QuantError if the device is not available.
    """
    match = re.fullmatch(r"(auto|cpu|cuda|npu)(?::(\d{1,3}))?", requested)
    if match is None or (match[2] and match[1] in ("auto", "cpu")):
        raise QuantError(f"unknown device {requested!r}", "use auto, cpu, cuda, cuda:1, npu or npu:1")
    kind, index = match[1], int(match[2] or default_index)
    _import_npu()
    _forbid_tf32()
    if kind == "cpu":
        return Device("cpu", "as requested")
    if kind == "auto":
        return _first_available(default_index)
    count, problem = _npu_count() if kind == "npu" else _cuda_count()
    if not count:
        raise QuantError(f"device {requested!r}: {problem}", _NPU_HINT if kind == "npu" else "use --device cpu")
    return _card(kind, index, count, "as requested")


def _forbid_tf32() -> None:
    """Keep float32 from silently becoming TF32 (NVIDIA; an environment variable may allow it) or HF32 (Ascend)."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    npu = getattr(torch, "npu", None)  # torch_npu adds it
    for operations in (getattr(npu, name, None) for name in ("conv", "matmul")):
        if operations is not None:
            operations.allow_hf32 = False


def _card(kind: str, index: int, count: int, reason: str) -> Device:
    name = f"{kind}:{index}"
    if index >= count:
        raise QuantError(f"device {name!r} does not exist; this machine has {count}: {kind}:0 to {kind}:{count - 1}")
    return Device(name, reason)


def _first_available(index: int) -> Device:
    npus, npu_problem = _npu_count()
    if npus:
        return _card("npu", index, npus, "auto: an NPU is available")
    cudas, cuda_problem = _cuda_count()
    if cudas:
        return _card("cuda", index, cudas, f"auto: no NPU ({npu_problem}), a CUDA card is available")
    return Device("cpu", f"auto: no NPU ({npu_problem}) and no CUDA card ({cuda_problem})")


def _npu_count() -> tuple[int, str]:
    """Number of NPUs, and why there are none if the number is 0."""
    if problem := _import_npu():
        return 0, problem
    npu = torch.npu  # type: ignore[attr-defined]  # torch_npu adds it
    return (int(npu.device_count()) if npu.is_available() else 0), "torch_npu finds no NPU"


@functools.cache
def _import_npu() -> str:
    """Import torch_npu. Returns an empty string, or the reason why it is not available.

    An installed torch_npu that fails to load is hidden from later imports: transformers would import it and fail.
    """
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            return "torch_npu is not installed"
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # makes later imports raise ModuleNotFoundError
        return f"torch_npu cannot be loaded: {error}"
    return ""


def _cuda_count() -> tuple[int, str]:
    """Number of CUDA cards, and why there are none if the number is 0."""
    if torch.version.cuda is None and torch.version.hip is None:
        return 0, "this torch is built without CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, "torch finds no CUDA card"


def set_current_device(device: torch.device) -> None:
    """Make a card the default device of this process."""
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)


def process_group_backend(device: torch.device, *, shared: bool) -> str:
    """Backend string for torch.distributed: gloo for CPU tensors, nccl or hccl for tensors on a card.

    shared: whether all processes use one card. nccl and hccl refuse this, so gloo copies card tensors through the CPU.
    """
    if device.type == "cpu":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{'gloo' if shared else {'cuda': 'nccl', 'npu': 'hccl'}[device.type]}"


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 math on tensors of `device`: the CPU for NPUs, which lack float64, else `device`."""
    return torch.device("cpu") if device.type == "npu" else device


def supports_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. Every CPU does, though some slowly."""
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(getattr(torch, device.type).is_bf16_supported())


def record_graph(device: torch.device, function: Callable[[], None]) -> Callable[[], None] | None:
    """Record the operations that `function` launches on a card. Calling the result launches all of them at once.

    function: works in place on tensors that outlive the result, and does not wait for the card. It runs once before it
    is recorded, because libraries allocate what they need at their first call.
    Returns None if the device cannot record, as the CPU, or an operation cannot be recorded.
    """
    backend = getattr(torch, device.type, None)
    kind = getattr(backend, {"cuda": "CUDAGraph", "npu": "NPUGraph"}.get(device.type, ""), None)
    if kind is None or not hasattr(backend, "graph"):
        return None
    function()
    recorded = kind()
    try:
        with backend.graph(recorded):  # type: ignore[union-attr]
            function()
    except RuntimeError:
        return None
    replay: Callable[[], None] = recorded.replay
    return replay


def free_memory(device: torch.device) -> None:
    """Return cached free memory to the system: the accelerator's cache and the heap of glibc (malloc_trim)."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_modules(device: torch.device) -> None:
    """Collect garbage, then free_memory. Modules of transformers may contain reference cycles."""
    gc.collect()
    free_memory(device)


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Free and total memory of an accelerator in bytes; None for a CPU."""
    if device.type == "cpu":
        return None
    free, total = getattr(torch, device.type).mem_get_info(device)
    return int(free), int(total)


def peak_device_memory(device: torch.device) -> int:
    """Peak memory allocated on the accelerator in bytes; 0 on a CPU."""
    return 0 if device.type == "cpu" else int(getattr(torch, device.type).max_memory_allocated(device))
