"""Memory budget of a run and size of its sample set."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes that may be kept in memory. Tensors that do not fit the budget are re-read from disk.

    hidden: hidden states of all samples, at the input and output of a layer together. arguments: the samples' other
    layer arguments. towers: Linears of the towers. matrix, factor: H of one input, see gram.choose_form; the last bits
    of a run's results depend on these two fields only. read_ahead: whether to read the next layer during compute.
    limit: the process' memory limit set by the user, from which the other fields are derived; None if not set.
    """

    hidden: int = 96 * MIB
    arguments: int = 32 * MIB
    towers: int = 1280 * MIB
    matrix: int = 1536 * MIB  # H of the 7B model's down_proj, 18944 wide, takes 1369 MiB
    factor: int = 768 * MIB  # half as many tokens as the 7B model's down_proj has inputs; more are a matrix
    read_ahead: bool = True
    limit: int | None = None


DEFAULT_BUDGET = Budget()


@dataclass(frozen=True)
class Extent:
    """Size of the sample set: tokens of all samples, tokens of the longest sample, number of modalities.

    media: bytes that the media of one sample take while they are decoded and made tokens, at most. All fields are zero
    for a data-free run.
    """

    tokens: int = 0
    longest: int = 0
    modalities: int = 0
    media: int = 0


NO_SAMPLES = Extent()
