"""The tiny MoE: a Qwen3-Omni with experts that answers the questions of the tiny Omni.

Media, questions and tokenizer are those of examples/tiny_omni; its samples are files of both. Here are the shape of the
model, its special tokens, and the inputs of the thinker. A test compares them with the real processor's output.

The tiny Omni is its teacher: both have the same hidden size, tokens and cells of pictures.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import make_tiny_omni as tiny
import make_tiny_qwen3_omni as tiny_moe
from tiny_omni import model as omni
from tiny_omni.model import IGNORED, positions
from tiny_omni.render import CLIP_HEIGHT, CLIP_WIDTH, FRAMES, PICTURE
from tiny_omni.tasks import Sample

TINY_OMNI = Path(__file__).parent.parent / "tiny_omni" / "model"
PATCH, MERGE = 16, 2
CELL = PATCH * MERGE  # side of a visual token in pixels
PICTURE_TOKENS = PICTURE // omni.PATCH // MERGE  # per side: the processor enlarges pictures to as many as the teacher's
CLIP_ROWS, CLIP_COLUMNS = CLIP_HEIGHT // CELL, CLIP_WIDTH // CELL  # tokens of a frame; clips keep their size
CHUNK = 100  # frames of sound that the audio tower convolves at once, into 13 tokens
EXPERTS, ACTIVE = 16, 4
ROPE_THETA = 1000.0  # as in the tiny Omni

_RANDOM = tiny_moe.tiny_shape()
SHAPE = replace(
    _RANDOM,
    text={
        **_RANDOM.text,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 1152,
        "moe_intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
    },
    vision={**_RANDOM.vision, "depth": 3, "deepstack_visual_indexes": [0, 1]},
    audio={**_RANDOM.audio, "d_model": 128, "encoder_layers": 3, "encoder_ffn_dim": 256},
    endoftext_id=omni.SHAPE.endoftext_id,
    audio_seconds=omni.AUDIO_SECONDS,
)


# ------------------------------------------------------------------------------------------ tokenizer


def vocabulary() -> tiny.Vocabulary:
    """Tokens and merges of the tiny Omni, without its special tokens."""
    vocab = json.loads((TINY_OMNI / "vocab.json").read_text(encoding="utf-8"))
    lines = (TINY_OMNI / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    return vocab, merges


def write_description(out: Path) -> None:
    """Write a checkpoint without weights: config, tokenizer, processor, template."""
    out.mkdir(parents=True, exist_ok=True)
    vocab, _ = vocabulary()
    shape = replace(SHAPE, assistant_token_id=vocab["assistant"], system_token_id=vocab["system"])
    config = tiny_moe.qwen3_omni_config(shape, "bfloat16")
    config["thinker_config"]["text_config"]["rope_theta"] = ROPE_THETA
    tiny.write_json(out / "config.json", config)
    tiny.write_json(out / "generation_config.json", tiny.generation_config(shape.endoftext_id))
    tiny_moe.write_processor(out, shape, vocabulary())


class Tokens(omni.Tokens):
    """The tokenizer of a checkpoint folder, and the encoded parts of a conversation without a system prompt."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.special = tiny.special_ids(SHAPE.endoftext_id, tiny_moe.SPECIAL_TOKENS)
        self.opening = self.encode("<|im_start|>user\n")
        self.end = self.special["<|im_end|>"]

    def media(self, sample: Sample) -> tuple[int, ...]:
        """Placeholder tokens of the sample's medium, as the processor writes them."""
        s = self.special
        audio = () if sample.sound is None else (s["<|audio_pad|>"],) * audio_tokens(len(sample.sound))
        if sample.picture is not None:
            return (s["<|vision_start|>"], *(s["<|image_pad|>"],) * PICTURE_TOKENS**2, s["<|vision_end|>"])
        if sample.frames is not None:
            pair = (s["<|video_pad|>"],) * (CLIP_ROWS * CLIP_COLUMNS)
            video = pair * (FRAMES // 2)
            if audio:  # in the order of time: a pair of frames, then the sound of its second
                second = len(audio) * 2 // FRAMES
                parts = (pair + audio[at * second : (at + 1) * second] for at in range(FRAMES // 2))
                video = (s["<|audio_start|>"], *(token for part in parts for token in part), s["<|audio_end|>"])
            return (s["<|vision_start|>"], *video, s["<|vision_end|>"])
        return (s["<|audio_start|>"], *audio, s["<|audio_end|>"]) if audio else ()


# Special tokens of the teacher by those of this model.
_TEACHER_TOKENS = {
    "<|endoftext|>": "<|endoftext|>",
    "<|im_start|>": "<|im_start|>",
    "<|im_end|>": "<|im_end|>",
    "<|vision_start|>": "<|vision_bos|>",
    "<|vision_end|>": "<|vision_eos|>",
    "<|audio_start|>": "<|audio_bos|>",
    "<|audio_end|>": "<|audio_eos|>",
    "<|image_pad|>": "<|IMAGE|>",
    "<|video_pad|>": "<|VIDEO|>",
    "<|audio_pad|>": "<|AUDIO|>",
}


def teacher_ids() -> Tensor:
    """The teacher's token for each token of this model, [vocabulary]."""
    own = tiny.special_ids(SHAPE.endoftext_id, tiny_moe.SPECIAL_TOKENS)
    special = tiny.special_ids(SHAPE.endoftext_id)
    ids = torch.arange(SHAPE.text["vocab_size"])
    for name, teachers in _TEACHER_TOKENS.items():
        ids[own[name]] = special[teachers]
    return ids


# -------------------------------------------------------------------------------------------- batches


@dataclass
class Batch(omni.Batch):
    """A batch, and the same pictures or clips as patches of the teacher, cut into as many tokens."""

    teacher_pixels: Tensor | None = None


def audio_tokens(samples: int) -> int:
    """Number of tokens of a sound with this number of samples."""
    whole, rest = divmod(samples // omni.HOP, CHUNK)
    for _ in range(3):
        rest = (rest + 1) // 2
    return 13 * whole + rest


def _resized(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [media, frames, height, width, 3] -> [media, frames, 3, new height, new width], as processors resize."""
    values = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 2)
    flat = F.interpolate(values.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    return flat.view(*values.shape[:3], height, width)


def patches(pixels: np.ndarray) -> Tensor:
    """uint8 [media, frames (1 or even), height, width, 3] -> normalised float32 [patches, 3 * 2 * 16 * 16].

    Pictures are enlarged as the processor enlarges them.
    """
    media, frames, height, width, _ = pixels.shape
    if frames == 1:
        height = width = PICTURE_TOKENS * CELL
    values = _resized(pixels, height, width).float() / 127.5 - 1
    if frames == 1:
        values = values.expand(-1, 2, -1, -1, -1)
    t, h, w = max(frames // 2, 1), height // PATCH, width // PATCH
    values = values.reshape(media, t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    values = values.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return values.reshape(media * t * h * w, 3 * 2 * PATCH * PATCH)


def sample_batch(tokens: Tokens, conversations: Sequence[Sequence[Sample]]) -> Batch:
    """One batch of conversations with the same media layout."""
    batch = Batch(**vars(omni.sample_batch(tokens, conversations, patches)))
    samples = [sample for samples in conversations for sample in samples]
    if samples[0].picture is not None:
        batch.teacher_pixels = omni.patches(np.stack([sample.picture for sample in samples])[:, None])
    elif samples[0].frames is not None:
        batch.grid = torch.tensor([[FRAMES // 2, MERGE * CLIP_ROWS, MERGE * CLIP_COLUMNS]] * len(samples))
        clips = np.stack([sample.frames for sample in samples])
        small = _resized(clips, *(MERGE * omni.PATCH * side for side in (CLIP_ROWS, CLIP_COLUMNS)))
        batch.teacher_pixels = omni.patches(small.movedim(2, -1).numpy())
    return batch


# ---------------------------------------------------------------------------------------------- model


def build_thinker(config_dir: Path, seed: int) -> Any:
    """The thinker in float32 with new weights."""
    tiny.shim_torchvision()
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    config = Qwen3OmniMoeThinkerConfig(**json.loads((config_dir / "config.json").read_text())["thinker_config"])
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration(config).float()
    with torch.no_grad():
        omni.new_weights(thinker, config.text_config.num_hidden_layers, seed)
        thinker.visual.pos_embed.weight.mul_(0.2)
    return thinker


@torch.no_grad()
def start_from_teacher(thinker: Any, teacher: Any) -> None:
    """Copy what both models have: embedding, head, norms, attention, patches and attention of the visual tower.

    Experts get random neurons of the teacher's MLPs. DeepStack starts with zeros.
    """
    ids = teacher_ids()
    thinker.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[ids])
    thinker.lm_head.weight.copy_(teacher.lm_head.weight[ids])
    thinker.model.norm.weight.copy_(teacher.model.norm.weight)
    generator = torch.Generator().manual_seed(0)
    for layer, old in zip(thinker.model.layers, teacher.model.layers, strict=True):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, norm).weight.copy_(getattr(old, norm).weight)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, leaf).weight.copy_(getattr(old.self_attn, leaf).weight)
        # The norms divide by the length of queries and keys, which is about that for inputs of the norm's scale.
        scale = layer.input_layernorm.weight
        for norm, linear in (("q_norm", old.self_attn.q_proj), ("k_norm", old.self_attn.k_proj)):
            getattr(layer.self_attn, norm).weight.fill_(float((linear.weight * scale).square().sum(1).mean().sqrt()))
        for expert in layer.mlp.experts:
            neurons = torch.randperm(len(old.mlp.gate_proj.weight), generator=generator)[: len(expert.gate_proj.weight)]
            expert.gate_proj.weight.copy_(old.mlp.gate_proj.weight[neurons])
            expert.up_proj.weight.copy_(old.mlp.up_proj.weight[neurons])
            expert.down_proj.weight.copy_(_EXPERT_GAIN * old.mlp.down_proj.weight[:, neurons])
    visual, old_visual = thinker.visual, teacher.visual
    _copy_patches(visual.patch_embed.proj, old_visual.patch_embed.proj.weight)
    for block, old in zip(visual.blocks, old_visual.blocks, strict=True):
        for leaf in ("weight", "bias"):
            parts = [getattr(getattr(old.attn, name), leaf) for name in ("q", "k", "v")]
            getattr(block.attn.qkv, leaf).copy_(torch.cat(parts))
            getattr(block.attn.proj, leaf).copy_(getattr(old.attn.proj, leaf))
        block.norm1.weight.copy_(old.norm1.weight)
        block.norm2.weight.copy_(old.norm2.weight)
    visual.merger.ln_q.weight.copy_(old_visual.merger.ln_q.weight)
    for index in (0, 2):
        visual.merger.mlp[index].load_state_dict(old_visual.merger.mlp[index].state_dict())
    for merger in visual.merger_list:
        merger.mlp[2].weight.zero_()


_EXPERT_GAIN = 6.0


def _copy_patches(proj: Any, weight: Tensor) -> None:
    """Copy the embedding of patches [out, 3, 2, 14, 14] for larger patches and another normalisation of pixels."""
    settings = tiny.preprocessor_config(omni.AUDIO_SECONDS)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1, 1) for name in ("image_mean", "image_std"))
    proj.bias.copy_((weight * (0.5 - mean) / std).flatten(1).sum(1))
    larger = F.interpolate((weight / (2 * std)).flatten(1, 2), (PATCH, PATCH), mode="bilinear", antialias=True)
    proj.weight.copy_(larger.view_as(proj.weight) * (omni.PATCH / PATCH) ** 2)


def speed_up_towers(thinker: Any) -> None:
    """Compute the towers' attention over media of equal size as one batch, and positions once.

    The library loops over media in the visual tower, and lets all sounds of a batch attend to each other.
    """
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as library

    library.ALL_ATTENTION_FUNCTIONS["equal_chunks"] = omni._chunked_attention
    thinker.audio_tower.config._attn_implementation = "equal_chunks"
    tower = thinker.visual

    def attend(self: Any, hidden: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        media = len(cu_seqlens) - 1
        q, k, v = self.qkv(hidden).reshape(len(hidden), 3, self.num_heads, -1).unbind(1)
        q, k = library.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        rows = [x.reshape(media, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        return self.proj(F.scaled_dot_product_attention(*rows).transpose(1, 2).reshape(len(hidden), -1))

    rotary, learnt = tower.rot_pos_emb, tower.fast_pos_embed_interpolate
    tower.rot_pos_emb = lambda grid: rotary(grid[:1]).repeat(len(grid), 1)
    tower.fast_pos_embed_interpolate = lambda grid: learnt(grid[:1]).repeat(len(grid), 1)
    for block in tower.blocks:
        block.attn.forward = attend.__get__(block.attn)


def answer_logits(thinker: Any, batch: omni.Batch) -> tuple[Tensor, Tensor]:
    """Logits [labels, vocabulary] before each labelled token, and those tokens [labels]."""
    config = thinker.config
    inputs = thinker.get_input_embeddings()(batch.ids)
    options: dict[str, Any] = {}
    if batch.pixels is not None:
        visual, deepstack = thinker.visual(batch.pixels, grid_thw=batch.grid)
        mask = (batch.ids == (config.video_token_id if batch.video else config.image_token_id))[..., None]
        inputs = inputs.masked_scatter(mask, visual)
        options = {"visual_pos_masks": mask, "deepstack_visual_embeds": deepstack}
    if batch.mels is not None:
        audio = audio_embeddings(thinker, batch.mels)
        inputs = inputs.masked_scatter((batch.ids == config.audio_token_id)[..., None], audio)
    # Without a mask the library takes positions that do not rise by one, as those of pictures, for packed sequences,
    # and no text could see a picture.
    options["attention_mask"] = torch.ones_like(batch.ids)
    places = positions(thinker, batch)
    hidden = thinker.model(inputs_embeds=inputs, position_ids=places, use_cache=False, **options)[0]
    is_label = batch.labels[:, 1:] != IGNORED
    return thinker.lm_head(hidden[:, :-1][is_label]), batch.labels[:, 1:][is_label]


def audio_embeddings(thinker: Any, mels: Tensor) -> Tensor:
    """Embeddings [tokens, width] of the audio tokens of mel features [sounds, 128, frames]."""
    lengths = torch.full((len(mels),), mels.shape[2])
    return thinker.audio_tower(mels.permute(1, 0, 2).flatten(1), feature_lens=lengths).last_hidden_state


class RouterLogits:
    """Records the router logits of the last forward pass, [tokens, experts] of each layer."""

    def __init__(self, thinker: nn.Module) -> None:
        self.seen: list[Tensor] = []
        for name, module in thinker.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, inputs, logits: self.seen.append(logits))

    def balance_loss(self) -> Tensor:
        """The library's loss of unequal use of experts, ACTIVE if all are used equally; forgets the logits."""
        from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import load_balancing_loss_func

        losses = [load_balancing_loss_func((logits,), EXPERTS, ACTIVE) for logits in self.seen]
        self.seen.clear()
        return torch.stack(losses).mean()


# ----------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(thinker: Any, description: Path, out: Path, seed: int) -> None:
    """Write a complete checkpoint: the trained thinker in bfloat16, with random talker and code2wav."""
    out.mkdir(parents=True, exist_ok=True)
    for file in description.iterdir():
        shutil.copyfile(file, out / file.name)
    trained = {tiny_moe.disk_name(f"thinker.{name}"): value.detach() for name, value in thinker.named_parameters()}
    normal = tiny.SeededNormal(seed)

    def blocks(spec: tiny.TensorSpec) -> Iterator[Tensor]:
        if spec.name in trained:
            return iter([trained[spec.name].to(spec.dtype)])
        return tiny.tensor_blocks(spec, normal, None)

    specs = tiny_moe.tensor_specs(out, torch.bfloat16)
    missing = trained.keys() - {spec.name for spec in specs}
    if missing:
        raise RuntimeError(f"the checkpoint has no tensors for these parameters: {sorted(missing)[:3]}")
    tiny.write_weights(out, specs, 1, blocks)


def load_thinker(folder: Path) -> Any:
    """The thinker of a checkpoint folder in float32, for computing with its bfloat16 weights."""
    from safetensors.torch import load_file

    thinker = build_thinker(folder, 0)
    weights = load_file(folder / "model.safetensors")
    names = {name: tiny_moe.disk_name(f"thinker.{name}") for name, _ in thinker.named_parameters()}
    thinker.load_state_dict({name: weights[disk].float() for name, disk in names.items()}, strict=False)
    return thinker.eval()
