"""The result of an analysis, as data and as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..formats import write_json
from ..models import MODALITIES
from ..report import Interval, human_bytes, markdown_table
from .mixed_recipe import FLOAT, LABELS, W4
from .sensitivity import (
    OUTLIER_RMS,
    Error,
    LinearSensitivity,
    UnitSensitivity,
)


@dataclass(frozen=True)
class Round:
    """One recipe that was used to quantize the model, with the evaluation of the result.

    linears: number of Linears by scheme. damage: sum over the units; bound: no recipe of this size has less (if the
    damages are right). *_bytes: all files of the checkpoint except Markdown and reports. *_kl: mean KL(float || quant)
    in nats on the held-out samples. predicted_kl is the damage times KL / damage of the previous round; the first round
    has none before it and takes the damage itself.
    """

    name: str
    linears: dict[str, int]
    damage: float
    bound: float
    predicted_bytes: int
    measured_bytes: int
    predicted_kl: float
    measured_kl: Interval


@dataclass(frozen=True)
class Choice:
    """The chosen mixed recipe and the rounds that led to it. One of target_size (bytes) and max_kl (nats) is given.

    chosen: number of the round whose recipe and model are kept. satisfied: whether its KL is within max_kl. patterns:
    the Linears of each scheme. unjudged: modalities that no sample of eval_dataset has.
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
    """The content of analysis.json.

    units: by decreasing int4 damage. exclude: patterns of the fewest units with half of the total int4 damage.
    patterns: a unit was measured if one of them matches one of its Linears; empty if every unit was measured.
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
    patterns: tuple[str, ...] = ()

    @property
    def scope(self) -> str:
        """Which units were measured, as a sentence; empty if all were."""
        if not self.patterns:
            return ""
        quoted = ", ".join(f"`{pattern}`" for pattern in self.patterns)
        return f"Only units with a Linear that matches {quoted} were measured; shares are shares of their damage."


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write analysis.json and analysis.md."""
    write_json(folder / "analysis.json", asdict(analysis))
    (folder / "analysis.md").write_text(as_markdown(analysis), encoding="utf-8")


def total_damage(units: Sequence[UnitSensitivity], scheme: str) -> float:
    return sum(unit.damage[scheme] for unit in units)


def units_with_half_of_damage(units: Sequence[UnitSensitivity]) -> list[UnitSensitivity]:
    """The fewest units with half of the total int4 damage. units: by decreasing damage."""
    left = total_damage(units, W4.name) / 2
    chosen = []
    for unit in units:
        if left <= 0:
            break
        chosen.append(unit)
        left -= unit.damage[W4.name]
    return chosen


def exclude_text(patterns: Sequence[str]) -> str:
    """The `exclude` field of a recipe, for use below `- type: linear_quant`."""
    return "\n".join(["exclude:", *(f'  - "{pattern}"' for pattern in patterns)]) if patterns else "exclude: []"


def unit_columns(units: Sequence[UnitSensitivity]) -> tuple[str, ...]:
    """The header of unit_rows."""
    int4, *steps = (LABELS[scheme] for scheme in measured_schemes(units))
    damages = (f"{int4} damage", "share", *(f"{step} damage" for step in steps))
    return ("unit", *damages, *(f"{name} error" for name in (int4, *steps)), "kurtosis", "outliers")


def measured_schemes(units: Sequence[UnitSensitivity]) -> tuple[str, ...]:
    """The names of the schemes that were measured, int4 first."""
    return tuple(units[0].damage) if units else (W4.name,)


def unit_rows(units: Sequence[UnitSensitivity], count: int | None = None) -> list[list[str]]:
    """Rows of the most sensitive units. Errors are those of the worst Linear of a unit."""
    total = total_damage(units, W4.name) or 1.0
    steps = measured_schemes(units)[1:]
    return [
        [
            unit.name,
            f"{unit.damage[W4.name]:.2e}",
            f"{unit.damage[W4.name] / total:.1%}",
            *(f"{unit.damage[step]:.2e}" for step in steps),
            *(f"{_worst(unit, scheme):.4f}" for scheme in (W4.name, *steps)),
            f"{unit.linears[0].kurtosis:.1f}",
            f"{unit.linears[0].outlier_share:.2%}",
        ]
        for unit in units[:count]
    ]


def _worst(unit: UnitSensitivity, scheme: str) -> float:
    return max(linear.output_error[scheme].overall for linear in unit.linears)


def round_columns(choice: Choice) -> tuple[str, ...]:
    """The header of round_rows."""
    counted = (LABELS[scheme] for scheme in _used_schemes(choice))
    return ("round", *counted, "bytes", "KL", "KL estimated", "95 % interval", "bytes estimated", "damage")


def _used_schemes(choice: Choice) -> list[str]:
    """int4, float, and what any round has between them."""
    used = {scheme for trial in choice.rounds for scheme in trial.linears}
    return [scheme for scheme in LABELS if scheme in used or scheme in (W4.name, FLOAT)]


def round_rows(choice: Choice) -> list[list[str]]:
    """Rows of the rounds. The chosen round is marked with *."""
    return [
        [
            f"{number} {trial.name}" + ("*" if number == choice.chosen else ""),
            *(str(trial.linears.get(scheme, 0)) for scheme in _used_schemes(choice)),
            human_bytes(trial.measured_bytes),
            f"{trial.measured_kl.value:.5f}",
            f"{trial.predicted_kl:.5f}",
            f"{trial.measured_kl.low:.5f} to {trial.measured_kl.high:.5f}",
            human_bytes(trial.predicted_bytes),
            f"{trial.damage:.2e}",
        ]
        for number, trial in enumerate(choice.rounds, 1)
    ]


def missed_estimates(rounds: Sequence[Round]) -> list[str]:
    """Which rounds measured less than half or more than twice the KL that was estimated, as sentences."""
    return [
        f"round {number}: the KL is {trial.measured_kl.value:.5f}, and {trial.predicted_kl:.5f} was estimated, which is"
        " not within a factor of 2: errors of several units add up, or the held-out samples differ from those of the"
        " calibration"
        for number, trial in enumerate(rounds, 1)
        if not trial.predicted_kl / 2 <= trial.measured_kl.value <= trial.predicted_kl * 2
    ]


def as_markdown(analysis: Analysis) -> str:
    """The analysis as one Markdown page."""
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
        "A unit is the Linears that read one input, or all experts of a layer; they share a scheme. Damage: KL(float ||"
        " quantized) of the whole model in nats if only this unit is quantized, with the scaling or smoothing of the"
        " recipe, on a few of the samples. analysis.json also has the noise that the unit adds to the residual stream"
        " behind its layer, |e|² / |h|², by modality. Errors: |Ŷ - Y| / |Y| of the worst"
        " Linear of the unit with plain rounding. Kurtosis (0: normal distribution) and outliers (values beyond"
        f" {OUTLIER_RMS:g} times the root mean square) describe the input.",
        *([analysis.scope] if analysis.scope else []),
        "",
        *markdown_table(unit_columns(analysis.units), unit_rows(analysis.units)),
        "",
        "The fewest units with half of the total int4 damage, as the `exclude` field of a recipe:",
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
    if choice.target_size:
        target = f"at most {human_bytes(choice.target_size)}"
    else:
        target = f"a mean KL of at most {choice.max_kl}"
    missed = "" if choice.satisfied else " **No recipe that was tried reaches the target; the best one is kept.**"
    return [
        "## Recipe",
        "",
        f"Target: {target}.{missed} Recipe: `{choice.recipe}`. Quantized model: `{choice.model}`, calibrated on"
        f" `{choice.calibration}` and evaluated on `{choice.eval_dataset}`.",
        "",
        *markdown_table(round_columns(choice), round_rows(choice)),
        "",
        "\\*: chosen. int4 to float: number of Linears.",
        "",
        *(f"- {scheme}: {', '.join(f'`{p}`' for p in globs)}" for scheme, globs in choice.patterns.items() if globs),
        "",
    ]


def _linear_lines(units: Sequence[UnitSensitivity]) -> list[str]:
    linears = [linear for unit in units for linear in unit.linears]
    modalities = [
        m for m in MODALITIES if any(m in e.by_modality for linear in linears for e in linear.output_error.values())
    ]
    schemes = measured_schemes(units)
    columns = ["Linear"]
    for scheme in schemes:
        columns += [f"{LABELS[scheme]} weight", LABELS[scheme], *modalities]
    rows = [
        [f"`{linear.name}`", *(cell for scheme in schemes for cell in _cells(linear, scheme, modalities))]
        for linear in sorted(linears, key=lambda linear: -linear.output_error[W4.name].overall)
    ]
    note = "Relative errors of weight and output, by modality, with plain rounding; worst first."
    return ["## Linears", "", note, "", *markdown_table(columns, rows)]


def _cells(linear: LinearSensitivity, scheme: str, modalities: Sequence[str]) -> list[str]:
    error: Error = linear.output_error[scheme]
    by_modality = [f"{error.by_modality[m]:.4f}" if m in error.by_modality else "" for m in modalities]
    return [f"{linear.weight_error[scheme]:.4f}", f"{error.overall:.4f}", *by_modality]
