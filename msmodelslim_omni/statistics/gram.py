"""H = Σ XᵀX over the input tokens X [tokens, in] of a Linear: the only statistic that AWQ, clip search and GPTQ need.

For a weight change ΔW [out, in], the squared output error of each output row δ is exactly δ H δᵀ. Dividing the input
by s turns H into D⁻¹ H D⁻¹ with D = diag(s).

H is stored as a matrix if that is cheap, otherwise as a factor R [rows, in] with RᵀR = H. R holds the tokens
themselves or, if there are too many, a count sketch of the tokens (Charikar, Chen, Farach-Colton 2002): each row of R
is a sum of tokens with random signs, and the expected value of RᵀR is H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime import SINGLE_PROCESS, Team

_FLUSH_ROWS = 1024  # tokens to collect before each matrix product
_TILE = 512  # columns of H per matrix product; only the upper triangle is computed, then mirrored


@dataclass(frozen=True)
class Gram:
    """H of one input, float32: either `matrix` H [in, in] or `factor` R [rows, in]; the other field is None.

    tokens: the number of tokens in H. error: |diag(RᵀR) - diag(H)| / |diag(H)| for a sketch, 0 for an exact H.
    """

    matrix: torch.Tensor | None
    factor: torch.Tensor | None
    tokens: int
    error: float = 0.0

    @property
    def in_features(self) -> int:
        return int(self._stored.shape[1])

    @property
    def _stored(self) -> torch.Tensor:
        stored = self.matrix if self.matrix is not None else self.factor
        assert stored is not None
        return stored

    @property
    def kind(self) -> str:
        """How H is stored, for the report."""
        if self.matrix is not None:
            return f"matrix of {self.tokens} tokens"
        rows = self._stored.shape[0]
        if self.error == 0.0:
            return f"{self.tokens} tokens"
        return f"sketch of {self.tokens} tokens in {rows} rows, diagonal error {self.error:.1%}"

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """δ H δᵀ for each row δ of `delta` [rows, in] -> [rows]."""
        if self.matrix is not None:
            return ((delta @ self.matrix) * delta).sum(dim=1)
        return (delta @ self._stored.T).square().sum(dim=1)

    def diagonal(self) -> torch.Tensor:
        """diag(H), [in]: the sum of squares of each channel."""
        return self.matrix.diagonal() if self.matrix is not None else self._stored.square().sum(dim=0)

    def diagonal_blocks(self, size: int) -> torch.Tensor:
        """H of each group of `size` consecutive channels, [in / size, size, size]."""
        if self.matrix is not None:
            tiles = self.matrix.reshape(-1, size, self.in_features // size, size)  # [groups, size, groups, size]
            return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        parts = self._stored.reshape(len(self._stored), -1, size).transpose(0, 1)  # [groups, rows, size]
        return torch.bmm(parts.transpose(1, 2), parts)

    def rescaled(self, factors: torch.Tensor) -> Gram:
        """H of the input divided by `factors` [in]."""
        if self.matrix is not None:
            return replace(self, matrix=self.matrix / factors / factors[:, None])
        return replace(self, factor=self._stored / factors)


def weighted_sum(grams: Sequence[Gram], weights: Sequence[float]) -> Gram:
    """Σ w H: adds matrices, or stacks factors. All H must be matrices, or all factors."""
    tokens = sum(gram.tokens for gram in grams)
    error = max(gram.error for gram in grams)
    if grams[0].matrix is not None:
        total = torch.zeros_like(grams[0].matrix)
        for gram, weight in zip(grams, weights, strict=True):
            assert gram.matrix is not None
            total.add_(gram.matrix, alpha=weight)
        return Gram(total, None, tokens, error)
    rows = [gram._stored * weight**0.5 for gram, weight in zip(grams, weights, strict=True)]
    return Gram(None, torch.cat(rows), tokens, error)


@dataclass(frozen=True)
class GramForm:
    """How H of one input is collected. rows: the number of rows of the factor R per modality; None for a matrix.

    combined: one weighted H of all modalities instead of one H per modality.
    """

    rows: tuple[int, ...] | None
    combined: bool = False

    def nbytes(self, in_features: int, modalities: int) -> int:
        """Bytes of H of one input while it is collected."""
        if self.rows is not None:
            return 4 * in_features * sum(self.rows)
        return 4 * in_features**2 * (1 if self.combined else modalities)


def choose_form(
    counts: Sequence[int], in_features: int, matrix_bytes: int, factor_bytes: int, *, combinable: bool = False
) -> GramForm:
    """Choose how to collect H of one input: exactly if the budget allows it, otherwise as a sketch.

    counts: tokens per modality. matrix_bytes, factor_bytes: the budget of H of one input over all modalities, as a
    matrix and as a factor. combinable: whether the weights of the modalities are known, so that one weighted matrix can
    replace one matrix per modality when these do not fit.

    A matrix costs tokens * in^2 to build and in^3 / 3 to factorize, a factor in * 4 rows^2 (gptq.py). The tokens
    themselves are stored if there are fewer than in / 2. Tokens that do not fit are sketched; the modalities share the
    budget evenly.
    """
    total, present = sum(counts), sum(1 for count in counts if count)
    if 2 * total >= in_features:
        for combined in (False, True) if combinable else (False,):
            if GramForm(None, combined).nbytes(in_features, present) <= matrix_bytes:
                return GramForm(None, combined)
    available = max(factor_bytes // (4 * in_features), present)
    rows = [0] * len(counts)
    for done, index in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
        rows[index] = min(counts[index], available // (len(counts) - done))
        available -= rows[index]
    return GramForm(tuple(rows))


class GramBuilder:
    """Accumulates H of one input and one modality, token by token in order.

    In a team, each process adds some of the tokens, and all processes get the same H of all tokens. A factor that holds
    the tokens themselves is bit-identical to a single process. Sketches and matrices are summed in a different order;
    see Team.all_reduce.
    """

    def __init__(self, in_features: int, rows: int | None, device: torch.device, seed: int) -> None:
        """rows: number of rows of the factor, or None for a matrix. seed: for the random signs of the sketch."""
        self._rows = rows
        height = in_features if rows is None else rows
        self._sum = torch.zeros((height, in_features), dtype=torch.float32, device=device)
        self._squares = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._waiting: list[torch.Tensor] = []
        self._random = torch.Generator().manual_seed(seed)
        self._signs = torch.zeros(0, dtype=torch.int8)  # of the tokens after the first `rows`
        self._tokens = 0

    def add(self, x: torch.Tensor, offset: int | None = None) -> None:
        """Add tokens.

        x: float32 [tokens, in]. offset: the number of tokens before x in all processes; by default in this process.
        """
        if self._rows is None:
            self._waiting.append(x)
            if sum(len(part) for part in self._waiting) >= _FLUSH_ROWS:
                self._flush()
        else:
            self._squares += x.square().sum(dim=0)
            self._sketch(x, self._tokens if offset is None else offset)
        self._tokens += len(x)

    def _flush(self) -> None:
        x = torch.cat(self._waiting)
        self._waiting = []
        for first in range(0, x.shape[1], _TILE):
            tile = slice(first, first + _TILE)
            self._sum[tile, first:].addmm_(x[:, tile].T, x[:, first:])

    def _sketch(self, x: torch.Tensor, offset: int) -> None:
        """Add token t to row t mod rows. The first `rows` tokens keep their sign: with no more tokens, H is exact."""
        assert self._rows is not None
        done = 0
        while done < len(x):
            row = (offset + done) % self._rows
            count = min(len(x) - done, self._rows - row)
            part = x[done : done + count]
            if offset + done >= self._rows:
                part = part * self._signs_of(offset + done - self._rows, count).to(x.device, torch.float32)[:, None]
            self._sum[row : row + count] += part
            done += count

    def _signs_of(self, first: int, count: int) -> torch.Tensor:
        """The signs (1 or -1) of `count` tokens; `first` counts from the end of the first `rows` tokens."""
        missing = first + count - len(self._signs)
        if missing > 0:
            drawn = torch.randint(0, 2, (missing,), generator=self._random) * 2 - 1
            self._signs = torch.cat([self._signs, drawn.to(torch.int8)])
        return self._signs[first : first + count]

    @torch.inference_mode()
    def finish(self, team: Team = SINGLE_PROCESS) -> Gram:
        """H of the tokens added by all processes of the team."""
        if self._waiting:
            self._flush()
        tokens = sum(team.all_gather(self._tokens))
        team.all_reduce(self._sum)
        team.all_reduce(self._squares)
        if self._rows is None:
            for first in range(0, self._sum.shape[0], _TILE):
                tile = slice(first, first + _TILE)
                self._sum[first + _TILE :, tile] = self._sum[tile, first + _TILE :].T
                square = self._sum[tile, tile]
                square.copy_((square + square.T) / 2)
            return Gram(self._sum, None, tokens)
        if tokens <= self._rows:
            return Gram(None, self._sum, tokens)
        diagonal = self._sum.square().sum(dim=0)
        error = float((diagonal - self._squares).norm() / self._squares.norm().clamp_min(1e-30))
        return Gram(None, self._sum, tokens, error)
