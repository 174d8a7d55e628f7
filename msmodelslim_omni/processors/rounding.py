"""Round the Linears that read one input: to the nearest level, with a clip search, or by GPTQ.

Output channels are independent, so several processes share them. Every process rounds to the nearest level (without a
search) itself, because this takes less time than sending the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from ..errors import QuantError
from ..numerics import QuantizedLinear, QuantScheme, WeightChecks, quantize_weight
from ..runtime import SINGLE_PROCESS, Split, Team
from ..statistics import Gram
from .gptq import (
    CholeskyFactor,
    NotFactorizable,
    factorize,
    round_in_order,
    split_into_parts,
)

# The fewest tokens per input with which GPTQ was measured: it had less error than the clip search and plain rounding.
TOKENS_PER_INPUT = 1 / 32


def tokens_for_gptq(in_features: int) -> float:
    return TOKENS_PER_INPUT * in_features


def has_enough_tokens(gram: Gram) -> bool:
    return gram.tokens >= tokens_for_gptq(gram.in_features)


def cholesky_for_gptq(schemes: Mapping[str, QuantScheme], gram: Gram | None) -> CholeskyFactor | None:
    """Factorize H if a scheme uses GPTQ and there are enough tokens. None if not, and if H cannot be factorized."""
    uses_gptq = any(scheme.weight_method == "gptq" for scheme in schemes.values())
    if not uses_gptq or gram is None or not has_enough_tokens(gram):
        return None
    with suppress(NotFactorizable):
        return factorize(gram)
    return None


def round_group(
    weights: Iterable[tuple[str, torch.Tensor]],
    schemes: Mapping[str, QuantScheme],
    gram: Gram | None,
    cholesky: CholeskyFactor | None,
    team: Team = SINGLE_PROCESS,
    checks: WeightChecks | None = None,
) -> dict[str, QuantizedLinear]:
    """Quantize named weights [out, in] that read one input, one after the other.

    gram, cholesky: H of the input and its Cholesky factor, if known and needed.
    checks: collects the limits of weights on a card, and the caller raises their faults; by default they are raised.

    The clip search minimizes the output error: weighted by the pivots if GPTQ rounds, else by the diagonal blocks of H.
    Without data it minimizes the error of the weight.
    """
    results: dict[str, QuantizedLinear | int] = {}  # an int is the number of parts that the processes share
    owners: list[int] = []
    own_parts: list[list[torch.Tensor | None]] = []
    is_last, checks = checks is None, checks or WeightChecks()
    for name, weight in weights:
        checks.name = name
        with _name_in_errors(name):
            if schemes[name].weight_method == "minmax":
                results[name] = quantize_weight(weight, schemes[name], checks=checks)
                continue
            parts = [weight[rows] for rows in split_into_parts(weight)]
            part_owners = [(len(owners) + number) % team.size for number in range(len(parts))]
            own = [part for part, owner in zip(parts, part_owners, strict=True) if owner == team.rank]
            rounded = round_parts(own, schemes[name], _clip_importance(schemes[name], gram, cholesky), cholesky, checks)
            own_parts += [[part.qweight, part.scales, part.zeros] for part in rounded]
            results[name] = len(parts)
            owners += part_owners
    if is_last:
        checks.raise_fault()
    all_parts = iter(Split(team, tuple(owners)).gather(own_parts))
    return {
        name: _join_parts([next(all_parts) for _ in range(result)], schemes[name])
        if isinstance(result, int)
        else result
        for name, result in results.items()
    }


def _clip_importance(scheme: QuantScheme, gram: Gram | None, cholesky: CholeskyFactor | None) -> torch.Tensor | None:
    """The error weights of the clip search, see quantize_weight. Those of an H beyond float32 are all alike."""
    if scheme.group_size is None:
        return None
    if cholesky is not None:
        return cholesky.pivots().view(-1, scheme.group_size)  # [groups, g]
    if gram is None:
        return None
    blocks = gram.diagonal_blocks(scheme.group_size)  # [groups, g, g]
    identity = torch.eye(scheme.group_size, dtype=blocks.dtype, device=blocks.device)
    return torch.where(torch.isfinite(blocks).all(), blocks, identity)


def round_parts(
    parts: Sequence[torch.Tensor],
    scheme: QuantScheme,
    importance: torch.Tensor | None,
    cholesky: CholeskyFactor | None,
    checks: WeightChecks | None = None,
) -> list[QuantizedLinear]:
    """Round each part of a weight (see split_into_parts) independently: its bits do not depend on the other parts."""
    grids = [quantize_weight(part, scheme, importance, checks) for part in parts]
    if cholesky is None or scheme.weight_method != "gptq":
        return grids
    return [round_in_order(part, grid, cholesky) for part, grid in zip(parts, grids, strict=True)]


def _join_parts(parts: Sequence[Sequence[torch.Tensor | None]], scheme: QuantScheme) -> QuantizedLinear:
    qweight, scales, zeros = (
        torch.cat([tensor for tensor in tensors if tensor is not None]) if tensors[0] is not None else None
        for tensors in zip(*parts, strict=True)
    )
    assert qweight is not None and scales is not None
    return QuantizedLinear(qweight, scales, scheme, zeros)


@contextmanager
def _name_in_errors(linear: str) -> Iterator[None]:
    try:
        yield
    except QuantError as error:
        raise QuantError(f"{linear}.weight: {error.message}", error.hint) from error
