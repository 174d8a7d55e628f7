"""The work folder inside save_path: the outputs in the making, a manifest, a lock; and the move to the finished place.

Whatever is in the manifest is whole: the units of an output (a layer, a piece of the rest) are synced before they are
entered, with checksums that tell whether they still are. A killed run goes on after the last layer entered. A folder
made from other inputs is refused, naming what differs, since its layers would not be what this run computes.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import QuantError
from ..files import value_digest
from ..formats import write_json
from ..report import human_bytes
from ..storage import load_json_object

WORK_FOLDER = ".msmodelslim_work"
REPORT_NAME = "quant_report.json"  # every output holds it


class Workspace:
    """The work folder of one run, locked for it."""

    def __init__(self, save_path: Path, fingerprint: Mapping[str, str], *, overwrite: bool) -> None:
        """Create or resume. Raises QuantError where save_path cannot be used, with what stands against it."""
        self.save_path = save_path
        self.folder = save_path / WORK_FOLDER
        manifest = self._read_manifest(overwrite)
        resumable = manifest.get("fingerprint") == dict(fingerprint)
        occupants = sorted(e.name for e in save_path.iterdir() if e.name != WORK_FOLDER) if save_path.is_dir() else []
        if not resumable and not overwrite:
            self._refuse_what_is_there(manifest, fingerprint, occupants)
        foreign = [] if resumable or manifest.get("committing") else _not_ours(save_path, occupants)
        if foreign:
            raise QuantError(
                f"save_path {str(save_path)!r} holds {foreign[0]!r}, which is no output of this tool;"
                " --overwrite will not delete it",
                "choose another folder, or empty this one yourself",
            )
        self._made_save_path, self._discarded = not save_path.exists(), False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise QuantError(
                f"save_path {str(save_path)!r} cannot be written: {error.strerror or error}",
                "choose another folder",
            ) from error
        if not resumable:
            self._clear()
            manifest = {"fingerprint": dict(fingerprint), "units": {}, "replaced": occupants}
        self._manifest: dict[str, Any] = manifest
        self._entering = threading.Lock()  # several threads write, each units of its own
        self._save_manifest()

    def _refuse_what_is_there(
        self, manifest: dict[str, Any], fingerprint: Mapping[str, str], occupants: list[str]
    ) -> None:
        if manifest:
            raise QuantError(
                f"{self.folder} was made by another run: {_difference(manifest.get('fingerprint', {}), fingerprint)}",
                "finish that run with its own command, or pass --overwrite to begin anew",
            )
        if occupants:
            raise QuantError(f"save_path {str(self.save_path)!r} is not empty", "choose another, or pass --overwrite")

    # --- state ---

    def _read_manifest(self, overwrite: bool) -> dict[str, Any]:
        if not self._manifest_path.exists():
            return {}
        try:
            manifest = load_json_object(self._manifest_path)
        except QuantError as error:
            if overwrite:
                return {}
            raise QuantError(error.message, "pass --overwrite to begin anew") from error
        if manifest.pop("digest", None) == value_digest(manifest) and _is_sound(manifest):
            return manifest
        if overwrite:
            return {}
        raise QuantError(f"{self._manifest_path}: is damaged", "pass --overwrite to begin anew")

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    def _save_manifest(self) -> None:
        write_json(self._manifest_path, sealed(self._manifest))

    def _locked(self) -> IO[str]:
        """The kernel drops this lock when the process ends, however it ends."""
        lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise QuantError(f"another run is writing to {str(self.save_path)!r}", "wait for it, or stop it") from error
        return lock

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                remove(entry)

    def _remove_replaced(self) -> None:
        # config.json first: what is left of the old output is then no checkpoint any more.
        for name in sorted(self._manifest.get("replaced", []), key=lambda name: name != "config.json"):
            if Path(name).name == name and name not in ("", ".", "..", WORK_FOLDER):
                remove(self.save_path / name)

    def remember(self, key: str, value: Any) -> Any:
        """The value stored under `key` by the run that began this folder; `value` if there is none yet."""
        if key not in self._manifest:
            self._manifest[key] = value
            self._save_manifest()
        return self._manifest[key]

    # --- units ---

    def enter(self, unit: str, checksums: Mapping[str, int], record: dict[str, Any] | None = None) -> None:
        """Say that a unit of the output is on the disk. checksums: of its bytes, by format."""
        with self._entering:
            self._manifest["units"][unit] = {"checksums": dict(checksums), "record": record}
            self._save_manifest()

    def checksums(self, unit: str) -> dict[str, int] | None:
        """Those of a unit that was entered, else None."""
        entry = self._manifest["units"].get(unit)
        return entry["checksums"] if entry else None

    def record(self, unit: str) -> dict[str, Any]:
        """What was entered with a unit."""
        record: dict[str, Any] = self._manifest["units"][unit]["record"]
        return record

    # --- the end ---

    def output_folder(self, saver: str) -> Path:
        return self.folder / "output" / saver

    def is_committing(self) -> bool:
        """Whether a stopped run had finished its output and only the move to its place is left."""
        return bool(self._manifest.get("committing"))

    def committed_savers(self) -> list[str]:
        """The savers of the output that is being moved."""
        return list(self._manifest["committing"])

    def place(self, saver: str, savers: list[str]) -> Path:
        """Where a saver's output belongs: save_path, or its folder there if there are several."""
        return self.save_path / saver if len(savers) > 1 else self.save_path

    def commit(self, savers: list[str]) -> None:
        """Move the finished output to its place and remove the work folder.

        Only now is what --overwrite replaces deleted: what lay there when the run began, nothing that came since.
        From the first move on the manifest says so, and a killed run only finishes the move. config.json goes
        last: until then no loader takes the folder for a checkpoint.
        """
        if not self.is_committing():
            self._remove_replaced()
            self._manifest["committing"] = savers
            self._save_manifest()
        for saver in savers:
            _move_into(self.output_folder(saver), self.place(saver, savers))
        for entry in self.folder.iterdir():
            if entry != self._manifest_path:  # it goes last, so that a kill in between leaves a folder that is known
                remove(entry)
        remove(self.folder)

    def discard(self) -> None:
        """Leave nothing behind when this is closed: what was begun could not be gone on with."""
        self._discarded = True

    def close(self) -> None:
        """Release the lock."""
        try:
            if self._discarded:
                with suppress(OSError):  # what remains stands in nobody's way; the fault behind it is what is told
                    remove(self.folder)
                    if self._made_save_path:
                        self.save_path.rmdir()
        finally:
            self._lock.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With a digest by which damage is noticed."""
    return {**manifest, "digest": value_digest(manifest)}


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether it has what is read of it, and the names to be deleted or moved are of entries of save_path."""
    fingerprint, units = manifest.get("fingerprint"), manifest.get("units")
    if not isinstance(fingerprint, dict) or not isinstance(units, dict):
        return False
    if not all(isinstance(unit, dict) and isinstance(unit.get("checksums"), dict) for unit in units.values()):
        return False
    lists = [manifest.get("replaced", []), manifest.get("committing", [])]
    if not all(isinstance(names, list) for names in lists):
        return False
    return all(isinstance(n, str) and Path(n).name == n and n not in ("", "..") for names in lists for n in names)


def remove(entry: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _move_into(source: Path, target: Path) -> None:
    if not source.is_dir():
        return  # moved by the run that was killed here
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == "config.json", entry.name)):
        entry.replace(target / entry.name)
    source.rmdir()


def _not_ours(folder: Path, occupants: list[str]) -> list[str]:
    """What lies in a folder that an output of ours does not account for; nothing, if the folder is itself an output."""
    if (folder / REPORT_NAME).is_file():
        return []
    return [name for name in occupants if not (folder / name / REPORT_NAME).is_file()]


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """`seed was 0, is 1; recipe was ..., is ...` for every field that differs."""
    fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
    return "; ".join(f"{field} was {old.get(field)}, is {new.get(field)}" for field in fields)


def check_save_path(save_path: Path, model_path: Path) -> None:
    """Refuse a save_path that is a file, or that overlaps the checkpoint it would be made from."""
    target, source = save_path.resolve(), model_path.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise QuantError(
            f"save_path {str(save_path)!r} and model_path {str(model_path)!r} lie inside one another",
            "choose a folder beside the checkpoint",
        )
    for existing in (target, *target.parents):
        if existing.exists():
            if not existing.is_dir():
                raise QuantError(f"save_path {str(save_path)!r}: {str(existing)!r} is a file", "choose a folder")
            return


def check_disk_space(save_path: Path, needed: int) -> None:
    """Refuse to start where the disk cannot hold `needed` bytes; what a stopped run has written counts."""
    # By blocks: a file in the making has its full length from the start.
    there = sum(f.stat().st_blocks * 512 for f in (save_path / WORK_FOLDER).rglob("*") if f.is_file())
    existing = next(path for path in (save_path, *save_path.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    free = usage.free if usage.total else needed  # no disk at all, such as /proc: writing will say why
    if needed > free + there:
        raise QuantError(
            f"{str(save_path)!r} needs {human_bytes(needed)}, free are {human_bytes(free + there)}",
            "free some space, choose another disk, or write one format only (--save_format)",
        )
