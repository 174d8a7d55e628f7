"""Proposal: a scheme for every unit, as a recipe, with the exact bytes of the checkpoint that the recipe makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats import FORMATS, OutLinear, output_files
from ..models import ModelSpec
from ..plan import make_plan
from ..recipe import parse_recipe
from ..run import make_job
from ..storage import Checkpoint
from .allocation import (
    Allocation,
    Option,
    minimize_damage,
    minimize_size,
)
from .mixed_recipe import (
    DEFAULT_STEPS,
    FLOAT,
    STEPS,
    W4,
    Grid,
    recipe_text,
)
from .sensitivity import UnitSensitivity

FORMAT = "compressed_tensors"  # the only format that stores several schemes in one checkpoint


@dataclass(frozen=True)
class Proposal:
    """A recipe with its estimated damage and its exact size.

    schemes: by the name of the Linear. damage, bound: see allocation.Allocation. file_sizes: bytes by relative name of
    the files that a loader reads (all except Markdown and reports).
    """

    schemes: dict[str, str]
    recipe: str
    damage: float
    bound: float
    file_sizes: dict[str, int]

    @property
    def size(self) -> int:
        return sum(self.file_sizes.values())

    def linear_counts(self) -> dict[str, int]:
        """The number of Linears by scheme."""
        return dict(Counter(self.schemes.values()))


class Proposer:
    """Makes proposals for one model and dataset. target: the user's target, as text for the comment of the recipe.

    steps: names in STEPS. schemes: int4 and those of the steps, by name; plans: with every Linear in that scheme.
    Raises QuantError unless every Linear can have every scheme.
    """

    def __init__(
        self,
        model: ModelSpec,
        checkpoint: Checkpoint,
        dataset: str,
        target: str = "",
        steps: Sequence[str] = DEFAULT_STEPS,
    ) -> None:
        self.schemes = {scheme.name: scheme for scheme in (W4, *(STEPS[step] for step in steps))}
        spec = model.family.layer_spec(checkpoint.config)
        groups = tuple(tuple(linear for group in unit for linear in group.linears) for unit in spec.units)
        self.grid = Grid(model.layer_prefix, model.family.num_layers(checkpoint.config), groups)
        self._checkpoint, self._dataset, self._target = checkpoint, dataset, target
        self.plans = {
            scheme: make_plan(parse_recipe(self.recipe(dict.fromkeys(self.grid.names(), scheme))), model, checkpoint)
            for scheme in self.schemes
        }

    def recipe(self, schemes: Mapping[str, str]) -> str:
        """The text of a recipe. Linears not in `schemes` are int4. Raises ValueError if all are float."""
        complete = {name: schemes.get(name, W4.name) for name in self.grid.names()}
        counts = Counter(complete.values())
        summary = ", ".join(f"{counts[s]} {s}" for s in (*self.schemes, FLOAT) if counts[s])
        comment = [f"Linears: {summary}."]
        if self._target:
            comment.append(f"Chosen by `msmodelslim analyze` for {self._target}.")
        return recipe_text(self.grid, complete, self._dataset, comment)

    def file_sizes(self, schemes: Mapping[str, str]) -> dict[str, int]:
        """The file sizes of the checkpoint that a recipe makes, see Proposal. Linears not in `schemes` are int4."""
        int4 = self.plans[W4.name]
        linears = (replace(lin, scheme=self.schemes.get(schemes.get(lin.name, W4.name))) for lin in int4.linears)
        plan = replace(int4, linears=tuple(linears))
        files = output_files(FORMATS[FORMAT], make_job(plan), plan.savers[0].part_file_size)
        return {name: size for name, size in files.items() if not name.endswith(".md")}

    def weight_size(self, name: str, scheme: str) -> int:
        """Bytes of the stored tensors of a Linear's weight (with scales and zero points), without headers."""
        info = self._checkpoint.tensors[f"{name}.weight"]
        if scheme == FLOAT:
            return info.nbytes
        linear = OutLinear(name, self.schemes[scheme], (info.shape[0], info.shape[1]), info.dtype, _no_data, _no_data)
        return sum(tensor.spec.nbytes for tensor in FORMATS[FORMAT].linear_tensors(linear))

    def smallest_size(self) -> int:
        """Bytes of the checkpoint with every Linear in int4."""
        return sum(self.file_sizes({}).values())

    def largest_size(self) -> int:
        """Bytes of the checkpoint with every Linear float; exact except for headers."""
        names = self.grid.names()
        return self.smallest_size() + sum(self.weight_size(n, FLOAT) - self.weight_size(n, W4.name) for n in names)

    # --- choices ---

    def all_int4(self, units: Sequence[UnitSensitivity]) -> Proposal:
        options = self._options(units)
        return self._proposal(units, minimize_damage(options, sum(unit[0].size for unit in options)))

    def for_size(self, units: Sequence[UnitSensitivity], target_size: int) -> Proposal:
        """The proposal with the least damage and at most target_size bytes in all files."""
        options = self._options(units)
        proposal = self.all_int4(units)
        budget = sum(unit[0].size for unit in options) + target_size - proposal.size
        while True:  # the size of headers and config.json depends on the choice; in the worst case all are int4 again
            proposal = self._proposal(units, minimize_damage(options, budget))
            if proposal.size <= target_size:
                return proposal
            budget -= proposal.size - target_size

    def for_damage(self, units: Sequence[UnitSensitivity], damage: float) -> Proposal | None:
        """The proposal with the fewest bytes and at most this damage; None if every Linear would have to stay float."""
        allocation = minimize_size(self._options(units), damage)
        if allocation is None or set(allocation.choices) == {len(self.schemes)}:
            return None
        return self._proposal(units, allocation)

    def _options(self, units: Sequence[UnitSensitivity]) -> list[list[Option]]:
        """The options of each unit: the schemes in their order, then float."""
        return [
            [
                *(Option(unit.size[scheme], unit.damage[scheme]) for scheme in self.schemes),
                Option(unit.size[FLOAT], 0.0),
            ]
            for unit in units
        ]

    def _proposal(self, units: Sequence[UnitSensitivity], allocation: Allocation) -> Proposal:
        options = (*self.schemes, FLOAT)
        schemes = {name: options[k] for unit, k in zip(units, allocation.choices, strict=True) for name in unit.names}
        sizes = self.file_sizes(schemes)
        return Proposal(schemes, self.recipe(schemes), allocation.damage, allocation.bound, sizes)


def _no_data() -> torch.Tensor:
    raise AssertionError("only the size is needed")
