"""Scales fitted to given integers: the least damped output error in every form of H, and less on other tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grams import FORMS, Form, as_matrix

from msmodelslim_omni.numerics.arithmetic import QuantizedLinear, dequantize, quantize_weight, storable_scales
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import scale_fit
from msmodelslim_omni.processors.gptq import factorize, round_in_order
from msmodelslim_omni.processors.rounding import fit_group
from msmodelslim_omni.processors.scale_fit import fit_and_round, fit_scales
from msmodelslim_omni.statistics.gram import Gram

ASYM = QuantScheme(4, None, "gptq", 32, symmetric=False)
SCHEMES = pytest.mark.parametrize("scheme", [ASYM, replace(ASYM, symmetric=True)], ids=["asymmetric", "symmetric"])
OUT, IN = 24, 160


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int) -> torch.Tensor:
    """Correlated inputs with channels of different magnitude."""
    size = normal(IN, seed=1001).exp()
    return (
        normal(count, IN // 8, seed=seed) @ normal(IN // 8, IN, seed=1000) + normal(count, IN, seed=seed + 500)
    ) * size


def damped_error(x: torch.Tensor, weight: torch.Tensor, damping: torch.Tensor, linear: QuantizedLinear) -> float:
    delta = dequantize(linear).double() - weight.double()
    return float((x.double() @ delta.T).square().sum() + (delta.square() @ damping.double()).sum())


def best_scales(x: torch.Tensor, weight: torch.Tensor, damping: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    """The scales of least damped error by the normal equations of each channel, float64 [out, groups]."""
    h = x.double().T @ x.double() + torch.diag(damping.double())
    zeros = torch.zeros_like(linear.scales) if linear.zeros is None else linear.zeros
    units = linear.qweight.double() - zeros.double().repeat_interleave(32, dim=1)
    channels = []
    for u, w in zip(units, weight.double(), strict=True):
        basis = torch.block_diag(*u.view(-1, 1, 32))  # [groups, in]
        channels.append(torch.linalg.solve(basis @ h @ basis.T, basis @ h @ w))
    return torch.stack(channels)


def test_scale_by_hand() -> None:
    """Two inputs, H = diag(1, 4), λ = (0, 1): s = Σ h u w / Σ h u² = (1·1·1 + 5·2·2.2) / (1·1 + 5·4) = 23 / 21."""
    scheme = QuantScheme(4, None, "gptq", 2)
    rounded = QuantizedLinear(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[1.0]]), scheme)
    gram = Gram(torch.diag(torch.tensor([1.0, 4.0])), None, 4)
    fitted = fit_scales(torch.tensor([[1.0, 2.2]]), rounded, gram, torch.tensor([0.0, 1.0]))
    assert fitted.scales.tolist() == [[1.09375]]  # 23 / 21 = 1.0952, in eight bits
    assert torch.equal(fitted.qweight, rounded.qweight)


@FORMS
@SCHEMES
def test_scales_have_nearly_the_least_error(form: Form, scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_fit, "_ROWS", 10 * IN)  # three pieces
    x, weight = tokens(200, seed=1), normal(OUT, IN)
    gram = form(x)
    cholesky = factorize(gram)
    rounded = round_in_order(weight, quantize_weight(weight, scheme), cholesky)
    fitted = fit_scales(weight, rounded, gram, cholesky.damping)
    exact = best_scales(x, weight, cholesky.damping, rounded)
    before, now, least = (
        damped_error(x, weight, cholesky.damping, replace(rounded, scales=scales))
        for scales in (rounded.scales, fitted.scales, exact.to(torch.float32))
    )
    assert least <= now < before
    assert before - now > 0.9 * (before - least)
    assert torch.equal(fitted.scales, storable_scales(fitted.scales, None))
    assert fitted.zeros is rounded.zeros


@SCHEMES
def test_less_error_on_other_tokens(scheme: QuantScheme) -> None:
    x, other, weight = tokens(2000, seed=1), tokens(500, seed=2), normal(OUT, IN)
    gram = as_matrix(x)
    cholesky = factorize(gram)
    rounded = round_in_order(weight, quantize_weight(weight, scheme), cholesky)
    nothing = torch.zeros(IN)
    before = damped_error(other, weight, nothing, rounded)
    fitted = damped_error(other, weight, nothing, fit_scales(weight, rounded, gram, cholesky.damping))
    again = damped_error(other, weight, nothing, fit_and_round(weight, rounded, gram, cholesky))
    assert again < fitted < before


def test_a_group_of_zeros_keeps_its_scale() -> None:
    x, weight = tokens(200, seed=1), normal(OUT, IN)
    weight[3, 32:64] = 0.0
    gram = as_matrix(x)
    cholesky = factorize(gram)
    rounded = round_in_order(weight, quantize_weight(weight, replace(ASYM, symmetric=True)), cholesky)
    rounded.qweight[3, 32:64] = 0
    fitted = fit_scales(weight, rounded, gram, cholesky.damping)
    assert fitted.scales[3, 1] == rounded.scales[3, 1]
    assert bool(torch.isfinite(fitted.scales).all()) and bool((fitted.scales > 0).all())


def test_the_damping_follows_the_scale_of_the_inputs() -> None:
    """Scaled inputs and weights have the same error, so they get the same scales."""
    x, weight = tokens(200, seed=1), normal(OUT, IN)
    factors = torch.tensor([0.5, 2.0]).repeat(IN // 2)
    gram = as_matrix(x)
    cholesky = factorize(gram)
    scaled, of_scaled = gram.rescaled(factors), cholesky.rescaled(factors)
    rounded = round_in_order(weight * factors, quantize_weight(weight * factors, ASYM), of_scaled)
    assert torch.equal(of_scaled.damping, cholesky.damping / factors.square())
    fitted = fit_scales(weight * factors, rounded, scaled, of_scaled.damping)
    exact = best_scales(x / factors, weight * factors, of_scaled.damping, rounded)
    assert float((fitted.scales / exact - 1).abs().median()) < 0.01


def test_parts_of_a_linear_are_fitted_like_the_full_linear() -> None:
    x, weight = tokens(200, seed=1), normal(OUT, IN)
    gram = as_matrix(x)
    cholesky = factorize(gram)
    rounded = round_in_order(weight, quantize_weight(weight, ASYM), cholesky)
    by_name = fit_group([("q", weight)], {"q": rounded}, gram, cholesky)["q"]
    alone = fit_and_round(weight, rounded, gram, cholesky)
    assert torch.equal(by_name.qweight, alone.qweight) and torch.equal(by_name.scales, alone.scales)
