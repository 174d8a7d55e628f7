"""Files that nobody vouches for: opened only if they are regular, read up to a limit, parsed up to a depth.

A pipe, a device, a JSON of a thousand levels or a template of endless loops in a folder from elsewhere must neither
hang the command nor break it. What is wrong is raised as OSError or ValueError; the callers say which file it was.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Far above any real file, far below where Python's own recursion ends.
MAX_DEPTH = 64


def open_regular(path: Path) -> BufferedReader:
    """A regular file or a link to one, for reading. Others are refused before a read could block on them."""
    stream = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError(errno.EINVAL, "it is no regular file")


def read_regular(path: Path, limit: int) -> bytes:
    """All of a regular file. Raises ValueError where it is larger than `limit` bytes, which no size it claims hides."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(limit + 1) if size <= limit else b""
    if content is None:  # of the kernel's, under /proc
        raise OSError(errno.EAGAIN, "it gives nothing to read")
    if size > limit or len(content) > limit:
        raise ValueError(f"it has {max(size, len(content))} bytes; at most {limit} are read")
    return content


def parse_json(text: str, *, unique: bool = False) -> Any:
    """JSON of at most MAX_DEPTH levels. unique: no key may stand twice in an object, where the last would win.

    Raises ValueError for whatever else it is.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"it is nested too deeply, more than {MAX_DEPTH} levels")
    return value


def within_seconds(call: Callable[[], T], seconds: float) -> T:
    """What the call gives. Raises TimeoutError if it takes longer; it is then stopped at its next step in Python."""
    task: Future[T] = Future()

    def work() -> None:
        try:
            task.set_result(call())
        except BaseException as error:  # handed to the caller
            task.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return task.result(seconds)
    except FutureTimeoutError as error:
        raise TimeoutError(f"not done in {seconds} s") from error  # in Python 3.10 they are not the same
    finally:
        if not task.done():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _inside(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands twice")
        found[name] = value
    return found
