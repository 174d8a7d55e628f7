"""A square matrix in a file without a name, for an H that does not fit the memory budget.

Reads and writes copy. Between calls nothing of the matrix stays in the memory of the process: recently used parts are
in the page cache, which the kernel gives back when memory is short. The file ends with the object, and when the process
is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Python has it on Linux and macOS. Without it, the parts that were used count as memory of the process.
_DROP = getattr(mmap, "MADV_DONTNEED", None)


@dataclass(frozen=True)
class Spill:
    """Where matrices go that do not fit. folder: for their files, by default the system's. rows: in memory at once."""

    folder: Path | None
    rows: int


class SpilledMatrix:
    """A float32 matrix [size, size] of zeros at first. device: of the tensors that `read` returns."""

    def __init__(self, size: int, spill: Spill, device: torch.device) -> None:
        """Raises OSError if the disk is too full for the whole matrix."""
        self.size, self._spill, self._device = size, spill, device
        with tempfile.TemporaryFile(dir=spill.folder) as file:
            if hasattr(os, "posix_fallocate"):  # writing to a mapping of a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, 4 * size * size)
            else:
                file.truncate(4 * size * size)
            self._map = mmap.mmap(file.fileno(), 4 * size * size)
        self._view = torch.frombuffer(self._map, dtype=torch.float32).view(size, size)

    def another(self) -> SpilledMatrix:
        """Zeros of the same size in a file of their own."""
        return SpilledMatrix(self.size, self._spill, self._device)

    def strips(self, multiple: int = 1) -> Iterator[slice]:
        """The rows in strips that may be held in memory at once; all but the last are multiples of `multiple`."""
        step = max(self._spill.rows // multiple, 1) * multiple
        return (slice(first, min(first + step, self.size)) for first in range(0, self.size, step))

    def read(self, rows: slice | torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """A copy of some rows, given as a slice or as indices, and of some columns of them."""
        part = self._view[rows.cpu() if isinstance(rows, torch.Tensor) else rows, columns]
        copied = part.to(self._device, copy=True, memory_format=torch.contiguous_format)
        self._drop()
        return copied

    def write(self, rows: slice, columns: slice, values: torch.Tensor) -> None:
        self._view[rows, columns] = values.cpu()
        self._drop()

    def mirror(self) -> None:
        """Copy the upper triangle to the lower one."""
        for rows in self.strips():
            square = self._view[rows, rows].triu()
            self._view[rows, rows] = square + square.triu(1).T
            for later in self.strips():
                if later.start > rows.start:
                    self._view[later, rows] = self._view[rows, later].T
            self._drop()

    def _drop(self) -> None:
        if _DROP is not None:
            self._map.madvise(_DROP)
