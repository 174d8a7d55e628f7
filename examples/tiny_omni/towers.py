"""First stage of training: only the towers learn, with linear heads that are discarded afterwards.

The full model would take hours to learn that pictures matter, because at first the words of a question answer it as
well as a picture of noise does. Here the heads predict, from each visual token, the shape, colour and motion of the
thing that the token covers, or the written text, and from each audio token the word that is being said.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_omni import model as omni
from tiny_omni import render, tasks
from tiny_omni.render import CLIP_HEIGHT, CLIP_WIDTH, COLOURS, FRAMES, PICTURE, SHAPES, Thing
from torch import Tensor, nn
from torch.utils.data import IterableDataset

COLOUR_NAMES = list(COLOURS)
WRITINGS = [str(n) for n in range(10)] + list(render.WRITTEN)
WAYS = list(tasks.STEPS)
CELL = 28  # side of a token in pixels
# Number of classes of each head; the last class of the first four heads means "nothing here".
HEADS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "way": len(WAYS) + 1,
    "word": len(render.SPOKEN) + 1,
    "seen": 3,  # number of the token's two frames that show the thing
    "writing": len(WRITINGS),
    "tens": 10,
    "units": 10,
}
KINDS = {"picture": (0.5, 112), "sound": (0.3, 24), "clip": (0.2, 5)}


@dataclass
class TowerBatch:
    """Media, and per head the class of each token [tokens], or IGNORED."""

    pixels: Tensor | None
    grid: Tensor | None
    mels: Tensor | None
    classes: dict[str, Tensor]


def covered(things: Sequence[Thing], width: int, height: int) -> np.ndarray:
    """Number of the thing that each token covers: int [height / CELL, width / CELL], -1 for none."""
    cells = np.full((height // CELL, width // CELL), -1)
    ys, xs = ((np.arange(n) + 0.5) * CELL for n in cells.shape)
    for number, thing in enumerate(things):
        inside = np.abs(ys[:, None] - thing.y) < 0.5 * thing.size
        cells[inside & (np.abs(xs[None] - thing.x) < 0.5 * thing.size)] = number
        cells[min(cells.shape[0] - 1, int(thing.y / CELL)), min(cells.shape[1] - 1, int(thing.x / CELL))] = number
    return cells


def _classes(cells: np.ndarray, values: Sequence[int], nothing: int) -> np.ndarray:
    return np.array([*values, nothing])[cells].reshape(-1)


def picture(rng: random.Random) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A picture and the classes of its tokens."""
    tokens = (PICTURE // CELL) ** 2
    if rng.random() < 0.4:
        things = tasks.random_things(rng, rng.randint(1, 4))
        cells = covered(things, PICTURE, PICTURE)
        return render.draw_scene(things, rng), {
            "colour": _classes(cells, [COLOUR_NAMES.index(t.colour) for t in things], len(COLOURS)),
            "shape": _classes(cells, [SHAPES.index(t.shape) for t in things], len(SHAPES)),
        }
    kind = rng.choices(("digit", "word", "number"), (3, 3, 1))[0]
    sample = tasks.writing_sample(rng, kind, render.TRAIN_FONTS)
    answers = {turn.task: turn.answer for turn in sample.turns}
    classes = {"colour": np.full(tokens, COLOUR_NAMES.index(answers["colour of writing"]))}
    if kind == "number":
        classes["tens"], classes["units"] = (np.full(tokens, int(digit)) for digit in answers[kind])
    else:
        classes["writing"] = np.full(tokens, WRITINGS.index(answers[kind]))
    assert sample.picture is not None
    return sample.picture, classes


def clip(rng: random.Random) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A clip and the classes of its tokens; a pair of frames has the classes of its first frame that shows things."""
    moves = rng.random() < 0.7
    plan, places = tasks.move_plan(rng) if moves else tasks.blink_plan(rng)
    answers = {turn.task: turn.answer for turn in plan.turns}
    parts: dict[str, list[np.ndarray]] = {"colour": [], "shape": [], "way": [], "seen": []}
    for pair in range(FRAMES // 2):
        frames = places[2 * pair : 2 * pair + 2]
        things = frames[0] or frames[1]
        cells = covered(things, CLIP_WIDTH, CLIP_HEIGHT)
        parts["colour"].append(_classes(cells, [COLOUR_NAMES.index(t.colour) for t in things], len(COLOURS)))
        parts["shape"].append(_classes(cells, [SHAPES.index(t.shape) for t in things], len(SHAPES)))
        way = WAYS.index(answers["direction"]) if moves else len(WAYS)
        still = len(WAYS)
        parts["way"].append(_classes(cells, [still] * (len(things) - 1) + [way] if things else [], still))
        count = sum(map(bool, frames))
        parts["seen"].append(_classes(cells, [count] * len(things), 0))
    return render.draw_clip(places, rng), {name: np.concatenate(values) for name, values in parts.items()}


class TowerSteps(IterableDataset):
    """The batch of each step in `part`.

    family: the module that makes the model's inputs, such as model.py. kinds: like KINDS, which is the default.
    """

    def __init__(
        self,
        spoken: Sequence[render.Utterance],
        seed: int,
        part: range,
        family: Any = omni,
        kinds: dict[str, tuple[float, int]] | None = None,
    ) -> None:
        self.spoken, self.seed, self.part, self.family, self.kinds = spoken, seed, part, family, kinds

    def __iter__(self) -> Iterator[tuple[str, TowerBatch]]:
        torch.set_num_threads(1)
        for step in self.part:
            yield self.batch(step)

    def batch(self, step: int) -> tuple[str, TowerBatch]:
        """The batch of a step."""
        rng = random.Random(f"{self.seed} towers {step}")
        kinds = self.kinds or KINDS
        kind = rng.choices(list(kinds), [share for share, _ in kinds.values()])[0]
        rows = kinds[kind][1]
        if kind == "sound":
            words = rng.randint(1, 3)
            noise = (0, 30) if step > 150 else (15, 30)
            return kind, self._sounds(rng, rows, words, noise)
        samples = [picture(rng) if kind == "picture" else clip(rng) for _ in range(rows)]
        media = np.stack([pixels for pixels, _ in samples])
        frames, (height, width) = (1, media.shape[1:3]) if kind == "picture" else (FRAMES // 2, media.shape[2:4])
        grid = torch.tensor([[frames, height // omni.PATCH, width // omni.PATCH]] * rows)
        tokens = frames * height * width // CELL**2
        nothing = np.full(tokens, omni.IGNORED)
        names = {name for _, classes in samples for name in classes}
        classes = {n: torch.tensor(np.concatenate([c.get(n, nothing) for _, c in samples])) for n in names}
        pixels = self.family.patches(media[:, None] if kind == "picture" else media)
        return kind, TowerBatch(pixels, grid, None, classes)

    def _sounds(self, rng: random.Random, rows: int, words: int, noise: tuple[float, float]) -> TowerBatch:
        sounds, labels = [], []
        for _ in range(rows):
            parts = [rng.choice(self.spoken) for _ in range(words)]
            sound, spans = render.say_with_spans(
                parts, tasks.SECONDS[words], rng.uniform(*noise), np.random.default_rng(rng.getrandbits(63))
            )
            classes = np.full(self.family.audio_tokens(len(sound)), len(render.SPOKEN))
            times = (np.arange(len(classes)) + 0.5) * self.family.FRAMES_PER_AUDIO_TOKEN * omni.HOP
            for part, (start, stop) in zip(parts, spans, strict=True):
                classes[(times >= start) & (times < stop)] = render.SPOKEN.index(part.word)
            sounds.append(sound)
            labels.append(classes)
        return TowerBatch(None, None, omni.mel_features(sounds), {"word": torch.tensor(np.concatenate(labels))})


def make_heads(width: int) -> nn.ModuleDict:
    """One linear head, with zero weights, per entry of HEADS."""
    heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in HEADS.items()})
    for head in heads.values():
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return heads


def tower_loss(
    thinker: Any, heads: nn.ModuleDict, batch: TowerBatch, family: Any = omni
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the heads' losses, and per head the share of right classes among tokens that show something."""
    if batch.pixels is not None:
        tokens = family.visual_embeddings(thinker, batch)
    else:
        tokens = family.audio_embeddings(thinker, batch.mels)
    total, right = torch.zeros(()), {}
    for name, labels in batch.classes.items():
        logits = heads[name](tokens)
        weight = torch.ones(HEADS[name])
        nothing = 0 if name == "seen" else HEADS[name] - 1 if name in ("colour", "shape", "way", "word") else -1
        if nothing >= 0:
            weight[nothing] = 0.2
        total = total + F.cross_entropy(logits, labels, weight, ignore_index=omni.IGNORED)
        shows_something = (labels != omni.IGNORED) & (labels != nothing)
        right[name] = float((logits.argmax(-1) == labels)[shows_something].float().mean())
    return total, right
