"""What `keep` left in a better precision than the recipe's, for the report and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KeptUnit:
    """Linears that share a scheme, which `keep` left in a better one.

    unit: `layer 3 down`. linears: their full names. damage, damage_kept: KL(float || quantized) of the model in nats if
    this unit alone is quantized, as the recipe does it and in the better scheme. extra_bytes: of the stored tensors,
    more than in the recipe's scheme.
    """

    unit: str
    linears: tuple[str, ...]
    scheme: str
    damage: float
    damage_kept: float
    extra_bytes: int


KEPT_COLUMNS = ("unit", "kept as", "damage", "damage as kept", "extra bytes")


def kept_rows(kept: Sequence[KeptUnit]) -> list[list[str]]:
    """Rows with KEPT_COLUMNS, in the order of the choice."""
    return [
        [unit.unit, unit.scheme, f"{unit.damage:.2e}", f"{unit.damage_kept:.2e}", str(unit.extra_bytes)]
        for unit in kept
    ]


def kept_text(kept: Sequence[KeptUnit]) -> str:
    """What was kept, as a sentence with the units by scheme."""
    by_scheme: dict[str, list[str]] = {}
    for unit in kept:
        by_scheme.setdefault(unit.scheme, []).append(unit.unit)
    parts = [
        f"{', '.join(units)} {'in float' if scheme == 'FLOAT' else f'as {scheme}'}"
        for scheme, units in by_scheme.items()
    ]
    return (
        f"`keep` left the units that cost most accuracy for their bytes in a better precision: {'; '.join(parts)}."
        " They were chosen by the damage that each does alone, its KL in nats, measured on some of"
        " the calibration samples."
    )
