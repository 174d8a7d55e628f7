"""Positional writes to a large file that bypass the page cache where the system supports it.

The output is not read again soon. Through the page cache, every byte is copied to a fresh page, whose first touch is
slow, and the new pages evict the checkpoint, which is still being read. With O_DIRECT the disk reads the data from a
reusable buffer.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

# The strictest alignment that O_DIRECT requires of offsets, lengths and addresses. A multiple of the page size keeps
# direct and buffered writes on separate pages.
_ALIGNMENT = max(4096, mmap.PAGESIZE)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_MIN_DIRECT_BYTES = 1 << 20  # each direct write waits for the disk, so smaller ones are buffered
_BUFFER_BYTES = 8 << 20  # per thread


class DirectFile:
    """An existing file of final length, open for writes at given offsets.

    Several threads may write at once if their ranges do not overlap.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("r+b", buffering=0)
        self._direct = _open_direct(path)
        self._refused = False

    def write(self, start: int, data: memoryview) -> None:
        """Write `data` at offset `start`. Only `sync` guarantees that it is on the disk."""
        if self._direct is not None and not self._refused and len(data) >= _MIN_DIRECT_BYTES:
            first = -start % _ALIGNMENT
            written = first + self._write_direct(self._direct, start + first, data[first:])
            self._write_buffered(start, data[:first])
            start, data = start + written, data[written:]
        self._write_buffered(start, data)

    def _write_direct(self, descriptor: int, start: int, data: memoryview) -> int:
        """Write as much as possible from the aligned offset `start`. Returns the number of bytes written."""
        done, end = 0, len(data) - len(data) % _ALIGNMENT
        while done < end:
            piece = _buffer.copy_of(data[done : min(done + _BUFFER_BYTES, end)])
            try:
                count = os.pwrite(descriptor, piece, start + done)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._refused = True  # some file systems accept O_DIRECT in open() but not in write()
                return done
            done += count - count % _ALIGNMENT
            if count < len(piece):
                return done
        return done

    def _write_buffered(self, start: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done:], start + done)

    def sync(self) -> None:
        """Wait until all written data is on the disk, then drop the file's pages from the page cache."""
        os.fsync(self._stream.fileno())
        if hasattr(os, "posix_fadvise"):  # macOS does not have it
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._stream.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(path: Path) -> int | None:
    """A descriptor opened with O_DIRECT, or None if the system or the file system does not support it."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


class _Buffer(threading.local):
    """One page-aligned buffer per thread, shared by all files."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def copy_of(self, data: memoryview) -> memoryview:
        """Copy `data` into the buffer. The result is valid until the next call in this thread."""
        copy = self._memory[: len(data)]
        np.copyto(np.frombuffer(copy, np.uint8), np.frombuffer(data, np.uint8))  # numpy releases the GIL here
        return copy


_buffer = _Buffer()
