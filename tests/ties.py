"""Roundings and choices of two float paths, compared so that the result holds on every processor.

The last bits of a float32 sum depend on the instruction set and the number of threads. A value that is near a tie, half
way between two integers, may therefore round to either neighbor. Every other value must round to the same integer.
Of two nearly equal logits either may be the larger one. Every other choice must be the same.
"""

from __future__ import annotations

import torch

# In steps of the integer grid. float32 sums differ by about 1e-6 of the largest value, and that is 127 steps.
TIE_DISTANCE = 1e-2

# The logits of the tiny models have a deviation of about 1, and their float32 errors are about 1e-6.
LOGIT_DISTANCE = 1e-4


def assert_rounded(integers: torch.Tensor, values: torch.Tensor, distance: float = TIE_DISTANCE) -> None:
    """Each integer is the nearest one to its value, or the other neighbor of a tie within `distance` of the value."""
    error = (integers - values).abs()
    assert float(error.max()) <= 0.5 + distance, f"{int((error > 0.5 + distance).sum())} integers are not the nearest"


def assert_greedy(tokens: list[int], logits: torch.Tensor, distance: float = LOGIT_DISTANCE) -> None:
    """The tokens are those with the largest of the logits [steps, vocabulary] of a greedy reference.

    If the reference chose another token by at most `distance`, either is valid, and the contexts differ from there on.
    """
    for step, (token, row) in enumerate(zip(tokens, logits, strict=False)):
        behind = float(row.max() - row[token])
        assert behind <= distance, f"step {step}: the logit of token {token} is {behind} below the largest"
        if token != int(row.argmax()):
            return
    assert len(tokens) == len(logits)


def shared_top(z: torch.Tensor, y: torch.Tensor, count: int, distance: float = LOGIT_DISTANCE) -> tuple[float, float]:
    """The mean share of the `count` largest logits that z and y [rows, vocabulary] have in common, as a range.

    A row in which the choice is not clear, because the next logit is at most `distance` smaller, has any share.
    """
    tops = [logits.topk(count + 1, dim=1) for logits in (z, y)]
    clear = torch.stack([top.values[:, -2] - top.values[:, -1] > distance for top in tops]).all(dim=0)
    a, b = (top.indices[:, :count] for top in tops)
    share = (a.unsqueeze(2) == b.unsqueeze(1)).sum(dim=(1, 2)).double() / count
    return float(share.where(clear, 0.0).mean()), float(share.where(clear, 1.0).mean())
