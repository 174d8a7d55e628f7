"""One token in a hundred has a massive activation in one channel, as the first token has in language models.

Its squared output error is nearly all of the sum, but scaling, GPTQ and smoothing must not serve it at the cost of the
others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msmodelslim_omni.models.spec import LayerSpec, LinearGroup
from msmodelslim_omni.numerics import QuantScheme, dequantize, quantize_weight, quantized_matmul
from msmodelslim_omni.processors import awq, linear_quant, smooth
from msmodelslim_omni.processors.work import LayerWork
from msmodelslim_omni.recipe.processors import AwqConfig, IterSmoothConfig, LinearQuantConfig
from msmodelslim_omni.statistics import relative_weights
from msmodelslim_omni.statistics.capture import input_stats
from msmodelslim_omni.statistics.gram import GramBuilder

IN, OUT, CHANNEL = 256, 64, 70
DOWN = LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", "up-down")
SPEC = LayerSpec((DOWN,), {"mlp.down_proj.weight": (OUT, IN), "mlp.up_proj.weight": (IN, 8)})
INT4 = QuantScheme(4, None, "gptq", 128, symmetric=False)
RECIPE = LinearQuantConfig.model_validate(
    {
        "type": "linear_quant",
        "qconfig": {"weight": {"scope": "per_group", "dtype": "int4", "symmetric": False, "method": "gptq"}},
    }
)
LINEARS = frozenset({"mlp.down_proj"})


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int) -> torch.Tensor:
    """Inputs mostly in a few directions, with channels of uneven size."""
    directions = normal(IN, 24, seed=1) * torch.logspace(0, -1, 24)
    size = 0.1 * (0.8 * normal(IN, seed=2)).exp()
    return (0.5 * normal(count, 24, seed=seed) @ directions.T + normal(count, IN, seed=seed + 100)) * size


def down_weight() -> torch.Tensor:
    weight = 0.02 * normal(OUT, IN, seed=3)
    weight[33, CHANNEL] = 0.5  # writes the massive activation into one residual channel
    return weight


def massive_tokens(count: int, peak: float) -> torch.Tensor:
    x = tokens(1, seed=50).repeat(count, 1)
    x[:, CHANNEL] = peak
    return x


def work_of(x: torch.Tensor, scheme: QuantScheme) -> LayerWork:
    """A layer of which only down is quantized, with the statistics of x as calibration collects them."""
    weight = down_weight()
    stats = input_stats(x, torch.zeros(len(x), dtype=torch.int8), torch.arange(len(x)))
    builder = GramBuilder(IN, None, torch.device("cpu"))
    builder.add(x * relative_weights(x @ weight.T).sqrt()[:, None])
    stats = replace(stats, grams={0: builder.finish()})
    weights = {"mlp.down_proj.weight": weight, "mlp.up_proj.weight": 0.02 * normal(IN, 8, seed=4)}
    schemes = {"mlp.down_proj": scheme, "mlp.up_proj": scheme}
    return LayerWork(0, SPEC, schemes, weights, stats={"down": stats}, importance={0: 1 / len(x)})


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    exact = x @ down_weight().T
    return float((y - exact).norm() / exact.norm())


ORDINARY = tokens(1000, seed=6)


@pytest.mark.parametrize("peak", [1e3, 1e4])
def test_gptq_and_awq(peak: float) -> None:
    massive = massive_tokens(1, peak)
    work = work_of(torch.cat([massive_tokens(30, peak), tokens(3000, seed=5)]), INT4)
    work = awq.apply(work, AwqConfig(type="awq", n_grid=6), LINEARS)
    work = linear_quant.apply(work, RECIPE, LINEARS)
    columns = work.fold("mlp.down_proj").columns
    rounded = dequantize(work.quantized["mlp.down_proj"]) / (1 if columns is None else columns)
    plain = dequantize(quantize_weight(down_weight(), replace(INT4, weight_method="minmax")))
    # Unweighted, the ordinary tokens have up to twice the error of plain rounding.
    assert relative_error(ORDINARY, ORDINARY @ rounded.T) < 0.92 * relative_error(ORDINARY, ORDINARY @ plain.T)
    assert relative_error(massive, massive @ rounded.T) < 0.5 * relative_error(massive, massive @ plain.T)


@pytest.mark.parametrize("peak", [1e3, 1e4])
def test_smoothing(peak: float) -> None:
    scheme, massive = QuantScheme(8, 8), massive_tokens(1, peak)
    work = work_of(torch.cat([massive_tokens(30, peak), tokens(3000, seed=5)]), scheme)
    work = smooth.apply(work, IterSmoothConfig(type="iter_smooth", alpha="auto"), LINEARS)
    columns = work.fold("mlp.down_proj").columns
    linear, plain = quantize_weight(work.weight("mlp.down_proj"), scheme), quantize_weight(down_weight(), scheme)
    for x, bound in ((ORDINARY, 1.0), (massive, 1.1)):
        smoothed = quantized_matmul(x if columns is None else x / columns, linear)
        assert relative_error(x, smoothed) <= bound * relative_error(x, quantized_matmul(x, plain))
