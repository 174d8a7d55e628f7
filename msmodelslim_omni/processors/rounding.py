"""Rounding the Linears that read one input: to the nearest level, on searched clips, or by GPTQ.

Output channels do not depend on one another. Several processes share them out, but for what is rounded to the nearest
level without a search: that takes less time than to hand it round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..arithmetic import QuantizedLinear, quantize_weight
from ..errors import QuantError
from ..gram import Gram
from ..scheme import QuantScheme
from ..team import ALONE, Team
from .gptq import ROWS, Triangle, factorize, round_in_order

# With fewer tokens than this share of a Linear's inputs GPTQ would fit the calibration data instead of the model.
TOKENS_PER_INPUT = 0.125


def enough_for_gptq(gram: Gram) -> bool:
    return gram.tokens >= TOKENS_PER_INPUT * gram.in_features


def triangle_for(schemes: Mapping[str, QuantScheme], gram: Gram | None) -> Triangle | None:
    """The factorized H where a scheme asks for GPTQ and there are tokens enough."""
    asked = any(scheme.weight_method == "gptq" for scheme in schemes.values())
    return factorize(gram) if asked and gram is not None and enough_for_gptq(gram) else None


def round_group(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, QuantScheme],
    gram: Gram | None,
    triangle: Triangle | None,
    team: Team = ALONE,
) -> dict[str, QuantizedLinear]:
    """Quantize weights [out, in] by name. gram, triangle: H of their input, as far as it is known and asked for.

    Clips are searched for what they leave of the output's error: after GPTQ its pivots say so, otherwise the diagonal
    blocks of H, and without data the error of the weight itself.
    """
    pivots = triangle.pivots() if triangle is not None else None

    def importance(scheme: QuantScheme) -> torch.Tensor | None:
        if scheme.group_size is None or (pivots is None and gram is None):
            return None
        if pivots is not None:
            return pivots.view(-1, scheme.group_size)  # [groups, g]
        assert gram is not None
        return gram.diagonal_blocks(scheme.group_size)

    searched = [name for name in weights if schemes[name].weight_method != "minmax"]
    weighed = {scheme: importance(scheme) for scheme in {schemes[name] for name in searched}}

    def rounded(piece: _Piece) -> list[torch.Tensor | None]:
        scheme = schemes[piece.name]
        with _naming(piece.name):
            found = _rounded(weights[piece.name][piece.rows], scheme, weighed[scheme], triangle)
        return [found.qweight, found.scales, found.zeros]

    pieces = [piece for name in searched for piece in _pieces(name, weights[name], team.size)]
    found: dict[str, list[list[torch.Tensor | None]]] = {name: [] for name in searched}
    for piece, tensors in zip(pieces, team.map(rounded, pieces, [piece.cost for piece in pieces]), strict=True):
        found[piece.name].append(tensors)
    quantized = {}
    for name, weight in weights.items():
        if name in found:
            qweight, scales, zeros = (_joined(parts) for parts in zip(*found[name], strict=True))
            assert qweight is not None and scales is not None
            quantized[name] = QuantizedLinear(qweight, scales, schemes[name], zeros)
        else:
            with _naming(name):
                quantized[name] = quantize_weight(weight, schemes[name])
    return quantized


@dataclass(frozen=True)
class _Piece:
    """Consecutive output channels of a Linear. cost: its weights."""

    name: str
    rows: slice
    cost: int


def _pieces(name: str, weight: torch.Tensor, count: int) -> Iterator[_Piece]:
    """At most `count`, of whole blocks of ROWS output channels."""
    out_features, in_features = weight.shape
    blocks = -(-out_features // ROWS)
    step = ROWS * -(-blocks // count)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        yield _Piece(name, rows, (rows.stop - rows.start) * in_features)


def _rounded(
    weight: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor | None, triangle: Triangle | None
) -> QuantizedLinear:
    """In blocks of ROWS output channels, so that pieces of whole blocks have the bits of the whole."""
    blocks = [quantize_weight(block, scheme, importance) for block in torch.split(weight, ROWS)]
    zeros = _joined([block.zeros for block in blocks])
    grid = QuantizedLinear(
        torch.cat([block.qweight for block in blocks]), torch.cat([block.scales for block in blocks]), scheme, zeros
    )
    if triangle is None or scheme.weight_method != "gptq":
        return grid
    return round_in_order(weight.to(torch.float32), grid, triangle)


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@contextmanager
def _naming(linear: str) -> Iterator[None]:
    try:
        yield
    except QuantError as error:
        raise QuantError(f"{linear}.weight: {error.message}", error.hint) from error
