"""The tiny Omni: shape, tokenizer, batches of samples as inputs of the thinker, and checkpoint.

Batches are built directly, with the right number of placeholder tokens, and run through the thinker's own modules. A
test compares them with the real processor's output for the same media.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import make_tiny_omni as tiny
from tiny_omni.render import CLIP_HEIGHT, CLIP_WIDTH, FRAMES, PICTURE, RATE
from tiny_omni.tasks import Sample

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
PATCH, MERGE = 14, 2
HOP = 160
FRAMES_PER_AUDIO_TOKEN = 4
AUDIO_SECONDS = 30
# With the usual 1e6 and 16, 24, 24, a small model hardly distinguishes the height and width of positions.
ROPE_THETA, MROPE_SECTION = 1000.0, [2, 10, 20]
IGNORED = -100

SHAPE = replace(
    tiny.TINY,
    text={
        **tiny.TINY.text,
        "num_hidden_layers": 4,
        "intermediate_size": 768,
        "vocab_size": 1152,
        "mrope_section": MROPE_SECTION,
    },
    vision={**tiny.TINY.vision, "depth": 3, "fullatt_block_indexes": [0, 2]},
    audio={**tiny.TINY.audio, "encoder_layers": 3},
    endoftext_id=896,  # also the number of learnt tokens
)


# ------------------------------------------------------------------------------------------ tokenizer


def write_description(out: Path, corpus: Iterable[str]) -> None:
    """Write a checkpoint without weights: config, tokenizer trained on `corpus`, processor, template, voices."""
    out.mkdir(parents=True, exist_ok=True)
    config = tiny.omni_config(SHAPE, "bfloat16")
    config["thinker_config"]["text_config"]["rope_theta"] = ROPE_THETA
    tiny.write_json(out / "config.json", config)
    tiny.write_json(out / "generation_config.json", tiny.generation_config(SHAPE.endoftext_id))
    originals = tiny.corpus, tiny.BPE_SIZE
    tiny.corpus, tiny.BPE_SIZE = lambda: iter(corpus), SHAPE.endoftext_id  # by default the corpus is Python's manual
    try:
        tiny.write_processor(out, SHAPE)
    finally:
        tiny.corpus, tiny.BPE_SIZE = originals
    tiny.write_speakers(out, SHAPE, seed=0)


class Tokens:
    """The tokenizer of a checkpoint folder, and the encoded parts of a conversation."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.encode: Callable[[str], tuple[int, ...]] = lru_cache(maxsize=200_000)(self._encode)
        self.special = tiny.special_ids(SHAPE.endoftext_id)
        self.opening = self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        self.ask = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.special["<|im_end|>"]
        self.next = self.encode("\n<|im_start|>user\n")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def media(self, sample: Sample) -> tuple[int, ...]:
        """Placeholder tokens of the sample's medium, as the processor writes them."""
        s = self.special
        audio = () if sample.sound is None else (s["<|AUDIO|>"],) * audio_tokens(len(sample.sound))
        if sample.picture is not None:
            image = (s["<|IMAGE|>"],) * ((PICTURE // PATCH // MERGE) ** 2)
            return (s["<|vision_bos|>"], *image, s["<|vision_eos|>"])
        if sample.frames is not None:
            count = FRAMES // 2 * (CLIP_HEIGHT // PATCH // MERGE) * (CLIP_WIDTH // PATCH // MERGE)
            video = (s["<|VIDEO|>"],) * count
            if audio:  # both are in one chunk of two seconds: all frames, then all sound
                video = (s["<|audio_bos|>"], *video, *audio, s["<|audio_eos|>"])
            return (s["<|vision_bos|>"], *video, s["<|vision_eos|>"])
        return (s["<|audio_bos|>"], *audio, s["<|audio_eos|>"]) if audio else ()

    def conversation(self, samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
        """Ids and labels of the samples' questions, one after another; only answers and their end are labels."""
        ids, labels = list(self.opening), [IGNORED] * len(self.opening)
        first = True
        for sample in samples:
            media = self.media(sample)
            for turn in sample.turns:
                ask = (*(() if first else self.next), *media, *self.encode(turn.question), *self.ask)
                answer = (*self.encode(turn.answer), self.end)
                ids += [*ask, *answer]
                labels += [*[IGNORED] * len(ask), *answer]
                media, first = (), False
        return ids, labels

    def prose(self, text_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of a text in the user's turn; every token of the text is a label."""
        return [*self.opening, *text_ids], [*[IGNORED] * len(self.opening), *text_ids]


# -------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Inputs of several conversations with the same media layout; shorter ones are padded at the end.

    ids, labels: [rows, length]. pixels: [patches, 1176] with grid [media, 3]. mels: [sounds, 128, frames].
    """

    ids: Tensor
    labels: Tensor
    video: bool = False
    pixels: Tensor | None = None
    grid: Tensor | None = None
    mels: Tensor | None = None


def audio_tokens(samples: int) -> int:
    """Number of tokens of a sound with this number of samples."""
    frames = samples // HOP
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


@lru_cache(maxsize=1)
def _extractor() -> Any:
    tiny.shim_torchvision()
    from transformers import WhisperFeatureExtractor

    settings = tiny.preprocessor_config(AUDIO_SECONDS)
    names = ("chunk_length", "dither", "feature_size", "hop_length", "n_fft", "padding_value", "sampling_rate")
    return WhisperFeatureExtractor(**{name: settings[name] for name in names})


def mel_features(sounds: Sequence[np.ndarray]) -> Tensor:
    """Log-mel features float32 [sounds, 128, frames] of sounds of equal length, as if padded to AUDIO_SECONDS."""
    frames = len(sounds[0]) // HOP
    padded = [np.pad(sound, (0, 2 * HOP + 240)) for sound in sounds]
    out = _extractor()(padded, sampling_rate=RATE, padding="longest", return_tensors="pt")
    return out["input_features"][:, :, :frames].contiguous()


def patches(pixels: np.ndarray) -> Tensor:
    """uint8 [media, frames (1 or even), height, width, 3] -> normalised float32 [patches, 3 * 2 * 14 * 14]."""
    settings = tiny.preprocessor_config(AUDIO_SECONDS)
    mean, std = (255 * torch.tensor(settings[name]).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
    values = (torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 2).float() - mean) / std
    if values.shape[1] == 1:
        values = values.expand(-1, 2, -1, -1, -1)
    media, frames, _, height, width = values.shape
    t, h, w = frames // 2, height // PATCH, width // PATCH
    values = values.reshape(media, t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    values = values.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return values.reshape(media * t * h * w, 3 * 2 * PATCH * PATCH)


def text_batch(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Rows of ids and labels, padded at the end, which causal attention never reads."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return Batch(ids, labels)


def sample_batch(
    tokens: Tokens, conversations: Sequence[Sequence[Sample]], to_patches: Callable[[np.ndarray], Tensor] = patches
) -> Batch:
    """One batch of conversations with the same media layout. to_patches: pictures or clips -> the tower's patches."""
    batch = text_batch([tokens.conversation(samples) for samples in conversations], tokens.special["<|endoftext|>"])
    samples = [sample for samples in conversations for sample in samples]
    if samples[0].picture is not None:
        pixels = np.stack([sample.picture for sample in samples])[:, None]
        batch.pixels = to_patches(pixels)
        batch.grid = torch.tensor([[1, PICTURE // PATCH, PICTURE // PATCH]] * len(samples))
    if samples[0].frames is not None:
        batch.video = True
        batch.pixels = to_patches(np.stack([sample.frames for sample in samples]))
        batch.grid = torch.tensor([[FRAMES // 2, CLIP_HEIGHT // PATCH, CLIP_WIDTH // PATCH]] * len(samples))
    if samples[0].sound is not None:
        batch.mels = mel_features([sample.sound for sample in samples])
    return batch


# ---------------------------------------------------------------------------------------------- model


def build_thinker(config_dir: Path, seed: int) -> Any:
    """The thinker in float32 with new weights: normal, with a deviation of about 1 / sqrt(inputs) for matrices."""
    tiny.shim_torchvision()
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(**json.loads((config_dir / "config.json").read_text())["thinker_config"])
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(config).float()
    with torch.no_grad():
        new_weights(thinker, config.text_config.num_hidden_layers, seed)
    return thinker


def new_weights(thinker: Any, layers: int, seed: int) -> None:
    """Fill the parameters: norms with 1, biases with 0, matrices with normal values. layers: of the decoder."""
    for prefix, module in thinker.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}"
            generator = torch.Generator().manual_seed(tiny.stable_hash(seed, name))
            if leaf == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                fan_in = parameter[0].numel()
                deviation = 0.5 if isinstance(module, nn.Embedding) else fan_in**-0.5
                if prefix.endswith(("o_proj", "down_proj", "attn.proj", "out_proj", "fc2")):
                    deviation *= (2 * layers) ** -0.5
                if prefix == "lm_head":
                    deviation *= 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def _chunked_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
    """Attention [1, heads, chunks * length, size] within chunks of equal length, as one batch."""
    chunks = len(options["cu_seq_lens_q"]) - 1

    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[1], chunks, -1, x.shape[3]).transpose(0, 1)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value))
    return out.permute(0, 2, 1, 3).flatten(0, 1)[None], None


def speed_up_towers(thinker: Any) -> None:
    """Compute the towers' attention over chunks of equal length as one batch; the library loops or masks instead."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as library

    if not hasattr(thinker.audio_tower, "_prepare_attention_mask"):
        return
    library.ALL_ATTENTION_FUNCTIONS["equal_chunks"] = _chunked_attention
    thinker.audio_tower.config._attn_implementation = "equal_chunks"
    thinker.audio_tower._prepare_attention_mask = lambda *_: None

    def forward(self: Any, hidden: Tensor, cu_seqlens: Tensor, rotary_pos_emb: Tensor, **_: Any) -> Tensor:
        rows = [part(hidden).reshape(1, len(hidden), self.num_heads, -1) for part in (self.q, self.k, self.v)]
        q, k = (library.apply_rotary_pos_emb_vision(row, rotary_pos_emb) for row in rows[:2])
        chunks = len(cu_seqlens) - 1
        q, k, v = (
            x.reshape(chunks, len(hidden) // chunks, self.num_heads, -1).transpose(1, 2) for x in (q, k, rows[2])
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(hidden), -1))

    for block in thinker.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def positions(thinker: Any, batch: Batch) -> Tensor:
    """Position ids [3, rows, length]; all rows have the layout of the first, so its ids are repeated."""
    first = batch.ids[:1]
    if batch.pixels is None and batch.mels is None:
        return torch.arange(first.shape[1]).expand(3, *batch.ids.shape)
    mask = torch.ones_like(first)
    sounds = 0 if batch.mels is None else len(batch.mels) // len(batch.ids)
    lengths = None if batch.mels is None else torch.tensor([batch.mels.shape[2]] * sounds)
    grid = None if batch.grid is None else batch.grid[: len(batch.grid) // len(batch.ids)]
    index, _ = thinker.get_rope_index(
        first,
        None if batch.video else grid,
        grid if batch.video else None,
        mask,
        batch.video and sounds > 0,
        lengths,
        torch.tensor([1.0]) if batch.video else None,
    )
    return index.expand(3, *batch.ids.shape)


def visual_embeddings(thinker: Any, batch: Any) -> Tensor:
    """Embeddings [tokens, width] of a batch's `pixels` with their `grid`."""
    return thinker.visual(batch.pixels, grid_thw=batch.grid)


def audio_embeddings(thinker: Any, mels: Tensor) -> Tensor:
    """Embeddings [tokens, width] of the audio tokens of mel features [sounds, 128, frames]."""
    lengths = torch.full((len(mels),), mels.shape[2])
    after, _ = thinker.audio_tower._get_feat_extract_output_lengths(lengths)
    flat = mels.permute(1, 0, 2).flatten(1)
    return thinker.audio_tower(flat, feature_lens=lengths, aftercnn_lens=after).last_hidden_state


def answer_logits(thinker: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [labels, vocabulary] before each labelled token, and those tokens [labels]."""
    config = thinker.config
    inputs = thinker.get_input_embeddings()(batch.ids)
    if batch.pixels is not None:
        visual = visual_embeddings(thinker, batch)
        token = config.video_token_id if batch.video else config.image_token_id
        inputs = inputs.masked_scatter((batch.ids == token)[..., None], visual)
    if batch.mels is not None:
        audio = audio_embeddings(thinker, batch.mels)
        inputs = inputs.masked_scatter((batch.ids == config.audio_token_id)[..., None], audio)
    hidden = thinker.model(inputs_embeds=inputs, position_ids=positions(thinker, batch), use_cache=False)[0]
    is_label = batch.labels[:, 1:] != IGNORED
    return thinker.lm_head(hidden[:, :-1][is_label]), batch.labels[:, 1:][is_label]


# ----------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(thinker: Any, description: Path, out: Path, seed: int) -> None:
    """Write a complete checkpoint: the trained thinker in bfloat16, with talker and token2wav as in make_tiny_omni."""
    out.mkdir(parents=True, exist_ok=True)
    for file in description.iterdir():
        if (file.is_file() and file.suffix in (".json", ".txt")) or file.name == "spk_dict.pt":
            shutil.copyfile(file, out / file.name)
    trained = {tiny.disk_name(f"thinker.{name}"): value.detach() for name, value in thinker.named_parameters()}
    normal = tiny.SeededNormal(seed)

    def blocks(spec: tiny.TensorSpec) -> Iterable[Tensor]:
        if spec.name in trained:
            return iter([trained[spec.name].to(spec.dtype)])
        return tiny.tensor_blocks(spec, normal, None)

    specs = tiny.tensor_specs(out, torch.bfloat16)
    missing = trained.keys() - {spec.name for spec in specs}
    if missing:
        raise RuntimeError(f"the checkpoint has no tensors for these parameters: {sorted(missing)[:3]}")
    tiny.write_weights(out, specs, 1, blocks)  # type: ignore[arg-type]


def load_thinker(folder: Path) -> Any:
    """The thinker of a checkpoint folder in float32, for computing with its bfloat16 weights."""
    from safetensors.torch import load_file

    thinker = build_thinker(folder, 0)
    weights = load_file(folder / "model.safetensors")
    names = {name: tiny.disk_name(f"thinker.{name}") for name, _ in thinker.named_parameters()}
    thinker.load_state_dict({name: weights[disk].float() for name, disk in names.items()}, strict=False)
    return thinker.eval()
