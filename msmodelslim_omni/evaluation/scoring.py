"""Distances between two models' next-token distributions and hidden states, as pure functions on tensors.

The vocabulary is processed in blocks, each once. Neither [tokens, vocabulary] nor a full lm_head is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics import relative_error
from ..statistics import is_ordinary

TOP = 5


@dataclass(frozen=True)
class Scores:
    """One value per position, on the CPU. p is the float model's distribution, q the quantized model's.

    kl: KL(p || q) in nats. shared_top: the share of the five likeliest tokens that both models have in common.
    nll_*: -log probability of the next token, in nats. likeliest_*: the likeliest token. likeliest_* are int64, all
    others float64.
    """

    kl: torch.Tensor
    shared_top: torch.Tensor
    nll_float: torch.Tensor
    nll_quant: torch.Tensor
    likeliest_float: torch.Tensor
    likeliest_quant: torch.Tensor


class _RunningSoftmax:
    """Running values of one model's logits z: m = max z, S = sum exp(z - m), top tokens, logit of the target."""

    def __init__(self, targets: torch.Tensor) -> None:
        rows, device = len(targets), targets.device
        self._targets = targets
        self.max = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=device)
        self.target_logit = torch.full_like(self.max, torch.nan)
        self.top = torch.empty((rows, 0), dtype=torch.float64, device=device)
        self.top_tokens = torch.empty((rows, 0), dtype=torch.int64, device=device)

    def add(self, first: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add z, float64 [rows, block]. Returns exp(z - m) and the factor that rescales sums over earlier blocks."""
        largest = torch.maximum(self.max, z.amax(dim=1))
        rescale = (self.max - largest).exp()
        weights = (z - largest.unsqueeze(1)).exp_()
        self.max, self.sum = largest, self.sum * rescale + weights.sum(dim=1)
        inside = (self._targets >= first) & (self._targets < first + z.shape[1])
        rows = torch.nonzero(inside).flatten()
        self.target_logit[rows] = z[rows, self._targets[rows] - first]
        self._add_top(first, z)
        return weights, rescale

    def _add_top(self, first: int, z: torch.Tensor) -> None:
        """Update the likeliest tokens. Equal logits are ordered by token id, if topk returned all of them."""
        values, tokens = z.topk(min(TOP, z.shape[1]), dim=1)
        values, tokens = torch.cat([self.top, values], dim=1), torch.cat([self.top_tokens, tokens + first], dim=1)
        by_token = tokens.argsort(dim=1)
        values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        self.top, self.top_tokens = values.gather(1, order), tokens.gather(1, order)

    def log_sum_exp(self) -> torch.Tensor:
        return self.max + self.sum.log()


class LogitScorer:
    """Scores of positions from the logits of both models, by blocks of the vocabulary.

    With p = softmax(z), q = softmax(y) and lse = log sum exp,
        KL(p || q) = sum_v p_v (log p_v - log q_v) = sum_v p_v (z_v - y_v) - lse(z) + lse(y).
    The first sum is D / S of two running sums, D = sum_v exp(z_v - m)(z_v - y_v) and S = sum_v exp(z_v - m), both
    multiplied by exp(m_old - m_new) when a block raises the maximum m, as in online softmax
    (https://arxiv.org/abs/1805.02867). All sums are float64, since KL is a small difference of large numbers. Equal
    logits give exactly 0. Values below 0 are rounding errors and are set to 0.

    targets: int64 [rows], the next tokens, on the device of the logits.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self._float, self._quant = _RunningSoftmax(targets), _RunningSoftmax(targets)
        self._weighted_difference = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def add(self, first: int, z: torch.Tensor, y: torch.Tensor) -> None:
        """Add logits [rows, block] of the tokens first, first + 1, ...: z of the float model, y of the quantized."""
        z, y = z.to(torch.float64), y.to(torch.float64)
        weights, rescale = self._float.add(first, z)
        self._quant.add(first, y)
        block_sum = weights.mul_(z - y).sum(dim=1)
        self._weighted_difference = self._weighted_difference * rescale + block_sum

    def finish(self) -> Scores:
        lse_float, lse_quant = self._float.log_sum_exp(), self._quant.log_sum_exp()
        kl = (self._weighted_difference / self._float.sum - lse_float + lse_quant).clamp_min(0.0)
        tops = self._float.top_tokens, self._quant.top_tokens
        shared = (tops[0].unsqueeze(2) == tops[1].unsqueeze(1)).sum(dim=(1, 2)).to(torch.float64) / tops[0].shape[1]
        return Scores(
            kl.cpu(),
            shared.cpu(),
            (lse_float - self._float.target_logit).cpu(),
            (lse_quant - self._quant.target_logit).cpu(),
            tops[0][:, 0].cpu(),
            tops[1][:, 0].cpu(),
        )


def concatenate_scores(scores: list[Scores]) -> Scores:
    """Concatenate the scores of several batches of positions."""
    return Scores(*(torch.cat([getattr(part, name) for part in scores]) for name in Scores.__dataclass_fields__))


def common_prefix_and_suffix(prompts: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The numbers of tokens that all prompts begin and end with, i.e. the text of the chat template.

    prompts: int64 [n] each. (0, 0) for fewer than two prompts, or if no token of a prompt would remain.
    """
    shortest = min((len(prompt) for prompt in prompts), default=0)
    if len(prompts) < 2 or not shortest:
        return 0, 0
    first = torch.stack([prompt[:shortest] for prompt in prompts])
    last = torch.stack([prompt[-shortest:].flip(0) for prompt in prompts])
    before, after = (int((rows == rows[0]).all(dim=0).to(torch.int64).cumprod(dim=0).sum()) for rows in (first, last))
    return (before, after) if before + after < shortest else (0, 0)


def scored_positions(
    modality: torch.Tensor, answer: tuple[int, int] | None, positions: str, template: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """The positions whose next token is scored, int64.

    positions: `answer`: positions that predict a token of the answer or its end; none without an answer. `text`:
    positions that predict a text token instead of a media token. `auto`: as `answer` if there is an answer, else as
    `text` without the `template` tokens, see common_prefix_and_suffix. modality: int8 [tokens], 0 for text.
    """
    if positions != "text" and answer is not None:
        return torch.arange(answer[0] - 1, answer[1] - 1)
    if positions == "answer":
        return torch.arange(0)
    before, after = template if positions == "auto" else (0, 0)
    following = torch.arange(1, len(modality))
    is_scored = (modality[1:] == 0) & (following >= before) & (following < len(modality) - after)
    return following[is_scored] - 1


# --- hidden states -------------------------------------------------------------------------------------------


def drift_sums(
    float_states: torch.Tensor, quant_states: torch.Tensor, groups: torch.Tensor, count: int
) -> torch.Tensor:
    """Sums over the tokens of each group: float64 [count, 7] on the CPU.

    Columns: |quant - float|^2, |float|^2, the cosine of the two, and 1; the first two again, of ordinary tokens only
    (see is_ordinary), and the number of the other tokens. Sums of several samples can be added; see `drift_figures`.
    float_states, quant_states: float32 [tokens, width]; groups: [tokens], 0 <= group < count. Two zero vectors have
    cosine 1.
    """
    error = (quant_states - float_states).square().sum(dim=1).cpu().to(torch.float64)
    float_square, quant_square, product = (
        (a * b).sum(dim=1).cpu().to(torch.float64)
        for a, b in ((float_states, float_states), (quant_states, quant_states), (float_states, quant_states))
    )
    scale = (float_square * quant_square).sqrt()
    both_zero = (float_square == 0) & (quant_square == 0)
    cosine = torch.where(scale > 0, product / scale, both_zero.to(torch.float64))
    ordinary = is_ordinary(float_square, groups).to(torch.float64)
    columns = torch.stack(
        [error, float_square, cosine, torch.ones_like(error), error * ordinary, float_square * ordinary, 1 - ordinary],
        dim=1,
    )
    return torch.zeros((count, 7), dtype=torch.float64).index_add_(0, groups.to(torch.int64), columns)


def drift_figures(sums: torch.Tensor) -> tuple[float, float]:
    """Relative error sqrt(sum |quant - float|^2 / sum |float|^2) and mean cosine; (0, 1) for no token.

    sums: [7], see drift_sums.
    """
    error, signal, cosine, tokens = sums[:4].tolist()
    return (relative_error(error, signal), cosine / tokens) if tokens else (0.0, 1.0)


def ordinary_drift(sums: torch.Tensor) -> tuple[float, int]:
    """The relative error without massive tokens, and their number, from drift_sums [7]."""
    error, signal, massive = sums[4:].tolist()
    return relative_error(error, signal), int(massive)
