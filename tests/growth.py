"""Counts of operations, to test that the cost of a sample does not grow with the number of samples.

Unlike times, counts are the same on every machine.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def python_calls(function: Callable[[], object]) -> int:
    """The number of calls of Python functions and built-ins."""
    profile = cProfile.Profile()
    profile.runcall(function)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


class _Elements(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def elements_computed(function: Callable[[], object]) -> int:
    """The number of elements in the results of all torch operations."""
    with _Elements() as elements:
        function()
    return elements.count
