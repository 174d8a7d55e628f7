"""The processes of one run, as torchrun starts them: each works out its share, and all hold all results.

A team of one is plain Python: nothing is packed, sent or waited for, and torch.distributed is not imported. Results
come back in the order of the items, so that whoever adds them up gets the same bits whatever the number of processes;
`add_up` alone, for what is too large to be sent piece by piece, adds in another order.

Left out on purpose: a scheduler. Who works out what follows from the costs alone, and every process knows it.
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
from .device import backends, resolve_device, use_device
from .packing import pack, unpack

# For a process that hangs; one that ends is noticed at once. No share of work between two exchanges takes so long.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Team:
    """The processes of a run. rank: which of `size` this is; place: its number on its machine, and so its card."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this process owns the output: its lock, its files, the report and what is said."""
        return self.rank == 0

    def split(self, costs: Sequence[float]) -> Split:
        """Share out items of these costs: the costliest first, each to the process with the least so far."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[item] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[item]] += costs[item]
        return Split(self, tuple(owners))

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], costs: Sequence[float] | None = None
    ) -> list[Any]:
        """function(item) of every item, in their order, each worked out by one process. It must not map itself.

        What it returns: see packing.py.
        """
        split = self.split([1.0] * len(items) if costs is None else costs)
        return split.gather([function(items[i]) for i in split.mine])

    def all_gather(self, value: Any) -> list[Any]:
        """The values that all processes give, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        mine = pack(value)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        with _as_one_fault():
            dist.all_reduce(sizes)
            packed = [
                mine if r == self.rank else torch.empty(n, dtype=torch.uint8) for r, n in enumerate(sizes.tolist())
            ]
            for rank, buffer in enumerate(packed):
                dist.broadcast(buffer, src=rank)
        return [unpack(buffer) for buffer in packed]

    def broadcast(self, value: Any = None) -> Any:
        """The value that the leading process gives; that of the others counts for nothing."""
        return self.all_gather(value if self.is_leader else None)[0]

    @torch.inference_mode()
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Make a tensor the sum of those of all processes, in place; the same bits in every process.

        In float32 the partial sums are rounded where one process would not round them, and the other way round. Of n
        products the two sums differ by at most 2 n 2^-24 Σ|products|, and each is as near to the true sum.
        """
        if self.size > 1:
            import torch.distributed as dist

            with _as_one_fault():
                dist.all_reduce(tensor)


SINGLE_PROCESS = Team()


@dataclass(frozen=True)
class Split:
    """Items shared out over a team. owners: the rank of each."""

    team: Team
    owners: tuple[int, ...]

    @property
    def mine(self) -> list[int]:
        """Positions of this process' items."""
        return [item for item, owner in enumerate(self.owners) if owner == self.team.rank]

    def of(self, items: Sequence[int]) -> Split:
        """Some of the items, by position."""
        return Split(self.team, tuple(self.owners[item] for item in items))

    def gather(self, values: list[Any]) -> list[Any]:
        """Those of all items in their order, of the values of this process' items."""
        if self.team.size == 1:
            return values
        return self.interleave(self.team.all_gather(values))

    def interleave(self, by_rank: Sequence[Sequence[Any]]) -> list[Any]:
        """The values of all items in their order, of lists by rank."""
        left = [iter(values) for values in by_rank]
        return [next(left[owner]) for owner in self.owners]


UNSPLIT = Split(SINGLE_PROCESS, ())  # of one process, whatever the items


# --- meeting and parting -------------------------------------------------------------------------------------


@contextmanager
def open_team(device: str) -> Iterator[Team]:
    """The team that torchrun started this process in, else one of one. device: what the run is asked to compute on.

    A fault is told once: by the process that has it, while the others end without a word. Where one was killed, one of
    those that are left tells so.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://"))
        # A program may quantize several times: what one team has left in the store is nothing to the next.
        store = PrefixStore(f"run {store.add(f'runs of {rank}', 1)}", store)
    except RuntimeError as error:
        raise _alone() from error
    team = Team(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    before = signal.signal(signal.SIGTERM, _stop)  # torchrun ends the processes that are left
    try:
        chosen = resolve_device(device, team.local_rank).torch
        use_device(chosen)
        with _as_one_fault():
            dist.init_process_group(
                backends(chosen, shared=":" in device), store=store, rank=rank, world_size=size, timeout=_PATIENCE
            )
        yield team
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)
    except (_Stopped, QuantError, OSError, KeyboardInterrupt) as fault:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _is_first_to_tell(store):
            raise SystemExit(1) from None
        if isinstance(fault, _Stopped):
            raise _alone() from fault
        raise


def _is_first_to_tell(store: Any) -> bool:
    try:
        return int(store.add("told", 1)) == 1
    except RuntimeError:  # the launcher, which keeps the store, is gone too
        return True


@contextmanager
def _as_one_fault() -> Iterator[None]:
    """What an exchange raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _Stopped from error


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def _alone() -> QuantError:
    return QuantError("another process of this run stopped", "run the same command again to go on")


class _Stopped(BaseException):
    """Another process is gone. Not a QuantError, which would be taken for a fault of what is at work just then."""
