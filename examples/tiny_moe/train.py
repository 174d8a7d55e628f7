"""Train the tiny MoE and write its checkpoint: `python examples/tiny_moe/train.py OUT`.

Data, optimizers and requirements are those of examples/tiny_omni. That model teaches this one, so that forty minutes
on one core are enough:

1. Towers: their tokens approximate those of the teacher's towers.
2. Layers: attention and experts of every layer, given the teacher's hidden states, approximate what the teacher's
   attention and MLP add to them.
3. Whole: the answers, and the teacher's probabilities in texts. The blocks of the visual tower stay as they are.

A checkpoint is written after each stage. A stopped training starts again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from tiny_moe import model as moe
from tiny_omni import model as omni
from tiny_omni import train as base
from torch import Tensor, nn
from torch.utils.data import DataLoader

SAMPLES_OF = 6000  # the samples are as hard as those of the tiny Omni's steps from this one on
FLAT = 0.4  # share of the steps of a stage after which the rates fall linearly to zero
BALANCE = 0.01  # weight of the loss of unequal use of experts
TEACHER = 0.5  # weight of the teacher's probabilities in texts
# Steps, share of the full rates, and of each kind its share of the steps and its rows.
Kinds = dict[str, tuple[float, int]]
TOWER_STEPS, TOWER_RATE = 300, 1.0
TOWER_KINDS: Kinds = {"picture": (0.5, 40), "sound": (0.35, 10), "clip": (0.15, 4)}
LAYER_STEPS, LAYER_RATE = 300, 1.0
LAYER_KINDS: Kinds = {"prose": (0.35, 3), "text": (0.25, 4), "picture": (0.25, 16), "clip": (0.15, 4)}
STEPS, RATE = 800, 0.5
KINDS: Kinds = {
    "prose": (0.2, 3),
    "text": (0.2, 4),
    "picture": (0.22, 16),
    "sound": (0.2, 8),
    "clip": (0.09, 4),
    "talking clip": (0.09, 4),
}


class Teacher:
    """The tiny Omni, computing without gradients."""

    def __init__(self) -> None:
        self.model = omni.load_thinker(moe.TINY_OMNI).requires_grad_(False)
        omni.speed_up_towers(self.model)
        self._ids = moe.teacher_ids()

    @torch.no_grad()
    def embeddings(self, batch: moe.Batch) -> Tensor:
        """What this model's tower should make of the batch's pictures, clips or sounds: [tokens, width].

        A token of sound has twice the length of the teacher's and approximates the mean of two.
        """
        if batch.teacher_pixels is not None:
            return omni.visual_embeddings(self.model, self._batch(batch))
        assert batch.mels is not None
        sounds, frames = len(batch.mels), batch.mels.shape[2]
        tokens = omni.audio_embeddings(self.model, batch.mels)
        tokens = tokens.view(sounds, -1, tokens.shape[-1])
        own = moe.audio_tokens(frames * omni.HOP)
        starts = moe.CHUNK * (torch.arange(own) // 13) + 8 * (torch.arange(own) % 13)  # in frames
        pairs = [(starts // omni.FRAMES_PER_AUDIO_TOKEN + k).clamp(max=tokens.shape[1] - 1) for k in (0, 1)]
        return ((tokens[:, pairs[0]] + tokens[:, pairs[1]]) / 2).flatten(0, 1)

    @torch.no_grad()
    def logits(self, batch: omni.Batch) -> Tensor:
        """Logits [labels, vocabulary] before each labelled token of a text."""
        return omni.answer_logits(self.model, self._batch(batch))[0]

    @torch.no_grad()
    def layers(self, batch: omni.Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer, [rows, length, width]: its input, and what attention and the MLP add to it."""
        seen: list[list[Tensor]] = []
        hooks = []
        for layer in self.model.model.layers:
            parts: list[Tensor] = []
            seen.append(parts)
            hooks += [
                layer.input_layernorm.register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0])),
                layer.self_attn.register_forward_hook(lambda _, args, out, parts=parts: parts.append(out[0])),
                layer.mlp.register_forward_hook(lambda _, args, out, parts=parts: parts.append(out)),
            ]
        omni.answer_logits(self.model, self._batch(batch))
        for hook in hooks:
            hook.remove()
        return [(hidden, attention, mlp) for hidden, attention, mlp in seen]

    def _batch(self, batch: omni.Batch) -> omni.Batch:
        pixels = batch.teacher_pixels if isinstance(batch, moe.Batch) else None
        return omni.Batch(self._ids[batch.ids], batch.labels, batch.video, pixels, batch.grid, batch.mels)


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens [..., width] of |out - target|² / |target|²; short targets count less."""
    squares = target.square().sum(-1)
    return ((out - target).square().sum(-1) / (squares + squares.mean())).mean() * 2


# What a stage minimizes: from a step's kind and batch, the loss and values to print.
Loss = Callable[[str, moe.Batch], tuple[Tensor, dict[str, float]]]


def tower_loss(thinker: Any, teacher: Teacher) -> Loss:
    """The error of the towers' tokens."""

    def loss(kind: str, batch: moe.Batch) -> tuple[Tensor, dict[str, float]]:
        if batch.pixels is not None:
            tokens = thinker.visual(batch.pixels, grid_thw=batch.grid)[0]
        else:
            tokens = moe.audio_embeddings(thinker, batch.mels)
        error = relative_error(tokens, teacher.embeddings(batch))
        return error, {kind: error.item()}

    return loss


def layer_loss(thinker: Any, teacher: Teacher, routers: moe.RouterLogits) -> Loss:
    """The sum over layers of the errors of attention and experts, each given the teacher's hidden states."""

    def loss(kind: str, batch: moe.Batch) -> tuple[Tensor, dict[str, float]]:
        places = omni.positions(thinker, batch)
        attention_error, mlp_error = torch.zeros(()), torch.zeros(())
        for layer, (hidden, attention, mlp) in zip(thinker.model.layers, teacher.layers(batch), strict=True):
            rotary = thinker.model.rotary_emb(hidden, places)
            own = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
            attention_error = attention_error + relative_error(own, attention)
            own = layer.mlp(layer.post_attention_layernorm(hidden + attention))[0]
            mlp_error = mlp_error + relative_error(own, mlp)
        balance = routers.balance_loss()
        values = {f"{kind} attention": attention_error.item() / 4, f"{kind} experts": mlp_error.item() / 4}
        return attention_error + mlp_error + BALANCE * balance, {**values, "balance": balance.item()}

    return loss


def answer_loss(thinker: Any, teacher: Teacher, routers: moe.RouterLogits, end: int) -> Loss:
    """Cross entropy of the answers, for texts mixed with that of the teacher. end: the token that ends answers."""

    def loss(kind: str, batch: moe.Batch) -> tuple[Tensor, dict[str, float]]:
        logits, labels = moe.answer_logits(thinker, batch)
        total = entropy = F.cross_entropy(logits, labels)
        if kind in ("prose", "text"):
            total = torch.lerp(entropy, F.cross_entropy(logits, teacher.logits(batch).softmax(-1)), TEACHER)
        balance = routers.balance_loss()
        ends = labels == end  # not counted: nearly always right, and half of the labels
        right = (logits.argmax(-1) == labels)[~ends].float().mean().item()
        return total + BALANCE * balance, {kind: entropy.item(), f"{kind} right": right, "balance": balance.item()}

    return loss


def run_stage(
    parts: nn.Module, loss: Loss, data: Iterator[tuple[str, Any]], steps: int, rate: float, tower_share: float
) -> None:
    """Train `parts` for some steps. rate, tower_share: shares of the full rates, of all weights and of the towers."""
    optimizers = base.make_optimizers(parts)
    rates, progress = base.Rates(optimizers), base.Progress(25)
    for step, (kind, batch) in zip(range(steps), data, strict=False):
        rates.set(rate * base.rate_factor(step, steps, FLAT), tower_share)
        total, values = loss(kind, batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        parts.zero_grad(set_to_none=True)
        progress.record(step, values, kind)


def train(work: Path, out: Path, seed: int, steps: Sequence[int]) -> Any:
    """Train and return the thinker. work: folder of description and data. steps: of each stage."""
    description = work / "description"
    moe.write_description(description)
    spoken = base.voices(work, False, base.VOICES_PER_WORD, seed)
    teacher, thinker = Teacher(), moe.build_thinker(description, seed)
    moe.start_from_teacher(thinker, teacher.model)
    moe.speed_up_towers(thinker)
    thinker.train()
    routers = moe.RouterLogits(thinker)

    def data(stage: int, kinds: Kinds) -> Iterator[tuple[str, Any]]:
        first = SAMPLES_OF + sum(steps[:stage])
        part = range(first, first + steps[stage])
        found = base.Steps(description, spoken, seed, part, moe, kinds)
        return iter(DataLoader(found, batch_size=None, num_workers=1, prefetch_factor=6))

    def finish(stage: str) -> None:
        print(f"{stage}: written", flush=True)
        moe.save_checkpoint(thinker, description, out, seed)

    towers = nn.ModuleDict({"visual": thinker.visual, "audio_tower": thinker.audio_tower})
    run_stage(towers, tower_loss(thinker, teacher), data(0, TOWER_KINDS), steps[0], TOWER_RATE, 1.0)
    finish("towers")
    layers = thinker.model.layers
    run_stage(layers, layer_loss(thinker, teacher, routers), data(1, LAYER_KINDS), steps[1], LAYER_RATE, 1.0)
    finish("layers")
    for part in (thinker.visual.patch_embed, thinker.visual.pos_embed, thinker.visual.blocks):
        part.requires_grad_(False)
    end = moe.Tokens(description).end
    answers = answer_loss(thinker, teacher, routers, end)
    run_stage(thinker, answers, data(2, KINDS), steps[2], RATE, base.LATER_TOWER_SHARE)
    finish("whole")
    return thinker


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny MoE.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    all_steps = (TOWER_STEPS, LAYER_STEPS, STEPS)
    parser.add_argument("--steps", type=int, nargs=3, default=all_steps, help="of each stage")
    parser.add_argument("--work", type=Path, default=None, help="folder for data (default: OUT.work)")
    args = parser.parse_args()
    work = args.work or args.out.with_name(args.out.name + ".work")
    started = time.monotonic()
    thinker = train(work, args.out, args.seed, args.steps)
    counts = {
        "parameters of the thinker": sum(p.numel() for p in thinker.parameters()),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
