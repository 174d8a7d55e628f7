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


def assign_roles(modalities: Sequence[torch.Tensor], weights: str | Mapping[Modality, float]) -> TokenRoles:
    """Roles for samples of these modalities, int8 [tokens] each. weights: calibration.modality_weights."""
    probe_samples = choose_probe_samples(modalities)
    held_out = choose_held_out(probe_samples, modalities)
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


def choose_probe_samples(modalities: Sequence[torch.Tensor], enough: int = 128) -> frozenset[int]:
    """Positions of few and short samples that hold `enough` tokens of every modality.

    Of a modality with less than 8 * enough tokens, an eighth of them. modalities: int8 [tokens] per sample.
    """
    counts = torch.stack([modality.bincount(minlength=len(MODALITIES)) for modality in modalities])
    by_length = sorted(range(len(modalities)), key=lambda i: (len(modalities[i]), i))
    chosen: list[int] = []
    for index, total in enumerate(counts.sum(dim=0).tolist()):
        for position in by_length:
            if int(counts[chosen, index].sum()) >= min(enough, total / 8):
                break
            if counts[position, index] and position not in chosen:
                chosen.append(position)
    return frozenset(chosen)


def choose_held_out(probe_samples: frozenset[int], modalities: Sequence[torch.Tensor]) -> frozenset[int]:
    """The probe samples, if the other samples hold at least twice their tokens of each modality; otherwise none.

    A probe that is kept out of H shows what GPTQ learned about the layer, not about the tokens.
    """
    probe = torch.stack([modalities[i].bincount(minlength=len(MODALITIES)) for i in sorted(probe_samples)]).sum(dim=0)
    total = torch.cat([*modalities]).bincount(minlength=len(MODALITIES))
    return probe_samples if bool((total - probe >= 2 * probe).all()) else frozenset()
