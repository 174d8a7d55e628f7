"""Split a dataset into calibration and held-out samples: a seeded choice that keeps every modality in calibration.

Each part becomes an index.jsonl with absolute media paths, so that a run can be repeated.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration import CalibSample, CalibSet
from ..errors import QuantError

_ONE_IN = 5  # one of this many samples is held out


@dataclass(frozen=True)
class Holdout:
    """Positions of the samples of both parts. not_evaluated: modalities that no held-out sample has."""

    calibration: tuple[int, ...]
    held_out: tuple[int, ...]
    not_evaluated: tuple[str, ...]


def split_holdout(modalities: Sequence[frozenset[str]], seed: int) -> Holdout:
    """Hold out a fifth of the samples. modalities: of each sample.

    Takes one sample of each modality first, from the rarest on, unless calibration would lose a modality; then any
    samples. Raises QuantError if there are fewer than five samples or none can be held out.
    """
    if len(modalities) < _ONE_IN:
        raise QuantError(
            f"the dataset has {len(modalities)} samples, too few to hold out one in {_ONE_IN} for evaluation",
            "pass evaluation samples with --eval_dataset, or add samples to the dataset",
        )
    order = list(range(len(modalities)))
    random.Random(seed).shuffle(order)
    names = sorted(frozenset[str]().union(*modalities))
    samples_of = {name: [i for i in order if name in modalities[i]] for name in names}
    chosen: list[int] = []

    def keeps_all_modalities(i: int) -> bool:
        return all(len(set(samples_of[name]) - {*chosen, i}) > 0 for name in modalities[i])

    def covers(name: str) -> bool:
        return any(name in modalities[i] for i in chosen)

    for name in sorted(names, key=lambda name: len(samples_of[name])):
        if not covers(name):
            chosen += [i for i in samples_of[name] if keeps_all_modalities(i)][:1]
    for i in order:
        if len(chosen) * _ONE_IN < len(modalities) and i not in chosen and keeps_all_modalities(i):
            chosen.append(i)
    if not chosen:
        raise QuantError(
            "no sample can be held out: each is the only one of some modality",
            "pass evaluation samples with --eval_dataset, or add samples to the dataset",
        )
    rest = tuple(i for i in range(len(modalities)) if i not in chosen)
    return Holdout(rest, tuple(sorted(chosen)), tuple(name for name in names if not covers(name)))


def write_index(calib: CalibSet, positions: Sequence[int], path: Path) -> Path:
    """Write an index of some samples of a set, as complete conversations. Returns the path."""
    lines = [json.dumps(_entry(calib.samples[i]), ensure_ascii=False) for i in positions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _entry(sample: CalibSample) -> dict[str, Any]:
    messages = [
        {"role": message["role"], "content": [_part(part) for part in message["content"]]}
        for message in sample.messages
    ]
    has_video = any(part["type"] == "video" for message in messages for part in message["content"])
    return {"messages": messages} | ({"use_audio_in_video": sample.use_audio_in_video} if has_video else {})


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    return {"type": kind, kind: str(part[kind].resolve()) if isinstance(part[kind], Path) else part[kind]}
