"""Prose for training (the King James Bible, as printed by the Debian package bible-kjv) and a trigram as baseline."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby

_HELD_OUT_SHARE = 40  # about one chapter in 40 is held out


@cache
def chapters() -> list[tuple[str, str]]:
    """(name such as Ge1, text) of each chapter, verses joined by spaces."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    matches = [match for line in lines if (match := re.match(r"(\w+?\d+):\d+ (.*)", line))]
    grouped = groupby(matches, key=lambda match: match[1])
    return [(name, " ".join(match[2].strip() for match in verses)) for name, verses in grouped]


def is_held_out(name: str) -> bool:
    """Whether the chapter belongs to the held-out set."""
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def train_chapters() -> list[str]:
    """Texts of the training chapters."""
    return [text for name, text in chapters() if not is_held_out(name)]


def held_chapters() -> list[str]:
    """Texts of the held-out chapters."""
    return [text for name, text in chapters() if is_held_out(name)]


class Trigram:
    """Interpolated Kneser-Ney model over token ids, with one absolute discount per order."""

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int, discounts: tuple[float, float]) -> None:
        self.vocabulary = vocabulary
        self.discount2, self.discount3 = discounts
        trigrams: Counter[tuple[int, int, int]] = Counter()
        for ids in texts:
            trigrams.update(zip(ids, ids[1:], ids[2:], strict=False))
        self.three = trigrams
        self.three_total: Counter[tuple[int, int]] = Counter()
        self.three_kinds: Counter[tuple[int, int]] = Counter()
        self.two: Counter[tuple[int, int]] = Counter()  # number of contexts in which a pair appears
        for (a, b, c), count in trigrams.items():
            self.three_total[a, b] += count
            self.three_kinds[a, b] += 1
            self.two[b, c] += 1
        self.two_total: Counter[int] = Counter()
        self.two_kinds: Counter[int] = Counter()
        self.one: Counter[int] = Counter()
        for (b, c), count in self.two.items():
            self.two_total[b] += count
            self.two_kinds[b] += 1
            self.one[c] += 1
        self.one_total = sum(self.one.values())

    def probability(self, a: int, b: int, c: int) -> float:
        """Probability of token c after a, b."""
        low = (self.one[c] + 0.5) / (self.one_total + 0.5 * self.vocabulary)
        total = self.two_total[b]
        if total:
            seen = max(self.two[b, c] - self.discount2, 0) / total
            low = seen + self.discount2 * self.two_kinds[b] / total * low
        total = self.three_total[a, b]
        if total:
            seen = max(self.three[a, b, c] - self.discount3, 0) / total
            low = seen + self.discount3 * self.three_kinds[a, b] / total * low
        return low

    def perplexity(self, texts: Sequence[Sequence[int]]) -> float:
        """Perplexity over every token, from the third of each text on."""
        logs = [
            math.log(self.probability(a, b, c)) for ids in texts for a, b, c in zip(ids, ids[1:], ids[2:], strict=False)
        ]
        return math.exp(-sum(logs) / len(logs))


def best_trigram(texts: Sequence[Sequence[int]], vocabulary: int, held: Sequence[Sequence[int]]) -> float:
    """Lowest perplexity over a grid of discounts, chosen on the held-out text itself, in the trigram's favour."""
    model = Trigram(texts, vocabulary, (0.75, 0.75))
    best = math.inf
    for model.discount2 in (0.6, 0.75, 0.9):
        for model.discount3 in (0.6, 0.75, 0.9):
            best = min(best, model.perplexity(held))
    return best
