"""The thread beside the main one: results, faults, and that nothing is left running."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import nullcontext

import pytest

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.runtime.background import Background, one_ahead


def test_result_of_a_call() -> None:
    with Background() as background:
        assert not background.busy
        background.start(divmod, 17, 5)
        assert background.busy
        assert background.result() == (3, 2)
        assert not background.busy


def test_one_call_after_the_other() -> None:
    with Background() as background:
        for number in range(5):
            background.start(lambda n: n * n, number)
            assert background.result() == number * number


def test_call_runs_beside_the_main_thread() -> None:
    meeting = threading.Barrier(2, timeout=10)
    with Background() as background:
        background.start(meeting.wait)
        meeting.wait()  # neither would come here alone
        background.result()


def test_what_a_call_raises_is_raised_by_result() -> None:
    def fail() -> None:
        raise QuantError("the disk is full", "free some space")

    with Background() as background:
        background.start(fail)
        with pytest.raises(QuantError, match="the disk is full") as caught:
            background.result()
        assert caught.value.hint == "free some space"
        assert not background.busy  # and it can be used again
        background.start(int, "7")
        assert background.result() == 7


@pytest.mark.parametrize("by_fault", [False, True])
def test_leaving_the_block_waits_for_the_call(by_fault: bool) -> None:
    """What is being written is whole afterwards, however the block is left."""
    done: list[str] = []

    def write() -> None:
        time.sleep(0.2)
        done.append("written")

    with pytest.raises(KeyboardInterrupt) if by_fault else nullcontext(), Background() as background:
        background.start(write)
        if by_fault:
            raise KeyboardInterrupt
    assert done == ["written"]


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with Background() as background:
        background.start(time.sleep, 0)
        background.result()
    assert threading.active_count() == before


@pytest.mark.parametrize("ahead", [False, True])
def test_one_ahead_gives_each_in_order_and_makes_no_more_than_the_next(ahead: bool) -> None:
    made: list[int] = []

    def square(number: int) -> int:
        made.append(number)
        return number * number

    for count in (0, 1, 4):
        made.clear()
        found = []
        with one_ahead(square, range(count), ahead) as squares:
            for done, each in enumerate(squares, 1):
                found.append(each)
                assert len(made) <= min(count, done + ahead)
        assert found == [number * number for number in range(count)]
        assert made == list(range(count))


def test_one_ahead_makes_the_next_meanwhile() -> None:
    meeting = threading.Barrier(2, timeout=10)
    with one_ahead(lambda number: number and meeting.wait(), range(2)) as results:
        assert next(results) == 0
        meeting.wait()  # neither would come here alone
        next(results)


def test_one_ahead_holds_nothing_that_it_gave() -> None:
    class Weight:
        pass

    with one_ahead(lambda number: Weight(), range(3)) as weights:
        weight = next(weights)
        seen = weakref.ref(weight)
        del weight
        assert seen() is None


def test_one_ahead_raises_what_the_call_raises_in_its_turn() -> None:
    def fail(number: int) -> int:
        if number:
            raise QuantError("cannot be read")
        return number

    with one_ahead(fail, range(2)) as results:
        assert next(results) == 0
        with pytest.raises(QuantError, match="cannot be read"):
            next(results)
