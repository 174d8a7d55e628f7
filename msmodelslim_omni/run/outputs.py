"""All output formats of a run, written side by side. A finished unit goes into every format and into the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..formats import FORMATS, OutLinear, Output, OutputJob, OutTensor
from .workspace import Workspace

Items = Sequence[OutTensor | OutLinear]


class Outputs:
    """The unfinished outputs in the work folder. A unit is a named set of the job's items, for example a layer."""

    def __init__(self, job: OutputJob, part_file_sizes: Mapping[str, int], workspace: Workspace) -> None:
        """part_file_sizes: GB per shard, by format."""
        self._manifest = workspace.manifest
        self._outputs = {
            name: Output(FORMATS[name], job, workspace.output_folder(name), size)
            for name, size in part_file_sizes.items()
        }

    def save(self, unit: str, items: Items, record: dict[str, Any] | None = None) -> None:
        """Write the items in every format. Once they are on disk, enter the unit and its record in the manifest."""
        self.save_and_free(unit, items, list(items), record, lambda item: None)

    def save_and_free(
        self,
        unit: str,
        planned: Items,
        items: list[OutTensor | OutLinear],
        record: dict[str, Any] | None,
        freed: Callable[[OutTensor | OutLinear], None],
    ) -> None:
        """The same, but each item is taken from the list once it is written in every format, and given to `freed`.

        planned: the same items without contents.
        """
        checksums, last = {}, len(self._outputs) - 1
        for number, (name, output) in enumerate(self._outputs.items()):
            checksums[name] = output.put(items if number < last else _taken(items, freed))
        for output in self._outputs.values():
            output.sync(planned)
        self._manifest.enter(unit, checksums, record)

    def is_whole(self, unit: str, items: Items) -> bool:
        """Whether the unit is in the manifest and its bytes still match the checksums."""
        checksums = self._manifest.checksums(unit)
        return checksums is not None and checksums == {n: output.crc(items) for n, output in self._outputs.items()}

    def finish(self) -> None:
        """Turn each folder into a checkpoint, once all units are saved."""
        for output in self._outputs.values():
            output.finish()

    def nbytes(self) -> dict[str, int]:
        """Bytes of the tensors, by format."""
        return {name: output.nbytes for name, output in self._outputs.items()}

    def tensors(self) -> list[OutTensor]:
        """The tensors of the first format."""
        return next(iter(self._outputs.values())).tensors

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._outputs.values():
            output.abandon()


def _taken(
    items: list[OutTensor | OutLinear], freed: Callable[[OutTensor | OutLinear], None]
) -> Iterator[OutTensor | OutLinear]:
    """The items, each taken from the list; `freed` gets it once the next one is asked for."""
    items.reverse()
    while items:
        item = items.pop()
        yield item
        freed(item)
