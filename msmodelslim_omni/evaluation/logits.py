"""Scores from the hidden states after the last layer: final norm, then lm_head by blocks of the vocabulary."""

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
from .figures import Measurements
from .layer_walk import LayerWalk
from .scoring import (
    LogitScorer,
    Scores,
    common_prefix_and_suffix,
    concatenate_scores,
    drift_sums,
    scored_positions,
)
from .stem_pair import FLOAT, QUANT, Sample, StemPair, require_finite

# One pass over lm_head, by blocks of its rows, serves one batch of positions. Logits are scored in smaller batches to
# keep their float64 copies small.
POSITIONS_PER_HEAD_PASS = 4096
POSITIONS_PER_SCORER = 512
HEAD_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class _Rows:
    """n positions as inputs of lm_head.

    float_states, quant_states: [n, hidden] of the two models. sample: int64 [n], an index into the samples.
    targets: int64 [n], the next tokens. in_answer: bool [n].
    """

    float_states: torch.Tensor
    quant_states: torch.Tensor
    sample: torch.Tensor
    targets: torch.Tensor
    in_answer: torch.Tensor

    def part(self, rows: slice) -> _Rows:
        return _Rows(
            self.float_states[rows],
            self.quant_states[rows],
            self.sample[rows],
            self.targets[rows],
            self.in_answer[rows],
        )


def score(
    float_source: Source,
    quant_source: Source,
    stems: StemPair,
    walk: LayerWalk,
    positions: str,
    device: torch.device,
    progress: Progress,
) -> Measurements:
    """Score the chosen positions of every sample. `walk` must have passed the last decoder layer.

    positions: see scoring.scored_positions.
    """
    samples = stems.samples
    norms = [_build_norm(source, device) for source in (float_source, quant_source)]
    heads = [source.floats[source.model.lm_head_tensor(source.config)] for source in (float_source, quant_source)]
    shared = same_bytes(*heads)
    template = common_prefix_and_suffix([sample.tokens for sample in samples if sample.answer is None])
    chosen = [scored_positions(s.modality, s.answer, positions, template) for s in samples]
    total = sum(len(sample_positions) for sample_positions in chosen)
    hidden_sums: list[torch.Tensor] = []
    targets: list[tuple[torch.Tensor, ...]] = []
    scores: list[Scores] = []
    for rows in _batches(_final_rows(samples, walk, norms, chosen, hidden_sums)):
        scores.append(_score_rows(rows, heads, shared, samples))
        targets.append((rows.sample, rows.targets, rows.in_answer))
        progress.step("logits", sum(len(sample) for sample, *_ in targets), total, "positions")
    sample, next_tokens, in_answer = (torch.cat(parts) for parts in zip(*targets, strict=True))
    return Measurements(
        samples=samples,
        scores=concatenate_scores(scores),
        sample=sample,
        targets=next_tokens,
        in_answer=in_answer,
        hidden=torch.stack(hidden_sums),
        embedding=stems.embedding_drift(),
    )


def _build_norm(source: Source, device: torch.device) -> torch.nn.Module:
    """The final norm of a model, in float32."""
    weight = load_finite(source.floats[source.model.norm]).to(device).to(torch.float32)
    return source.model.family.build_norm(source.config, weight)


def _final_rows(
    samples: list[Sample],
    walk: LayerWalk,
    norms: list[torch.nn.Module],
    positions: list[torch.Tensor],
    hidden_sums: list[torch.Tensor],
) -> Iterator[_Rows]:
    """Yield the chosen positions of each sample after the final norm. Appends each sample's drift to `hidden_sums`."""
    for number, (sample, chosen) in enumerate(zip(samples, positions, strict=True)):
        states = []
        for side, norm in zip((FLOAT, QUANT), norms, strict=True):
            with torch.inference_mode():
                states.append(norm(walk.hidden(side, number))[0])
            require_finite(states[-1], f"{side} model, final norm, sample {sample.where}")
        read = sample.read_by_talker
        hidden_sums.append(drift_sums(states[0][:read], states[1][:read], sample.modality[:read], len(MODALITIES)))
        on_device = chosen.to(states[0].device)
        yield _Rows(
            states[0][on_device],
            states[1][on_device],
            torch.full_like(chosen, number),
            sample.tokens[chosen + 1],
            _in_answer(sample, chosen),
        )


def _in_answer(sample: Sample, chosen: torch.Tensor) -> torch.Tensor:
    """Whether each position predicts a token of the sample's answer or its end: bool [positions]."""
    if sample.answer is None:
        return torch.zeros(len(chosen), dtype=torch.bool)
    return (chosen >= sample.answer[0] - 1) & (chosen < sample.answer[1] - 1)


def _batches(rows_by_sample: Iterator[_Rows]) -> Iterator[_Rows]:
    """Regroup rows into batches of POSITIONS_PER_HEAD_PASS; the last batch may be smaller."""
    waiting: list[_Rows] = []
    count = 0
    for rows in rows_by_sample:
        waiting.append(rows)
        count += len(rows.sample)
        while count >= POSITIONS_PER_HEAD_PASS:
            gathered = _concatenate_rows(waiting)
            yield gathered.part(slice(0, POSITIONS_PER_HEAD_PASS))
            waiting = [gathered.part(slice(POSITIONS_PER_HEAD_PASS, None))]
            count -= POSITIONS_PER_HEAD_PASS
    if count:
        yield _concatenate_rows(waiting)


def _concatenate_rows(rows: list[_Rows]) -> _Rows:
    return _Rows(*(torch.cat([getattr(part, name) for part in rows]) for name in _Rows.__dataclass_fields__))


def _score_rows(rows: _Rows, heads: list[TensorInfo], shared: bool, samples: list[Sample]) -> Scores:
    """Score the rows in one pass over lm_head. shared: the models have equal lm_heads, so each block is read once."""
    device = rows.float_states.device
    firsts = range(0, len(rows.sample), POSITIONS_PER_SCORER)
    batches = [rows.part(slice(first, first + POSITIONS_PER_SCORER)) for first in firsts]
    scorers = [LogitScorer(batch.targets.to(float64_device(device))) for batch in batches]
    vocabulary, width = heads[0].shape
    step = max(1, HEAD_BLOCK_BYTES // (4 * width))
    for first in range(0, vocabulary, step):
        blocks = [
            load_tensor(row_range(head, first, first + step)).to(device).to(torch.float32)
            for head in (heads[:1] if shared else heads)
        ]
        for batch, scorer in zip(batches, scorers, strict=True):
            # [rows, block] each
            logits = [F.linear(batch.float_states, blocks[0]), F.linear(batch.quant_states, blocks[-1])]
            for side, values in zip((FLOAT, QUANT), logits, strict=True):
                _require_finite_logits(values, side, batch, samples, first)
            scorer.add(first, *(values.to(float64_device(device)) for values in logits))
    return concatenate_scores([scorer.finish() for scorer in scorers])


def _require_finite_logits(logits: torch.Tensor, side: str, rows: _Rows, samples: list[Sample], first: int) -> None:
    finite = torch.isfinite(logits)
    if bool(finite.all()):
        return
    row, token = torch.nonzero(~finite)[0].tolist()
    raise QuantError(
        f"{side} model, logits, sample {samples[int(rows.sample[row])].where}: NaN or Inf for token {first + token}",
        "check lm_head and the final norm of that model",
    )
