"""The background thread: results, exceptions, and no thread left at the end."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import nullcontext

import pytest

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.runtime.background import Background, Backlog, prefetch


def test_result_of_a_call() -> None:
    with Background() as background:
        assert not background.busy
        background.start(divmod, 17, 5)
        assert background.busy
        assert background.result() == (3, 2)
        assert not background.busy


def test_calls_in_sequence() -> None:
    with Background() as background:
        for number in range(5):
            background.start(lambda n: n * n, number)
            assert background.result() == number * number


def test_call_runs_concurrently() -> None:
    barrier = threading.Barrier(2, timeout=10)
    with Background() as background:
        background.start(barrier.wait)
        barrier.wait()  # passes only if both threads arrive
        background.result()


def test_result_raises_the_exception_of_the_call() -> None:
    def fail() -> None:
        raise QuantError("the disk is full", "free some space")

    with Background() as background:
        background.start(fail)
        with pytest.raises(QuantError, match="the disk is full") as caught:
            background.result()
        assert caught.value.hint == "free some space"
        assert not background.busy  # the thread can be reused
        background.start(int, "7")
        assert background.result() == 7


@pytest.mark.parametrize("by_exception", [False, True])
def test_exit_waits_for_the_call(by_exception: bool) -> None:
    """A write in progress completes, whether the block ends normally or by an exception."""
    done: list[str] = []

    def write() -> None:
        time.sleep(0.2)
        done.append("written")

    with pytest.raises(KeyboardInterrupt) if by_exception else nullcontext(), Background() as background:
        background.start(write)
        if by_exception:
            raise KeyboardInterrupt
    assert done == ["written"]


def test_thread_ends_with_the_block() -> None:
    before = threading.active_count()
    with Background() as background:
        background.start(time.sleep, 0)
        background.result()
    assert threading.active_count() == before


@pytest.mark.parametrize("enabled", [False, True])
def test_prefetch_keeps_order_and_computes_one_item_ahead(enabled: bool) -> None:
    computed: list[int] = []

    def square(number: int) -> int:
        computed.append(number)
        return number * number

    for count in (0, 1, 4):
        computed.clear()
        results = []
        with prefetch(square, range(count), enabled) as squares:
            for received, result in enumerate(squares, 1):
                results.append(result)
                assert len(computed) <= min(count, received + enabled)
        assert results == [number * number for number in range(count)]
        assert computed == list(range(count))


def test_prefetch_computes_the_next_item_concurrently() -> None:
    barrier = threading.Barrier(2, timeout=10)
    with prefetch(lambda number: number and barrier.wait(), range(2)) as results:
        assert next(results) == 0
        barrier.wait()  # passes only if both threads arrive
        next(results)


def test_prefetch_keeps_no_reference_to_results() -> None:
    class Weight:
        pass

    with prefetch(lambda number: Weight(), range(3)) as weights:
        weight = next(weights)
        reference = weakref.ref(weight)
        del weight
        assert reference() is None


def test_prefetch_raises_an_exception_at_its_item() -> None:
    def fail(number: int) -> int:
        if number:
            raise QuantError("cannot be read")
        return number

    with prefetch(fail, range(2)) as results:
        assert next(results) == 0
        with pytest.raises(QuantError, match="cannot be read"):
            next(results)


def test_backlog_waits_for_the_writer() -> None:
    """A limit of 15: the second ten wait until the first are written. Without a writer nothing waits."""
    backlog, written = Backlog(15), threading.Event()
    backlog.add(20)
    backlog.remove(10)

    def write() -> None:
        with backlog.writing():
            started.set()
            written.wait(10)
            backlog.remove(10)

    started = threading.Event()
    with Background() as background:
        background.start(write)
        assert started.wait(10)
        threading.Timer(0.1, written.set).start()
        backlog.add(10)
        assert written.is_set()
        background.result()


def test_backlog_does_not_wait_for_a_writer_that_failed() -> None:
    backlog = Backlog(15)
    started, fail = threading.Event(), threading.Event()

    def write() -> None:
        with backlog.writing():
            started.set()
            fail.wait(10)
            raise OSError("the disk is full")

    with Background() as background:
        backlog.add(10)
        background.start(write)
        assert started.wait(10)
        threading.Timer(0.1, fail.set).start()
        backlog.add(10)
        with pytest.raises(OSError, match="full"):
            background.result()
