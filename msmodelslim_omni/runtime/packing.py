"""Values as bytes, to be handed from one process of a run to another: JSON for what is plain, bytes for tensors.

Left out on purpose: classes of ours and pickle, which runs whatever is sent to it. Tuples come back as lists.
"""

from __future__ import annotations

import json
from typing import Any

import torch

_LENGTH = 8  # bytes of the number that tells how long the JSON is


def pack(value: Any) -> torch.Tensor:
    """uint8 [bytes]: the JSON's length, the JSON, then the tensors in the order in which it names them.

    value: lists, tuples, dicts with strings as keys, tensors, and what JSON has.
    """
    tensors: list[torch.Tensor] = []

    def plain(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            tensors.append(part.cpu().contiguous().view(-1).view(torch.uint8))
            return {"tensor": [str(part.dtype).removeprefix("torch."), list(part.shape), part.device.type]}
        if isinstance(part, dict):
            return {"entries": {key: plain(entry) for key, entry in part.items()}}
        return [plain(entry) for entry in part] if isinstance(part, list | tuple) else part

    text = json.dumps(plain(value)).encode()
    head = torch.frombuffer(bytearray(len(text).to_bytes(_LENGTH, "little") + text), dtype=torch.uint8)
    return torch.cat([head, *tensors])


def unpack(packed: torch.Tensor) -> Any:
    """The value again; tensors on this process' device of the kind that they were on."""
    length = int.from_bytes(bytes(packed[:_LENGTH].tolist()), "little")
    end = _LENGTH + length

    def restored(part: Any) -> Any:
        nonlocal end
        if isinstance(part, list):
            return [restored(entry) for entry in part]
        if not isinstance(part, dict):
            return part
        if "entries" in part:
            return {key: restored(entry) for key, entry in part["entries"].items()}
        name, shape, device = part["tensor"]
        empty = torch.empty(shape, dtype=getattr(torch, name))
        held = packed[end : end + empty.nbytes]
        end += empty.nbytes
        empty.view(-1).view(torch.uint8).copy_(held)
        return empty.to(device)

    return restored(json.loads(packed[_LENGTH:end].numpy().tobytes()))
