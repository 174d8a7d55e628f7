"""Write a tiny Qwen3-VL (dense) checkpoint with random weights, in the layout of the official repositories.

    python examples/make_tiny_qwen3_vl.py OUT [--tied] [--dtype bfloat16|float32] [--layers 4] [--single_file]

As in make_tiny_omni.py, names and shapes come from the model class of the installed transformers (4.57 or 5.x), values
come from a generator seeded per tensor, and config and processor files are plain JSON. The heads are wider than the
hidden size divided by their number, and all three DeepStack maps are used. With ``--tied``, as in the 4B, lm_head is
the embedding and is not stored.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_tiny_omni import (
    BPE_SIZE,
    N_TRUE_SPECIAL,
    Json,
    SeededNormal,
    TensorSpec,
    added_tokens,
    name_order,
    parameter_specs,
    plain_token,
    shim_torchvision,
    special_ids,
    tied,
    write_json,
    write_model,
    write_vocabulary,
)
from make_tiny_vl import SPECIAL_TOKENS

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Settings of pictures and clips; sizes are the sums of pixels of a picture, or of all frames of a clip.
_PATCHES: Json = {
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "merge_size": 2, "patch_size": 16,
    "temporal_patch_size": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Qwen3VlShape:
    """Sizes that differ between Qwen3-VL models, with the keys of config.json."""

    text: Json
    vision: Json
    tied: bool
    endoftext_id: int

    def with_layers(self, layers: int | None) -> Qwen3VlShape:
        """The same shape with ``layers`` decoder layers (None: unchanged)."""
        return self if layers is None else replace(self, text={**self.text, "num_hidden_layers": layers})


TINY_QWEN3_VL = Qwen3VlShape(
    text={
        "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 3072, "mrope_section": [12, 10, 10],
    },
    vision={
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    },
    tied=False,
    endoftext_id=BPE_SIZE,
)  # fmt: skip


def text_block(sizes: Json, model_type: str, rope_theta: float) -> Json:
    """The decoder's block of config.json, in the spelling of 4.57."""
    sizes = dict(sizes)
    mrope_section = sizes.pop("mrope_section")
    return {
        "model_type": model_type,
        **sizes,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-06,
        "rope_theta": rope_theta,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": list(mrope_section), "rope_type": "default"},
        "use_cache": True,
    }


def vision_block(sizes: Json, model_type: str) -> Json:
    """The vision tower's block of config.json."""
    return {
        "model_type": model_type, **sizes, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3,
        "initializer_range": 0.02, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip


def qwen3_vl_config(shape: Qwen3VlShape, dtype: str) -> Json:
    """The complete config.json."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    text = text_block(shape.text, "qwen3_vl_text", 5000000)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {
            **text, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "dtype": dtype,
            "tie_word_embeddings": shape.tied,
        },
        "tie_word_embeddings": shape.tied,
        "transformers_version": "4.57.0",
        "vision_config": vision_block(shape.vision, "qwen3_vl"),
    }  # fmt: skip


def tokenizer_config(ids: dict[str, int]) -> Json:
    """tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in added_tokens(ids).items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:N_TRUE_SPECIAL]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_processor(out: Path, shape: Qwen3VlShape) -> None:
    """Write the tokenizer, processor and chat template files into ``out``."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    write_vocabulary(out, ids)
    write_json(out / "tokenizer_config.json", tokenizer_config(ids))
    tokens = {"eos_token": plain_token("<|im_end|>"), "pad_token": plain_token("<|endoftext|>")}
    special = {"additional_special_tokens": list(SPECIAL_TOKENS[1:N_TRUE_SPECIAL]), **tokens}
    write_json(out / "special_tokens_map.json", special)
    image = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, **_PATCHES}
    video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, **_PATCHES}
    names = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    write_json(out / "preprocessor_config.json", {**names, **image})
    names = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(out / "video_preprocessor_config.json", {**names, **video})
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def tensor_specs(config_dir: Path, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the model described by ``config_dir``/config.json, in storage order."""
    shim_torchvision()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    specs = list(parameter_specs(model, str, dtype))
    if config.tie_word_embeddings:
        specs = tied(specs, "model.language_model.embed_tokens.weight")
    return sorted(specs, key=lambda spec: name_order(spec.name))


def write_checkpoint(out: Path, shape: Qwen3VlShape, *, dtype: str, **options: Any) -> list[TensorSpec]:
    """Write a complete checkpoint of the given shape into ``out``. ``options``: see make_tiny_omni.write_model."""
    specs = write_model(out, qwen3_vl_config(shape, dtype), shape.endoftext_id, tensor_specs, dtype=dtype, **options)
    write_processor(out, shape)
    return specs


def make_tiny_qwen3_vl(
    out: Path, *, tied: bool = False, dtype: str = "bfloat16", seed: int = 0, layers: int = 4, shards: int = 2
) -> Path:
    """Write the tiny checkpoint into ``out`` (created, must hold no checkpoint yet) and return ``out``."""
    out = Path(out)
    shape = replace(TINY_QWEN3_VL, tied=tied).with_layers(layers)
    write_checkpoint(out, shape, dtype=dtype, seed=seed, shards=shards, normal=SeededNormal(seed))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny Qwen3-VL with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint into")
    parser.add_argument("--tied", action="store_true", help="lm_head is the embedding, as in the 4B")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--single_file", action="store_true", help="write one model.safetensors without an index")
    args = parser.parse_args()
    shards = 1 if args.single_file else 2
    out = make_tiny_qwen3_vl(
        args.out, tied=args.tied, dtype=args.dtype, seed=args.seed, layers=args.layers, shards=shards
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
