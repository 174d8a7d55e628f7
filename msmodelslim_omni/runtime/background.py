"""One call at a time on a thread beside the main one: the next layer is read, the last one written, meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


class Background:
    """A thread for one call. What the call raises is raised by `result`; leaving the block waits for its end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether a result is still to be taken."""
        return self._running is not None

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        assert self._running is None
        self._running = self._thread.submit(call, *arguments)

    def result(self) -> Any:
        """Wait for the call."""
        assert self._running is not None
        running, self._running = self._running, None
        return running.result()

    def raise_if_failed(self) -> None:
        """Raise what the call has raised so far; do not wait for it."""
        if self._running is not None and self._running.done():
            self._running.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)


@contextmanager
def one_ahead(call: Callable[[Item], Found], items: Sequence[Item], ahead: bool = True) -> Iterator[Iterator[Found]]:
    """What the call makes of each item, in order; with `ahead` the next is made while whoever asks works on one.

    Nothing that was given is held here. Leaving the block waits for the thread.
    """
    with Background() as thread:

        def results() -> Iterator[Found]:
            for number, item in enumerate(items):
                found = [thread.result() if thread.busy else call(item)]
                if ahead and number + 1 < len(items):
                    thread.start(call, items[number + 1])
                yield found.pop()

        yield results()
