"""All formats of a run, written side by side: a finished unit goes into every one of them, and into the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import FORMATS, OutLinear, Output, OutputJob, OutTensor
from .workspace import Workspace

Items = Sequence[OutTensor | OutLinear]


class Outputs:
    """The formats' folders inside the work folder. A unit is some of the job's items under a name, e.g. a layer."""

    def __init__(self, job: OutputJob, part_file_sizes: Mapping[str, int], workspace: Workspace) -> None:
        """part_file_sizes: GB of a shard, by format."""
        self._workspace = workspace
        self._outputs = {
            name: Output(FORMATS[name], job, workspace.output_folder(name), size)
            for name, size in part_file_sizes.items()
        }

    def save(self, unit: str, items: Items, record: dict[str, Any] | None = None) -> None:
        """Put the items into every format; once they are on the disk, enter the unit and its record."""
        checksums = {name: output.put(items) for name, output in self._outputs.items()}
        for output in self._outputs.values():
            output.sync(items)
        self._workspace.enter(unit, checksums, record)

    def is_whole(self, unit: str, items: Items) -> bool:
        """Whether the unit was entered and its bytes are still those."""
        checksums = self._workspace.checksums(unit)
        return checksums is not None and checksums == {n: output.crc(items) for n, output in self._outputs.items()}

    def finish(self) -> None:
        """All units are saved: make each folder a checkpoint."""
        for output in self._outputs.values():
            output.finish()

    def nbytes(self) -> dict[str, int]:
        """Bytes of the tensors, by format."""
        return {name: output.nbytes for name, output in self._outputs.items()}

    def tensors(self) -> list[OutTensor]:
        """Those of the first format."""
        return next(iter(self._outputs.values())).tensors

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._outputs.values():
            output.abandon()
