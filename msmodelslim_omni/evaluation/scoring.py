"""How far two models' next-token distributions and hidden states are apart: pure functions on tensors.

The vocabulary comes in blocks, each seen once, so that neither tokens x vocabulary nor a whole lm_head is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOP = 5


@dataclass(frozen=True)
class Scores:
    """One value for each position, on the CPU.

    kl: KL(p || q) in nats. shared_top: of the five likeliest tokens the share that both have. nll_*: -log of the
    probability of the token that follows, in nats. likeliest_*: the likeliest token. float64, the last ones int64; p
    is the float model, q the quantized one.
    """

    kl: torch.Tensor
    shared_top: torch.Tensor
    nll_float: torch.Tensor
    nll_quant: torch.Tensor
    likeliest_float: torch.Tensor
    likeliest_quant: torch.Tensor


class _Running:
    """One model's logits z over the blocks: m = max z, S = sum exp(z - m), the top tokens, the target's logit."""

    def __init__(self, targets: torch.Tensor) -> None:
        rows, device = len(targets), targets.device
        self._targets = targets
        self.max = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=device)
        self.of_target = torch.full_like(self.max, torch.nan)
        self.top = torch.empty((rows, 0), dtype=torch.float64, device=device)
        self.top_tokens = torch.empty((rows, 0), dtype=torch.int64, device=device)

    def add(self, first: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z: float64 [rows, block]. Returns exp(z - m) and what sums over earlier blocks must be multiplied by."""
        largest = torch.maximum(self.max, z.amax(dim=1))
        rescale = (self.max - largest).exp()
        weights = (z - largest.unsqueeze(1)).exp_()
        self.max, self.sum = largest, self.sum * rescale + weights.sum(dim=1)
        inside = (self._targets >= first) & (self._targets < first + z.shape[1])
        rows = torch.nonzero(inside).flatten()
        self.of_target[rows] = z[rows, self._targets[rows] - first]
        self._add_top(first, z)
        return weights, rescale

    def _add_top(self, first: int, z: torch.Tensor) -> None:
        """The likeliest tokens so far; of equal logits the lower token is in front, as far as topk has it."""
        values, tokens = z.topk(min(TOP, z.shape[1]), dim=1)
        values, tokens = torch.cat([self.top, values], dim=1), torch.cat([self.top_tokens, tokens + first], dim=1)
        by_token = tokens.argsort(dim=1)
        values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        self.top, self.top_tokens = values.gather(1, order), tokens.gather(1, order)

    def log_sum_exp(self) -> torch.Tensor:
        return self.max + self.sum.log()


class LogitScorer:
    """Scores of some positions from the logits of both models, block by block of the vocabulary.

    With p = softmax(z), q = softmax(y) and lse = log sum exp,
        KL(p || q) = sum_v p_v (log p_v - log q_v) = sum_v p_v (z_v - y_v) - lse(z) + lse(y).
    The first sum is D / S of two running sums, D = sum_v exp(z_v - m)(z_v - y_v) and S = sum_v exp(z_v - m), both
    multiplied by exp(m_old - m_new) when a block raises the maximum m, as in online softmax
    (https://arxiv.org/abs/1805.02867). Float64, since KL is a small difference of large numbers. Equal logits give
    exactly 0; below it is rounding alone, and is set to 0.

    targets: int64 [rows], the tokens that follow, on the device that the logits come on.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self._float, self._quant = _Running(targets), _Running(targets)
        self._weighted_difference = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def add(self, first: int, z: torch.Tensor, y: torch.Tensor) -> None:
        """The logits of tokens first, first + 1, ...: [rows, block] of the float and of the quantized model."""
        z, y = z.to(torch.float64), y.to(torch.float64)
        weights, rescale = self._float.add(first, z)
        self._quant.add(first, y)
        here = weights.mul_(z - y).sum(dim=1)
        self._weighted_difference = self._weighted_difference * rescale + here

    def finish(self) -> Scores:
        of_float, of_quant = self._float.log_sum_exp(), self._quant.log_sum_exp()
        kl = (self._weighted_difference / self._float.sum - of_float + of_quant).clamp_min(0.0)
        tops = self._float.top_tokens, self._quant.top_tokens
        shared = (tops[0].unsqueeze(2) == tops[1].unsqueeze(1)).sum(dim=(1, 2)).to(torch.float64) / tops[0].shape[1]
        return Scores(
            kl.cpu(),
            shared.cpu(),
            (of_float - self._float.of_target).cpu(),
            (of_quant - self._quant.of_target).cpu(),
            tops[0][:, 0].cpu(),
            tops[1][:, 0].cpu(),
        )


def joined(scores: list[Scores]) -> Scores:
    """The scores of several runs of positions, one behind the other."""
    return Scores(*(torch.cat([getattr(part, name) for part in scores]) for name in Scores.__dataclass_fields__))


def frame(tokens: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many tokens all of several prompts begin with, and end with: what the chat template puts around them.

    tokens: int64 [n] each. (0, 0) of fewer than two, or where nothing would be left of one.
    """
    shortest = min((len(one) for one in tokens), default=0)
    if len(tokens) < 2 or not shortest:
        return 0, 0
    first = torch.stack([one[:shortest] for one in tokens])
    last = torch.stack([one[-shortest:].flip(0) for one in tokens])
    before, after = (int((rows == rows[0]).all(dim=0).to(torch.int64).cumprod(dim=0).sum()) for rows in (first, last))
    return (before, after) if before + after < shortest else (0, 0)


def scored_positions(
    modality: torch.Tensor, answer: tuple[int, int] | None, positions: str, around: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """The positions whose next token counts, int64.

    positions: `answer`: those that predict a token of the answer, its end included; none without one. `text`: those
    that predict a token that stands for no media. `auto`: the first where there is an answer, else the second without
    the template's tokens `around` it, see frame. modality: int8 [tokens], 0 for text.
    """
    if positions != "text" and answer is not None:
        return torch.arange(answer[0] - 1, answer[1] - 1)
    if positions == "answer":
        return torch.arange(0)
    before, after = around if positions == "auto" else (0, 0)
    following = torch.arange(1, len(modality))
    counts = (modality[1:] == 0) & (following >= before) & (following < len(modality) - after)
    return following[counts] - 1


# --- hidden states -------------------------------------------------------------------------------------------


def drift(exact: torch.Tensor, other: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Sums over tokens, by their group: float64 [count, 4] on the CPU.

    Columns: |other - exact|^2, |exact|^2, the cosine of the two, and 1. They add over samples; see `drift_figures`.
    exact, other: float32 [tokens, width]; groups: [tokens], 0 <= group < count. Two zero vectors have cosine 1.
    """
    error = (other - exact).square().sum(dim=1).cpu().to(torch.float64)
    ours, theirs, both = (
        (a * b).sum(dim=1).cpu().to(torch.float64) for a, b in ((exact, exact), (other, other), (exact, other))
    )
    scale = (ours * theirs).sqrt()
    cosine = torch.where(scale > 0, both / scale, ((ours == 0) & (theirs == 0)).to(torch.float64))
    columns = torch.stack([error, ours, cosine, torch.ones_like(error)], dim=1)
    return torch.zeros((count, 4), dtype=torch.float64).index_add_(0, groups.to(torch.int64), columns)


def drift_figures(sums: torch.Tensor) -> tuple[float, float]:
    """Relative error sqrt(sum |other - exact|^2 / sum |exact|^2) and mean cosine of sums [4]; (0, 1) of no token."""
    error, signal, cosine, tokens = sums.tolist()
    if not tokens:
        return 0.0, 1.0
    relative = 0.0 if error == 0 else float("inf") if signal == 0 else (error / signal) ** 0.5
    return relative, cosine / tokens
