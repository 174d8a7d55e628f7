"""H = Σ XᵀX over the tokens X [tokens, in] that reach a Linear: the one statistic of AWQ, clip search and GPTQ.

The squared output error of a changed weight is Σ_rows ΔW H ΔWᵀ, exactly; X / s has D⁻¹ H D⁻¹ with D = diag(s). H is
kept as a matrix where that is cheap, else as a factor R [rows, in] with RᵀR = H: the tokens themselves, or, where
they are too many, a count sketch of them (Charikar, Chen, Farach-Colton 2002): each row of R is a sum of tokens with
random signs, so that RᵀR is H on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime import SINGLE_PROCESS, Team

_FLUSH_ROWS = 1024  # tokens that are gathered before they are multiplied
_TILE = 512  # columns of H worked out at once; what lies below the diagonal is mirrored


@dataclass(frozen=True)
class Gram:
    """The second moment of one input: `matrix` H [in, in] or `factor` R [rows, in], float32; the other is None.

    tokens: how many are in it. error: |diag(RᵀR) - diag(H)| / |diag(H)| of a sketch, zero for what is exact.
    """

    matrix: torch.Tensor | None
    factor: torch.Tensor | None
    tokens: int
    error: float = 0.0

    @property
    def in_features(self) -> int:
        return int(self._held.shape[1])

    @property
    def _held(self) -> torch.Tensor:
        held = self.matrix if self.matrix is not None else self.factor
        assert held is not None
        return held

    @property
    def kind(self) -> str:
        """How H is held, for the report."""
        if self.matrix is not None:
            return f"matrix of {self.tokens} tokens"
        rows = self._held.shape[0]
        if self.error == 0.0:
            return f"{self.tokens} tokens"
        return f"sketch of {self.tokens} tokens in {rows} rows, error of its diagonal {self.error:.1%}"

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """δ H δᵀ of each row of delta [rows, in] -> [rows]."""
        if self.matrix is not None:
            return ((delta @ self.matrix) * delta).sum(dim=1)
        return (delta @ self._held.T).square().sum(dim=1)

    def diagonal(self) -> torch.Tensor:
        """[in], the sum of squares of each channel."""
        return self.matrix.diagonal() if self.matrix is not None else self._held.square().sum(dim=0)

    def diagonal_blocks(self, size: int) -> torch.Tensor:
        """[in / size, size, size]: H of each group of consecutive channels."""
        if self.matrix is not None:
            tiles = self.matrix.reshape(-1, size, self.in_features // size, size)  # [groups, size, groups, size]
            return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        parts = self._held.reshape(len(self._held), -1, size).transpose(0, 1)  # [groups, rows, size]
        return torch.bmm(parts.transpose(1, 2), parts)

    def rescaled(self, factors: torch.Tensor) -> Gram:
        """Of X / factors. factors: [in]."""
        if self.matrix is not None:
            return replace(self, matrix=self.matrix / factors / factors[:, None])
        return replace(self, factor=self._held / factors)


def combined(grams: Sequence[Gram], weights: Sequence[float]) -> Gram:
    """Σ w H, all of one kind: matrices are added, factors stacked."""
    tokens = sum(gram.tokens for gram in grams)
    error = max(gram.error for gram in grams)
    if grams[0].matrix is not None:
        total = torch.zeros_like(grams[0].matrix)
        for gram, weight in zip(grams, weights, strict=True):
            assert gram.matrix is not None
            total.add_(gram.matrix, alpha=weight)
        return Gram(total, None, tokens, error)
    rows = [gram._held * weight**0.5 for gram, weight in zip(grams, weights, strict=True)]
    return Gram(None, torch.cat(rows), tokens, error)


def sketch_rows(counts: Sequence[int], in_features: int, matrix_bytes: int, factor_bytes: int) -> list[int] | None:
    """Rows of the factor for each modality with `counts` tokens, or None where a matrix is the cheaper form.

    matrix_bytes, factor_bytes: how large H of one input may get in either form, over all modalities.

    A matrix costs tokens * in^2 to make and in^3 / 3 to factorize, a factor in * 4 rows^2 (gptq.py): with fewer tokens
    than half the inputs these are kept as they are. What does not fit is sketched, the room shared evenly.
    """
    total, present = sum(counts), sum(1 for count in counts if count)
    if 2 * total >= in_features and 4 * in_features**2 * present <= matrix_bytes:
        return None
    room = max(factor_bytes // (4 * in_features), present)
    rows = [0] * len(counts)
    for left, index in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
        rows[index] = min(counts[index], room // (len(counts) - left))
        room -= rows[index]
    return rows


class GramBuilder:
    """Adds up H of one input and one modality, in the order in which tokens come.

    Several processes that see some of the tokens each get the same H of all. As a factor of the tokens as they are it
    has the bits of one process; sketches and matrices are added in another order, see Team.add_up.
    """

    def __init__(self, in_features: int, rows: int | None, device: torch.device, seed: int) -> None:
        """rows: of the factor, or None for a matrix. seed: of the sketch's signs."""
        self._rows = rows
        height = in_features if rows is None else rows
        self._held = torch.zeros((height, in_features), dtype=torch.float32, device=device)
        self._squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._waiting: list[torch.Tensor] = []
        self._random = torch.Generator().manual_seed(seed)
        self._signs = torch.zeros(0, dtype=torch.int8)  # of the tokens after the first round
        self._tokens = 0

    def add(self, x: torch.Tensor, number: int | None = None) -> None:
        """x: [tokens, in] float32. number: of its first token among those of all processes, where there are several."""
        if self._rows is None:
            self._waiting.append(x)
            if sum(len(part) for part in self._waiting) >= _FLUSH_ROWS:
                self._flush()
        else:
            self._squares += x.square().sum(dim=0)
            self._sketch(x, self._tokens if number is None else number)
        self._tokens += len(x)

    def _flush(self) -> None:
        x = torch.cat(self._waiting)
        self._waiting = []
        for first in range(0, x.shape[1], _TILE):
            tile = slice(first, first + _TILE)
            self._held[tile, first:].addmm_(x[:, tile].T, x[:, first:])

    def _sketch(self, x: torch.Tensor, number: int) -> None:
        """Token number t goes to row t mod rows; tokens of the first round keep their sign, and are exact if alone."""
        assert self._rows is not None
        done = 0
        while done < len(x):
            row = (number + done) % self._rows
            count = min(len(x) - done, self._rows - row)
            part = x[done : done + count]
            if number + done >= self._rows:
                part = part * self._signs_of(number + done - self._rows, count).to(x.device, torch.float32)[:, None]
            self._held[row : row + count] += part
            done += count

    def _signs_of(self, first: int, count: int) -> torch.Tensor:
        """Those of `count` tokens, by their number after the first round."""
        missing = first + count - len(self._signs)
        if missing > 0:
            drawn = torch.randint(0, 2, (missing,), generator=self._random) * 2 - 1
            self._signs = torch.cat([self._signs, drawn.to(torch.int8)])
        return self._signs[first : first + count]

    @torch.inference_mode()
    def finish(self, team: Team = SINGLE_PROCESS) -> Gram:
        """H of the tokens that all processes of the team have added."""
        if self._waiting:
            self._flush()
        tokens = sum(team.all_gather(self._tokens))
        team.all_reduce(self._held)
        team.all_reduce(self._squares)
        if self._rows is None:
            for first in range(0, self._held.shape[0], _TILE):
                tile = slice(first, first + _TILE)
                self._held[first + _TILE :, tile] = self._held[tile, first + _TILE :].T
                square = self._held[tile, tile]
                square.copy_((square + square.T) / 2)
            return Gram(self._held, None, tokens)
        if tokens <= self._rows:
            return Gram(None, self._held, tokens)
        found = self._held.square().sum(dim=0)
        error = float((found - self._squares).norm() / self._squares.norm().clamp_min(1e-30))
        return Gram(None, self._held, tokens, error)
