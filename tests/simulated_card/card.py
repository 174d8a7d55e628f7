"""A simulated card: tensors that say they are on npu:0 or cuda:0 and are computed on the CPU.

It refuses what a card refuses, and counts what a card would wait for, by line of the package:
- operations on tensors of two devices, `.numpy()` of a tensor of the card, products of integers; on an NPU float64 and
  complex numbers. CPU indices into a tensor of the card, which a card copies, are refused in the package's own code.
- waits: the host waits for the card to have a number, the size of a mask, or a copy on the CPU.
- copies: between CPU and card, in both directions. Those of background threads are copies, but no waits of the run.
- launches: operations that compute something; not views, and not allocations. Replaying a graph is one launch.

Not simulated: time, streams, the memory of a card, and rounding that differs from the CPU's. The kernels are the CPU's,
so an output that differs from the CPU's shows a path that depends on the device.
"""

from __future__ import annotations

import importlib.machinery
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import bitsandbytes  # noqa: F401  # with a card of CUDA it would look for the driver when it is imported
import torch
import torch._inductor.test_operators  # they register operations once, and cannot do so after a simulation
import torch.distributed.tensor
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import GenerationMixin  # noqa: F401  # imports what else registers operations

from msmodelslim_omni.runtime import device as devices

Kind = Literal["npu", "cuda"]

TOTAL_MEMORY, FREE_MEMORY = 16 << 30, 12 << 30  # what the card says it has

_COPIES = ("aten::_to_copy", "aten::copy_")
_ASK_THE_CARD = (  # their result, or its size, is a number that the host needs
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::repeat_interleave",
)  # fmt: skip
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach")
_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::mv", "aten::dot")


@dataclass
class Counts:
    """How often each line of the package made the host wait, copied, or launched a kernel."""

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def table(self, lines: int = 12) -> str:
        """The lines with the most of each, for people."""
        rows = []
        for name in ("waits", "copies", "launches"):
            counter: Counter[str] = getattr(self, name)
            rows.append(f"{name}: {counter.total()}")
            rows += [f"  {count:>8}  {line}" for line, count in counter.most_common(lines)]
        return "\n".join(rows)


class CardTensor(torch.Tensor):
    """A tensor of the card. `inner` is the CPU tensor with its values."""

    inner: torch.Tensor
    card: ClassVar[_Card]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CardTensor:
        made: CardTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("npu:0"),  # of both kinds: for CUDA, torch would ask its driver, which is not there
            requires_grad=False,
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.card.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.card.kind == "cuda"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.card.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"CardTensor({self.inner!r})"

    def tolist(self) -> Any:
        self.card.count_wait()
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy, at {_line()}")

    # Numbers and indexing are done here, because torch itself would ask the driver of CUDA, which is not there.

    def item(self) -> Any:
        self.card.count_wait()
        return self.inner.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Without the device if it is the card: torch knows it by another name, and would copy."""

        def is_here(value: Any) -> bool:
            is_device = isinstance(value, torch.device) or (isinstance(value, str) and value != "cpu")
            return is_device and self.card.has(torch.device(value))

        args = tuple(a for a in args if not is_here(a))
        kwargs = {name: value for name, value in kwargs.items() if not is_here(value)}
        return super().to(*args, **kwargs) if args or kwargs else self

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> CardTensor:
        self.card.run(torch.ops.aten.copy_.default, (self, source), {})
        return self

    def __getitem__(self, index: Any) -> Any:
        view, indices = _basic_indexing(self, index)
        return torch.ops.aten.index.Tensor(view, indices) if indices else view

    def __setitem__(self, index: Any, value: Any) -> None:
        view, indices = _basic_indexing(self, index)
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, dtype=self.dtype)
        if indices:
            torch.ops.aten.index_put_.default(view, indices, value.to(self.device))
        else:
            self.card.run(torch.ops.aten.copy_.default, (view, value), {})


def _basic_indexing(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view that integers, slices, None and `...` of an index select, and the tensors that index its axes."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part.dim() if _is_mask(part) else 1 for part in parts if part is not None and part is not Ellipsis)
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    indices: dict[int, torch.Tensor] = {}
    axis = 0
    for part in parts:
        if part is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
            axis += 1
        elif isinstance(part, torch.Tensor | list):
            indices[axis] = part if isinstance(part, torch.Tensor) else _on_card(torch.tensor(part))
            axis += part.dim() if _is_mask(part) else 1
        else:
            tensor = torch.ops.aten.select.int(tensor, axis, int(part))
    return tensor, [indices.get(i) for i in range(max(indices) + 1)] if indices else []


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool


class _Card:
    """The card of one `simulated_card` context."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.device = torch.device(f"{kind}:0")
        self.counts = Counts()
        self.thread = threading.get_ident()
        self.capturing: Graph | None = None

    def has(self, device: torch.device) -> bool:
        """Whether a device is the card, by its name or by that of CardTensor for torch."""
        return device.type in (self.kind, "npu")

    def count_wait(self) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"the host waits for the card while a graph is captured, at {_line()}")
        if threading.get_ident() == self.thread:
            self.counts.waits[_line()] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on tensors of the card, of the CPU, or with a device as an argument."""
        if func._can_decompose():
            with Mode():
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        flat, spec = tree_flatten((args, kwargs))
        on_card = [a for a in flat if isinstance(a, CardTensor)]
        on_cpu = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, CardTensor)]
        targets = [a for a in flat if isinstance(a, torch.device)]
        to_card = self.has(targets[0]) if targets else bool(on_card)
        name = func._schema.name
        if not on_card and not to_card:
            return func(*args, **kwargs)
        self._refuse(name, func, on_card, on_cpu)
        self._count(name, func, flat, on_card, on_cpu, to_card)
        inner = [a.inner if isinstance(a, CardTensor) else a for a in flat]
        inner = [torch.device("cpu") if isinstance(a, torch.device) and self.has(a) else a for a in inner]
        known = {id(a.inner): a for a in on_card}
        call_args, call_kwargs = tree_unflatten(inner, spec)
        out = func(*call_args, **call_kwargs)
        if self.capturing is not None:
            self.capturing.record(func, call_args, call_kwargs, out)

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            if not to_card:
                return value
            if self.kind == "npu" and (value.dtype == torch.float64 or value.dtype.is_complex):
                raise RuntimeError(f"{value.dtype} on an NPU: {name} at {_line()}")
            return CardTensor(value)

        return tree_map(wrap, out)

    def attention(
        self, attend: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """F.scaled_dot_product_attention, whose gradient is that of _Attention."""
        flat = [*args, *kwargs.values()]
        if any(isinstance(a, torch.Tensor) and not isinstance(a, CardTensor) for a in flat):
            raise RuntimeError(f"tensors of two devices: attention at {_line()}")
        self.counts.launches[_line()] += 1
        with torch._C._DisableTorchDispatch():
            inner = tree_map(lambda a: a.inner if isinstance(a, CardTensor) else a, (args, kwargs))
            return CardTensor(attend(*inner[0], **inner[1]))

    def _refuse(self, name: str, func: Any, on_card: list[Any], on_cpu: list[torch.Tensor]) -> None:
        if on_card and any(tensor.dim() > 0 for tensor in on_cpu) and name not in _COPIES:
            if name not in _INDEXING:
                raise RuntimeError(f"tensors of two devices: {name} at {_line()}")
            if _is_own_code():
                raise RuntimeError(f"CPU indices into a tensor of the card: {name} at {_line()}")
        if name in _PRODUCTS and any(not t.is_floating_point() and not t.is_complex() for t in on_card):
            raise RuntimeError(f"a product of integers: {name} at {_line()}")

    def _count(
        self, name: str, func: Any, flat: list[Any], on_card: list[Any], on_cpu: list[torch.Tensor], to_card: bool
    ) -> None:
        indices = flat[1:] if name == "aten::index" else flat[1:2]
        is_mask = name in _INDEXING and any(isinstance(a, CardTensor) and a.dtype == torch.bool for a in indices)
        if name in _ASK_THE_CARD or is_mask:
            self.count_wait()
        if name in _COPIES:
            back = (name == "aten::copy_" and not isinstance(flat[0], CardTensor)) or (on_card and not to_card)
            if back or on_cpu:  # also where transformers indexes with indices of the CPU
                self.counts.copies[_line()] += 1
            if back:
                self.count_wait()
        if not func.is_view and name not in _ALLOCATIONS and self.capturing is None:
            self.counts.launches[_line()] += 1


class Mode(TorchDispatchMode):
    """Sends the operations of this thread to the card, also those that make a tensor of it from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CardTensor.card.run(func, args, kwargs or {})


class Graph:
    """A recorded sequence of operations, as torch.cuda.CUDAGraph and torch.npu.NPUGraph have it."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._calls.append((func, args, kwargs, out))

    def replay(self) -> None:
        CardTensor.card.counts.launches[_line()] += 1
        with torch._C._DisableTorchDispatch():
            for func, args, kwargs, out in self._calls:
                if func.is_view:
                    continue
                new = func(*args, **kwargs)
                if isinstance(new, torch.Tensor) and new is not out:
                    out.copy_(new)


@contextmanager
def graph(recorded: Graph, **_: Any) -> Iterator[None]:
    """Record what runs inside. A card does not compute meanwhile; here it does, which leaves the buffers undefined."""
    CardTensor.card.capturing = recorded
    try:
        yield
    finally:
        CardTensor.card.capturing = None


def _line() -> str:
    """The innermost line of the package on the stack, or of any other file if there is none."""
    frame, outermost = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/msmodelslim_omni/" in file:
            return f"{file.rpartition('/msmodelslim_omni/')[2]}:{frame.f_lineno}"
        if "/torch/" not in file and "simulated_card" not in file:
            outermost = outermost or f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outermost


def _is_own_code() -> bool:
    """Whether the package itself, and not a library that it calls, runs the operation."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or "simulated_card" in frame.f_code.co_filename:
        assert frame.f_back is not None
        frame = frame.f_back
    return "/msmodelslim_omni/" in frame.f_code.co_filename


def _on_card(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(CardTensor.card.device)


def _backend(kind: Kind) -> dict[str, Any]:
    """What torch.npu or torch.cuda of a machine with one card has, as far as the package and torch itself ask."""
    graph_class = {"npu": "NPUGraph", "cuda": "CUDAGraph"}[kind]
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "mem_get_info": lambda device=None: (FREE_MEMORY, TOTAL_MEMORY),
        "is_bf16_supported": lambda **_: True,
        "graph": graph,
        graph_class: Graph,
    }


def _inference_mode(mode: bool = True) -> Any:
    """What torch.inference_mode enters, also where it decorates a function; its tensors cannot be wrapped."""
    return torch.no_grad() if mode else nullcontext()


def _tensor_on_card(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor, which makes tensors without asking a dispatch mode."""

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    return tensor


def _attention_on_card(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's attention as the one kernel that a card has for it, with the sums of the CPU's kernel.

    torch chooses the kernel by the device: without this, it would call one that is not there (CUDA), or a sequence of
    products that adds in another order (an unknown device).
    """

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if not any(isinstance(a, CardTensor) for a in (query, key, value, *args, *kwargs.values())):
            return attend(query, key, value, *args, **kwargs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            out: torch.Tensor = _Attention.apply(query, key, value, attend, args, kwargs)  # type: ignore[no-untyped-call]
            return out
        return CardTensor.card.attention(attend, (query, key, value, *args), kwargs)

    return attention


class _Attention(torch.autograd.Function):
    """Attention on the card with a gradient, by the CPU's kernels for both."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, attend: Any, args: Any, kwargs: Any) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = attend, args, kwargs
        return CardTensor.card.attention(attend, (query, key, value, *args), kwargs)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        attend, args, kwargs = ctx.rest
        with torch._C._DisableTorchDispatch(), torch.enable_grad():
            inputs = [tensor.inner.detach().requires_grad_() for tensor in ctx.saved_tensors]
            args, kwargs = tree_map(lambda a: a.inner if isinstance(a, CardTensor) else a, (args, kwargs))
            found = torch.autograd.grad(attend(*inputs, *args, **kwargs), inputs, gradient.inner)
        return (*(CardTensor(tensor) for tensor in found), None, None, None)


@contextmanager
def simulated_card(kind: Kind) -> Iterator[Counts]:
    """A machine with one card. Commands with `--device npu` or `--device cuda` run on it. Yields its counts."""
    npu = _npu_module()
    CardTensor.card = card = _Card(kind)
    with (
        patch.object(torch._C, "_InferenceMode", _inference_mode),
        patch.object(torch, "tensor", _tensor_on_card(torch.tensor)),
        patch.object(F, "scaled_dot_product_attention", _attention_on_card(F.scaled_dot_product_attention)),
    ):
        backend = _backend(kind)
        if kind == "cuda":
            with (
                patch.multiple(torch.cuda, **backend),
                patch.object(npu, "device_count", lambda: 1),  # for the queue of gradients
                patch.object(torch.version, "cuda", "simulated"),
                Mode(),
            ):
                yield card.counts
            return
        torch_npu = types.ModuleType("torch_npu")
        # transformers imports kernels from it, which the tiny models do not call.
        torch_npu.__getattr__ = lambda name: None  # type: ignore[method-assign]
        torch_npu.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
        devices._import_npu.cache_clear()
        before = sys.modules.get("torch_npu")
        sys.modules["torch_npu"] = torch_npu
        try:
            with patch.multiple(npu, **backend), Mode():
                yield card.counts
        finally:
            del sys.modules["torch_npu"]
            if before is not None:
                sys.modules["torch_npu"] = before
            devices._import_npu.cache_clear()


def _npu_module() -> types.ModuleType:
    """torch.npu. torch accepts one such backend for the life of a process; without a card it says that it has none."""
    if not hasattr(torch, "npu"):
        module = types.ModuleType("torch.npu")
        for name, value in _backend("npu").items():
            setattr(module, name, value)
        module.is_available = lambda: False  # type: ignore[attr-defined]
        module.device_count = lambda: 0  # type: ignore[attr-defined]
        module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
        module.get_amp_supported_dtype = lambda: []  # type: ignore[attr-defined]
        _setup_privateuseone_for_python_backend("npu", module)
    return torch.npu  # type: ignore[attr-defined,no-any-return]
