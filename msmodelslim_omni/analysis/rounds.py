"""A mixed recipe for a size or a KL: proposed, quantized with, and judged on samples that it has not seen.

KL is taken to be c times the damage. The first round measures the smallest model, all int4, and so gives c; for a KL it
is the answer if it is good enough. Each later round corrects c by what it measured. Of those within the KL the smallest
is kept; for a size, the one of the least KL.
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
    SCHEMES,
    Proposal,
    Proposer,
)
from .result import Choice, Round
from .sensitivity import UnitSensitivity

# Rounds after the first. A proposal aims below the KL that is asked for, and is small enough not far below it.
CORRECTIONS = 3
_AIM, _ENOUGH = 0.9, 0.75


@dataclass(frozen=True)
class Judge:
    """How a recipe is tried. folder: gets the model; work: for models that may still be replaced, on the same disk."""

    request: QuantRequest
    eval_dataset: str
    folder: Path
    work: Path
    progress: Progress

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def measured(self, number: int, name: str, proposal: Proposal, predicted_kl: float | None) -> Round:
        """Quantize with a proposal's recipe into `model`, and evaluate the result."""
        self.progress.say(f"round {number}: {name}, {human_bytes(proposal.size)}")
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(proposal.recipe, encoding="utf-8")
        request = replace(self.request, config_path=str(recipe), save_format=(FORMAT,))
        run_request(request, self.model, overwrite=False, progress=self.progress)
        found = evaluate(
            request.model_path, self.model, self.eval_dataset, device=request.device, seed=request.seed,
            trust_remote_code=request.trust_remote_code, save_path=default_save_path(self.model),
            progress=self.progress,
        )  # fmt: skip
        written = sum((self.model / file).stat().st_size for file in proposal.files)
        kl = found.overall.kl_mean
        self.progress.say(f"round {number}: KL {kl.value:.5f} ({kl.low:.5f} to {kl.high:.5f})")
        return Round(
            name, proposal.linears(), proposal.damage, proposal.bound, proposal.size, written, predicted_kl, kl
        )

    def put_aside(self, number: int) -> None:
        self.model.rename(self.work / f"model-{number}")

    def keep_only(self, number: int) -> None:
        """Delete what else was put aside, so that there is room for the next."""
        for other in self.work.glob("model-*"):
            if other.name != f"model-{number}":
                shutil.rmtree(other)

    def put_back(self, number: int, proposal: Proposal) -> None:
        """The model that is kept, at the place where it was made, and its recipe."""
        (self.work / f"model-{number}").rename(self.model)
        (self.folder / "recipe.yaml").write_text(proposal.recipe, encoding="utf-8")


def search(
    judge: Judge,
    proposer: Proposer,
    units: Sequence[UnitSensitivity],
    target_size: int | None,
    max_kl: float | None,
    unjudged: tuple[str, ...],
) -> Choice:
    """The recipe for one of target_size (bytes of all files) and max_kl (nats), and the model that it makes."""
    tried: list[tuple[Proposal, Round]] = []
    best = 0
    pending: Proposal | None = proposer.all_int4(units)
    while pending is not None and pending.schemes not in [proposal.schemes for proposal, _ in tried]:
        number = len(tried) + 1
        predicted = kl_per_damage(tried) * pending.damage if tried else None
        name = "all int4" if not tried else "for the size" if max_kl is None else f"correction {number - 1}"
        tried.append((pending, judge.measured(number, name, pending, predicted)))
        best = best_round([one for _, one in tried], max_kl)
        judge.put_aside(number)
        judge.keep_only(best + 1)
        if target_size is not None:
            pending = proposer.for_size(units, target_size) if number == 1 else None
        elif max_kl is not None:
            pending = _correction(proposer, units, tried, max_kl)
    judge.put_back(best + 1, tried[best][0])
    chosen, one = tried[best]
    return Choice(
        target_size=target_size,
        max_kl=max_kl,
        rounds=tuple(one for _, one in tried),
        chosen=best + 1,
        satisfied=max_kl is None or one.measured_kl.value <= max_kl,
        patterns={
            scheme: patterns(proposer.grid, [name for name, its in chosen.schemes.items() if its == scheme])
            for scheme in (*SCHEMES, FLOAT)
        },
        recipe=str(judge.folder / "recipe.yaml"),
        model=str(judge.model),
        calibration=judge.request.dataset or "",
        eval_dataset=judge.eval_dataset,
        unjudged=unjudged,
    )


def kl_per_damage(tried: Sequence[tuple[Proposal, Round]]) -> float:
    """c, as the last round has it."""
    proposal, one = tried[-1]
    return one.measured_kl.value / proposal.damage if proposal.damage > 0 else 0.0


def best_round(rounds: Sequence[Round], max_kl: float | None) -> int:
    """Position of the smallest round within max_kl; where there is none, of the one with the least KL."""
    within = [i for i, one in enumerate(rounds) if max_kl is not None and one.measured_kl.value <= max_kl]
    if within:
        return min(within, key=lambda i: rounds[i].measured_bytes)
    return min(range(len(rounds)), key=lambda i: rounds[i].measured_kl.value)


def _correction(
    proposer: Proposer, units: Sequence[UnitSensitivity], tried: Sequence[tuple[Proposal, Round]], max_kl: float
) -> Proposal | None:
    """The next proposal for a KL; None where the last one will do, or no other is left to try."""
    kl = tried[-1][1].measured_kl.value
    small_enough = len(tried) == 1 or kl >= _ENOUGH * max_kl
    if len(tried) > CORRECTIONS or (kl <= max_kl and small_enough):
        return None
    return proposer.for_damage(units, _AIM * max_kl / kl_per_damage(tried))
