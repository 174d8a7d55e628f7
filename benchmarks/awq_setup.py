"""Make the inputs of a comparison of 4-bit quantizers: a mid-size random Qwen2.5-Omni, and texts of exact token counts.

    python benchmarks/awq_setup.py OUT [--layers 8] [--samples 16] [--tokens 256]

Random weights have no outlier channels, and without outliers plain rounding is nearly optimal. Therefore a few channels
of every norm, of v_proj and of up_proj are made much larger. Unlike in the tiny example model, the weights that read
them keep their size. Errors in those columns then cost most; an activation-aware search can find them, plain rounding
cannot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_tiny_omni import TINY, SeededNormal, stable_hash, write_checkpoint

HIDDEN = 1024
SHAPE = replace(
    TINY,
    text={
        "hidden_size": HIDDEN, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 3072, "mrope_section": [16, 24, 24],
    },
    vision={**TINY.vision, "out_hidden_size": HIDDEN},
    audio={**TINY.audio, "output_dim": HIDDEN},
    talker={**TINY.talker, "embedding_size": HIDDEN},
)  # fmt: skip

# Output size of each Linear for a unit input. These give attention that is neither uniform nor one-hot, branches of
# about half the residual stream, and next-token probabilities with a few likely words.
_STRENGTHS = {
    "q_proj": 1.4, "k_proj": 1.4, "v_proj": 1.0, "o_proj": 1.0, "gate_proj": 1.0, "up_proj": 1.0, "down_proj": 0.8,
}  # fmt: skip
_LM_HEAD_STRENGTH = 3.0
# Outlier channels of the activation that a Linear reads: (number, smallest gain, largest gain).
_OUTLIERS = {
    "attn_in": (8, 10.0, 40.0), "attn_inner": (4, 4.0, 8.0), "mlp_in": (8, 10.0, 40.0), "mlp_inner": (32, 8.0, 20.0),
}  # fmt: skip
_READS = {
    "q_proj": "attn_in", "k_proj": "attn_in", "v_proj": "attn_in", "o_proj": "attn_inner", "gate_proj": "mlp_in",
    "up_proj": "mlp_in", "down_proj": "mlp_inner",
}  # fmt: skip
_WRITES = {
    "input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in", "v_proj": "attn_inner", "up_proj": "mlp_inner",
}  # fmt: skip
_LAYER_KEY = re.compile(r"(thinker\.model\.layers\.\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")


def _gains(layer: str, activation: str, size: int, seed: int) -> Tensor:
    """Gains (size,) of one layer's activation: above 1 for outlier channels, 1 for the others."""
    count, low, high = _OUTLIERS[activation]
    generator = torch.Generator().manual_seed(stable_hash(seed, "gains", layer, activation))
    channels = torch.randperm(size, generator=generator)[:count]
    gains = torch.ones(size)
    gains[channels] = low * (high / low) ** torch.rand(count, generator=generator)
    return gains


def _with_outliers(name: str, value: Tensor, seed: int) -> Tensor:
    """Scale a tensor of the thinker: its rows up by the gains it writes, all of it down for the gains it reads.

    A weight with std 1/sqrt(in) that reads an input with gains g gets std strength / |g|, the same in every column.
    """
    if name == "thinker.lm_head.weight":
        return value * _LM_HEAD_STRENGTH
    match = _LAYER_KEY.fullmatch(name)
    if match is None:
        return value
    layer, leaf, kind = match.groups()
    if leaf in _READS and kind == "weight":
        gains = _gains(layer, _READS[leaf], _inner_size(leaf, value.shape[1]), seed)
        value = value * (_STRENGTHS[leaf] * math.sqrt(len(gains)) / gains.norm())
    if leaf in _WRITES:
        rows = _gains(layer, _WRITES[leaf], value.shape[0], seed)
        value = value * rows.reshape(-1, *[1] * (value.ndim - 1))
    return value


def _inner_size(leaf: str, columns: int) -> int:
    """Number of channels that a Linear reads; o_proj reads each channel of v once per query head of its group."""
    if leaf != "o_proj":
        return columns
    return columns * SHAPE.text["num_key_value_heads"] // SHAPE.text["num_attention_heads"]


def make_checkpoint(out: Path, layers: int, seed: int = 0) -> None:
    """Write the float32 checkpoint into ``out``: a complete Omni with a thinker of width 1024."""
    shape = SHAPE.with_layers(layers)
    write_checkpoint(out, shape, dtype="float32", seed=seed, normal=SeededNormal(seed), shards=1, outliers=False)
    file = out / "model.safetensors"
    tensors = {name: _with_outliers(name, value, seed) for name, value in load_file(file).items()}
    temporary = out / "model.part"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(file)


# ------------------------------------------------------------------------------------------------ text

SYSTEM = "You are a helpful assistant."
SUCCESSORS = 20
JUMP = 0.3  # probability that the next word does not depend on the last
_WORD = re.compile(r"\u0120[A-Za-z]{2,}")  # U+0120 is a leading space in a byte-level vocabulary


class Language:
    """Words of the tokenizer's vocabulary with Zipf frequencies, and a few likely successors of each.

    It has hundreds of words. With a few dozen, the held-out tokens would repeat the calibration tokens.
    """

    def __init__(self, checkpoint: Path, seed: int = 0) -> None:
        vocab = json.loads((checkpoint / "vocab.json").read_text(encoding="utf-8"))
        self.words = [token[1:] for token in sorted(vocab) if _WORD.fullmatch(token)]
        chooser = random.Random(seed)
        chooser.shuffle(self.words)
        self.frequencies = list(itertools.accumulate(1 / rank for rank in range(1, len(self.words) + 1)))
        self.successors = {word: chooser.sample(self.words, SUCCESSORS) for word in self.words}
        self.preference = self.frequencies[:SUCCESSORS]

    def draw_words(self, chooser: random.Random, count: int) -> list[str]:
        return chooser.choices(self.words, cum_weights=self.frequencies, k=count)

    def text(self, count: int, chooser: random.Random) -> list[str]:
        """``count`` words of a random walk."""
        words = self.draw_words(chooser, 1)
        while len(words) < count:
            jumps = chooser.random() < JUMP
            successors = self.successors[words[-1]]
            words += self.draw_words(chooser, 1) if jumps else chooser.choices(successors, cum_weights=self.preference)
        return words


def write_samples(checkpoint: Path, folder: Path, samples: int, tokens: int, seed: int) -> Tensor:
    """Write text samples as ``folder``/index.jsonl, and their prepared ids [samples, tokens] as tokens.safetensors.

    The ids are those that the quantizer makes from the index with its reader, chat template and tokenizer.
    """
    from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
    from msmodelslim_omni.models import MODEL_TYPES
    from msmodelslim_omni.models.inputs import MediaLimits

    spec = MODEL_TYPES["Qwen2.5-Omni-7B"]
    processor = spec.family.open_media_processor(checkpoint, MediaLimits(1 << 20, None, 2.0), False)

    def prepared_length(text: str) -> int:
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        return processor.prepare(messages, False).tensors["input_ids"].shape[1]

    folder.mkdir(parents=True, exist_ok=True)
    language = Language(checkpoint)
    chooser = random.Random(seed)
    lines: list[dict[str, Any]] = [
        {"system": SYSTEM, "text": _text_of_length(language.text(tokens, chooser), tokens, prepared_length)}
        for _ in range(samples)
    ]
    index = folder / "index.jsonl"
    index.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    calib = load_calib_set(str(index), "", spec)
    prepared = [prepare_sample(sample, processor).tensors["input_ids"][0] for sample in calib.samples]
    ids = torch.stack(prepared)  # [samples, tokens]; fails if a length differs
    if ids.shape != (samples, tokens):
        raise RuntimeError(f"the samples have shape {tuple(ids.shape)}, expected {(samples, tokens)}")
    save_file({"input_ids": ids.contiguous()}, folder / "tokens.safetensors")
    return ids


def _text_of_length(words: list[str], tokens: int, prepared_length: Any) -> str:
    """The longest prefix of ``words`` that fits, padded with one-token words to exactly ``tokens``."""
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if prepared_length(" ".join(words[:middle])) <= tokens else (low, middle - 1)
    text = " ".join(words[:low])
    missing = tokens - prepared_length(text)
    if missing < 0:
        raise ValueError(f"{tokens} tokens are too few: the chat template needs {tokens - missing}; raise --tokens")
    text += " a" * missing
    if prepared_length(text) != tokens:
        raise RuntimeError(f"found no text of exactly {tokens} tokens")
    return text


def main() -> None:
    """Command line: write all inputs of a comparison into one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for model/, calibration/ and heldout/")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--heldout_samples", type=int, default=8)
    parser.add_argument("--heldout_tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = args.out / "model"
    make_checkpoint(model, args.layers, args.seed)
    write_samples(model, args.out / "calibration", args.samples, args.tokens, args.seed + 1)
    write_samples(model, args.out / "heldout", args.heldout_samples, args.heldout_tokens, args.seed + 2)


if __name__ == "__main__":
    main()
