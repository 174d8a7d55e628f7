"""Choose the scheme of each unit of Linears: a multiple-choice knapsack problem. No names, no files.

    minimize  Σ_u damage(u, k_u)   subject to   Σ_u size(u, k_u) <= budget        (k_u: the option of unit u)

Solved by dynamic programming over sizes (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.5): best[b]
is the least damage of the units so far in b grains of bytes. The bytes of an option above the smallest option of its
unit are rounded up to grains, so that a result always fits. With a grain of one byte the result is exact; otherwise it
is at least as good as every choice that leaves one grain per unit free. `bound` limits the distance from the optimum:
it is the damage of the linear relaxation (a unit may take a fraction of an option), a lower bound for every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_GRAINS = 1 << 16


@dataclass(frozen=True)
class Option:
    """One possible scheme of a unit: its bytes, and the damage to the model."""

    size: int
    damage: float


Unit = Sequence[Option]


@dataclass(frozen=True)
class Allocation:
    """The option of each unit, and their total bytes and damage. bound: no choice of this size has less damage."""

    choices: tuple[int, ...]
    size: int
    damage: float
    bound: float


def smallest_size(units: Sequence[Unit]) -> int:
    return sum(min(option.size for option in unit) for unit in units)


def minimize_damage(units: Sequence[Unit], budget: int) -> Allocation:
    """The least-damage allocation within `budget` bytes. Raises ValueError if the smallest options do not fit."""
    spare = budget - smallest_size(units)
    if spare < 0:
        raise ValueError(f"the budget is {budget} bytes; the smallest choice takes {budget - spare}")
    spare = min(spare, _largest_spare(units))
    table = _Table(units, grain := _grain(spare), spare // grain)
    return _allocation(units, _improve(units, table.choices(table.columns), budget, _size, _damage), budget)


def minimize_size(units: Sequence[Unit], damage: float) -> Allocation | None:
    """The allocation of the fewest bytes with at most this damage, or None if even the best options have more."""
    grain = _grain(spare := _largest_spare(units))
    table = _Table(units, grain, spare // grain + len(units))  # each unit rounds up by at most one grain
    sufficient = torch.nonzero(table.best <= damage).flatten()
    if not len(sufficient):
        return None
    choices = _improve(units, table.choices(int(sufficient[0])), damage, _damage, _size)
    return _allocation(units, choices, sum(unit[k].size for unit, k in zip(units, choices, strict=True)))


class _Table:
    """best[b] for b = 0 .. columns, and the option of each unit that attains it. Bytes are rounded up to grains."""

    def __init__(self, units: Sequence[Unit], grain: int, columns: int) -> None:
        self.columns = columns
        self.best = torch.zeros(self.columns + 1, dtype=torch.float64)
        self._extra = [_grains(unit, grain) for unit in units]
        self._taken = torch.zeros((len(units), self.columns + 1), dtype=torch.int8)
        for number, (unit, extra) in enumerate(zip(units, self._extra, strict=True)):
            least = torch.full_like(self.best, torch.inf)
            for k in sorted(range(len(unit)), key=lambda k: extra[k]):  # on a tie the smaller option wins
                if extra[k] > self.columns:
                    break
                shifted = least.clone().fill_(torch.inf)
                shifted[extra[k] :] = self.best[: self.columns + 1 - extra[k]] + unit[k].damage
                self._taken[number][shifted < least] = k
                least = torch.minimum(shifted, least)
            self.best = least

    def choices(self, column: int) -> list[int]:
        """The options that attain best[column]."""
        choices = []
        for taken, extra in zip(reversed(self._taken), reversed(self._extra), strict=True):
            k = int(taken[column])
            choices.append(k)
            column -= extra[k]
        return choices[::-1]


def _grain(spare: int) -> int:
    return max(1, -(-spare // _GRAINS))


def _grains(unit: Unit, grain: int) -> list[int]:
    least = min(option.size for option in unit)
    return [-(-(option.size - least) // grain) for option in unit]


def _largest_spare(units: Sequence[Unit]) -> int:
    return sum(max(option.size for option in unit) for unit in units) - smallest_size(units)


def _improve(
    units: Sequence[Unit],
    choices: list[int],
    limit: float,
    cost: Callable[[Option], float],
    objective: Callable[[Option], float],
) -> list[int]:
    """Spend what rounding up left unused of `limit`: repeatedly make the change that lowers `objective` most."""
    while True:
        unused = limit - sum(cost(unit[k]) for unit, k in zip(units, choices, strict=True))
        changes = [
            (objective(unit[now]) - objective(option), number, k)
            for number, (unit, now) in enumerate(zip(units, choices, strict=True))
            for k, option in enumerate(unit)
            if objective(option) < objective(unit[now]) and cost(option) - cost(unit[now]) <= unused
        ]
        if not changes:
            return choices
        _, number, k = max(changes)
        choices[number] = k


def _size(option: Option) -> float:
    return option.size


def _damage(option: Option) -> float:
    return option.damage


def _allocation(units: Sequence[Unit], choices: Sequence[int], budget: int) -> Allocation:
    chosen = [unit[k] for unit, k in zip(units, choices, strict=True)]
    size, damage = sum(option.size for option in chosen), sum(option.damage for option in chosen)
    return Allocation(tuple(choices), size, damage, damage_bound(units, budget))


def damage_bound(units: Sequence[Unit], budget: int) -> float:
    """The least damage within `budget` bytes if a unit may take fractions of its options (Dantzig's bound).

    Takes the steps along the lower convex hulls of all units, the steepest first and the last one in part.
    """
    damage, steps = 0.0, []
    for unit in units:
        hull = _hull(unit)
        damage += hull[0].damage
        steps += [(b.size - a.size, a.damage - b.damage) for a, b in pairwise(hull)]
    left = float(budget - smallest_size(units))
    for size, gain in sorted(steps, key=lambda step: -step[1] / step[0]):
        fraction = min(1.0, left / size)
        damage -= gain * fraction
        left -= size * fraction
        if left <= 0:
            break
    return max(damage, 0.0)


def _hull(unit: Unit) -> list[Option]:
    """The options on the lower convex hull of damage over size, by increasing size; the slope decreases each step."""
    hull: list[Option] = []
    for option in sorted(unit, key=lambda option: (option.size, option.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.damage - b.damage) / (b.size - a.size)
