"""Rounding the Linears that read one input: to the nearest level, on searched clips, or by GPTQ.

Output channels do not depend on one another. Several processes share them out, but for what is rounded to the nearest
level without a search: that takes less time than to hand it round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..errors import QuantError
from ..numerics import QuantizedLinear, QuantScheme, quantize_weight
from ..runtime import SINGLE_PROCESS, Split, Team
from ..statistics import Gram
from .gptq import (
    Triangle,
    factorize,
    parts,
    round_in_order,
)

# With fewer tokens than this share of a Linear's inputs GPTQ would fit the calibration data instead of the model.
TOKENS_PER_INPUT = 0.125


def enough_for_gptq(gram: Gram) -> bool:
    return gram.tokens >= TOKENS_PER_INPUT * gram.in_features


def triangle_for(schemes: Mapping[str, QuantScheme], gram: Gram | None) -> Triangle | None:
    """The factorized H where a scheme asks for GPTQ and there are tokens enough."""
    asked = any(scheme.weight_method == "gptq" for scheme in schemes.values())
    return factorize(gram) if asked and gram is not None and enough_for_gptq(gram) else None


def round_group(
    weights: Iterable[tuple[str, torch.Tensor]],
    schemes: Mapping[str, QuantScheme],
    gram: Gram | None,
    triangle: Triangle | None,
    team: Team = SINGLE_PROCESS,
) -> dict[str, QuantizedLinear]:
    """Quantize weights [out, in], each with its name, one after the other.

    gram, triangle: H of their input, as far as it is known and asked for.

    Clips are searched for what they leave of the output's error: after GPTQ its pivots say so, otherwise the diagonal
    blocks of H, and without data the error of the weight itself.
    """
    found: dict[str, QuantizedLinear | int] = {}  # how many blocks, where these are shared out
    owners: list[int] = []
    mine: list[list[torch.Tensor | None]] = []
    for name, weight in weights:
        with _naming(name):
            if schemes[name].weight_method == "minmax":
                found[name] = quantize_weight(weight, schemes[name])
                continue
            blocks = [weight[rows] for rows in parts(weight)]
            whose = [(len(owners) + block) % team.size for block in range(len(blocks))]
            own = [block for block, owner in zip(blocks, whose, strict=True) if owner == team.rank]
            rounded = rounded_parts(own, schemes[name], _importance(schemes[name], gram, triangle), triangle)
            mine += [[part.qweight, part.scales, part.zeros] for part in rounded]
            found[name] = len(blocks)
            owners += whose
    everyones = iter(Split(team, tuple(owners)).gather(mine))
    return {
        name: _of_blocks([next(everyones) for _ in range(there)], schemes[name]) if isinstance(there, int) else there
        for name, there in found.items()
    }


def _importance(scheme: QuantScheme, gram: Gram | None, triangle: Triangle | None) -> torch.Tensor | None:
    """What a clip search weighs errors by: see quantize_weight."""
    if scheme.group_size is None:
        return None
    if triangle is not None:
        return triangle.pivots().view(-1, scheme.group_size)  # [groups, g]
    return gram.diagonal_blocks(scheme.group_size) if gram is not None else None


def rounded_parts(
    blocks: Sequence[torch.Tensor],
    scheme: QuantScheme,
    importance: torch.Tensor | None,
    triangle: Triangle | None,
) -> list[QuantizedLinear]:
    """gptq.py's parts of a weight, each by itself: they have the same bits whichever of them are here."""
    grids = [quantize_weight(block, scheme, importance) for block in blocks]
    if triangle is None or scheme.weight_method != "gptq":
        return grids
    return [round_in_order(block, grid, triangle) for block, grid in zip(blocks, grids, strict=True)]


def _of_blocks(blocks: Sequence[Sequence[torch.Tensor | None]], scheme: QuantScheme) -> QuantizedLinear:
    qweight, scales, zeros = (
        torch.cat([part for part in column if part is not None]) if column[0] is not None else None
        for column in zip(*blocks, strict=True)
    )
    assert qweight is not None and scales is not None
    return QuantizedLinear(qweight, scales, scheme, zeros)


@contextmanager
def _naming(linear: str) -> Iterator[None]:
    try:
        yield
    except QuantError as error:
        raise QuantError(f"{linear}.weight: {error.message}", error.hint) from error
