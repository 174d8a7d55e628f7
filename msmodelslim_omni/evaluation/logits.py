"""From the hidden states behind the last layer to scores: final norm, then lm_head block by block of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import QuantError
from ..models import MODALITIES
from ..quantized import Source
from ..runtime import Progress, float64_device
from ..storage import (
    TensorInfo,
    load_finite,
    load_tensor,
    row_range,
    same_bytes,
)
from .figures import Measured
from .scoring import (
    LogitScorer,
    Scores,
    drift,
    frame,
    joined,
    scored_positions,
)
from .side_by_side import (
    FLOAT,
    QUANT,
    Sample,
    SideBySide,
    refuse_nonfinite,
)

# lm_head is read once for so many positions, a block of its rows at a time; their logits are scored in smaller lots,
# whose float64 copies stay small.
POSITIONS_AT_ONCE = 4096
SCORED_AT_ONCE = 512
HEAD_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class _Rows:
    """Positions on their way through lm_head.

    exact, other: [n, hidden] of the two models. sample: int64 [n], whose they are; targets: int64 [n]; in_answer: bool.
    """

    exact: torch.Tensor
    other: torch.Tensor
    sample: torch.Tensor
    targets: torch.Tensor
    in_answer: torch.Tensor

    def part(self, rows: slice) -> _Rows:
        return _Rows(self.exact[rows], self.other[rows], self.sample[rows], self.targets[rows], self.in_answer[rows])


def score(
    exact: Source, other: Source, pair: SideBySide, positions: str, device: torch.device, progress: Progress
) -> Measured:
    """Score the positions that count in every sample. `pair` stands behind the last decoder layer.

    positions: see scoring.scored_positions.
    """
    norms = [source.model.family.build_norm(source.config, _norm_weight(source, device)) for source in (exact, other)]
    heads = [source.floats[source.model.head_of(source.config)] for source in (exact, other)]
    shared = same_bytes(*heads)
    hidden_sums: list[torch.Tensor] = []
    places: list[tuple[torch.Tensor, ...]] = []
    scores: list[Scores] = []
    around = frame([sample.tokens for sample in pair.samples if sample.answer is None])
    chosen = [scored_positions(s.modality, s.answer, positions, around) for s in pair.samples]
    total = sum(len(places) for places in chosen)
    for rows in _lots(_normed(pair, norms, chosen, hidden_sums)):
        scores.append(_score_rows(rows, heads, shared, pair.samples))
        places.append((rows.sample, rows.targets, rows.in_answer))
        progress.step("logits", sum(len(sample) for sample, *_ in places), total, "positions")
    sample, targets, in_answer = (torch.cat(parts) for parts in zip(*places, strict=True))
    return Measured(
        samples=pair.samples,
        scores=joined(scores),
        sample=sample,
        targets=targets,
        in_answer=in_answer,
        hidden=torch.stack(hidden_sums),
        embedding=pair.embedding_drift(),
    )


def _norm_weight(source: Source, device: torch.device) -> torch.Tensor:
    return load_finite(source.floats[source.model.norm]).to(device).to(torch.float32)


def _normed(
    pair: SideBySide, norms: list[torch.nn.Module], positions: list[torch.Tensor], hidden_sums: list[torch.Tensor]
) -> Iterator[_Rows]:
    """Sample by sample the positions that count, behind the final norm; `hidden_sums` gets the drift of each sample."""
    for number, (sample, chosen) in enumerate(zip(pair.samples, positions, strict=True)):
        states = []
        for side, norm in zip((FLOAT, QUANT), norms, strict=True):
            with torch.inference_mode():
                states.append(norm(pair.hidden(side, number))[0])
            refuse_nonfinite(states[-1], f"{side} model, final norm, sample {sample.where}")
        read = sample.read_by_talker
        hidden_sums.append(drift(states[0][:read], states[1][:read], sample.modality[:read], len(MODALITIES)))
        on_device = chosen.to(states[0].device)
        yield _Rows(
            states[0][on_device],
            states[1][on_device],
            torch.full_like(chosen, number),
            sample.tokens[chosen + 1],
            _in_answer(sample, chosen),
        )


def _in_answer(sample: Sample, chosen: torch.Tensor) -> torch.Tensor:
    if sample.answer is None:
        return torch.zeros(len(chosen), dtype=torch.bool)
    return (chosen >= sample.answer[0] - 1) & (chosen < sample.answer[1] - 1)


def _lots(samples: Iterator[_Rows]) -> Iterator[_Rows]:
    """The same positions, gathered and cut so that each lot but the last has as many as lm_head is read for."""
    waiting: list[_Rows] = []
    count = 0
    for rows in samples:
        waiting.append(rows)
        count += len(rows.sample)
        while count >= POSITIONS_AT_ONCE:
            whole = _gathered(waiting)
            yield whole.part(slice(0, POSITIONS_AT_ONCE))
            waiting = [whole.part(slice(POSITIONS_AT_ONCE, None))]
            count -= POSITIONS_AT_ONCE
    if count:
        yield _gathered(waiting)


def _gathered(rows: list[_Rows]) -> _Rows:
    return _Rows(*(torch.cat([getattr(part, name) for part in rows]) for name in _Rows.__dataclass_fields__))


def _score_rows(rows: _Rows, heads: list[TensorInfo], shared: bool, samples: list[Sample]) -> Scores:
    """One pass over lm_head. shared: both models have the same, so that each block is read once."""
    device = rows.exact.device
    lots = [rows.part(slice(first, first + SCORED_AT_ONCE)) for first in range(0, len(rows.sample), SCORED_AT_ONCE)]
    scorers = [LogitScorer(lot.targets.to(float64_device(device))) for lot in lots]
    vocabulary, width = heads[0].shape
    step = max(1, HEAD_BLOCK_BYTES // (4 * width))
    for first in range(0, vocabulary, step):
        blocks = [
            load_tensor(row_range(head, first, first + step)).to(device).to(torch.float32)
            for head in (heads[:1] if shared else heads)
        ]
        for lot, scorer in zip(lots, scorers, strict=True):
            logits = [F.linear(lot.exact, blocks[0]), F.linear(lot.other, blocks[-1])]  # [rows, block]
            for side, values in zip((FLOAT, QUANT), logits, strict=True):
                _refuse_nonfinite_logits(values, side, lot, samples, first)
            scorer.add(first, *(values.to(float64_device(device)) for values in logits))
    return joined([scorer.finish() for scorer in scorers])


def _refuse_nonfinite_logits(logits: torch.Tensor, side: str, rows: _Rows, samples: list[Sample], first: int) -> None:
    finite = torch.isfinite(logits)
    if bool(finite.all()):
        return
    row, token = torch.nonzero(~finite)[0].tolist()
    raise QuantError(
        f"{side} model, logits, sample {samples[int(rows.sample[row])].where}: NaN or Inf for token {first + token}",
        "check lm_head and the final norm of that model",
    )
