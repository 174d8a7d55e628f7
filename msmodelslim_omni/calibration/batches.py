"""Which samples run through a layer joined, so that a Linear multiplies the tokens of all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..models import JOINED_TOKENS


def join_batches(lengths: Sequence[int], alone: Collection[int]) -> list[range]:
    """Batches of consecutive samples, at most JOINED_TOKENS together; those in `alone`, and longer ones, by themselves.

    They depend on nothing else, so that results are the same for every number of processes.
    """
    batches: list[range] = []
    tokens = JOINED_TOKENS
    for position, length in enumerate(lengths):
        tokens += length
        if position in alone or tokens > JOINED_TOKENS:
            batches.append(range(position, position + 1))
            tokens = JOINED_TOKENS if position in alone else length
        else:
            batches[-1] = range(batches[-1].start, position + 1)
    return batches
