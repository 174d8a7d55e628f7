"""What an analysis found, as data and as one page; how it is found is in analyze.py and sensitivity.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..formats import write_json
from ..models import MODALITIES
from ..report import Interval, human_bytes, markdown_table
from .mixed_recipe import FLOAT, W4, W8
from .sensitivity import (
    OUTLIER_RMS,
    Error,
    LinearSensitivity,
    UnitSensitivity,
)


@dataclass(frozen=True)
class Round:
    """One recipe that was quantized with and evaluated.

    linears: how many have each scheme. damage: what the units' damages add up to; bound: no recipe of that size has
    less (the damages being right). bytes: of all files of the checkpoint but Markdown and reports. kl: mean KL(float ||
    quant) in nats on the samples kept out; predicted from the rounds before, hence not in the first.
    """

    name: str
    linears: dict[str, int]
    damage: float
    bound: float
    predicted_bytes: int
    measured_bytes: int
    predicted_kl: float | None
    measured_kl: Interval


@dataclass(frozen=True)
class Choice:
    """A mixed recipe and how it was come by. One of target_size (bytes) and max_kl (nats) is given.

    chosen: number of the round whose recipe and model are kept; satisfied: whether it is within max_kl. patterns: the
    Linears of each scheme. unjudged: modalities that no sample of eval_dataset has.
    """

    target_size: int | None
    max_kl: float | None
    rounds: tuple[Round, ...]
    chosen: int
    satisfied: bool
    patterns: dict[str, list[str]]
    recipe: str
    model: str
    calibration: str
    eval_dataset: str
    unjudged: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """Everything analysis.json holds. units: by falling damage of int4. exclude: patterns of the fewest units that make
    half of that damage.
    """

    model_type: str
    model_path: str
    dataset: str
    samples: int
    tokens_by_modality: dict[str, int]
    units: tuple[UnitSensitivity, ...]
    exclude: tuple[str, ...]
    choice: Choice | None
    device: str
    seed: int
    versions: dict[str, str]
    seconds: float
    seconds_by_phase: dict[str, float]
    peak_rss_bytes: int
    warnings: tuple[str, ...]


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """analysis.json and analysis.md."""
    write_json(folder / "analysis.json", asdict(analysis))
    (folder / "analysis.md").write_text(as_markdown(analysis), encoding="utf-8")


def total_damage(units: Sequence[UnitSensitivity], scheme: str) -> float:
    return sum(unit.damage[scheme].overall for unit in units)


def units_with_half_of_damage(units: Sequence[UnitSensitivity]) -> list[UnitSensitivity]:
    """The fewest units that make half of the damage of int4. units: by falling damage."""
    left = total_damage(units, W4.name) / 2
    chosen = []
    for unit in units:
        if left <= 0:
            break
        chosen.append(unit)
        left -= unit.damage[W4.name].overall
    return chosen


def exclude_text(patterns: Sequence[str]) -> str:
    """As it stands in a recipe, below `- type: linear_quant`."""
    return "\n".join(["exclude:", *(f'  - "{pattern}"' for pattern in patterns)]) if patterns else "exclude: []"


UNIT_COLUMNS = ("unit", "int4 damage", "share", "int8 damage", "int4 error", "int8 error", "kurtosis", "outliers")


def unit_rows(units: Sequence[UnitSensitivity], count: int | None = None) -> list[list[str]]:
    """The worst units, as UNIT_COLUMNS names their cells; errors are of the worst Linear."""
    total = total_damage(units, W4.name) or 1.0
    return [
        [
            unit.name,
            f"{unit.damage[W4.name].overall:.2e}",
            f"{unit.damage[W4.name].overall / total:.1%}",
            f"{unit.damage[W8.name].overall:.2e}",
            f"{_worst(unit, W4.name):.4f}",
            f"{_worst(unit, W8.name):.4f}",
            f"{unit.linears[0].kurtosis:.1f}",
            f"{unit.linears[0].outlier_share:.2%}",
        ]
        for unit in units[:count]
    ]


def _worst(unit: UnitSensitivity, scheme: str) -> float:
    return max(linear.output_error[scheme].overall for linear in unit.linears)


ROUND_COLUMNS = (
    "round", "int4", "int8", "float", "bytes", "KL", "KL foretold", "95 % interval", "bytes foretold", "damage",
)  # fmt: skip


def round_rows(choice: Choice) -> list[list[str]]:
    """The rounds, as ROUND_COLUMNS names their cells; the chosen one is marked."""
    return [
        [
            f"{number} {one.name}" + ("*" if number == choice.chosen else ""),
            *(str(one.linears.get(scheme, 0)) for scheme in (W4.name, W8.name, FLOAT)),
            human_bytes(one.measured_bytes),
            f"{one.measured_kl.value:.5f}",
            "" if one.predicted_kl is None else f"{one.predicted_kl:.5f}",
            f"{one.measured_kl.low:.5f} to {one.measured_kl.high:.5f}",
            human_bytes(one.predicted_bytes),
            f"{one.damage:.2e}",
        ]
        for number, one in enumerate(choice.rounds, 1)
    ]


def as_markdown(analysis: Analysis) -> str:
    """The analysis as one page."""
    tokens = ", ".join(f"{name} {count}" for name, count in analysis.tokens_by_modality.items())
    lines = [
        f"# Sensitivity of {analysis.model_type}",
        "",
        f"- model: `{analysis.model_path}`",
        f"- data: `{analysis.dataset}`, {analysis.samples} samples; tokens: {tokens}",
        f"- device {analysis.device}; seed {analysis.seed}; time {analysis.seconds:.1f} s; peak memory"
        f" {human_bytes(analysis.peak_rss_bytes)}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in analysis.versions.items())}",
        "",
        *(_choice_lines(analysis.choice) if analysis.choice else []),
        "## Units",
        "",
        "Linears that read one input share a scheme. Damage: the noise that quantizing the unit alone, scaled or"
        " smoothed as a recipe does it, puts into the residual stream, |e|² / |h|², the mean over text tokens (by"
        " modality in analysis.json). Errors: |Ŷ - Y| / |Y| of the unit's worst Linear, plainly rounded. Kurtosis"
        f" (0: normal) and outliers (values beyond {OUTLIER_RMS:g} times the root mean square) are of the input.",
        "",
        *markdown_table(UNIT_COLUMNS, unit_rows(analysis.units)),
        "",
        "The fewest units that make half of the damage of int4, for a recipe:",
        "",
        "```yaml",
        exclude_text(analysis.exclude),
        "```",
        "",
        *_linear_lines(analysis.units),
    ]
    if analysis.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in analysis.warnings)]
    return "\n".join(lines) + "\n"


def _choice_lines(choice: Choice) -> list[str]:
    asked = f"at most {human_bytes(choice.target_size)}" if choice.target_size else f"a mean KL within {choice.max_kl}"
    met = "" if choice.satisfied else " **No recipe that was tried is within it; kept is the best of them.**"
    return [
        "## Recipe",
        "",
        f"Asked for: {asked}.{met} The recipe is `{choice.recipe}`, the model it makes `{choice.model}`; calibrated on"
        f" `{choice.calibration}`, judged on `{choice.eval_dataset}`.",
        "",
        *markdown_table(ROUND_COLUMNS, round_rows(choice)),
        "",
        "\\*: chosen. int4, int8, float: Linears.",
        "",
        *(f"- {scheme}: {', '.join(f'`{p}`' for p in found)}" for scheme, found in choice.patterns.items() if found),
        "",
    ]


def _linear_lines(units: Sequence[UnitSensitivity]) -> list[str]:
    linears = [linear for unit in units for linear in unit.linears]
    seen = [
        m for m in MODALITIES if any(m in e.by_modality for linear in linears for e in linear.output_error.values())
    ]
    columns = ["Linear", "int4 weight", "int4", *seen, "int8 weight", "int8", *seen]
    rows = [
        [f"`{linear.name}`", *_cells(linear, W4.name, seen), *_cells(linear, W8.name, seen)]
        for linear in sorted(linears, key=lambda linear: -linear.output_error[W4.name].overall)
    ]
    note = "Relative errors of weight and output, by modality, as int4 and as int8 with int8 activations; worst first."
    return ["## Linears", "", note, "", *markdown_table(columns, rows)]


def _cells(linear: LinearSensitivity, scheme: str, modalities: Sequence[str]) -> list[str]:
    error: Error = linear.output_error[scheme]
    of_modality = [f"{error.by_modality[m]:.4f}" if m in error.by_modality else "" for m in modalities]
    return [f"{linear.weight_error[scheme]:.4f}", f"{error.overall:.4f}", *of_modality]
