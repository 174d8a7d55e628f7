"""A choice of schemes for the units, as a recipe, with the exact bytes of what that recipe makes."""

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
    FLOAT,
    W4,
    W8,
    Grid,
    recipe_text,
)
from .sensitivity import UnitSensitivity

FORMAT = "compressed_tensors"  # the one that holds int4 and int8 beside each other
SCHEMES = {W4.name: W4, W8.name: W8}


@dataclass(frozen=True)
class Proposal:
    """schemes: of every Linear by name. damage, bound: as in allocation. files: those that a loader reads (all but
    Markdown and reports), by relative name, with their bytes.
    """

    schemes: dict[str, str]
    recipe: str
    damage: float
    bound: float
    files: dict[str, int]

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def linears(self) -> dict[str, int]:
        """How many have each scheme."""
        return dict(Counter(self.schemes.values()))


class Proposer:
    """Makes proposals for one model and dataset. aim: what is asked for, in the words of the recipe's comment.

    Raises QuantError where not every Linear can be int4 and int8.
    """

    def __init__(self, model: ModelSpec, checkpoint: Checkpoint, dataset: str, aim: str = "") -> None:
        spec = model.family.layer_spec(checkpoint.config)
        groups = tuple(group.linears for group in spec.groups)
        self.grid = Grid(model.layer_prefix, model.family.num_layers(checkpoint.config), groups)
        self._checkpoint, self._dataset, self._aim = checkpoint, dataset, aim
        self.int4, self.int8 = (
            make_plan(parse_recipe(self.recipe(dict.fromkeys(self.grid.names(), scheme))), model, checkpoint)
            for scheme in SCHEMES
        )

    def recipe(self, schemes: Mapping[str, str]) -> str:
        """A Linear that is not in `schemes` is int4. Raises ValueError where all stay float."""
        every = {name: schemes.get(name, W4.name) for name in self.grid.names()}
        counts = Counter(every.values())
        of_each = ", ".join(f"{counts[s]} Linears {s}" for s in (*SCHEMES, FLOAT) if counts[s])
        comment = [f"{of_each}.", *([f"Chosen by `msmodelslim analyze` for {self._aim}."] if self._aim else [])]
        return recipe_text(self.grid, every, self._dataset, comment)

    def files(self, schemes: Mapping[str, str]) -> dict[str, int]:
        """Of a recipe's result, see Proposal."""
        linears = (replace(lin, scheme=SCHEMES.get(schemes.get(lin.name, W4.name))) for lin in self.int4.linears)
        plan = replace(self.int4, linears=tuple(linears))
        made = output_files(FORMATS[FORMAT], make_job(plan), plan.savers[0].part_file_size)
        return {name: size for name, size in made.items() if not name.endswith(".md")}

    def weight_size(self, name: str, scheme: str) -> int:
        """Bytes of a Linear's weight with what belongs to it, headers aside."""
        info = self._checkpoint.tensors[f"{name}.weight"]
        if scheme == FLOAT:
            return info.nbytes
        linear = OutLinear(name, SCHEMES[scheme], (info.shape[0], info.shape[1]), info.dtype, _unread, _unread)
        return sum(tensor.spec.nbytes for tensor in FORMATS[FORMAT].linear_tensors(linear))

    def smallest(self) -> int:
        """Bytes of the checkpoint with every Linear in int4."""
        return sum(self.files({}).values())

    def largest(self) -> int:
        """With every Linear float, as exact as headers allow."""
        names = self.grid.names()
        return self.smallest() + sum(self.weight_size(n, FLOAT) - self.weight_size(n, W4.name) for n in names)

    # --- choices ---

    def all_int4(self, units: Sequence[UnitSensitivity]) -> Proposal:
        options = self._options(units)
        return self._proposal(units, minimize_damage(options, sum(unit[0].size for unit in options)))

    def for_size(self, units: Sequence[UnitSensitivity], target_size: int) -> Proposal:
        """The least damage with at most target_size bytes in all files."""
        options = self._options(units)
        proposal = self.all_int4(units)
        room = sum(unit[0].size for unit in options) + target_size - proposal.size
        while True:  # what headers and config.json take depends on the choice; at the worst all int4 comes out again
            proposal = self._proposal(units, minimize_damage(options, room))
            if proposal.size <= target_size:
                return proposal
            room -= proposal.size - target_size

    def for_damage(self, units: Sequence[UnitSensitivity], damage: float) -> Proposal | None:
        """The fewest bytes with at most this damage; None where every Linear would have to stay float."""
        found = minimize_size(self._options(units), damage)
        if found is None or set(found.choices) == {len(SCHEMES)}:
            return None
        return self._proposal(units, found)

    def _options(self, units: Sequence[UnitSensitivity]) -> list[list[Option]]:
        """Of each unit in the order of SCHEMES, and float."""
        return [
            [
                *(Option(unit.size[scheme], unit.damage[scheme].overall) for scheme in SCHEMES),
                Option(unit.size[FLOAT], 0.0),
            ]
            for unit in units
        ]

    def _proposal(self, units: Sequence[UnitSensitivity], chosen: Allocation) -> Proposal:
        words = (*SCHEMES, FLOAT)
        schemes = {name: words[k] for unit, k in zip(units, chosen.choices, strict=True) for name in unit.names}
        return Proposal(schemes, self.recipe(schemes), chosen.damage, chosen.bound, self.files(schemes))


def _unread() -> torch.Tensor:
    raise AssertionError("only the size is asked for")
