"""The processes of one run under torchrun: each process computes its share of the items, and all get all results.

A team of one process runs plain Python: no packing, no communication, no import of torch.distributed. Results are
returned in the order of the items, so sums over them are bit-identical for every number of processes. The exception is
`all_reduce`, for tensors that are too large to gather: its order of summation depends on the number of processes.

Not here: a scheduler. Every process derives the same assignment of items from their costs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ..errors import QuantError
from .device import process_group_backend, resolve_device, set_current_device
from .packing import pack, unpack

# Limit for a peer that hangs; a peer that exits is noticed at once. Work between two collectives takes far less.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Team:
    """The processes of a run. rank: index of this process in the run. local_rank: its index on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this process owns the output: the lock, the files, the report and the console."""
        return self.rank == 0

    def split(self, costs: Sequence[float]) -> Split:
        """Assign items to processes: in order of falling cost, each to the process with the lowest load so far."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[item] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[item]] += costs[item]
        return Split(self, tuple(owners))

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> list[Any]:
        """Results of function(item) in the order of the items. Each item is computed by one process.

        `function` must not use the team itself. It may return the types that packing.py supports.
        """
        split = self.split([1.0] * len(items) if costs is None else costs)
        return split.gather([function(items[i]) for i in split.local_items])

    def all_gather(self, value: Any) -> list[Any]:
        """Gather one value from every process. Returns the values by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        packed = pack(value)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(packed)
        with _peer_failure_as_stop():
            dist.all_reduce(sizes)
            buffers = [
                packed if r == self.rank else torch.empty(n, dtype=torch.uint8) for r, n in enumerate(sizes.tolist())
            ]
            for rank, buffer in enumerate(buffers):
                dist.broadcast(buffer, src=rank)
        return [unpack(buffer) for buffer in buffers]

    def broadcast(self, value: Any = None) -> Any:
        """Return the leader's value in every process. The other processes' values are ignored."""
        return self.all_gather(value if self.is_leader else None)[0]

    @torch.inference_mode()
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes in place. All processes get the same bits.

        The float32 rounding differs from a sum in one process. For n products the two sums differ by at most
        2 n 2^-24 Σ|products|, and both have the same error bound.
        """
        if self.size > 1:
            import torch.distributed as dist

            with _peer_failure_as_stop():
                dist.all_reduce(tensor)


SINGLE_PROCESS = Team()


@dataclass(frozen=True)
class Split:
    """An assignment of items to the processes of a team. owners: the rank of each item."""

    team: Team
    owners: tuple[int, ...]

    @property
    def local_items(self) -> list[int]:
        """Positions of the items that this process owns."""
        return [item for item, owner in enumerate(self.owners) if owner == self.team.rank]

    def subset(self, items: Sequence[int]) -> Split:
        """The assignment of some of the items, given by position."""
        return Split(self.team, tuple(self.owners[item] for item in items))

    def gather(self, values: list[Any]) -> list[Any]:
        """Values of all items in their order. values: one per local item."""
        if self.team.size == 1:
            return values
        return self.interleave(self.team.all_gather(values))

    def interleave(self, by_rank: Sequence[Sequence[Any]]) -> list[Any]:
        """Merge one list of values per rank into the order of the items."""
        iterators = [iter(values) for values in by_rank]
        return [next(iterators[owner]) for owner in self.owners]


UNSPLIT = Split(SINGLE_PROCESS, ())  # one process, any number of items


# --- start and end of a team ---------------------------------------------------------------------------------


@contextmanager
def open_team(device: str) -> Iterator[Team]:
    """Join the team of processes that torchrun started, or make a team of one. device: the requested device.

    An error is reported once, by the process in which it occurs; the others exit silently with status 1. If a process
    is killed, one of the remaining processes reports that.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://"))
        # A program may quantize several times: a new prefix hides the keys that an earlier team left in the store.
        store = PrefixStore(f"run {store.add(f'runs of {rank}', 1)}", store)
    except RuntimeError as error:
        raise _peer_stopped_error() from error
    team = Team(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    previous_handler = signal.signal(signal.SIGTERM, _on_sigterm)  # torchrun terminates the remaining processes
    try:
        chosen = resolve_device(device, team.local_rank).torch
        set_current_device(chosen)
        with _peer_failure_as_stop():
            dist.init_process_group(
                process_group_backend(chosen, shared=":" in device),
                store=store,
                rank=rank,
                world_size=size,
                timeout=_TIMEOUT,
            )
        yield team
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, previous_handler)
    except (_PeerStopped, QuantError, OSError, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _claim_error_report(store):
            raise SystemExit(1) from None
        if isinstance(error, _PeerStopped):
            raise _peer_stopped_error() from error
        raise


def _claim_error_report(store: Any) -> bool:
    """Whether this process is the first of the team to call this function, and so reports the error."""
    try:
        return int(store.add("error reports", 1)) == 1
    except RuntimeError:  # the launcher, which hosts the store, has exited too
        return True


@contextmanager
def _peer_failure_as_stop() -> Iterator[None]:
    """Convert the RuntimeError that a collective raises when a peer has exited into _PeerStopped."""
    try:
        yield
    except RuntimeError as error:
        raise _PeerStopped from error


def _on_sigterm(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _PeerStopped


def _peer_stopped_error() -> QuantError:
    return QuantError("another process of this run stopped", "run the same command again to resume")


class _PeerStopped(BaseException):
    """Another process has exited. Not a QuantError, which callers would take for an error of their own work."""
