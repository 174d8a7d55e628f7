"""The result of an analysis as one HTML page: where the damage is, what to exclude, and the rounds of a search.

Needs the extra `report`, like the page of a quantization, whose parts it uses.
"""

from __future__ import annotations

import math

from ..report import Article, Chart, Section, Table, Tile, heat_map, human_bytes, render_page
from .mixed_recipe import LABELS, W4
from .result import (
    Analysis,
    exclude_text,
    measured_schemes,
    round_columns,
    round_rows,
    total_damage,
    unit_columns,
    unit_rows,
    units_with_half_of_damage,
)
from .sensitivity import UnitSensitivity

HTML_NAME = "analysis.html"
_WORST_LINEARS = 10


def as_html(analysis: Analysis) -> str:
    """Render the page."""
    half = units_with_half_of_damage(analysis.units)
    tokens = ", ".join(f"{name} {count}" for name, count in analysis.tokens_by_modality.items())
    whole = "these units" if analysis.patterns else "everything"
    tiles = (
        Tile("most sensitive unit", analysis.units[0].name if analysis.units else "none", _share(analysis, 1)),
        Tile("half of the damage", f"{len(half)} of {len(analysis.units)} units", f"of quantizing {whole} to int4"),
        Tile("samples", str(analysis.samples), f"tokens: {tokens}"),
        *_choice_tiles(analysis),
    )
    sections = [_damage(analysis), _worst(analysis), _exclude(analysis)]
    if analysis.choice is not None:
        sections.insert(0, _rounds(analysis))
    if analysis.warnings:
        sections.append(Section("Warnings", notes=analysis.warnings))
    text = (
        "How much the decoder's Linears suffer if they are quantized. A unit is the Linears that read one input and"
        " share a scheme. Damage: KL(float || quantized) of the whole model in nats if only this unit is quantized."
        f" {analysis.scope}"
    )
    return render_page([Article(f"Sensitivity: {analysis.model_type}", text, tiles, tuple(sections))])


def _share(analysis: Analysis, count: int) -> str:
    """`27.1% of the damage`: the share of the most sensitive units."""
    whole = total_damage(analysis.units, W4.name)
    part = total_damage(analysis.units[:count], W4.name)
    return f"{part / whole:.1%} of the damage" if whole else "no damage"


def _choice_tiles(analysis: Analysis) -> tuple[Tile, ...]:
    if analysis.choice is None:
        return ()
    trial = analysis.choice.rounds[analysis.choice.chosen - 1]
    kl = trial.measured_kl
    return (
        Tile("chosen recipe", human_bytes(trial.measured_bytes), trial.name),
        Tile("KL, measured", f"{kl.value:.5f}", f"{kl.low:.5f} to {kl.high:.5f} on held-out samples"),
    )


def _damage(analysis: Analysis) -> Section:
    layers = sorted({unit.layer for unit in analysis.units})
    groups = list(dict.fromkeys(unit.group for unit in sorted(analysis.units, key=lambda unit: unit.layer)))
    units = {(unit.layer, unit.group): unit for unit in analysis.units}
    grid = [[units.get((layer, group)) for group in groups] for layer in layers]
    charts = []
    for scheme in measured_schemes(analysis.units):
        name = LABELS[scheme]
        values = [[_logarithm(unit, scheme) for unit in row] for row in grid]
        hints = [["" if u is None else f"{u.name}: {u.damage[scheme]:.2e}" for u in row] for row in grid]
        texts = [["none" if value is None else f"{value:.1f}" for value in row] for row in values]
        rows_of_map = [str(layer) for layer in layers]
        charts.append(
            Chart(
                f"Damage by layer and unit, {name}",
                heat_map(f"damage-{scheme}", rows_of_map, groups, values, hints, texts, "damage, power of ten"),
                "Brighter units lose more. -3 is a KL of a thousandth of a nat.",
                f"the most sensitive unit is {analysis.units[0].name}" if analysis.units else "no units",
            )
        )
    rows = tuple(tuple(row) for row in unit_rows(analysis.units))
    table = Table("All units, the most sensitive first", unit_columns(analysis.units), rows, folded=True, wide=True)
    return Section("Where the damage is", charts=tuple(charts), tables=(table,))


def _logarithm(unit: UnitSensitivity | None, scheme: str) -> float | None:
    """log10 of the damage; None without a unit or damage."""
    damage = 0.0 if unit is None else unit.damage[scheme]
    return math.log10(damage) if damage > 0 and math.isfinite(damage) else None


def _worst(analysis: Analysis) -> Section:
    linears = [linear for unit in analysis.units for linear in unit.linears]
    schemes = measured_schemes(analysis.units)
    worst = sorted(linears, key=lambda linear: -linear.output_error[W4.name].overall)[:_WORST_LINEARS]
    rows = tuple(
        (
            linear.name,
            *(f"{linear.output_error[scheme].overall:.2%}" for scheme in schemes),
            f"{linear.kurtosis:.1f}",
            f"{linear.outlier_share:.2%}",
        )
        for linear in worst
    )
    columns = ("Linear", *(f"{LABELS[scheme]} error" for scheme in schemes), "kurtosis of the input", "outliers")
    text = "Relative output error with plain rounding, before any scaling or smoothing."
    return Section("The worst Linears", text, tables=(Table("Ten worst by int4 error", columns, rows, wide=True),))


def _exclude(analysis: Analysis) -> Section:
    text = "The fewest units with half of the int4 damage, to copy below `- type: linear_quant` of a recipe."
    return Section("Keep these float", text, code=exclude_text(analysis.exclude))


def _rounds(analysis: Analysis) -> Section:
    choice = analysis.choice
    assert choice is not None
    target = f"at most {human_bytes(choice.target_size)}" if choice.target_size else f"a KL of at most {choice.max_kl}"
    missed = "" if choice.satisfied else " No recipe that was tried reaches it; the best one is kept."
    rows = tuple(tuple(row) for row in round_rows(choice))
    return Section(
        "Rounds", f"Target: {target}.{missed}", tables=(Table("* chosen", round_columns(choice), rows, wide=True),)
    )
