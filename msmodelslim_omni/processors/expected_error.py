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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..numerics import QuantScheme, row_blocks
from ..statistics import InputStats, evenly_spaced, relative_weights

# Output rows of each Linear for their maxima: at most, at least, and of all Linears together.
_WEIGHT_ROWS, _FEWEST_ROWS, _ALL_ROWS = 128, 16, 2048
_NUMBERS = 1 << 23  # maximum numbers of the inputs that are used
# Of Adam, on the logarithms of the factors; the rate falls to zero. So few steps need short memories: with the usual
# ones, 0.9 and 0.999, 60 steps at 0.08 leave the same error on the inputs of a language model.
_STEPS, _RATE, _MEMORIES = 30, 0.14, (0.8, 0.95)
_PARTS = 16  # of the numbers whose maximum is searched
_LIMIT = 14.0  # of |log2 s|, which keeps norms in the range of float16


@dataclass(frozen=True)
class _Weights:
    """All Linears. columns: Σ_o w_oc² of each, [Linears, in]. outputs: out / rows of each, [Linears].

    rows: some output rows w of each, then zeros, [Linears, rows, groups, g]; magnitudes if they are rounded
    symmetrically.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    outputs: torch.Tensor
    symmetric: bool

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], scheme: QuantScheme) -> _Weights:
        """weights: [out, in] of each Linear, any float dtype."""
        most, size = _rows_of_each(weights), scheme.group_size or weights[0].shape[1]
        columns = [torch.stack([w[r].to(torch.float32).square().sum(dim=0) for r in row_blocks(w)]).sum(dim=0)
                   for w in weights]  # fmt: skip
        chosen = [_some_rows(weight, most) for weight in weights]
        outputs = torch.tensor([len(w) / len(rows) for w, rows in zip(weights, chosen, strict=True)])
        rows = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        rows = (rows.abs() if scheme.symmetric else rows).view(*rows.shape[:2], -1, size)
        return cls(torch.stack(columns), rows, outputs.to(rows.device), scheme.symmetric)

    @property
    def groups(self) -> int:
        return self.rows.shape[2]

    def peaks(self, factors: torch.Tensor) -> torch.Tensor:
        """Σ_o (max_c |w_oc s_c|)² of each Linear and group, [Linears, groups]. factors: [in]."""
        with torch.no_grad():
            scaled = self.rows * factors.view(self.groups, -1)
            ends = (_argmax(scaled),) if self.symmetric else (_argmax(scaled), _argmax(scaled.neg_()))
            first = torch.arange(0, len(factors), self.rows.shape[3], device=factors.device)  # channel of each group
        high, *low = (_taken(self.rows, end) * _selected(factors, end + first) for end in ends)
        largest = (high.clamp_min(0.0) - low[0].clamp_max(0.0)) / 2 if low else high
        return largest.square().sum(dim=1) * self.outputs[:, None]


def _argmax(values: torch.Tensor) -> torch.Tensor:
    """values.argmax(dim=-1) of [..., n], one of them where several are equal; several times as fast on a CPU.

    Its maximum is vectorized, its argmax is not: so the first is taken over 16 parts, and the second of what is left.
    """
    parts = math.gcd(values.shape[-1], _PARTS)
    folded = values.view(*values.shape[:-1], parts, -1)
    column = folded.amax(dim=-2).argmax(dim=-1)
    of_column = _taken(folded, column[..., None].expand(*column.shape, parts))
    return of_column.argmax(dim=-1) * folded.shape[-1] + column


def _taken(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The numbers at `indices` [...] of the last axis of values [..., n]. A gradient reaches these numbers alone.

    The gradient of a maximum would pass over all numbers several times.
    """
    return values.gather(-1, indices[..., None])[..., 0]


def _selected(factors: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """factors[channels]; its gradient is several times as fast."""
    return factors.index_select(0, channels.flatten()).view(channels.shape)


class ExpectedErrors:
    """ε by modality for a group of Linears that read one input, see the top of this file.

    ε is linear in x_c² and in the squared step of the token. So what belongs to the weights needs only the weighted
    mean of x_c² over the tokens, and only the steps are computed from the tokens each time.
    """

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
        self._weights = _Weights.of(weights, scheme)
        shares = torch.zeros((len(members), len(weights), len(magnitude)), device=magnitude.device)
        for of_modality, tokens in zip(shares, members, strict=True):
            for of_linear, token_weight in zip(of_modality, token_weights, strict=True):
                of_linear[tokens] = token_weight[tokens] / len(tokens)
        self._shares = shares  # [modalities, Linears, tokens]: the mean over a modality's tokens is a sum with these
        self._squares = shares.flatten(0, 1) @ magnitude.square()  # of x_c, [modalities * Linears, in]
        self._magnitude = magnitude if self._act_qmax is not None else None
        self._scaled = torch.empty_like(magnitude)
        self._plain = self._by_modality(torch.ones_like(magnitude[0]))

    @classmethod
    def of_tokens(
        cls, inputs: Sequence[tuple[InputStats, Sequence[torch.Tensor]]], scheme: QuantScheme
    ) -> ExpectedErrors:
        """The errors on the kept rows. inputs: one, or those of several groups that share the factors.

        Each with the weights of its Linears, which read no other input.
        """
        total, all_weights = sum(len(stats.rows) for stats, _ in inputs), [w for _, weights in inputs for w in weights]
        rows_of_each, most = _rows_of_each(all_weights), max(1, _NUMBERS // all_weights[0].shape[1])
        magnitudes: list[torch.Tensor] = []
        modalities, token_weights = [], []
        for stats, weights in inputs:
            chosen = evenly_spaced(len(stats.rows), max(1, most * len(stats.rows) // total))
            x = stats.rows[chosen.to(stats.rows.device)].clone()  # an inference tensor has no gradient
            before = sum(len(part) for part in magnitudes)
            magnitudes.append(x.abs())
            modalities.append(stats.row_modality[chosen])
            for weight in weights:  # 1 / |y|, divided by the mean |y| of the tokens
                y = x @ _some_rows(weight, rows_of_each).T  # some outputs
                inverse = relative_weights(y)
                signal = (y.square().sum(dim=1) * inverse).mean() * (len(weight) / max(1, y.shape[1]))
                token_weights.append((before, inverse / signal.clamp_min(1e-30)))
        magnitude, modality = torch.cat(magnitudes), torch.cat(modalities)
        present = sorted({m for stats, _ in inputs for m in stats.sampled_of(modality)})
        members = [(modality == m).nonzero().flatten().to(magnitude.device) for m in present]
        of_all = [_placed(weights, before, len(magnitude)) for before, weights in token_weights]
        return cls(magnitude, members, all_weights, of_all, scheme)

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
        squares = self._squares / factors.square()
        in_groups = squares.view(*self._shares.shape[:2], self._weights.groups, -1).sum(dim=3)
        # [modalities]: sums over Linears and groups
        total = (in_groups * self._weights.peaks(factors)).sum(dim=(1, 2)) / self._weight_qmax**2
        if self._magnitude is not None:
            steps = self._shares @ self._squared_steps(self._magnitude, factors)  # [modalities, Linears]
            total = total + steps @ (self._weights.columns @ factors.square())
        return total.clamp_min(1e-30)

    def _squared_steps(self, magnitude: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The squared step of each token, [tokens]. Its gradient is that of the one channel that decides it."""
        assert self._act_qmax is not None
        with torch.no_grad():
            largest = _argmax(torch.mul(magnitude, 1 / factors, out=self._scaled))
        steps: torch.Tensor = _taken(magnitude, largest) / _selected(factors, largest) / self._act_qmax
        return steps.square()


def refine(errors: ExpectedErrors, start: torch.Tensor, spread: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Factors [channels] near `start` with a smaller expected error.

    Adam (Kingma, Ba 2014) on log s minimizes the squared ratios of the modalities, so that the worst one counts most.
    spread: repeats the factors of the channels for all inputs that share them, [channels] -> [in].
    """
    with torch.enable_grad(), torch.inference_mode(False):
        logs = start.clone().log().requires_grad_()
        optimizer = torch.optim.Adam([logs], lr=_RATE, betas=_MEMORIES)
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


def _placed(values: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """`count` numbers: `values` from position `first` on, and zeros."""
    return torch.nn.functional.pad(values, (first, count - first - len(values)))


def _rows_of_each(weights: Sequence[torch.Tensor]) -> int:
    return min(_WEIGHT_ROWS, max(_FEWEST_ROWS, _ALL_ROWS // len(weights)))


def _some_rows(weight: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` evenly spaced rows of a weight, float32."""
    return weight[evenly_spaced(len(weight), most).to(weight.device)].to(torch.float32)
