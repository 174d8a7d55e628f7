"""What both models answer, from the likeliest tokens that the scores hold.

The models are run on the expected answer, so a greedy answer is known up to its first token that differs. That is
enough to say whether it is exact; what a model would have written after that token is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..calibration import CalibSample
from ..errors import QuantError
from ..files import write_atomically
from ..models import MediaProcessor
from ..report import AnswerPair
from .figures import Measurements


def answer_pairs(
    measurements: Measurements, samples: Sequence[CalibSample], processor: MediaProcessor
) -> list[AnswerPair]:
    """The answers of both models to every sample with an answer, in the order of the samples."""
    by_place = {sample.where: sample for sample in samples}
    pairs = []
    for number, measured in enumerate(measurements.samples):
        rows = ((measurements.sample == number) & measurements.in_answer).nonzero().flatten()
        if measured.answer is None or not len(rows):
            continue
        targets = measurements.targets[rows]
        texts = [
            _answer(likeliest[rows], targets, processor)
            for likeliest in (measurements.scores.likeliest_float, measurements.scores.likeliest_quant)
        ]
        sample = by_place[measured.where]
        pairs.append(
            AnswerPair(
                where=measured.where,
                question=last_question(sample),
                media=media_of(sample),
                expected=processor.decode(targets[:-1].tolist()),
                float_text=texts[0][0],
                float_exact=texts[0][1],
                quant_text=texts[1][0],
                quant_exact=texts[1][1],
                kl=float(measurements.scores.kl[rows].mean()),
            )
        )
    return pairs


def _answer(likeliest: torch.Tensor, targets: torch.Tensor, processor: MediaProcessor) -> tuple[str, bool]:
    """The greedy answer up to its first differing token, and whether there is none. The last target ends the turn."""
    differing = (likeliest != targets).nonzero().flatten()
    if not len(differing):
        return processor.decode(targets[:-1].tolist()), True
    first = int(differing[0])
    ends_early = first < len(targets) - 1 and int(likeliest[first]) == int(targets[-1])
    return processor.decode(likeliest[: first + (0 if ends_early else 1)].tolist()), False


def last_question(sample: CalibSample) -> str:
    asked = [message for message in sample.messages if message["role"] == "user"]
    parts = asked[-1]["content"] if asked else []
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def media_of(sample: CalibSample) -> tuple[tuple[str, str], ...]:
    parts = [part for message in sample.messages for part in message["content"] if part["type"] != "text"]
    return tuple((part["type"], str(part[part["type"]])) for part in parts)


def write_answers(pairs: Sequence[AnswerPair], path: Path) -> None:
    """Write one line of JSON per answer, atomically."""
    lines = (json.dumps(asdict(pair), ensure_ascii=False) for pair in pairs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise QuantError(
            f"the answers cannot be written to {str(path)!r}: {error.strerror or error}", "give another --answers"
        ) from error
