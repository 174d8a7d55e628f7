"""Rounding the Linears that read one input: to the nearest level, on searched clips, or by GPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..arithmetic import QuantizedLinear, quantize_weight
from ..errors import QuantError
from ..gram import Gram
from ..scheme import QuantScheme
from .gptq import Triangle, factorize, round_in_order

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
) -> dict[str, QuantizedLinear]:
    """Quantize weights [out, in], each with its name, one after the other.

    gram, triangle: H of their input, as far as it is known and asked for.

    Clips are searched for what they leave of the output's error: after GPTQ its pivots say so, otherwise the diagonal
    blocks of H, and without data the error of the weight itself.
    """
    pivots = triangle.pivots() if triangle is not None else None
    quantized = {}
    for name, weight in weights:
        scheme = schemes[name]
        importance = None
        if scheme.group_size is not None and scheme.weight_method != "minmax":
            if pivots is not None:
                importance = pivots.view(-1, scheme.group_size)  # [groups, g]
            elif gram is not None:
                importance = gram.diagonal_blocks(scheme.group_size)
        try:
            grid = quantize_weight(weight, scheme, importance)
        except QuantError as error:
            raise QuantError(f"{name}.weight: {error.message}", error.hint) from error
        if triangle is not None and scheme.weight_method == "gptq":
            grid = round_in_order(weight.to(torch.float32), grid, triangle)
        quantized[name] = grid
    return quantized
