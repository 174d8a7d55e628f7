"""What a run may hold in memory for the sake of speed, and how much there is to run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import QuantError

MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes, but for read_ahead. What is not held is read from disk whenever it is needed.

    hidden: hidden states of all samples, at the boundaries of a layer together. arguments: the samples' other arguments
    of a layer. towers: Linears of the towers. matrix, factor: H of one input, see gram.sketch_rows; what a run finds
    depends on these two alone. read_ahead: whether what comes next is read meanwhile. limit: what the user allows the
    process, from which the others follow; None where nothing was said.
    """

    hidden: int = 96 * MIB
    arguments: int = 32 * MIB
    towers: int = 1280 * MIB
    matrix: int = 448 * MIB  # less than H of the 3B's down_proj takes: three of it would not fit into 3 GiB
    factor: int = 160 * MIB
    read_ahead: bool = True
    limit: int | None = None


DEFAULT_BUDGET = Budget()


@dataclass(frozen=True)
class Extent:
    """What is to run through the layers: tokens of all samples and of the longest, and how many modalities they are of.

    All zero for a data-free run.
    """

    tokens: int = 0
    longest: int = 0
    modalities: int = 0


NO_SAMPLES = Extent()

_SIZE_UNITS = {"": 1, "b": 1} | {
    f"{p}{b}": n**k for k, p in enumerate("kmgt", 1) for b, n in (("b", 1000), ("ib", 1024))
}


def parse_size(text: str) -> int:
    """`4.2GiB`, `900 MB`, `123456` -> bytes: KiB, MiB, GiB are powers of 1024, KB, MB, GB of 1000."""
    spelled = text.strip().lower()
    number = spelled.rstrip("bikmgt ")
    unit = _SIZE_UNITS.get(spelled.removeprefix(number).strip())
    try:
        size = float(number) * (unit or 0)
    except ValueError:
        size = 0.0
    if not 1 <= size < 2**63:
        raise QuantError(f"{text!r} is no size", "give a number of bytes, or e.g. 900MiB, 4.2GiB, 4.2GB")
    return int(size)
