"""Writing parts of a large file at their places, past the page cache where the system lets us.

Nobody reads the output again soon. Through the page cache each of its bytes would be copied to a fresh page, whose
first touch is slow, and would push the checkpoint out, which is still being read; from memory of our own, which is used
again and again, the disk takes it directly.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

# What O_DIRECT asks of places, lengths and addresses, at most; and no page is written in both ways.
_ALIGNMENT = max(4096, mmap.PAGESIZE)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_LEAST_DIRECT = 1 << 20  # bytes; the disk is asked and answers once for each
_BUFFER = 8 << 20  # of each thread


class PlacedFile:
    """A file that is there and has its length. Several threads may write, each parts of its own."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("r+b", buffering=0)
        self._direct = _open_direct(path)
        self._refused = False

    def write(self, start: int, data: memoryview) -> None:
        """Put bytes at `start`. They are on the disk only after `sync`."""
        if self._direct is not None and not self._refused and len(data) >= _LEAST_DIRECT:
            first = -start % _ALIGNMENT
            written = first + self._write_direct(self._direct, start + first, data[first:])
            self._write_buffered(start, data[:first])
            start, data = start + written, data[written:]
        self._write_buffered(start, data)

    def _write_direct(self, to: int, start: int, data: memoryview) -> int:
        """Write from an aligned place on as many bytes as can be. Returns how many."""
        done, end = 0, len(data) - len(data) % _ALIGNMENT
        while done < end:
            piece = _buffer.filled(data[done : min(done + _BUFFER, end)])
            try:
                count = os.pwrite(to, piece, start + done)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._refused = True  # a file system that opens a file so, but will not write it
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
        """Return when all that was written is on the disk. What is of it in the page cache leaves it."""
        os.fsync(self._stream.fileno())
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._stream.close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(path: Path) -> int | None:
    """None where the system or the file system does not know O_DIRECT."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


class _Buffer(threading.local):
    """Page-aligned memory of each thread, for all its files."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def filled(self, data: memoryview) -> memoryview:
        filled = self._memory[: len(data)]
        np.copyto(np.frombuffer(filled, np.uint8), np.frombuffer(data, np.uint8))  # lets other threads run meanwhile
        return filled


_buffer = _Buffer()
