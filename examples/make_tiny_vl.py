"""Write a tiny Qwen2.5-VL checkpoint with random weights, in the layout of the official repositories.

    python examples/make_tiny_vl.py OUT [--tied] [--dtype bfloat16|float32] [--seed 0] [--layers 4] [--single_file]

As in make_tiny_omni.py, names and shapes come from the model class of the installed transformers (4.57 or 5.x), values
come from a generator seeded per tensor, and config and processor files are plain JSON. config.json is flat, as in the
official repositories. With ``--tied``, as in the 3B, lm_head is the embedding and is not stored.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_tiny_omni import (
    BPE_SIZE,
    IMAGE_SETTINGS,
    N_TRUE_SPECIAL,
    TINY,
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

# In the official order, as in make_tiny_omni.py.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
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


@dataclass(frozen=True)
class VlShape:
    """Sizes that differ between Qwen2.5-VL models, with the keys of config.json."""

    text: Json
    vision: Json
    tied: bool
    endoftext_id: int

    def with_layers(self, layers: int | None) -> VlShape:
        """The same shape with ``layers`` decoder layers (None: unchanged)."""
        return self if layers is None else replace(self, text={**self.text, "num_hidden_layers": layers})


TINY_VL = VlShape(text=TINY.text, vision=TINY.vision, tied=False, endoftext_id=BPE_SIZE)


def vl_config(shape: VlShape, dtype: str) -> Json:
    """The complete config.json, flat, as in the official repositories."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    text = dict(shape.text)
    mrope_section = text.pop("mrope_section")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "max_window_layers": text["num_hidden_layers"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(mrope_section)},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "vision_config": {
            "model_type": "qwen2_5_vl", **shape.vision, "hidden_act": "silu", "in_channels": 3, "in_chans": 3,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            "tokens_per_second": 2, "window_size": 112,
        },
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
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_processor(out: Path, shape: VlShape) -> None:
    """Write the tokenizer, processor and chat template files into ``out``."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    write_vocabulary(out, ids)
    write_json(out / "tokenizer_config.json", tokenizer_config(ids))
    tokens = {"eos_token": plain_token("<|im_end|>"), "pad_token": plain_token("<|endoftext|>")}
    special = {"additional_special_tokens": list(SPECIAL_TOKENS[1:N_TRUE_SPECIAL]), **tokens}
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "preprocessor_config.json", {"processor_class": "Qwen2_5_VLProcessor", **IMAGE_SETTINGS})
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def disk_name(name: str) -> str:
    """Name in the checkpoint of a parameter called ``name`` in transformers."""
    for prefix, short in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def tensor_specs(config_dir: Path, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the model described by ``config_dir``/config.json, in storage order."""
    shim_torchvision()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    specs = list(parameter_specs(model, disk_name, dtype))
    if config.tie_word_embeddings:
        specs = tied(specs, "model.embed_tokens.weight")
    return sorted(specs, key=lambda spec: name_order(spec.name))


def write_checkpoint(out: Path, shape: VlShape, *, dtype: str, **options: Any) -> list[TensorSpec]:
    """Write a complete checkpoint of the given shape into ``out``. ``options``: see make_tiny_omni.write_model."""
    specs = write_model(out, vl_config(shape, dtype), shape.endoftext_id, tensor_specs, dtype=dtype, **options)
    write_processor(out, shape)
    return specs


def make_tiny_vl(
    out: Path, *, tied: bool = False, dtype: str = "bfloat16", seed: int = 0, layers: int = 4, shards: int = 2
) -> Path:
    """Write the tiny checkpoint into ``out`` (created, must hold no checkpoint yet) and return ``out``."""
    out = Path(out)
    shape = replace(TINY_VL, tied=tied).with_layers(layers)
    write_checkpoint(out, shape, dtype=dtype, seed=seed, shards=shards, normal=SeededNormal(seed))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny Qwen2.5-VL with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint into")
    parser.add_argument("--tied", action="store_true", help="lm_head is the embedding, as in the 3B")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--single_file", action="store_true", help="write one model.safetensors without an index")
    args = parser.parse_args()
    shards = 1 if args.single_file else 2
    out = make_tiny_vl(args.out, tied=args.tied, dtype=args.dtype, seed=args.seed, layers=args.layers, shards=shards)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
