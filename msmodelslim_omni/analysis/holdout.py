"""Part of a dataset kept out of the calibration, to judge its result: a seeded choice in which no modality is missing.

Both parts are written as an index.jsonl of their own, media by absolute path, so that a run can be repeated with them.
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

SHARE = 5  # one sample of so many is kept out


@dataclass(frozen=True)
class Holdout:
    """Positions of the samples of both parts, and modalities that only one of the parts has."""

    calibration: tuple[int, ...]
    held_out: tuple[int, ...]
    unjudged: tuple[str, ...]


def split_holdout(modalities: Sequence[frozenset[str]], seed: int) -> Holdout:
    """Keep a fifth out. modalities: of each sample.

    First, from the rarest modality on, a sample of each that leaves one with it behind; then any. Raises QuantError
    where there are fewer than five samples.
    """
    if len(modalities) < SHARE:
        raise QuantError(
            f"the dataset has {len(modalities)} samples, too few to keep one of {SHARE} out for a judgement",
            "give samples to judge by with --eval_dataset, or more samples",
        )
    order = list(range(len(modalities)))
    random.Random(seed).shuffle(order)
    every = {name: [i for i in order if name in modalities[i]] for name in sorted(frozenset[str]().union(*modalities))}
    chosen: list[int] = []

    def leaves_all(i: int) -> bool:
        return all(len(set(every[name]) - {*chosen, i}) > 0 for name in modalities[i])

    def covers(name: str) -> bool:
        return any(name in modalities[i] for i in chosen)

    for name in sorted(every, key=lambda name: len(every[name])):
        if not covers(name):
            chosen += [i for i in every[name] if leaves_all(i)][:1]
    for i in order:
        if len(chosen) * SHARE < len(modalities) and i not in chosen and leaves_all(i):
            chosen.append(i)
    if not chosen:
        raise QuantError(
            "no sample can be kept out: each is the only one of some modality",
            "give samples to judge by with --eval_dataset, or more samples",
        )
    rest = tuple(i for i in range(len(modalities)) if i not in chosen)
    return Holdout(rest, tuple(sorted(chosen)), tuple(name for name in every if not covers(name)))


def write_index(calib: CalibSet, positions: Sequence[int], path: Path) -> Path:
    """An index of some samples of a set, as whole conversations."""
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
