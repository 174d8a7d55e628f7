"""Search for a mixed recipe that meets a size or a KL: propose, quantize, and evaluate on held-out samples.

The search assumes that KL is c times the damage. The damage of a unit alone is a KL, so c is 1 until the first round
measures the smallest model (all int4), which gives c.
With a KL target, the search ends there if that model is good enough; otherwise each round updates c with its measured
KL, and the smallest model within the target is kept. With a size target, the model with the least KL is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..evaluation import default_save_path, evaluate
from ..report import human_bytes
from ..run import QuantRequest, run_request
from ..runtime import Progress
from .mixed_recipe import FLOAT, patterns
from .proposal import (
    FORMAT,
    Proposal,
    Proposer,
)
from .result import Choice, Round
from .sensitivity import UnitSensitivity
from .state import AnalysisState

_CORRECTIONS = 3  # maximum number of rounds after the first, for a KL target

# Fractions of max_kl. A proposal aims at _KL_AIM; the search ends if the measured KL is between _CLOSE_ENOUGH and 1.
_KL_AIM, _CLOSE_ENOUGH = 0.9, 0.75


@dataclass(frozen=True)
class TrialRunner:
    """Quantizes with a proposed recipe and evaluates the result.

    folder: for recipe.yaml and the model. work: temporary folder on the same disk, for models of earlier rounds.
    """

    request: QuantRequest
    eval_dataset: str
    folder: Path
    work: Path
    progress: Progress

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def run(self, number: int, name: str, proposal: Proposal, predicted_kl: float) -> Round:
        """Quantize with the recipe of a proposal into `model` and evaluate the result."""
        self.progress.say(f"round {number}: {name}, {human_bytes(proposal.size)}")
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(proposal.recipe, encoding="utf-8")
        request = replace(self.request, config_path=str(recipe), save_format=(FORMAT,))
        run_request(request, self.model, overwrite=False, progress=self.progress)
        report = evaluate(
            request.model_path, self.model, self.eval_dataset, device=request.device, seed=request.seed,
            trust_remote_code=request.trust_remote_code, save_path=default_save_path(self.model),
            progress=self.progress,
        )  # fmt: skip
        written = sum((self.model / file).stat().st_size for file in proposal.file_sizes)
        kl = report.overall.kl_mean
        self.progress.say(f"round {number}: KL {kl.value:.5f} ({kl.low:.5f} to {kl.high:.5f})")
        return Round(
            name, proposal.linear_counts(), proposal.damage, proposal.bound, proposal.size, written, predicted_kl, kl
        )

    def move_model_to_work(self, number: int) -> None:
        """Move the model of a round out of the way, unless that was done before an interruption."""
        target = self.work / f"model-{number}"
        if self.model.exists() and not target.exists():  # otherwise the model is that of the next round
            self.model.rename(target)

    def keep_only(self, number: int) -> None:
        """Delete the models of all other rounds from `work` to free disk space for the next one."""
        for other in self.work.glob("model-*"):
            if other.name != f"model-{number}":
                shutil.rmtree(other)

    def restore(self, number: int, proposal: Proposal) -> None:
        """Move the model of a round back from `work` to `model` and write its recipe."""
        if not self.model.exists():
            (self.work / f"model-{number}").rename(self.model)
        (self.folder / "recipe.yaml").write_text(proposal.recipe, encoding="utf-8")


def search_recipe(
    runner: TrialRunner,
    proposer: Proposer,
    units: Sequence[UnitSensitivity],
    target_size: int | None,
    max_kl: float | None,
    not_evaluated: tuple[str, ...],
    state: AnalysisState,
) -> Choice:
    """Find the recipe for target_size (bytes of all files) or max_kl (nats), and leave its model in runner.model.

    not_evaluated: modalities that no evaluation sample has. state: has the rounds that are finished, and receives more.
    """
    finished = state.rounds
    tried: list[tuple[Proposal, Round]] = []
    best = 0
    pending: Proposal | None = proposer.all_int4(units)
    while pending is not None and pending.schemes not in [proposal.schemes for proposal, _ in tried]:
        number = len(tried) + 1
        predicted = (kl_per_damage(tried) if tried else 1.0) * pending.damage
        name = "all int4" if not tried else "for the size" if max_kl is None else f"correction {number - 1}"
        if number <= len(finished):
            trial = finished[number - 1]
        else:
            trial = runner.run(number, name, pending, predicted)
            state.add_round(trial)
        tried.append((pending, trial))
        best = best_round([trial for _, trial in tried], max_kl)
        if number >= len(finished):  # the model of an earlier round was moved before the next one began
            runner.move_model_to_work(number)
        runner.keep_only(best + 1)
        if target_size is not None:
            pending = proposer.for_size(units, target_size) if number == 1 else None
        elif max_kl is not None:
            pending = next_for_kl(proposer, units, tried, max_kl)
    chosen, trial = tried[best]
    runner.restore(best + 1, chosen)
    return Choice(
        target_size=target_size,
        max_kl=max_kl,
        rounds=tuple(trial for _, trial in tried),
        chosen=best + 1,
        satisfied=max_kl is None or trial.measured_kl.value <= max_kl,
        patterns={
            scheme: patterns(proposer.grid, [name for name, own in chosen.schemes.items() if own == scheme])
            for scheme in (*proposer.schemes, FLOAT)
        },
        recipe=str(runner.folder / "recipe.yaml"),
        model=str(runner.model),
        calibration=runner.request.dataset or "",
        eval_dataset=runner.eval_dataset,
        unjudged=not_evaluated,
    )


def kl_per_damage(tried: Sequence[tuple[Proposal, Round]]) -> float:
    """c from the last round."""
    proposal, trial = tried[-1]
    return trial.measured_kl.value / proposal.damage if proposal.damage > 0 else 0.0


def best_round(rounds: Sequence[Round], max_kl: float | None) -> int:
    """Position of the round with the fewest bytes within max_kl; if there is none, of the round with the least KL."""
    within = [i for i, trial in enumerate(rounds) if max_kl is not None and trial.measured_kl.value <= max_kl]
    if within:
        return min(within, key=lambda i: rounds[i].measured_bytes)
    return min(range(len(rounds)), key=lambda i: rounds[i].measured_kl.value)


def next_for_kl(
    proposer: Proposer, units: Sequence[UnitSensitivity], tried: Sequence[tuple[Proposal, Round]], max_kl: float
) -> Proposal | None:
    """The next proposal for a KL target; None if the last one is good enough or there is no further proposal.

    Damage without KL says nothing about the damage that the target allows, so a KL of 0 also ends the search.
    """
    kl = tried[-1][1].measured_kl.value
    small_enough = len(tried) == 1 or kl >= _CLOSE_ENOUGH * max_kl
    per_damage = kl_per_damage(tried)
    if len(tried) > _CORRECTIONS or (kl <= max_kl and small_enough) or per_damage <= 0:
        return None
    return proposer.for_damage(units, _KL_AIM * max_kl / per_damage)
