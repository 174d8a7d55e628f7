"""Reading of untrusted files: only regular files are opened, and size, JSON depth and run time are limited.

A downloaded folder may contain a pipe, a device, JSON with thousands of levels or a template that never ends. These
must not hang or crash the command. The functions raise OSError, ValueError or TimeoutError; the callers add the path.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Real files need far fewer levels; Python's recursion limit is far higher.
MAX_JSON_DEPTH = 64

# Objects and lists of one JSON text. Each takes about 90 bytes, even an empty one of two characters; the header of a
# checkpoint with 100,000 tensors has 300,000.
MAX_JSON_CONTAINERS = 2_000_000


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises OSError for pipes, devices and folders, without blocking on them.
    """
    stream = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError(errno.EINVAL, "not a regular file")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a complete regular file. Raises ValueError if it has more than `limit` bytes, whatever size stat reports."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(limit + 1) if size <= limit else b""
    if content is None:  # a non-blocking file under /proc without data
        raise OSError(errno.EAGAIN, "no data to read")
    if size > limit or len(content) > limit:
        raise ValueError(f"file has {max(size, len(content))} bytes; the limit is {limit}")
    return content


def parse_json(text: str, *, unique: bool = False) -> Any:
    """Parse JSON of at most MAX_JSON_DEPTH levels and MAX_JSON_CONTAINERS objects and lists.

    Raises ValueError if the text is invalid or exceeds a limit. Brackets within strings count too.
    unique: also raise ValueError if a key appears twice in an object. Otherwise the last one wins.
    """
    if (count := text.count("{") + text.count("[")) > MAX_JSON_CONTAINERS:
        raise ValueError(f"has {count} objects and lists; the limit is {MAX_JSON_CONTAINERS}")
    try:
        value = json.loads(text, object_pairs_hook=_dict_of_unique_keys if unique else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _children(outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"nested too deeply (more than {MAX_JSON_DEPTH} levels)")
    return value


def call_with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Return the result of `call`, which runs in a thread. Raises TimeoutError if it takes longer than `seconds`.

    After a timeout, SystemExit is raised in the thread at its next Python instruction.
    """
    task: Future[T] = Future()

    def run() -> None:
        try:
            task.set_result(call())
        except BaseException as error:  # re-raised in the caller's thread
            task.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return task.result(seconds)
    except FutureTimeoutError as error:
        raise TimeoutError(f"not finished after {seconds} s") from error  # two distinct classes in Python 3.10
    finally:
        if not task.done():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def _children(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return result
