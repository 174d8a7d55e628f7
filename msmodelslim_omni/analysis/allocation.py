"""Which unit of Linears gets which scheme: a knapsack with one choice for each unit. Pure; no names, no files.

    minimise  Σ_u damage(u, k_u)   subject to   Σ_u size(u, k_u) <= room          (k_u: the option of unit u)

Solved by dynamic programming over sizes (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.5): best[b]
is the least damage of the units so far in b grains of bytes. What an option takes beyond the unit's smallest is rounded
up to grains, so that an answer always fits. With a grain of one byte it is exact; else no choice is better that leaves
a grain for each unit free. How far it can be from the best is also told: `bound` is the damage of the linear relaxation
(a unit may take a share of an option), which no choice goes below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_GRAINS = 1 << 16


@dataclass(frozen=True)
class Option:
    """What a unit may become: its bytes, and what that does to the model."""

    size: int
    damage: float


Unit = Sequence[Option]


@dataclass(frozen=True)
class Allocation:
    """The option of each unit; their bytes and damage in all. bound: no choice of that size has less damage."""

    choices: tuple[int, ...]
    size: int
    damage: float
    bound: float


def smallest_size(units: Sequence[Unit]) -> int:
    return sum(min(option.size for option in unit) for unit in units)


def minimize_damage(units: Sequence[Unit], room: int) -> Allocation:
    """The least damage within `room` bytes. Raises ValueError where not even the smallest options fit."""
    spare = room - smallest_size(units)
    if spare < 0:
        raise ValueError(f"{room} bytes; the smallest choice takes {room - spare}")
    spare = min(spare, _largest_spare(units))
    table = _Table(units, grain := _grain(spare), spare // grain)
    return _allocation(units, _improved(units, table.choices(table.columns), room, _size, _damage), room)


def minimize_size(units: Sequence[Unit], damage: float) -> Allocation | None:
    """The fewest bytes with at most this damage; None where the best options already do more."""
    grain = _grain(spare := _largest_spare(units))
    table = _Table(units, grain, spare // grain + len(units))  # so much is rounded up at the most
    enough = torch.nonzero(table.best <= damage).flatten()
    if not len(enough):
        return None
    choices = _improved(units, table.choices(int(enough[0])), damage, _damage, _size)
    return _allocation(units, choices, sum(unit[k].size for unit, k in zip(units, choices, strict=True)))


class _Table:
    """best[b] for b = 0 .. columns, and for each unit the option that attains it. Bytes are rounded up to grains."""

    def __init__(self, units: Sequence[Unit], grain: int, columns: int) -> None:
        self.columns = columns
        self.best = torch.zeros(self.columns + 1, dtype=torch.float64)
        self._extra = [_grains(unit, grain) for unit in units]
        self._taken = torch.zeros((len(units), self.columns + 1), dtype=torch.int8)
        for number, (unit, extra) in enumerate(zip(units, self._extra, strict=True)):
            least = torch.full_like(self.best, torch.inf)
            for k in sorted(range(len(unit)), key=lambda k: extra[k]):  # of equals the smaller one stays
                if extra[k] > self.columns:
                    break
                shifted = least.clone().fill_(torch.inf)
                shifted[extra[k] :] = self.best[: self.columns + 1 - extra[k]] + unit[k].damage
                self._taken[number][shifted < least] = k
                least = torch.minimum(shifted, least)
            self.best = least

    def choices(self, column: int) -> list[int]:
        """The options that attain best[column]."""
        found = []
        for taken, extra in zip(reversed(self._taken), reversed(self._extra), strict=True):
            k = int(taken[column])
            found.append(k)
            column -= extra[k]
        return found[::-1]


def _grain(spare: int) -> int:
    return max(1, -(-spare // _GRAINS))


def _grains(unit: Unit, grain: int) -> list[int]:
    least = min(option.size for option in unit)
    return [-(-(option.size - least) // grain) for option in unit]


def _largest_spare(units: Sequence[Unit]) -> int:
    return sum(max(option.size for option in unit) for unit in units) - smallest_size(units)


def _improved(
    units: Sequence[Unit],
    choices: list[int],
    limit: float,
    cost: Callable[[Option], float],
    worth: Callable[[Option], float],
) -> list[int]:
    """What rounding up has left free of `limit`, spent on the change that lowers `worth` most, while there is one."""
    while True:
        left = limit - sum(cost(unit[k]) for unit, k in zip(units, choices, strict=True))
        changes = [
            (worth(unit[now]) - worth(option), number, k)
            for number, (unit, now) in enumerate(zip(units, choices, strict=True))
            for k, option in enumerate(unit)
            if worth(option) < worth(unit[now]) and cost(option) - cost(unit[now]) <= left
        ]
        if not changes:
            return choices
        _, number, k = max(changes)
        choices[number] = k


def _size(option: Option) -> float:
    return option.size


def _damage(option: Option) -> float:
    return option.damage


def _allocation(units: Sequence[Unit], choices: Sequence[int], room: int) -> Allocation:
    chosen = [unit[k] for unit, k in zip(units, choices, strict=True)]
    size, damage = sum(option.size for option in chosen), sum(option.damage for option in chosen)
    return Allocation(tuple(choices), size, damage, damage_bound(units, room))


def damage_bound(units: Sequence[Unit], room: int) -> float:
    """The least damage within `room` if a unit could take shares of its options: steps along its lower convex hull,
    the steepest of all units first, the last one in part (Dantzig's bound).
    """
    damage, steps = 0.0, []
    for unit in units:
        hull = _hull(unit)
        damage += hull[0].damage
        steps += [(b.size - a.size, a.damage - b.damage) for a, b in pairwise(hull)]
    left = float(room - smallest_size(units))
    for size, gain in sorted(steps, key=lambda step: -step[1] / step[0]):
        share = min(1.0, left / size)
        damage -= gain * share
        left -= size * share
        if left <= 0:
            break
    return max(damage, 0.0)


def _hull(unit: Unit) -> list[Option]:
    """The options on the lower convex hull of damage over size, by rising size; each step gains less than the last."""
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
