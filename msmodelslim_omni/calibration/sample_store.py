"""Tensors of all calibration samples between layers: on disk, and cached in memory within a budget.

A resumed run starts from the files, so they are written atomically. The cache only saves reading them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..errors import QuantError
from ..models import LayerInput
from ..runtime import to_cpu
from ..storage import (
    SafetensorsWriter,
    TensorInfo,
    TensorSpec,
    is_finite,
    is_whole,
    load_tensor,
    read_header,
    write_tensors,
)


class _Cache:
    """Holds tensors until a budget of bytes is used up."""

    def __init__(self, budget: int) -> None:
        self._room = budget
        self._kept: dict[int, dict[str, torch.Tensor]] = {}

    def offer(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._room:
            self._room -= size
            self._kept[number] = tensors

    def get(self, number: int) -> dict[str, torch.Tensor] | None:
        return self._kept.get(number)


class StemStore:
    """The input of the first decoder layer, one file per sample: hidden states, other arguments, modalities.

    hidden: float32 [1, tokens, hidden]. modality: int8 [tokens]. arguments: everything else that the library passes to
    a layer. deepstack: see models.Deepstack; absent in samples without it.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._cache = _Cache(budget)
        self._deepstack: dict[int, list[TensorInfo]] = {}  # positions and features of a sample, by number

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def is_whole(self, number: int) -> bool:
        """Whether the file exists and is undamaged, after a stopped run."""
        return is_whole(self._path(number))

    def write(self, number: int, inputs: LayerInput, modality: torch.Tensor) -> None:
        tensors = {"hidden": inputs.hidden, "modality": modality}
        for name, value in inputs.arguments.items():
            if isinstance(value, tuple):
                tensors |= {f"argument.{name}.{i:03d}": part for i, part in enumerate(value)}
            else:
                tensors[f"argument.{name}"] = value
        if inputs.deepstack is not None:
            tensors |= {"deepstack.positions": inputs.deepstack.positions}
            tensors |= {f"deepstack.{i:03d}": features for i, features in enumerate(inputs.deepstack.features)}
        on_cpu: dict[str, torch.Tensor] = {}
        for dtype in {tensor.dtype: None for tensor in tensors.values()}:
            alike = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            on_cpu |= zip(alike, to_cpu([*alike.values()]), strict=True)
        write_tensors(self._path(number), {name: on_cpu[name].contiguous() for name in tensors}, checksum=True)

    def modality(self, number: int) -> torch.Tensor:
        return load_tensor(read_header(self._path(number))["modality"])

    def hidden(self, number: int) -> torch.Tensor:
        return load_tensor(read_header(self._path(number))["hidden"])

    def layer_input(self, number: int, layer: int, hidden: torch.Tensor, device: torch.device) -> LayerInput:
        """The input of a layer for one sample. hidden: what the layer before returned, float32 [1, tokens, hidden]."""
        return LayerInput(self.entering(number, layer, hidden.to(device)), self.arguments(number, device))

    def entering(self, number: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that enter a layer, or after the last one the final norm: with the features added."""
        if layer == 0:
            return hidden
        if number not in self._deepstack:
            infos = read_header(self._path(number))
            features = sorted(name for name in infos if name.startswith("deepstack.0"))
            self._deepstack[number] = [infos[name] for name in ("deepstack.positions", *features) if name in infos]
        stored = self._deepstack[number]
        if layer >= len(stored):
            return hidden
        positions, added = (load_tensor(stored[i]).to(hidden.device) for i in (0, layer))
        return hidden.index_add(1, positions, added[None])

    def arguments(self, number: int, device: torch.device) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """The layer's other arguments for one sample; tuples are rebuilt."""
        stored = self._cache.get(number)
        if stored is None:
            infos = read_header(self._path(number))
            stored = {n: load_tensor(info) for n, info in sorted(infos.items()) if n.startswith("argument.")}
            self._cache.offer(number, stored)
        arguments: dict[str, torch.Tensor | tuple[torch.Tensor, ...]] = {}
        for name, tensor in stored.items():
            _, key, *position = name.split(".")
            before = arguments.get(key, ())
            here = tensor.to(device)
            arguments[key] = (*before, here) if position else here
        return arguments


class HiddenStates:
    """The hidden states of all samples at one boundary between layers, in one file."""

    def __init__(self, path: Path, lengths: Sequence[int], width: int, budget: int) -> None:
        self.path = path
        self._specs = [TensorSpec(f"{n:06d}", "F32", (1, length, width)) for n, length in enumerate(lengths)]
        self._cache = _Cache(budget)
        self._infos: dict[str, TensorInfo] | None = None  # of the file, read once: a header is as long as the samples

    def write(self, hidden: Iterable[torch.Tensor], *, sync: bool = True) -> None:
        """Write the samples' hidden states in order, float32 [1, tokens, hidden] each.

        sync: whether a run may resume from this file. Other files need neither a sync nor a checksum.
        """
        self._infos = None
        with SafetensorsWriter(self.path, self._specs, sync=sync, checksum=sync) as writer:
            for number, tensor in enumerate(hidden):
                on_cpu = tensor.to("cpu", torch.float32).contiguous()
                writer.write(f"{number:06d}", on_cpu)
                self._cache.offer(number, {"hidden": on_cpu})

    def is_whole(self) -> bool:
        """Whether the file exists and is undamaged, after a stopped run."""
        return is_whole(self.path)

    def read(self, number: int) -> torch.Tensor:
        if kept := self._cache.get(number):
            return kept["hidden"]
        if self._infos is None:
            self._infos = read_header(self.path)
        return load_tensor(self._infos[f"{number:06d}"])

    def __len__(self) -> int:
        return len(self._specs)


def refuse_nonfinite_states(hidden: torch.Tensor, producer: str, sample: str) -> None:
    """Raise QuantError if hidden states hold NaN or Inf. producer, sample: what the message names."""
    if not is_finite(hidden):
        raise QuantError(
            f"{producer}: NaN or Inf in the hidden states of sample {sample}",
            "check the checkpoint with the float model, or remove the sample",
        )
