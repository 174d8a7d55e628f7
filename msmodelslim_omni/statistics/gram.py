"""H = Σ XᵀX over the input tokens X [tokens, in] of a Linear: the only statistic that AWQ, clip search and GPTQ need.

For a weight change ΔW [out, in], the squared output error of each output row δ is exactly δ H δᵀ. Dividing the input
by s turns H into D⁻¹ H D⁻¹ with D = diag(s).

H is exact in all its forms: a matrix, a matrix in a file if memory is short, or for few tokens the tokens themselves, a
factor R [rows, in] with RᵀR = H. An H that is only near the true one makes GPTQ worse than no GPTQ: it corrects errors
by correlations that do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime import SINGLE_PROCESS, Team
from .spilled import Spill, SpilledMatrix

FLUSH_TOKENS = 1024  # tokens to collect before each matrix product
_TILE = 256  # columns of H per matrix product; only the upper triangle is computed, then mirrored


@dataclass(frozen=True)
class Gram:
    """H of one input, float32, in one of three forms.

    whole: H [in, in]. rows: the tokens R [tokens, in], with RᵀR = H. spilled: H on disk. tokens: their number in H.
    divisors: [in], by which the input is divided when H is read, so that no second H is in memory.
    """

    whole: torch.Tensor | None
    rows: torch.Tensor | None
    tokens: int
    spilled: SpilledMatrix | None = None
    divisors: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        if self.spilled is not None:
            return self.spilled.size
        stored = self.whole if self.whole is not None else self.rows
        assert stored is not None
        return int(stored.shape[1])

    @property
    def matrix(self) -> torch.Tensor | None:
        """H [in, in] of the divided input, a copy if it is divided; None in the other forms."""
        if self.whole is None or self.divisors is None:
            return self.whole
        return self.whole / self.divisors / self.divisors[:, None]

    @property
    def factor(self) -> torch.Tensor | None:
        """R [tokens, in] of the divided input, a copy if it is divided; None in the other forms."""
        return self.rows if self.rows is None or self.divisors is None else self.rows / self.divisors

    @property
    def kind(self) -> str:
        """How H is stored, for the report."""
        if self.spilled is not None:
            return f"matrix of {self.tokens} tokens, on disk"
        return f"matrix of {self.tokens} tokens" if self.whole is not None else f"{self.tokens} tokens"

    def rows_of_matrix(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some rows of H in memory or on disk, a copy if it is divided: [rows, in]."""
        if self.spilled is None:
            assert self.whole is not None
            part = self.whole[rows]
            return part if self.divisors is None else (part / self.divisors).div_(self.divisors[rows, None])
        part = self.spilled.read(rows)
        return part if self.divisors is None else part.div_(self.divisors).div_(self.divisors[rows, None])

    def _strips(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of a spilled H, a strip after the other."""
        assert self.spilled is not None
        return ((rows, self.rows_of_matrix(rows)) for rows in self.spilled.strips())

    def output_error(self, delta: torch.Tensor) -> torch.Tensor:
        """δ H δᵀ for each row δ of `delta` [rows, in] -> [rows]."""
        if self.spilled is not None:
            return torch.stack([((delta[:, rows] @ h) * delta).sum(dim=1) for rows, h in self._strips()]).sum(dim=0)
        if (matrix := self.matrix) is not None:
            return ((delta @ matrix) * delta).sum(dim=1)
        factor = self.factor
        assert factor is not None
        return (delta @ factor.T).square().sum(dim=1)

    def diagonal(self) -> torch.Tensor:
        """diag(H), [in]: the sum of squares of each channel."""
        if self.spilled is not None:
            return torch.cat([h[:, rows].diagonal() for rows, h in self._strips()])
        if self.whole is not None:
            diagonal = self.whole.diagonal()
            return diagonal if self.divisors is None else diagonal / self.divisors / self.divisors
        factor = self.factor
        assert factor is not None
        return factor.square().sum(dim=0)

    def diagonal_blocks(self, size: int) -> torch.Tensor:
        """H of each group of `size` consecutive channels, [in / size, size, size]."""
        if self.spilled is not None:
            groups = (slice(first, first + size) for first in range(0, self.in_features, size))
            return torch.stack([self.rows_of_matrix(group)[:, group] for group in groups])
        if self.whole is not None:
            tiles = self.whole.reshape(-1, size, self.in_features // size, size)  # [groups, size, groups, size]
            blocks = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
            if self.divisors is None:
                return blocks
            divisors = self.divisors.view(-1, size)
            return (blocks / divisors[:, None, :]).div_(divisors[:, :, None])
        factor = self.factor
        assert factor is not None
        parts = factor.reshape(len(factor), -1, size).transpose(0, 1)  # [groups, rows, size]
        return torch.bmm(parts.transpose(1, 2), parts)

    def rescaled(self, factors: torch.Tensor) -> Gram:
        """H of the input divided by `factors` [in]."""
        return replace(self, divisors=factors if self.divisors is None else self.divisors * factors)


def weighted_sum(grams: Sequence[Gram], weights: Sequence[float]) -> Gram:
    """Σ w H: adds matrices, or stacks factors. All H must have the same form."""
    tokens = sum(gram.tokens for gram in grams)
    if grams[0].spilled is not None:
        return Gram(None, None, tokens, _weighted_sum_on_disk(grams, weights))
    if grams[0].whole is not None:
        total = torch.zeros_like(grams[0].whole)
        for gram, weight in zip(grams, weights, strict=True):
            assert gram.matrix is not None
            total.add_(gram.matrix, alpha=weight)
        return Gram(total, None, tokens)
    factors = [
        gram.factor * weight**0.5 for gram, weight in zip(grams, weights, strict=True) if gram.factor is not None
    ]
    return Gram(None, torch.cat(factors), tokens)


def _weighted_sum_on_disk(grams: Sequence[Gram], weights: Sequence[float]) -> SpilledMatrix:
    assert grams[0].spilled is not None
    total = grams[0].spilled.another()
    for rows in total.strips():
        strip = total.read(rows)
        for gram, weight in zip(grams, weights, strict=True):
            strip.add_(gram.rows_of_matrix(rows), alpha=weight)
        total.write(rows, slice(None), strip)
    return total


@dataclass(frozen=True)
class GramForm:
    """How H of one input is collected. rows: the number of tokens per modality to store; None for a matrix.

    combined: one weighted H of all modalities instead of one H per modality. strip: rows of a matrix on disk that are
    in memory at once; None for a matrix in memory.
    """

    rows: tuple[int, ...] | None
    combined: bool = False
    strip: int | None = None

    def nbytes(self, in_features: int, modalities: int) -> int:
        """Bytes in memory of H of one input while it is collected."""
        if self.rows is not None:
            return 4 * in_features * sum(self.rows)
        held = in_features if self.strip is None else 2 * self.strip  # a strip, and as many tokens to add to it
        return 4 * in_features * held * (1 if self.combined else modalities)

    def disk_bytes(self, in_features: int, modalities: int) -> int:
        """Bytes on disk: H, per modality and combined, and its factorization."""
        matrices = 0 if self.strip is None else 2 if self.combined or modalities == 1 else modalities + 2
        return 4 * in_features**2 * matrices


def choose_form(
    counts: Sequence[int], in_features: int, matrix_bytes: int, factor_bytes: int, *, combinable: bool = False
) -> GramForm:
    """Choose how to collect H of one input: in memory if the budget allows it, otherwise on disk.

    counts: tokens per modality. matrix_bytes, factor_bytes: the budget of H of one input over all modalities, as a
    matrix, and as a factor or as the strips of a matrix on disk. combinable: whether the weights of the modalities are
    known, so that one weighted matrix can replace one matrix per modality when these do not fit.

    A matrix costs tokens * in^2 to build and in^3 / 3 to factorize, a factor in * 4 tokens^2 (gptq.py). The tokens
    themselves are stored if there are fewer than in / 2.
    """
    total, present = sum(counts), sum(1 for count in counts if count)
    tokens = GramForm(tuple(counts))
    if 2 * total < in_features and tokens.nbytes(in_features, present) <= factor_bytes:
        return tokens
    for combined in (False, True) if combinable else (False,):
        if GramForm(None, combined).nbytes(in_features, present) <= matrix_bytes:
            return GramForm(None, combined)
    if tokens.nbytes(in_features, present) <= factor_bytes:
        return tokens
    combined = combinable and present > 1
    strip = factor_bytes // (8 * in_features * (1 if combined else max(present, 1)))
    return GramForm(None, combined, min(max(strip, 1), in_features))


class RoutedGramBuilder:
    """Accumulates H of the tokens that reach one expert, whose number is known only at the end. H is always exact.

    Keeps the tokens themselves, up to half as many as there are inputs; more become a matrix.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._in_features = in_features
        self._device = device
        self._rows: list[torch.Tensor] = []
        self._matrix: GramBuilder | None = None
        self._tokens = 0

    def add(self, x: torch.Tensor, offset: int | None = None) -> None:
        """Add weighted tokens, float32 [tokens, in]."""
        self._tokens += len(x)
        if self._matrix is None and 2 * self._tokens >= self._in_features:
            self._to_matrix()
        if self._matrix is not None:
            self._matrix.add(x)
        else:
            self._rows.append(x)

    def _to_matrix(self) -> None:
        self._matrix = GramBuilder(self._in_features, None, self._device)
        for rows in self._rows:
            self._matrix.add(rows)
        self._rows = []

    @torch.inference_mode()
    def finish(self, team: Team = SINGLE_PROCESS) -> Gram:
        """H of the tokens added by all processes of the team, added in the order of the processes."""
        total = sum(team.all_gather(self._tokens))
        if 2 * total >= self._in_features:
            if self._matrix is None:
                self._to_matrix()
            assert self._matrix is not None
            return self._matrix.finish(team)
        empty = torch.zeros((0, self._in_features), dtype=torch.float32, device=self._device)
        own = torch.cat([empty, *self._rows])
        rows = own if team.size == 1 else torch.cat([part.to(self._device) for part in team.all_gather(own.cpu())])
        return Gram(None, rows, total)


class GramBuilder:
    """Accumulates H of one input and one modality, token by token in order.

    In a team, each process adds some of the tokens, and all processes get the same H of all tokens. A factor, which
    holds the tokens themselves, is bit-identical to a single process. Matrices are summed in a different order; see
    Team.all_reduce.
    """

    def __init__(self, in_features: int, rows: int | None, device: torch.device, spill: Spill | None = None) -> None:
        """rows: the number of tokens to store, or None for a matrix. spill: for a matrix on disk."""
        self._rows = rows
        self._spilled = None if spill is None else SpilledMatrix(in_features, spill, device)
        self._enough = FLUSH_TOKENS if spill is None else spill.rows
        height = 0 if spill is not None else in_features if rows is None else rows
        self._sum = torch.zeros((height, in_features), dtype=torch.float32, device=device)
        self._waiting: list[torch.Tensor] = []
        self._tokens = 0

    def add(self, x: torch.Tensor, offset: int | None = None) -> None:
        """Add tokens.

        x: float32 [tokens, in]. offset: the number of tokens before x in all processes; by default in this process.
        """
        if self._rows is None:
            self._waiting.append(x)
            if sum(len(part) for part in self._waiting) >= self._enough:
                self._flush()
        else:
            first = self._tokens if offset is None else offset
            self._sum[first : first + len(x)] = x
        self._tokens += len(x)

    def _flush(self) -> None:
        x = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting = []
        if self._spilled is not None:
            for rows in self._spilled.strips():
                columns = slice(rows.start, None)
                strip = self._spilled.read(rows, columns)
                self._spilled.write(rows, columns, strip.addmm_(x[:, rows].T, x[:, columns]))
            return
        for first in range(0, x.shape[1], _TILE):
            tile = slice(first, first + _TILE)
            self._sum[tile, first:].addmm_(x[:, tile].T, x[:, first:])

    @torch.inference_mode()
    def finish(self, team: Team = SINGLE_PROCESS) -> Gram:
        """H of the tokens added by all processes of the team."""
        if self._waiting:
            self._flush()
        tokens = sum(team.all_gather(self._tokens))
        if self._spilled is not None:
            return Gram(None, None, tokens, self._finish_on_disk(self._spilled, team))
        team.all_reduce(self._sum)
        if self._rows is not None:
            return Gram(None, self._sum, tokens)
        for first in range(0, self._sum.shape[0], _TILE):
            tile = slice(first, first + _TILE)
            self._sum[first + _TILE :, tile] = self._sum[tile, first + _TILE :].T
            square = self._sum[tile, tile]
            square.copy_((square + square.T) / 2)
        return Gram(self._sum, None, tokens)

    @staticmethod
    def _finish_on_disk(spilled: SpilledMatrix, team: Team) -> SpilledMatrix:
        if team.size > 1:
            for rows in spilled.strips():
                strip = spilled.read(rows)
                team.all_reduce(strip)
                spilled.write(rows, slice(None), strip)
        spilled.mirror()
        return spilled
