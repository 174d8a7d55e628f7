"""The knapsack: against every choice there is, within its bound, and never above the room."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.analysis import allocation
from msmodelslim_omni.analysis.allocation import (
    Option,
    minimize_damage,
    minimize_size,
    damage_bound,
    smallest_size,
)

Units = list[list[Option]]

option = st.builds(Option, st.integers(0, 40), st.integers(0, 30).map(float))
some_units = st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=5)


def every_choice(units: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """(bytes, damage) of each."""
    return [(sum(o.size for o in c), sum(o.damage for o in c)) for c in itertools.product(*units)]


@settings(max_examples=60, deadline=None)
@given(some_units, st.integers(0, 120))
def test_least_damage_is_that_of_all_choices(units: Units, spare: int) -> None:
    room = smallest_size(units) + spare
    found = minimize_damage(units, room)
    assert found.size <= room
    assert found.damage == min(damage for size, damage in every_choice(units) if size <= room)
    assert found.bound <= found.damage + 1e-9
    chosen = [unit[k] for unit, k in zip(units, found.choices, strict=True)]
    assert (found.size, found.damage) == (sum(o.size for o in chosen), sum(o.damage for o in chosen))


@settings(max_examples=60, deadline=None)
@given(some_units, st.integers(0, 100).map(float))
def test_least_size_is_that_of_all_choices(units: Units, damage: float) -> None:
    fitting = [size for size, own in every_choice(units) if own <= damage]
    found = minimize_size(units, damage)
    assert (found.size if found else None) == (min(fitting) if fitting else None)
    assert found is None or found.damage <= damage


@settings(max_examples=40, deadline=None)
@given(some_units, st.integers(0, 120), st.integers(1, 20))
def test_coarse_grains_keep_what_is_promised(units: Units, spare: int, grains: int) -> None:
    """An answer fits, and no choice is better that leaves a grain for each unit free."""
    room, exact = smallest_size(units) + spare, allocation._GRAINS
    try:
        allocation._GRAINS = grains
        found, small = minimize_damage(units, room), minimize_size(units, 20.0)
    finally:
        allocation._GRAINS = exact
    grain = -(-spare // grains) if spare else 1
    assert found.size <= room
    left_free = [damage for size, damage in every_choice(units) if size <= room - grain * len(units)]
    assert not left_free or found.damage <= min(left_free)
    fitting = [size for size, damage in every_choice(units) if damage <= 20.0]
    assert (small is None) == (not fitting)
    assert small is None or (small.damage <= 20.0 and small.size >= min(fitting))


def test_a_case_by_hand() -> None:
    """Two steps cost 10 each and there is room for one: the one that mends 5, not the one that mends 4."""
    units = [[Option(10, 6.0), Option(20, 1.0)], [Option(10, 5.0), Option(20, 1.0), Option(40, 0.0)]]
    found = minimize_damage(units, 30)
    assert (found.choices, found.size, found.damage) == ((1, 0), 30, 6.0)
    assert damage_bound(units, 30) == 6.0 and damage_bound(units, 35) == 4.0  # half of the step that mends 4
    assert minimize_damage(units, 35).choices == (1, 0)
    assert minimize_damage(units, 1000).choices == (1, 2)
    found = minimize_size(units, 2.0)
    assert found is not None and (found.choices, found.size) == ((1, 1), 40)
    assert minimize_size(units, 0.5) is None
    with pytest.raises(ValueError, match="the smallest choice takes 20"):
        minimize_damage(units, 19)


def test_a_model_of_144_units_is_within_a_hundredth_of_the_bound() -> None:
    units = [
        [Option(s // 2, 1.0 + i % 17), Option(s, 0.01 * (1 + i % 5)), Option(2 * s, 0.0)]
        for i in range(144)
        for s in [(5 << 20, 4 << 20, 45 << 20, 22 << 20)[i % 4]]
    ]
    room = smallest_size(units) * 3 // 2
    found = minimize_damage(units, room)
    assert found.size <= room and found.damage <= 1.01 * found.bound
    back = minimize_size(units, found.damage)
    assert back is not None and back.size <= found.size
