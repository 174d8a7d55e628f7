"""Watches, and if asked forces, the tokens of transformers' generate: the answer's text or the codes of speech.

With forced tokens two models are compared step by step on the same past, with the library's own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def watched_steps(
    forced: Sequence[int] | None = None, end: int | None = None, on_step: Callable[[int], None] = lambda count: None
) -> Any:
    """A LogitsProcessor with the attributes `likeliest` (one token per step) and `chosen` (all tokens but the last).

    forced: tokens to choose instead of the model's, one per step. end: the token that is forced after them. on_step:
    receives the number of steps, after each one.
    """
    from transformers import LogitsProcessor

    class Steps(LogitsProcessor):
        def __init__(self) -> None:
            self.likeliest: list[int] = []
            self.chosen: list[int] = []
            self._first = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if not self.likeliest:
                self._first = input_ids.shape[1]
            step = len(self.likeliest)
            self.likeliest.append(int(scores[0].argmax()))
            on_step(step + 1)
            self.chosen = input_ids[0, self._first :].tolist()
            token = end if forced is None or step >= len(forced) else forced[step]
            if forced is None or token is None:
                return scores
            only = scores.new_full(scores.shape, float("-inf"))
            only[:, token] = 0.0
            return only

    return Steps()


def as_list(steps: Any) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([steps])
