"""The work folder inside save_path: unfinished outputs, a manifest, a lock; and the move of the outputs into place.

Every unit in the manifest (a layer, or a piece of the rest) is complete: it was synced before it was entered, with
checksums that detect later damage. A killed run resumes after the last finished layer. A work folder of other inputs
is refused with the fields that differ, because its layers are not what this run would compute.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import QuantError
from ..files import WORK_FOLDER
from .differences import command_of, differences
from .manifest import Manifest, new_state, read_state
from .save_path import foreign_entries, move_output, output_folder, remove, stored_fingerprint


class Workspace:
    """The work folder of one run, locked for it."""

    def __init__(
        self,
        save_path: Path,
        fingerprint: Mapping[str, str],
        *,
        overwrite: bool,
        flags: Mapping[str, str] | None = None,
    ) -> None:
        """Create the work folder, or resume from it. Raises QuantError if save_path cannot be used, with the reason.

        flags: of the command, for the message of a later run that differs.
        """
        self.save_path = save_path
        self.folder = save_path / WORK_FOLDER
        self.fingerprint = dict(fingerprint)
        manifest_path = self.folder / "manifest.json"
        state = read_state(manifest_path, overwrite)
        resumable = state.get("fingerprint") == dict(fingerprint)
        occupants = sorted(e.name for e in save_path.iterdir() if e.name != WORK_FOLDER) if save_path.is_dir() else []
        if not resumable and not overwrite:
            self._require_free(state, fingerprint, occupants, flags or {})
        foreign = [] if resumable or state.get("committing") else foreign_entries(save_path, occupants)
        if foreign:
            raise QuantError(
                f"save_path {str(save_path)!r} holds {foreign[0]!r}, which is not an output of this tool;"
                " --overwrite will not delete it",
                "choose another folder, or empty this one yourself",
            )
        self._created_save_path, self._discarded = not save_path.exists(), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire_lock()
        except OSError as error:
            raise QuantError(
                f"save_path {str(save_path)!r} cannot be written: {error.strerror or error}",
                "choose another folder",
            ) from error
        if not resumable:
            for entry in self.folder.iterdir():
                if entry.name != "lock":
                    remove(entry)
            state = new_state(fingerprint, occupants, flags or {})
        self.manifest = Manifest(manifest_path, state)

    def _require_free(
        self, state: dict[str, Any], fingerprint: Mapping[str, str], occupants: list[str], flags: Mapping[str, str]
    ) -> None:
        if state:
            command = command_of(state["flags"], str(self.save_path))
            raise QuantError(
                f"{self.folder} belongs to another run:"
                f" {differences(state['fingerprint'], fingerprint, state['flags'], flags)}",
                f"finish that run with {f'`{command}`' if command else 'its own command'},"
                " or pass --overwrite to start again",
            )
        if occupants:
            candidates = [self.save_path, *(self.save_path / name for name in occupants)]
            finished = next((found for folder in candidates if (found := stored_fingerprint(folder))), {})
            changed = differences(finished, fingerprint, {}, {}) if finished else ""
            of_run = f": it holds an output of another run: {changed}" if changed else ""
            raise QuantError(
                f"save_path {str(self.save_path)!r} is not empty{of_run}",
                "choose another, or pass --overwrite",
            )

    def _acquire_lock(self) -> IO[str]:
        """The kernel releases this lock when the process ends, however it ends."""
        lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise QuantError(f"another run is writing to {str(self.save_path)!r}", "wait for it, or stop it") from error
        return lock

    # --- the outputs ---

    def output_folder(self, saver: str) -> Path:
        """The folder of an unfinished output."""
        return self.folder / "output" / saver

    def place(self, saver: str, savers: list[str]) -> Path:
        """The final folder of an output."""
        return output_folder(self.save_path, saver, savers)

    def commit(self, savers: list[str]) -> None:
        """Move the finished outputs into place and remove the work folder.

        Only now --overwrite deletes what it replaces: what was there when the run began, nothing that came later. The
        manifest records the first move, so that a killed run only completes the moves.
        """
        if not self.manifest.committing:
            self._remove_replaced()
            self.manifest.begin_commit(savers)
        for saver in savers:
            move_output(self.output_folder(saver), self.place(saver, savers))
        for entry in self.folder.iterdir():
            if entry != self.manifest.path:  # the manifest goes last: a kill in between leaves a known folder
                remove(entry)
        remove(self.folder)

    def _remove_replaced(self) -> None:
        # config.json first: after that the rest of the old output is no longer a checkpoint.
        for name in sorted(self.manifest.replaced, key=lambda name: name != "config.json"):
            if Path(name).name == name and name not in ("", ".", "..", WORK_FOLDER):
                remove(self.save_path / name)

    # --- the end ---

    def discard(self) -> None:
        """Delete the work folder on close: the run could never be resumed."""
        self._discarded = True

    def close(self) -> None:
        """Release the lock."""
        try:
            if self._discarded:
                with suppress(OSError):  # leftovers do no harm; the error that caused this is the one to report
                    remove(self.folder)
                    if self._created_save_path:
                        self.save_path.rmdir()
        finally:
            self._lock.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
