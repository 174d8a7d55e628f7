"""Score a checkpoint of the tiny Omni on held-out sets: `python examples/tiny_omni/score.py MODEL [--rounding]`.

The calibration code of `msmodelslim quant` reads the inputs from the files. An answer is right if all its tokens and
its end are the most probable ones, which is the case if greedy generation gives exactly that answer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from tiny_omni import model as omni
from tiny_omni import text
from torch import Tensor

from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.models.inputs import MediaLimits
from msmodelslim_omni.models.qwen2_5_omni_media import open_media_processor

LIMITS = MediaLimits(max_tokens=4096, max_pixels=200_704, video_fps=2.0)  # the limits of the recipes
ROWS = 12
MARKS = ("<!-- scores -->", "<!-- end of scores -->")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUNDINGS = (("W8 per channel", 8, 0), ("W4 group 128", 4, 128), ("W3 group 128", 3, 128), ("W3 per channel", 3, 0))


@dataclass
class Item:
    """One held-out sample: its entry in the index, and its inputs as a batch of one row."""

    entry: dict[str, Any]
    batch: omni.Batch


def read_items(index: Path, model: Path, *, every: int = 1) -> list[Item]:
    """Read every `every`-th sample of the index with the processor of the checkpoint `model`."""
    processor = open_media_processor(model, LIMITS, False)
    tokens = omni.Tokens(model)
    entries = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
    samples = load_calib_set(str(index), "", MODEL_TYPES["Qwen2.5-Omni-3B"]).samples
    items = []
    for entry, sample in list(zip(entries, samples, strict=True))[::every]:
        tensors = prepare_sample(sample, processor).tensors
        ids = tensors["input_ids"][0].tolist()
        start = len(tokens.opening)
        stop = len(ids) - 1 - ids[::-1].index(tokens.end)  # the last <|im_end|>
        if "answer" in entry:
            start = stop - len(tokens.encode(entry["answer"]))
        else:
            start, stop = start, ids.index(tokens.end, start) - 1
        labels = torch.full((1, len(ids)), omni.IGNORED)
        labels[0, start : stop + 1] = tensors["input_ids"][0, start : stop + 1]
        video = "pixel_values_videos" in tensors
        mels = tensors.get("input_features")
        if mels is not None:
            mels = mels[:, :, : int(tensors["feature_attention_mask"].sum())]
        batch = omni.Batch(
            tensors["input_ids"][:, : stop + 1],
            labels[:, : stop + 1],
            video,
            tensors.get("pixel_values_videos" if video else "pixel_values"),
            tensors.get("video_grid_thw" if video else "image_grid_thw"),
            mels,
        )
        items.append(Item(entry, batch))
    return items


def _layout(item: Item) -> tuple[Any, ...]:
    batch = item.batch
    return (
        batch.video,
        None if batch.grid is None else tuple(batch.grid.flatten().tolist()),
        None if batch.mels is None else batch.mels.shape[2],
        item.entry["task"] == "prose",
    )


def _join(items: Sequence[Item]) -> omni.Batch:
    rows = [(item.batch.ids[0].tolist(), item.batch.labels[0].tolist()) for item in items]
    joined = omni.text_batch(rows, 0)

    def cat(name: str) -> Tensor | None:
        parts = [getattr(item.batch, name) for item in items]
        return None if parts[0] is None else torch.cat(parts)

    joined.video, joined.pixels, joined.grid, joined.mels = (
        items[0].batch.video,
        cat("pixels"),
        cat("grid"),
        cat("mels"),
    )
    return joined


@torch.no_grad()
def log_probabilities(thinker: Any, items: Sequence[Item]) -> list[tuple[Tensor, Tensor]]:
    """Per item: log-probabilities [labels, vocabulary], computed in float32, and the labels."""
    by_layout: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        by_layout[_layout(item)].append(number)
    results: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(items)
    for numbers in by_layout.values():
        for at in range(0, len(numbers), ROWS):
            part = numbers[at : at + ROWS]
            logits, labels = omni.answer_logits(thinker, _join([items[number] for number in part]))
            counts = [int((items[number].batch.labels[:, 1:] != omni.IGNORED).sum()) for number in part]
            for number, row, row_labels in zip(part, logits.split(counts), labels.split(counts), strict=True):
                results[number] = (row.log_softmax(-1), row_labels)
    return results


@dataclass
class Tally:
    """Sums of one task or modality."""

    items: int = 0
    right: int = 0
    tokens: int = 0
    nats: float = 0.0
    divergence: float = 0.0
    agree: int = 0

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return self.right / self.items

    @property
    def perplexity(self) -> float:
        """Perplexity over all labelled tokens."""
        return math.exp(self.nats / self.tokens)

    @property
    def kl(self) -> float:
        """Mean KL divergence from the reference per token."""
        return self.divergence / self.tokens


@dataclass
class Scores:
    """Tallies by modality and by (modality, task)."""

    modalities: dict[str, Tally] = field(default_factory=dict)
    tasks: dict[tuple[str, str], Tally] = field(default_factory=dict)


def score(
    items: Sequence[Item],
    results: Sequence[tuple[Tensor, Tensor]],
    reference: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Scores:
    """Sum up accuracy and perplexity of `results`, and the KL from `reference`; both as in `log_probabilities`."""
    scores = Scores()
    for number, (item, (logs, labels)) in enumerate(zip(items, results, strict=True)):
        if item.entry["task"] == "prose":  # skip the first two tokens, which a trigram cannot predict
            logs, labels = logs[2:], labels[2:]
        modality = item.entry["modality"]
        for tally in (
            scores.modalities.setdefault(modality, Tally()),
            scores.tasks.setdefault((modality, item.entry["task"]), Tally()),
        ):
            tally.items += 1
            tally.right += bool((logs.argmax(-1) == labels).all())
            tally.tokens += len(labels)
            tally.nats -= float(logs.gather(1, labels[:, None]).sum())
            if reference is not None:
                base = reference[number][0][-len(labels) :]
                tally.divergence += float((base.exp() * (base - logs)).sum())
                tally.agree += int((base.argmax(-1) == logs.argmax(-1)).sum())
    return scores


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Weight [out, in] rounded symmetrically: one scale per row, or per `group` columns of a row."""
    rows = weight.reshape(-1, group) if group else weight
    top = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / top).clamp_min(1e-12)
    return ((rows / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape)


def round_decoder(thinker: Any, bits: int, group: int) -> None:
    """Round every Linear of the decoder layers in place."""
    with torch.no_grad():
        for name, parameter in thinker.model.layers.named_parameters():
            if name.endswith("weight") and name.split(".")[-2] in LINEARS:
                parameter.copy_(rounded(parameter, bits, group))


def site_statistics(thinker: Any, items: Sequence[Item]) -> dict[str, tuple[float, float]]:
    """Per kind of Linear input: (kurtosis, max / median of channel maxima), each the largest value of all layers."""
    values: dict[str, list[Tensor]] = defaultdict(list)
    sites = {"q_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up", "down_proj": "down"}
    hooks = []
    for name, module in thinker.model.layers.named_modules():
        if (site := sites.get(name.split(".")[-1])) is not None:
            key = f"{name.split('.')[0]} {site}"

            def keep(_: Any, inputs: tuple[Tensor, ...], key: str = key) -> None:
                values[key].append(inputs[0].flatten(0, -2))

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for item in items:
            omni.answer_logits(thinker, item.batch)
    for hook in hooks:
        hook.remove()
    statistics: dict[str, tuple[float, float]] = {}
    for key, parts in values.items():
        x = torch.cat(parts)
        centred = x - x.mean()
        kurtosis = float((centred**4).mean() / (centred**2).mean() ** 2)
        largest = x.abs().amax(0)
        ratio = float(largest.max() / largest.median())
        site = key.split(" ")[1]
        previous = statistics.get(site, (0.0, 0.0))
        statistics[site] = (max(previous[0], kurtosis), max(previous[1], ratio))
    return statistics


def report(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the score tables."""
    items = read_items(args.index, args.model, every=args.every)
    thinker = load(args.model)
    base = log_probabilities(thinker, items)
    scores = score(items, base)
    yield from ("| modality | task | questions | exact |", "|---|---|---|---|")
    for modality, tally in scores.modalities.items():
        if modality == "prose":
            yield f"| prose | next token | {tally.tokens} tokens | perplexity {tally.perplexity:.2f} |"
            continue
        for (owner, task), part in scores.tasks.items():
            if owner == modality:
                yield f"| {modality} | {task} | {part.items} | {100 * part.accuracy:.1f} % |"
        yield f"| **{modality}** | all | {tally.items} | **{100 * tally.accuracy:.1f} %** |"
    if args.trigram:
        tokens = omni.Tokens(args.model)
        train = [tokens.encode(chapter) for chapter in text.train_chapters()]
        held = [tokens.encode(item.entry["text"]) for item in items if item.entry["task"] == "prose"]
        best = text.best_trigram(train, thinker.config.text_config.vocab_size, held)
        yield f"| prose | next token, by the trigram | the same | perplexity {best:.2f} |"
    if args.sites:
        yield from ("", "| input of | kurtosis | max / median of channel maxima |", "|---|---|---|")
        for site, (kurtosis, ratio) in site_statistics(thinker, read_items(args.sites, args.model)).items():
            yield f"| {site} | {kurtosis:.1f} | {ratio:.1f} |"
    if args.rounding:
        names = list(scores.modalities)
        yield from ("", f"| rounding | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}")
        for label, bits, group in ROUNDINGS:
            thinker = load(args.model)
            round_decoder(thinker, bits, group)
            damaged = score(items, log_probabilities(thinker, items), base).modalities
            cells = [f"KL {damaged[name].kl:.4f}, {_result(name, damaged[name])}" for name in names]
            yield f"| {label} | {' | '.join(cells)} |"


def load(model: Path) -> Any:
    """The thinker of a checkpoint, with faster tower attention."""
    thinker = omni.load_thinker(model)
    omni.speed_up_towers(thinker)
    return thinker


def _result(modality: str, tally: Tally) -> str:
    return f"perplexity {tally.perplexity:.2f}" if modality == "prose" else f"{100 * tally.accuracy:.1f} %"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score a checkpoint of the tiny Omni.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--index", type=Path, default=Path(__file__).parent / "heldout" / "index.jsonl")
    parser.add_argument("--every", type=int, default=1, help="use only every n-th sample")
    parser.add_argument("--rounding", action="store_true", help="also score plainly rounded weights")
    parser.add_argument("--trigram", action="store_true", help="also score a trigram (needs the `bible` program)")
    parser.add_argument("--sites", type=Path, metavar="INDEX", help="add statistics of activations on this set")
    parser.add_argument("--card", type=Path, help="write the tables into this file, between its two score marks")
    args = parser.parse_args()
    lines = []
    for line in report(args):
        print(line, flush=True)
        lines.append(line)
    if args.card:
        before, _, rest = args.card.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        tables = "\n".join(lines)
        args.card.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
