"""linear_quant: round the weights of the matching Linears to integers. Needs no data."""

from __future__ import annotations

from dataclasses import replace

from ..arithmetic import quantize_weight
from ..errors import QuantError
from ..recipe import LinearQuantConfig
from .work import LayerWork


def needs_calibration(config: LinearQuantConfig) -> bool:
    return False


def apply(work: LayerWork, config: LinearQuantConfig, linears: frozenset[str]) -> LayerWork:
    """Quantize `linears` (relative names that this processor is to handle) by their planned schemes."""
    quantized = dict(work.quantized)
    for linear in sorted(linears):
        try:
            quantized[linear] = quantize_weight(work.weights[f"{linear}.weight"], work.schemes[linear])
        except QuantError as error:
            raise QuantError(f"layer {work.index}, {linear}.weight: {error.message}", error.hint) from error
    return replace(work, quantized=quantized)
