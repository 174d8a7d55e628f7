"""What each calibration token is used for: statistics, the probe, or neither; and how much it counts.

Pure functions of the samples' modalities. Every process of a run computes the same roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..models import MODALITIES
from ..recipe import Modality
from ..statistics import choose_rows

# Of the probe samples that stand for sequences of ordinary length. The probe keeps its tokens in memory.
_LONGEST_TYPICAL = 512


@dataclass(frozen=True)
class TokenRoles:
    """The roles of all tokens, by the samples' positions.

    rows: int64 indices per sample, the tokens whose inputs are kept as rows; see statistics.choose_rows.
    probe_samples: run through every changed layer, to measure its output error.
    held_out: the probe samples that do not enter H; empty where the other samples are too few.
    importance: the weight of one token of each modality (an index into MODALITIES).
    gram_counts: tokens of each modality that enter H.
    gram_offsets: per sample, the tokens of each modality that enter H from the samples before it.
    """

    rows: tuple[torch.Tensor, ...]
    probe_samples: frozenset[int]
    held_out: frozenset[int]
    importance: dict[int, float]
    gram_counts: tuple[int, ...]
    gram_offsets: tuple[tuple[int, ...], ...]


def assign_roles(
    modalities: Sequence[torch.Tensor], weights: str | Mapping[Modality, float], own_texts: int = 0
) -> TokenRoles:
    """Roles for samples of these modalities, int8 [tokens] each. weights: calibration.modality_weights.

    own_texts: how many samples, at the end, the model has written itself; they judge nothing.
    """
    given = modalities[: len(modalities) - own_texts]
    probe_samples = choose_probe_samples(given)
    held_out = choose_held_out(probe_samples, modalities)
    if not held_out and (shorter := choose_held_out(choose_probe_samples(given, typical=False), modalities)):
        probe_samples = held_out = shorter
    in_gram = torch.stack(
        [
            modality.bincount(minlength=len(MODALITIES)) * (position not in held_out)
            for position, modality in enumerate(modalities)
        ]
    )  # [samples, modalities]
    gram_counts: list[int] = in_gram.sum(dim=0).tolist()
    offsets: list[list[int]] = (in_gram.cumsum(dim=0) - in_gram).tolist()
    return TokenRoles(
        rows=tuple(choose_rows(modalities)),
        probe_samples=probe_samples,
        held_out=held_out,
        importance=token_importance(weights, gram_counts),
        gram_counts=tuple(gram_counts),
        gram_offsets=tuple(tuple(row) for row in offsets),
    )


def count_tokens(modalities: Sequence[torch.Tensor]) -> dict[str, int]:
    """Tokens by modality name, for the modalities that occur. modalities: int8 [tokens] per sample."""
    counts: list[int] = torch.cat([*modalities]).bincount(minlength=len(MODALITIES)).tolist()
    return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}


def token_importance(weights: str | Mapping[Modality, float], counts: Sequence[int]) -> dict[int, float]:
    """The weight of one token of each modality that has tokens. Over all counted tokens the weights sum to one.

    balanced: every modality has the same total weight. tokens: every token has the same weight. A mapping: every
    modality has the total weight that it gives.
    """
    present = [m for m, count in enumerate(counts) if count]
    if weights == "tokens":
        return dict.fromkeys(present, 1 / sum(counts))
    named = None if isinstance(weights, str) else {str(name): weight for name, weight in weights.items()}
    total = {m: 1.0 if named is None else named.get(MODALITIES[m], 0.0) for m in present}
    return {m: total[m] / (sum(total.values()) * counts[m]) for m in present}


def choose_probe_samples(
    modalities: Sequence[torch.Tensor], enough: int = 128, *, typical: bool = True
) -> frozenset[int]:
    """Positions of few samples that hold `enough` tokens of every modality.

    Of a modality with less than 8 * enough tokens, an eighth of them. typical: each modality has a sample of typical
    length among them, so that not only the beginnings of sequences are judged. The others are short. The modality with
    the fewest samples comes first, because its samples bring text tokens too. modalities: int8 [tokens] per sample.
    """
    counts = torch.stack([modality.bincount(minlength=len(MODALITIES)) for modality in modalities])
    lengths = counts.sum(dim=1).tolist()
    by_length = sorted(range(len(modalities)), key=lambda i: (lengths[i], i))
    total: list[int] = counts.sum(dim=0).tolist()
    samples: list[int] = (counts > 0).sum(dim=0).tolist()
    chosen: list[int] = []
    for index in sorted((m for m in range(len(MODALITIES)) if samples[m]), key=lambda m: (samples[m], m)):
        having = [position for position in by_length if counts[position, index]]
        if typical and (position := _typical(having, lengths, counts[:, index].tolist())) not in chosen:
            chosen.append(position)
        for position in having:
            if int(counts[chosen, index].sum()) >= min(enough, total[index] / 8):
                break
            if position not in chosen:
                chosen.append(position)
    return frozenset(chosen)


def _typical(by_length: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> int:
    """The longest of the samples that together hold the shorter half of a modality's tokens.

    At most _LONGEST_TYPICAL tokens long, unless all are longer.

    by_length: positions of the samples that have the modality, the shortest first. counts: its tokens by position.
    """
    half, before, typical = sum(counts) / 2, 0, by_length[0]
    for position in by_length:
        if before > half or lengths[position] > _LONGEST_TYPICAL:
            break
        typical, before = position, before + counts[position]
    return typical


def choose_held_out(probe_samples: frozenset[int], modalities: Sequence[torch.Tensor]) -> frozenset[int]:
    """The probe samples, if the other samples hold at least twice their tokens of each modality; otherwise none.

    A probe that is kept out of H shows what GPTQ learned about the layer, not about the tokens.
    """
    probe = torch.stack([modalities[i].bincount(minlength=len(MODALITIES)) for i in sorted(probe_samples)]).sum(dim=0)
    total = torch.cat([*modalities]).bincount(minlength=len(MODALITIES))
    return probe_samples if bool((total - probe >= 2 * probe).all()) else frozenset()
