"""The knapsack: compared with all choices, at least its bound, and never above the budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.analysis import allocation
from msmodelslim_omni.analysis.allocation import (
    Option,
    damage_bound,
    minimize_damage,
    minimize_size,
    smallest_size,
)

Units = list[list[Option]]

option = st.builds(Option, st.integers(0, 40), st.integers(0, 30).map(float))
some_units = st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=5)


def every_choice(units: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """(bytes, damage) of every possible choice."""
    return [(sum(o.size for o in c), sum(o.damage for o in c)) for c in itertools.product(*units)]


@settings(max_examples=60, deadline=None)
@given(some_units, st.integers(0, 120))
def test_minimize_damage_finds_the_best_of_all_choices(units: Units, spare: int) -> None:
    budget = smallest_size(units) + spare
    result = minimize_damage(units, budget)
    assert result.size <= budget
    assert result.damage == min(damage for size, damage in every_choice(units) if size <= budget)
    assert result.bound <= result.damage + 1e-9
    chosen = [unit[k] for unit, k in zip(units, result.choices, strict=True)]
    assert (result.size, result.damage) == (sum(o.size for o in chosen), sum(o.damage for o in chosen))


@settings(max_examples=60, deadline=None)
@given(some_units, st.integers(0, 100).map(float))
def test_minimize_size_finds_the_best_of_all_choices(units: Units, damage: float) -> None:
    fitting = [size for size, own in every_choice(units) if own <= damage]
    result = minimize_size(units, damage)
    assert (result.size if result else None) == (min(fitting) if fitting else None)
    assert result is None or result.damage <= damage


@settings(max_examples=40, deadline=None)
@given(some_units, st.integers(0, 120), st.integers(1, 20))
def test_coarse_grains_keep_the_guarantee(units: Units, spare: int, grains: int) -> None:
    """The result fits and is at least as good as every choice that leaves one grain per unit free."""
    budget, exact = smallest_size(units) + spare, allocation._GRAINS
    try:
        allocation._GRAINS = grains
        best, small = minimize_damage(units, budget), minimize_size(units, 20.0)
    finally:
        allocation._GRAINS = exact
    grain = -(-spare // grains) if spare else 1
    assert best.size <= budget
    left_free = [damage for size, damage in every_choice(units) if size <= budget - grain * len(units)]
    assert not left_free or best.damage <= min(left_free)
    fitting = [size for size, damage in every_choice(units) if damage <= 20.0]
    assert (small is None) == (not fitting)
    assert small is None or (small.damage <= 20.0 and small.size >= min(fitting))


def test_example_by_hand() -> None:
    """Two steps cost 10 each and only one fits: the step that reduces the damage by 5, not the one by 4."""
    units = [[Option(10, 6.0), Option(20, 1.0)], [Option(10, 5.0), Option(20, 1.0), Option(40, 0.0)]]
    best = minimize_damage(units, 30)
    assert (best.choices, best.size, best.damage) == ((1, 0), 30, 6.0)
    assert damage_bound(units, 30) == 6.0 and damage_bound(units, 35) == 4.0  # half of the second step
    assert minimize_damage(units, 35).choices == (1, 0)
    assert minimize_damage(units, 1000).choices == (1, 2)
    small = minimize_size(units, 2.0)
    assert small is not None and (small.choices, small.size) == ((1, 1), 40)
    assert minimize_size(units, 0.5) is None
    with pytest.raises(ValueError, match="the smallest choice takes 20"):
        minimize_damage(units, 19)


def test_damage_of_144_units_is_within_one_percent_of_the_bound() -> None:
    units = [
        [Option(s // 2, 1.0 + i % 17), Option(s, 0.01 * (1 + i % 5)), Option(2 * s, 0.0)]
        for i in range(144)
        for s in [(5 << 20, 4 << 20, 45 << 20, 22 << 20)[i % 4]]
    ]
    budget = smallest_size(units) * 3 // 2
    best = minimize_damage(units, budget)
    assert best.size <= budget and best.damage <= 1.01 * best.bound
    small = minimize_size(units, best.damage)
    assert small is not None and small.size <= best.size
