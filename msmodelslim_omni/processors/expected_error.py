"""The expected output error of rounding weights and activations, as a smooth function of smoothing factors.

Rounding to steps of width d adds an error of variance d² / 12 to each number, independently. With factors s, a token x
is rounded with the step max_c |x_c / s_c| / qmax, and an output row w with max_c |w_c s_c| / qmax, so the expected
squared error of the token's output Y = X Wᵀ, divided by |y| (see relative_weights), is

    ε(x) = ( (max_c |x_c / s_c|)² Σ_c s_c² Σ_o w_oc² + Σ_c (x_c / s_c)² Σ_o (max_c |w_oc s_c|)² ) / (12 qmax² |y|)

(in groups of inputs, the second product is summed over the groups; asymmetric weights have half their range instead of
their maximum; without rounding of activations, the first product is omitted). On the inputs of a language model, with
int8, this is within 8 % of the measured error. A formula with a gradient finds factors for all channels, where the
exponent of SmoothQuant's formula is one number for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..numerics import QuantScheme, row_blocks
from ..statistics import InputStats, evenly_spaced, relative_weights

_WEIGHT_ROWS = 128  # output rows of each Linear for their maxima
_NUMBERS = 1 << 23  # maximum numbers of the inputs that are used
_STEPS, _RATE = 100, 0.05  # of Adam, on the logarithms of the factors; the rate falls to zero
_LIMIT = 14.0  # of |log2 s|, which keeps norms in the range of float16


@dataclass(frozen=True)
class _Weight:
    """One Linear. columns: Σ_o w_oc², [in]. rows: some output rows of w, [rows, groups, g]; share: rows / out."""

    columns: torch.Tensor
    rows: torch.Tensor
    share: float
    symmetric: bool

    def peaks(self, factors: torch.Tensor) -> torch.Tensor:
        """Σ_o (max_c |w_oc s_c|)² of each group, [groups]. factors: [in]."""
        scaled = self.rows * factors.view(self.rows.shape[1], -1)
        if self.symmetric:
            largest = scaled.abs().amax(dim=2)
        else:
            largest = (scaled.amax(dim=2).clamp_min(0.0) - scaled.amin(dim=2).clamp_max(0.0)) / 2
        return largest.square().sum(dim=0) / self.share


class ExpectedErrors:
    """ε by modality for a group of Linears that read one input, see the top of this file."""

    def __init__(
        self,
        magnitude: torch.Tensor,
        members: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        token_weights: Sequence[torch.Tensor],
        scheme: QuantScheme,
    ) -> None:
        """magnitude: |x| of some tokens, [tokens, in]. members: indices of the tokens of each modality.

        weights: [out, in] of each Linear, any float dtype. token_weights: of each Linear, [tokens].
        """
        self._act_qmax = None if scheme.act_bits is None else 2 ** (scheme.act_bits - 1) - 1
        low, high = scheme.weight_range
        self._weight_qmax = high if scheme.symmetric else (high - low) / 2
        self._magnitude, self._members, self._token_weights = magnitude, members, token_weights
        self._weights = [_weight(weight, scheme) for weight in weights]
        self._plain = self._by_modality(torch.ones_like(magnitude[0]))

    @classmethod
    def of_tokens(cls, stats: InputStats, weights: Sequence[torch.Tensor], scheme: QuantScheme) -> ExpectedErrors:
        """The errors on the kept rows."""
        chosen = evenly_spaced(len(stats.rows), max(1, _NUMBERS // stats.rows.shape[1]))
        x = stats.rows[chosen.to(stats.rows.device)].clone()  # an inference tensor has no gradient
        modality = stats.row_modality[chosen]
        members = [(modality == m).nonzero().flatten().to(x.device) for m in stats.sampled_of(modality)]
        token_weights = []  # 1 / |y|, divided by the mean |y| of the tokens
        for weight in weights:
            y = x @ _some_rows(weight).T  # some outputs
            inverse = relative_weights(y)
            signal = (y.square().sum(dim=1) * inverse).mean() * (len(weight) / max(1, y.shape[1]))
            token_weights.append(inverse / signal.clamp_min(1e-30))
        return cls(x.abs(), members, weights, token_weights, scheme)

    @classmethod
    def of_importance(
        cls, importance: torch.Tensor, weights: Sequence[torch.Tensor], signals: torch.Tensor, scheme: QuantScheme
    ) -> ExpectedErrors:
        """The errors Σ_o Σ_c h_c Δw_oc², relative to the signal of each Linear. importance: h, [in].

        signals: float32 [Linears]. A Linear without signal counts for nothing.
        """
        h = importance.clone().clamp_min(0.0).sqrt()[None]  # as one token, because x² is all that counts
        token_weights = list(torch.where(signals > 0, 1 / signals, torch.zeros_like(signals)).view(-1, 1))
        return cls(h, [torch.zeros(1, dtype=torch.int64, device=h.device)], weights, token_weights, scheme)

    def ratios(self, factors: torch.Tensor) -> torch.Tensor:
        """ε(factors) / ε of plain rounding, [modalities present]; has a gradient. factors: [in]."""
        return self._by_modality(factors) / self._plain

    def worst_ratio(self, factors: torch.Tensor) -> torch.Tensor:
        """The maximum of `ratios`, as a ratio of errors that are not squared. Infinite for factors out of range."""
        return self.ratios(factors).max().sqrt().nan_to_num(nan=torch.inf)

    def _by_modality(self, factors: torch.Tensor) -> torch.Tensor:
        scaled = self._magnitude / factors
        total = torch.zeros_like(scaled[:, 0])
        for weight, token_weights in zip(self._weights, self._token_weights, strict=True):
            in_groups = scaled.square().view(len(scaled), weight.rows.shape[1], -1).sum(dim=2)  # [tokens, groups]
            noise = in_groups @ weight.peaks(factors) / self._weight_qmax**2
            if self._act_qmax is not None:
                step = scaled.amax(dim=1) / self._act_qmax
                noise = noise + step.square() * (factors.square() * weight.columns).sum()
            total = total + noise * token_weights
        return torch.stack([total[members].mean() for members in self._members]).clamp_min(1e-30)


def refine(errors: ExpectedErrors, start: torch.Tensor, spread: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Factors [channels] near `start` with a smaller expected error.

    Adam (Kingma, Ba 2014) on log s minimizes the squared ratios of the modalities, so that the worst one counts most.
    spread: repeats the factors of the channels for all inputs that share them, [channels] -> [in].
    """
    with torch.enable_grad(), torch.inference_mode(False):
        logs = start.clone().log().requires_grad_()
        optimizer = torch.optim.Adam([logs], lr=_RATE)
        best, least = start, torch.full_like(start[0], torch.inf)  # compared on the device, see runtime/transfer.py
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            loss = errors.ratios(spread(logs.exp())).square().sum()
            value = loss.detach()
            best = torch.where(value < least, logs.detach().exp(), best)
            least = torch.fmin(value, least)
            (logs.grad,) = torch.autograd.grad(loss, [logs])
            optimizer.step()
    return best.clamp(2.0**-_LIMIT, 2.0**_LIMIT)


def _weight(weight: torch.Tensor, scheme: QuantScheme) -> _Weight:
    columns = torch.stack([weight[r].to(torch.float32).square().sum(dim=0) for r in row_blocks(weight)]).sum(dim=0)
    rows = _some_rows(weight)
    size = scheme.group_size or rows.shape[1]
    return _Weight(columns, rows.view(len(rows), -1, size), len(rows) / len(weight), scheme.symmetric)


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """At most _WEIGHT_ROWS evenly spaced rows of a weight, float32."""
    return weight[evenly_spaced(len(weight), _WEIGHT_ROWS).to(weight.device)].to(torch.float32)
