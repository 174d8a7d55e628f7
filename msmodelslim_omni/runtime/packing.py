"""Serialization of values that the processes of a run exchange: JSON for plain values, raw bytes for tensors.

Not here: the package's own classes, and pickle, which would execute received code. Tuples become lists.
"""

from __future__ import annotations

import json
from typing import Any

import torch

_LENGTH = 8  # bytes of the integer that holds the length of the JSON


def pack(value: Any) -> torch.Tensor:
    """Serialize a value to uint8 [bytes]: length of the JSON, the JSON, then the tensors in the order of the JSON.

    value: lists, tuples, dicts with string keys, tensors and JSON scalars. Raises TypeError for other types.
    """
    tensors: list[torch.Tensor] = []

    def to_json(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            tensors.append(part.cpu().contiguous().view(-1).view(torch.uint8))
            return {"tensor": [str(part.dtype).removeprefix("torch."), list(part.shape), part.device.type]}
        if isinstance(part, dict):
            return {"entries": {key: to_json(entry) for key, entry in part.items()}}
        return [to_json(entry) for entry in part] if isinstance(part, list | tuple) else part

    text = json.dumps(to_json(value)).encode()
    head = torch.frombuffer(bytearray(len(text).to_bytes(_LENGTH, "little") + text), dtype=torch.uint8)
    return torch.cat([head, *tensors])


def unpack(packed: torch.Tensor) -> Any:
    """Inverse of `pack`. Tensors are put on this process' current device of their original type."""
    length = int.from_bytes(bytes(packed[:_LENGTH].tolist()), "little")
    end = _LENGTH + length

    def restore(part: Any) -> Any:
        nonlocal end
        if isinstance(part, list):
            return [restore(entry) for entry in part]
        if not isinstance(part, dict):
            return part
        if "entries" in part:
            return {key: restore(entry) for key, entry in part["entries"].items()}
        name, shape, device = part["tensor"]
        tensor = torch.empty(shape, dtype=getattr(torch, name))
        content = packed[end : end + tensor.nbytes]
        end += tensor.nbytes
        tensor.view(-1).view(torch.uint8).copy_(content)
        return tensor.to(device)

    return restore(json.loads(packed[_LENGTH:end].numpy().tobytes()))
