"""One background thread next to the main thread, to read the next layer or write the last one during compute.

Backlog limits how much the main thread may compute ahead of the writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Background:
    """A thread that runs one call at a time. Leaving the `with` block waits for the call.

    `result` re-raises the exception of the call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether a call was started whose result has not been taken yet."""
        return self._running is not None

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        assert self._running is None
        self._running = self._thread.submit(call, *arguments)

    def result(self) -> Any:
        """Wait for the call and return its result, or raise its exception."""
        assert self._running is not None
        running, self._running = self._running, None
        return running.result()

    def raise_if_failed(self) -> None:
        """Raise the exception of the call if it has already failed. Does not wait."""
        if self._running is not None and self._running.done():
            self._running.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)


class Backlog:
    """Bytes of results in memory, computed in one thread and written in another. The limit holds while one writes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._writing = False
        self._changed = Condition()

    def add(self, nbytes: int) -> None:
        """Note new results. Waits while too much is held, unless nothing is being written."""
        with self._changed:
            self._held += nbytes
            self._changed.wait_for(lambda: self._held <= self._limit or not self._writing)

    def remove(self, nbytes: int) -> None:
        """Note results that are written and freed."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A thread writes; by the end it has removed what it wrote, or failed."""
        with self._changed:
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


@contextmanager
def prefetch(call: Callable[[Item], Result], items: Sequence[Item], enabled: bool = True) -> Iterator[Iterator[Result]]:
    """Iterate over call(item) in order. If enabled, the next result is computed while the caller uses the current one.

    No reference to a yielded result is kept. Leaving the `with` block waits for the thread.
    """
    with Background() as thread:

        def results() -> Iterator[Result]:
            for number, item in enumerate(items):
                result = [thread.result() if thread.busy else call(item)]
                if enabled and number + 1 < len(items):
                    thread.start(call, items[number + 1])
                yield result.pop()  # keeps no reference here

        yield results()
