"""The manifest of a work folder: which units of the outputs are finished, with their checksums.

Every change is written atomically and synced, so that a killed run finds the last state. A digest detects damage.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import value_digest
from ..formats import write_json
from ..storage import load_json_object


class Manifest:
    """The state of one run. Several threads may enter units, each thread its own."""

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        """state: that of a stopped run, or `new_state`."""
        self.path = path
        self._state = state
        self._entering = threading.Lock()
        self.save()

    def save(self) -> None:
        write_json(self.path, sealed(self._state))

    def remember(self, key: str, value: Any) -> Any:
        """The value that the first run stored under `key`; stores `value` if there is none."""
        if key not in self._state:
            self._state[key] = value
            self.save()
        return self._state[key]

    def recall(self, key: str) -> Any:
        """What `remember` stored under `key`, or None."""
        return self._state.get(key)

    def replace(self, key: str, value: Any) -> None:
        """Store a new value under `key`."""
        self._state[key] = value
        self.save()

    # --- units ---

    def enter(self, unit: str, checksums: Mapping[str, int], record: dict[str, Any] | None = None) -> None:
        """Record that a unit is on disk. checksums: of its bytes, by format. record: what the report says about it."""
        with self._entering:
            self._state["units"][unit] = {"checksums": dict(checksums), "record": record}
            self.save()

    def has(self, unit: str) -> bool:
        """Whether a unit is finished."""
        return unit in self._state["units"]

    def checksums(self, unit: str) -> dict[str, int] | None:
        """The checksums of a finished unit, otherwise None."""
        entry = self._state["units"].get(unit)
        return entry["checksums"] if entry else None

    def record(self, unit: str) -> dict[str, Any]:
        """The record of a finished unit."""
        record: dict[str, Any] = self._state["units"][unit]["record"]
        return record

    # --- the move into place ---

    @property
    def replaced(self) -> list[str]:
        """Names in save_path that --overwrite replaces: those that were there when the run began."""
        return list(self._state.get("replaced", []))

    @property
    def committing(self) -> list[str]:
        """The savers whose finished outputs are being moved into place; empty before that."""
        return list(self._state.get("committing", []))

    def begin_commit(self, savers: list[str]) -> None:
        self._state["committing"] = savers
        self.save()


def new_state(fingerprint: Mapping[str, str], replaced: list[str], flags: Mapping[str, str]) -> dict[str, Any]:
    """The state of a run that has finished nothing."""
    return {"fingerprint": dict(fingerprint), "flags": dict(flags), "units": {}, "replaced": replaced}


def read_state(path: Path, overwrite: bool) -> dict[str, Any]:
    """The state that a stopped run left; empty if there is none.

    A damaged manifest raises QuantError; with `overwrite` it counts as none.
    """
    if not path.exists():
        return {}
    try:
        state = load_json_object(path)
    except QuantError as error:
        if overwrite:
            return {}
        raise QuantError(error.message, "pass --overwrite to start again") from error
    if state.pop("digest", None) == value_digest(state) and _is_sound(state):
        return state
    if overwrite:
        return {}
    raise QuantError(f"{path}: is damaged", "pass --overwrite to start again")


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a digest, which detects damage."""
    return {**state, "digest": value_digest(state)}


def _is_sound(state: dict[str, Any]) -> bool:
    """Whether the state has the expected types, and all names to delete or move are plain names inside save_path."""
    fingerprint, units, flags = state.get("fingerprint"), state.get("units"), state.get("flags")
    if not (isinstance(fingerprint, dict) and isinstance(units, dict) and isinstance(flags, dict)):
        return False
    if not all(isinstance(unit, dict) and isinstance(unit.get("checksums"), dict) for unit in units.values()):
        return False
    lists = [state.get("replaced", []), state.get("committing", [])]
    if not all(isinstance(names, list) for names in lists):
        return False
    return all(isinstance(n, str) and Path(n).name == n and n not in ("", "..") for names in lists for n in names)
