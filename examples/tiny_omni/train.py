"""Train the tiny Omni and write its checkpoint: `python examples/tiny_omni/train.py OUT`.

The state is saved every few minutes; the same command resumes from it. The data of a step depend only on the seed and
the step's number, so an interrupted training ends with the same weights (on the same machine with the same threads).
It needs espeak-ng, the `bible` program and the fonts named in render.py; on Debian:
`apt-get install espeak-ng bible-kjv fonts-dejavu fonts-liberation fonts-noto-core`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from tiny_omni import model as omni
from tiny_omni import render, tasks, text, towers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

TOWER_STEPS = 640  # steps of the first stage, towers.py
PLACES_FROM = 8600  # from this step on, most steps have pictures, and most scenes ask for a place first
# The steps at which the rates, after falling to zero, start again.
RESTARTS = (3100, 6000, PLACES_FROM, 9500, 9900, 10400, 10900)
STEPS = 11400
# From this step on, the saved weights are the mean of the weights at the ends of the rounds that end at this step or
# later (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407).
MEAN_FROM = 9500
WARM_UP = 40
TOWER_FLAT, FLAT = 0.3, 0.35  # share of the steps after which the rates fall linearly to zero
MUON_RATE, EMBEDDING_RATE, ADAM_RATE = 0.02, 6e-3, 3e-3
TOWERS = ("visual.", "audio_tower.", "model.visual.", "model.audio_tower.")  # names in transformers 4 and 5
# Factors on the towers' rates in the second stage. At first the gradients from an untrained decoder are noise; after a
# restart they are better.
TOWER_SHARE, LATER_TOWER_SHARE = 0.1, 0.3
HARD_FROM = 700  # from this step on, some pictures and sounds are hard ones
VARIED_FROM = 3100  # from this step on, words are also played slower and lower, or faster and higher
SPEEDS = (0.85, 1.18)
# Share of the steps of each kind, and rows of a step; a row is one conversation.
KINDS = {
    "prose": (0.33, 8),
    "text": (0.14, 8),
    "picture": (0.18, 24),
    "sound": (0.14, 14),
    "clip": (0.12, 6),
    "talking clip": (0.09, 6),
}
# Shares from these steps on: the kinds that have learnt least get most of the time.
LATER_SHARES = {
    6000: {"prose": 0.15, "text": 0.15, "picture": 0.36, "sound": 0.22, "clip": 0.06, "talking clip": 0.06},
    PLACES_FROM: {"prose": 0.07, "text": 0.06, "picture": 0.76, "sound": 0.05, "clip": 0.03, "talking clip": 0.03},
    9500: {"prose": 0.10, "text": 0.10, "picture": 0.50, "sound": 0.16, "clip": 0.07, "talking clip": 0.07},
    9900: {"prose": 0.08, "text": 0.12, "picture": 0.60, "sound": 0.08, "clip": 0.06, "talking clip": 0.06},
}
LATER_RATE = 0.4  # factor from PLACES_FROM on, so that kinds with few steps are not unlearnt
PLACES_ASKED = 0.7  # share of the scenes that ask for a place first, from PLACES_FROM on
MOST_TURNS = 3  # questions about one picture or clip; with more of them it would be too far back in the context
PROSE_TOKENS = 448
TEXT_TURNS = 10
SOUNDS_PER_ROW = 3
VOICES_PER_WORD = 150


# ----------------------------------------------------------------------------------------------- data


def corpus(seed: int) -> list[str]:
    """Training text of the tokenizer: the prose, and questions and answers often enough that words become tokens."""
    rng = random.Random(f"{seed} corpus")
    chat = [f"system\n{omni.SYSTEM}", "user\n", "assistant\n"] * 300
    for _ in range(1500):
        samples = [tasks.text_sample(rng, 4)]
        chat += [part for sample in samples for turn in sample.turns for part in (turn.question, turn.answer)]
    for _ in range(300):
        turns = [*tasks.scene_sample(rng, rng.randint(1, 4), 9).turns]
        for kind in ("digit", "number", "word"):
            turns += tasks.writing_sample(rng, kind, render.TRAIN_FONTS[:1]).turns
        for plan in (tasks.move_plan(rng)[0], tasks.blink_plan(rng)[0]):
            turns += plan.turns
        chat += [part for turn in turns for part in (turn.question, turn.answer)]
    chat += [word for word in (*render.SPOKEN, *render.COLOURS, *render.SHAPES) for _ in range(400)]
    chat += [f"{a} {b} {c}" for _ in range(4000) for a, b, c in [rng.choices(render.SPOKEN, k=3)]]
    chat += ["What is said?", "Which word is said?"] * 200
    return [*text.train_chapters(), *chat * 5]


def voices(cache: Path, held_out: bool, per_word: int, seed: int) -> list[render.Utterance]:
    """All words by many voices, cached in a file because espeak-ng takes a minute."""
    file = cache / f"voices_{'held' if held_out else 'train'}_{per_word}_{seed}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        spoken = render.utterances(held_out, per_word, seed)
        partial = file.with_name("partial.npz")
        sounds = {str(n): u.samples for n, u in enumerate(spoken)}
        np.savez(partial, names=[(u.word, u.voice) for u in spoken], **sounds)
        partial.rename(file)
    with np.load(file) as stored:
        return [
            render.Utterance(str(word), str(voice), stored[str(n)]) for n, (word, voice) in enumerate(stored["names"])
        ]


class Steps(IterableDataset):
    """Data set of (kind, Batch), one for each step in `part`.

    family: the module of the model, such as model.py. kinds: like KINDS, for all steps; by default those of the step.
    """

    def __init__(
        self,
        description: Path,
        spoken: list[render.Utterance],
        seed: int,
        part: Iterable[int],
        family: Any = omni,
        kinds: dict[str, tuple[float, int]] | None = None,
    ) -> None:
        self.tokens = family.Tokens(description)
        self.spoken, self.seed, self.part, self.family, self.kinds = spoken, seed, part, family, kinds
        ids: list[int] = []
        for chapter in text.train_chapters():
            ids += [*self.tokens.encode(chapter), self.tokens.special["<|endoftext|>"]]
        self.prose = ids

    def __iter__(self) -> Iterator[tuple[str, omni.Batch]]:
        torch.set_num_threads(1)
        for step in self.part:
            yield self.batch(step)

    def batch(self, step: int) -> tuple[str, omni.Batch]:
        """The batch of a step."""
        rng = random.Random(f"{self.seed} {step}")
        kinds = self.kinds or KINDS
        shares = {kind: share for kind, (share, _) in kinds.items()}
        for since, later in () if self.kinds else LATER_SHARES.items():
            shares = later if step >= since else shares
        kind = rng.choices(list(shares), list(shares.values()))[0]
        rows = kinds[kind][1]
        hard = step >= HARD_FROM
        speeds = SPEEDS if step >= VARIED_FROM else None
        if kind == "prose":
            starts = [rng.randrange(len(self.prose) - PROSE_TOKENS) for _ in range(rows)]
            parts = [self.tokens.prose(self.prose[at : at + PROSE_TOKENS]) for at in starts]
            return kind, omni.text_batch(parts, self.tokens.special["<|endoftext|>"])
        if kind == "text":
            samples = [[tasks.text_sample(rng, TEXT_TURNS)] for _ in range(rows)]
        elif kind == "picture":
            places = PLACES_ASKED if step >= PLACES_FROM else 0.0
            samples = [[tasks.picture_sample(rng, render.TRAIN_FONTS, hard, MOST_TURNS, places)] for _ in range(rows)]
        elif kind == "sound":
            words = rng.choices((1, 2, 3), (3, 2, 2) if hard else (1, 0, 0))[0]
            noise = (0, 30) if hard else (15, 30)
            samples = [
                [tasks.speech_sample(rng, self.spoken, words, noise, speeds=speeds) for _ in range(SOUNDS_PER_ROW)]
                for _ in range(rows)
            ]
        else:
            spoken = self.spoken if kind == "talking clip" else None
            clip_kinds = ["move" if rng.random() < 0.7 else "blink" for _ in range(rows)]
            clips = [tasks.clip_sample(rng, clip_kind, spoken, speeds=speeds) for clip_kind in clip_kinds]
            samples = [[replace(clip, turns=clip.turns[:MOST_TURNS])] for clip in clips]
        return kind, self.family.sample_batch(self.tokens, samples)


# ------------------------------------------------------------------------------------------ optimizer


def orthogonal(updates: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with singular values near 1 (Newton-Schulz iteration, as in Muon)."""
    x = updates / (updates.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalized momentum) for matrices, and for convolutions flattened to matrices.

    It computes in float32, for all parameters of one shape at once. torch's Muon computes in bfloat16, which is slow on
    a CPU without instructions for it.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the matrices that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                moves = orthogonal(torch.stack(updates).flatten(2))
                scale = group["lr"] * max(1.0, moves.shape[1] / moves.shape[2]) ** 0.5
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(move.view_as(parameter), alpha=scale)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions, AdamW for embeddings, heads, norms and biases.

    AdamW would move the patch embedding far too fast, because its 1176 inputs are similar within a patch of one colour.
    "tower" in a parameter group says whether the group belongs to the towers.
    """
    matrices: dict[bool, list[Tensor]] = {False: [], True: []}
    others: dict[bool, list[Tensor]] = {False: [], True: []}
    embeddings = []
    for name, parameter in model.named_parameters():
        is_tower = name.startswith(TOWERS)
        if "embed_tokens" in name or "bos_eos" in name:
            embeddings.append(parameter)
        elif parameter.ndim > 1 and "head" not in name:
            matrices[is_tower].append(parameter)
        else:
            others[is_tower].append(parameter)
    muon = [{"params": params, "lr": MUON_RATE, "tower": tower} for tower, params in matrices.items()]
    adam = [{"params": params, "lr": ADAM_RATE, "tower": tower} for tower, params in others.items()]
    adam += [{"params": embeddings, "lr": EMBEDDING_RATE, "tower": False}]
    return [
        Muon([group for group in muon if group["params"]], lr=MUON_RATE),
        torch.optim.AdamW([group for group in adam if group["params"]], betas=(0.9, 0.95), weight_decay=0.01),
    ]


class Rates:
    """Sets the learning rates of optimizers as shares of their initial rates."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._full = [(group["lr"], group["tower"]) for group in groups]  # loading a state overwrites both

    def set(self, factor: float, tower_share: float = 1.0) -> None:
        """Set all rates to this factor of the initial ones; the towers get `tower_share` of that."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, (rate, is_tower) in zip(groups, self._full, strict=True):
            group["lr"] = rate * factor * (tower_share if is_tower else 1.0)


def cycle(step: int, steps: int) -> tuple[int, int]:
    """First step and end of the round (the steps between two restarts) that contains `step`."""
    ends = [*(end for end in RESTARTS if end < steps), steps]
    return max([0, *(end for end in ends if end <= step)]), min(end for end in ends if end > step)


def rate_factor(step: int, steps: int, flat: float) -> float:
    """Share of the full rates: rises over WARM_UP, is flat, and after the share `flat` of the steps falls linearly."""
    fallen = max(0.0, (step / steps - flat) / (1 - flat))
    return min(1.0, (step + 1) / WARM_UP, 1 - fallen)


# ----------------------------------------------------------------------------------------------- loop


@dataclass
class Mean:
    """The mean of the weights at the ends of rounds."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    rounds: int = 0

    def add(self, weights: dict[str, Tensor]) -> None:
        """Add the weights at the end of a round."""
        self.rounds += 1
        for name, weight in weights.items():
            self.weights[name] = torch.lerp(self.weights.get(name, weight), weight, 1 / self.rounds)


def write_state(file: Path, step: int, thinker: Any, optimizers: list[torch.optim.Optimizer], mean: Mean) -> None:
    """Write the state to a temporary file, then rename it."""
    state = {"step": step, "model": thinker.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    state["mean"] = vars(mean)
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


class Progress:
    """Prints the means of the recorded values every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.started = self.last = time.monotonic()
        self.values: dict[str, list[float]] = defaultdict(list)

    def record(self, step: int, values: dict[str, float], kind: str) -> None:
        """Record the values and the time of a step, and print if it is due."""
        now = time.monotonic()
        for name, value in {**values, f"{kind} s": now - self.last}.items():
            self.values[name].append(value)
        self.last = now
        if (step + 1) % self.every == 0:
            means = " | ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in sorted(self.values.items()))
            print(f"{step + 1} {now - self.started:.0f}s {means}", flush=True)
            self.values.clear()


def train_towers(
    thinker: Any,
    spoken: Sequence[render.Utterance],
    seed: int,
    steps: int,
    workers: int,
    family: Any = omni,
    kinds: dict[str, tuple[float, int]] | None = None,
) -> None:
    """Train the towers in place: the first stage. family, kinds: see TowerSteps."""
    heads = towers.make_heads(thinker.config.text_config.hidden_size)
    parts = nn.ModuleDict({"visual": thinker.visual, "audio_tower": thinker.audio_tower, "heads": heads})
    optimizers = make_optimizers(parts)
    rates, progress = Rates(optimizers), Progress(50)
    data = towers.TowerSteps(spoken, seed, range(steps), family, kinds)
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=6 if workers else None)
    for step, (kind, batch) in enumerate(loader):
        rates.set(rate_factor(step, steps, TOWER_FLAT))
        loss, right = towers.tower_loss(thinker, heads, batch, family)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        parts.zero_grad(set_to_none=True)
        progress.record(step, {f"{kind} {name}": value for name, value in right.items()}, kind)


def train(
    *, seed: int, steps: int, stop: int, work: Path, workers: int, save_seconds: float, tower_steps: int = TOWER_STEPS
) -> Any:
    """Train up to step `stop` of a schedule of `steps` and return the thinker. `work` is the folder of state and data.

    If rounds have ended since MEAN_FROM, the thinker has the mean of their weights, not the weights of step `stop`.
    """
    work.mkdir(parents=True, exist_ok=True)
    description = work / "description"
    if not (description / "vocab.json").exists():
        omni.write_description(description, corpus(seed))
    spoken = voices(work, False, VOICES_PER_WORD, seed)
    thinker = omni.build_thinker(description, seed)
    omni.speed_up_towers(thinker)
    thinker.train()
    state_file = work / "state.pt"
    start = 0
    if not state_file.exists():
        train_towers(thinker, spoken, seed, tower_steps, workers)
        write_state(state_file, 0, thinker, [], Mean())
    optimizers = make_optimizers(thinker)
    rates, progress = Rates(optimizers), Progress(100)
    state = torch.load(state_file, weights_only=True)
    start = state["step"]
    thinker.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):  # empty after the first stage
        optimizer.load_state_dict(saved)
    mean = Mean(**state["mean"])
    data = Steps(description, spoken, seed, range(start, stop))
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=6 if workers else None)
    saved_at = time.monotonic()
    for step, (kind, batch) in enumerate(loader, start):
        first, end = cycle(step, steps)
        share = TOWER_SHARE if first == 0 else LATER_TOWER_SHARE
        rate = rate_factor(step - first, end - first, FLAT)
        if first >= PLACES_FROM:
            rate, share = rate * LATER_RATE, 1.0
        rates.set(rate, share)
        logits, labels = omni.answer_logits(thinker, batch)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(thinker.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        thinker.zero_grad(set_to_none=True)
        ends = labels == data.tokens.end  # not counted: nearly always right, and half of the labels
        right = (logits.argmax(-1) == labels)[~ends].float().mean().item()
        progress.record(step, {kind: loss.item(), f"{kind} right": right}, kind)
        if step + 1 == end >= MEAN_FROM:
            mean.add(thinker.state_dict())
        if time.monotonic() - saved_at > save_seconds:
            write_state(state_file, step + 1, thinker, optimizers, mean)
            saved_at = time.monotonic()
    if stop > start:
        write_state(state_file, stop, thinker, optimizers, mean)
    if mean.rounds:
        thinker.load_state_dict(mean.weights)
    return thinker


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny Omni; the same command resumes a stopped training.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="number of steps of the schedule")
    parser.add_argument("--stop", type=int, default=None, help="stop after this many steps; see MEAN_FROM")
    parser.add_argument("--work", type=Path, default=None, help="folder for state and data (default: OUT.work)")
    args = parser.parse_args()
    work = args.work or args.out.with_name(args.out.name + ".work")
    stop = args.steps if args.stop is None else min(args.stop, args.steps)
    thinker = train(seed=args.seed, steps=args.steps, stop=stop, work=work, workers=1, save_seconds=240)
    omni.save_checkpoint(thinker, work / "description", args.out, args.seed)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    counts = {"parameters of the thinker": sum(p.numel() for p in thinker.parameters()), "bytes": size}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
