"""What an interrupted analysis has finished: the units of the first layers, and the rounds. A file in the work folder.

An analysis of a large model takes hours. The same command reads this file and goes on; another command is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import QuantError
from ..files import value_digest
from ..formats import write_json
from ..storage import load_json_object
from .result import Round
from .sensitivity import UnitSensitivity

STATE_NAME = "state.json"


class AnalysisState:
    """The state of one analysis. Every change is written at once. path: None for an analysis that saves nothing."""

    def __init__(self, path: Path | None, request: Mapping[str, str], stored: Mapping[str, Any] | None = None) -> None:
        """request: the arguments that decide the result. stored: the content of the file that is resumed."""
        self._path = path
        self._content: dict[str, Any] = {"request": dict(request), "samples": "", "layers": [], "rounds": []}
        if stored is not None:
            self._content |= stored
        self._save()

    @property
    def layers(self) -> list[list[UnitSensitivity]]:
        """The units of each finished layer, from the first layer on."""
        return TypeAdapter(list[list[UnitSensitivity]]).validate_python(self._content["layers"])

    @property
    def rounds(self) -> list[Round]:
        """The finished rounds."""
        return TypeAdapter(list[Round]).validate_python(self._content["rounds"])

    def require_samples(self, identity: str) -> None:
        """Remember the samples and their media files. Raises QuantError if they changed since the analysis began."""
        if self._content["samples"] not in ("", identity):
            raise QuantError(
                "the samples or their media files changed since this analysis began", "pass --overwrite to start again"
            )
        self._content["samples"] = identity
        self._save()

    def add_layer(self, units: Sequence[UnitSensitivity]) -> None:
        self._content["layers"].append([asdict(unit) for unit in units])
        self._save()

    def keep(self, count: int) -> None:
        """Drop all but the first `count` layers: the hidden states behind them are lost."""
        self._content["layers"] = self._content["layers"][:count]
        self._save()

    def finish(self, layers: Sequence[Sequence[UnitSensitivity]]) -> None:
        """Replace all layers by the same with the damage of their units."""
        self._content["layers"] = [[asdict(unit) for unit in units] for units in layers]
        self._save()

    def add_round(self, trial: Round) -> None:
        self._content["rounds"].append(asdict(trial))
        self._save()

    def _save(self) -> None:
        if self._path is not None:
            write_json(self._path, {**self._content, "digest": value_digest(self._content)})


def read_stored(folder: Path) -> dict[str, Any] | None:
    """The state in a work folder; None if there is none, or if it is damaged."""
    path = folder / STATE_NAME
    try:
        content = load_json_object(path)
    except QuantError:
        return None
    if content.pop("digest", None) != value_digest(content) or not isinstance(content.get("request"), dict):
        return None
    try:
        TypeAdapter(list[list[UnitSensitivity]]).validate_python(content.get("layers"))
        TypeAdapter(list[Round]).validate_python(content.get("rounds"))
    except ValidationError:
        return None
    return content


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """`--seed was 0, is 1`: the arguments that differ."""
    fields = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"--{name} was {old.get(name, 'not given')}, is {new.get(name, 'not given')}" for name in fields)
