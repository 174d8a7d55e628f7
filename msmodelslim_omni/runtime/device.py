"""cpu, cuda and npu: the only file that names them.

torch_npu is looked for when a device is resolved, not before; a broken installation of it is reported, and never
allowed to break a run on another device.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import QuantError

# What a device raises when its memory is used up.
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)

_NPU_HINT = "install the driver and CANN, then `pip install 'msmodelslim_omni[npu]'`; or use --device cpu"


@dataclass(frozen=True)
class Device:
    """A device to compute on and why it was chosen."""

    name: str
    reason: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)


@contextmanager
def out_of_memory_as_error(device: Device, remedy: str) -> Iterator[None]:
    """What is raised when the device's memory is used up, as a QuantError with what the user can do about it."""
    try:
        yield
    except _OUT_OF_MEMORY as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise QuantError(f"out of memory on {device.name}: {reason}", remedy) from error


def resolve_device(wanted: str, place: int = 0) -> Device:
    """`auto` (npu, else cuda, else cpu), `cpu`, `cuda[:i]` or `npu[:i]`. Raises QuantError with what is missing.

    place: which card to take where no index is asked for.
    """
    form = re.fullmatch(r"(auto|cpu|cuda|npu)(?::(\d{1,3}))?", wanted)
    if form is None or (form[2] and form[1] in ("auto", "cpu")):
        raise QuantError(f"unknown device {wanted!r}", "use auto, cpu, cuda, cuda:1, npu or npu:1")
    kind, index = form[1], int(form[2] or place)
    _import_npu()
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant where float32 is said
    if kind == "cpu":
        return Device("cpu", "as asked")
    if kind == "auto":
        return _first_available(place)
    count, problem = _npu_count() if kind == "npu" else _cuda_count()
    if not count:
        raise QuantError(f"device {wanted!r}: {problem}", _NPU_HINT if kind == "npu" else "use --device cpu")
    return _card(kind, index, count, "as asked")


def _card(kind: str, index: int, count: int, reason: str) -> Device:
    name = f"{kind}:{index}"
    if index >= count:
        raise QuantError(f"device {name!r} does not exist: there are {count}, {kind}:0 to {kind}:{count - 1}")
    return Device(name, reason)


def _first_available(place: int) -> Device:
    npus, npu_problem = _npu_count()
    if npus:
        return _card("npu", place, npus, "auto: an NPU is there")
    cudas, cuda_problem = _cuda_count()
    if cudas:
        return _card("cuda", place, cudas, f"auto: no NPU ({npu_problem}), a CUDA card is there")
    return Device("cpu", f"auto: no NPU ({npu_problem}) and no CUDA card ({cuda_problem})")


def _npu_count() -> tuple[int, str]:
    if problem := _import_npu():
        return 0, problem
    npu = torch.npu  # type: ignore[attr-defined]  # torch_npu adds it
    return (int(npu.device_count()) if npu.is_available() else 0), "torch_npu finds no card"


@functools.cache
def _import_npu() -> str:
    """Import torch_npu; an empty string, or why it is not there.

    One that is installed but does not load is hidden: transformers imports it too wherever it finds it, and fails.
    """
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            return "torch_npu is not installed"
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # the import system's mark for "not there"
        return f"torch_npu does not load: {error}"
    return ""


def _cuda_count() -> tuple[int, str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return 0, "this torch is built without CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, "torch finds no card"


def use_device(device: torch.device) -> None:
    """Make a card the one that this process computes on where none is named."""
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device)


def backends(device: torch.device, *, shared: bool) -> str:
    """What processes talk by: tensors on the CPU by gloo, those on cards by the maker's library.

    shared: whether all are on one card, which these libraries refuse; gloo then takes those through the CPU.
    """
    if device.type == "cpu":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{'gloo' if shared else {'cuda': 'nccl', 'npu': 'hccl'}[device.type]}"


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on `device`: there, but for NPUs, which lack it."""
    return torch.device("cpu") if device.type == "npu" else device


def free_memory(device: torch.device) -> None:
    """Give memory back that was freed but is kept: by the accelerator, and by the C library, as glibc does."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_modules(device: torch.device) -> None:
    """The same, of modules too that refer to themselves in circles, as the library's may."""
    gc.collect()
    free_memory(device)


def peak_rss() -> int:
    """The largest resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int:
    """The largest memory allocated on the accelerator, in bytes; 0 on a CPU."""
    return 0 if device.type == "cpu" else int(getattr(torch, device.type).max_memory_allocated(device))
