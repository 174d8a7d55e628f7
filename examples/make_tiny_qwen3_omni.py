"""Write a tiny Qwen3-Omni checkpoint with random weights, in the layout of the official repositories.

    python examples/make_tiny_qwen3_omni.py OUT [--thinker_only] [--dtype bfloat16|float32] [--layers 3]

As in make_tiny_omni.py, names and shapes come from the model class of the installed transformers (4.57 or 5.x), values
come from a generator seeded per tensor, and config and processor files are plain JSON. The thinker has 8 experts, 2 of
them per token, and uses all three DeepStack maps; talker and code2wav are there. With ``--thinker_only``, as in
Thinking and Captioner, they are not.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_tiny_omni import (
    BPE_SIZE,
    N_TRUE_SPECIAL,
    USER_TOKEN_ID,
    Json,
    SeededNormal,
    TensorSpec,
    Vocabulary,
    added_tokens,
    name_order,
    parameter_specs,
    preprocessor_config,
    shim_torchvision,
    special_ids,
    train_bpe,
    write_json,
    write_model,
    write_vocabulary,
)
from make_tiny_qwen3_vl import text_block, vision_block
from make_tiny_vl import SPECIAL_TOKENS as VL_TOKENS

# In the official order, as in make_tiny_omni.py.
SPECIAL_TOKENS = (
    *VL_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>",
    "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>",
)  # fmt: skip

PROCESSOR_TOKENS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
    "<|audio_start|><|audio_pad|><|audio_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Qwen3OmniShape:
    """Sizes of a Qwen3-Omni, by part, with the keys of config.json. speaks: with talker and code2wav."""

    text: Json
    vision: Json
    audio: Json
    talker_text: Json
    code_predictor: Json
    talker: Json
    code2wav: Json
    endoftext_id: int
    audio_seconds: int
    assistant_token_id: int
    system_token_id: int
    speaks: bool = True

    def with_layers(self, layers: int | None) -> Qwen3OmniShape:
        """The same shape with ``layers`` thinker layers (None: unchanged)."""
        return self if layers is None else replace(self, text={**self.text, "num_hidden_layers": layers})


def tiny_shape() -> Qwen3OmniShape:
    """Heads are wider than the hidden size divided by their number, as in the published model."""
    vocab, _ = train_bpe(BPE_SIZE)
    return Qwen3OmniShape(
        text={
            "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 3072,
            "mrope_section": [12, 10, 10], "num_experts": 8, "num_experts_per_tok": 2,
        },
        vision={
            "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
        },
        audio={
            "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
            "output_dim": 256, "downsample_hidden_size": 32,
        },
        talker_text={
            "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1280,
            "mrope_section": [6, 5, 5], "num_experts": 4, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 64,
        },
        code_predictor={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "num_code_groups": 4,
        },
        talker={
            "num_code_groups": 4, "thinker_hidden_size": 256, "accept_hidden_layer": 2, "codec_eos_token_id": 1200,
            "codec_nothink_id": 1201, "codec_think_bos_id": 1202, "codec_think_eos_id": 1203, "codec_pad_id": 1204,
            "codec_bos_id": 1205, "speaker_id": {"chelsie": 1206, "ethan": 1207, "aiden": 1208},
        },
        code2wav={
            "codebook_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 4, "num_hidden_layers": 2, "num_quantizers": 4, "decoder_dim": 64,
        },
        endoftext_id=BPE_SIZE,
        audio_seconds=30,
        assistant_token_id=vocab.get("assistant", 0),
        system_token_id=vocab.get("system", 0),
    )  # fmt: skip


_MOE: Json = {
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
}  # fmt: skip


def _decoder_block(sizes: Json, model_type: str) -> Json:
    """The block of a text decoder with experts. The published one spells the kind of its positions twice."""
    block = {**text_block(sizes, model_type, 1000000), **_MOE, "sliding_window": None, "use_sliding_window": False}
    block["rope_scaling"] = {"interleaved": True, **block["rope_scaling"], "type": "default"}
    return block


def qwen3_omni_config(shape: Qwen3OmniShape, dtype: str) -> Json:
    """The complete config.json, in the layout of transformers 4.57: keys and values of the published one."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    media_ids = {
        "audio_token_id": ids["<|audio_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
    }
    audio = {
        "model_type": "qwen3_omni_moe_audio_encoder", **shape.audio,
        "num_hidden_layers": shape.audio["encoder_layers"], "activation_function": "gelu",
        "activation_dropout": 0, "attention_dropout": 0, "dropout": 0, "initializer_range": 0.02,
        "max_source_positions": 1500, "n_window": 50, "n_window_infer": 800, "conv_chunksize": 500,
        "num_mel_bins": 128, "scale_embedding": False,
    }  # fmt: skip
    thinker = {
        "model_type": "qwen3_omni_moe_thinker",
        **media_ids,
        "audio_end_token_id": ids["<|audio_end|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "user_token_id": USER_TOKEN_ID,
        "initializer_range": 0.02,
        "text_config": {
            **_decoder_block(shape.text, "qwen3_omni_moe_text"),
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
        },
        "vision_config": {
            **vision_block(shape.vision, "qwen3_omni_moe_vision_encoder"),
            # Only vLLM reads the first two: position embeddings of a picture of that size, one per patch.
            "apply_vit_abs_pos_embed": True,
            "image_size": 16 * math.isqrt(shape.vision["num_position_embeddings"]),
            "in_chans": 3,
            "spatial_patch_size": 16,
            "tokens_per_second": 2,
        },
        "audio_config": audio,
        "dtype": dtype,
    }
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": shape.speaks,
        "thinker_config": thinker,
        "im_start_token_id": ids["<|im_start|>"],
        "im_end_token_id": ids["<|im_end|>"],
        "system_token_id": shape.system_token_id,
        "user_token_id": USER_TOKEN_ID,
        "assistant_token_id": shape.assistant_token_id,
        "tts_pad_token_id": ids["<tts_pad>"],
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "dtype": dtype,
        "transformers_version": "4.57.0",
    }
    if not shape.speaks:
        return config
    talker_text = _decoder_block(shape.talker_text, "qwen3_omni_moe_talker_text")
    del talker_text["rope_scaling"]["mrope_interleaved"]
    predictor = {
        "model_type": "qwen3_omni_moe_talker_code_predictor", **shape.code_predictor, "attention_bias": False,
        "attention_dropout": 0, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
        "layer_types": ["full_attention"] * shape.code_predictor["num_hidden_layers"], "rms_norm_eps": 1e-06,
        "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
        "use_cache": True, "max_window_layers": 28, "tie_word_embeddings": False,
    }  # fmt: skip
    config["talker_config"] = {
        "model_type": "qwen3_omni_moe_talker", **media_ids, **shape.talker, "text_config": talker_text,
        "code_predictor_config": predictor, "spatial_merge_size": 2, "output_router_logits": False,
        "audio_end_token_id": ids["<|audio_end|>"],
    }  # fmt: skip
    config["code2wav_config"] = {
        "model_type": "qwen3_omni_moe_code2wav", **shape.code2wav, "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "layer_scale_initial_scale": 0.01, "max_position_embeddings": 8000,
        "rms_norm_eps": 1e-05, "rope_theta": 10000, "sliding_window": 72, "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2], "codebook_dim": 512, "semantic_codebook_size": 4096, "num_semantic_quantizers": 1,
        "vector_quantization_hidden_dimension": 512,
    }  # fmt: skip
    return config


def _added_tokens(ids: dict[str, int]) -> dict[int, Json]:
    """Settings of the special tokens; the media placeholders after the first tokens are special too."""
    special = {ids[token] for token in PROCESSOR_TOKENS.values()}
    return {
        index: {**token, "special": token["special"] or index in special} for index, token in added_tokens(ids).items()
    }


def tokenizer_config(ids: dict[str, int]) -> Json:
    """tokenizer_config.json; the processor reads the media tokens as attributes of the tokenizer."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in _added_tokens(ids).items()},
        "additional_special_tokens": [*SPECIAL_TOKENS[1:N_TRUE_SPECIAL], *("<|audio_start|>", "<|audio_end|>")],
        **PROCESSOR_TOKENS,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": PROCESSOR_TOKENS,
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3OmniMoeProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_processor(out: Path, shape: Qwen3OmniShape, trained: Vocabulary | None = None) -> None:
    """Write the tokenizer, processor and chat template files into ``out``. ``trained``: see write_vocabulary."""
    ids = special_ids(shape.endoftext_id, SPECIAL_TOKENS)
    write_vocabulary(out, ids, trained)
    write_json(out / "tokenizer_config.json", tokenizer_config(ids))
    picture = {
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16, "min_pixels": 3136,
        "processor_class": "Qwen3OmniMoeProcessor",
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", {**preprocessor_config(shape.audio_seconds), **picture})
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


# -------------------------------------------------------------------------------------------- tensors

# transformers 5 nests the thinker's parts one level deeper than the files do.
_DISK_NAMES = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
)


def disk_name(name: str) -> str:
    """Name in the checkpoint of a parameter called ``name`` in the installed transformers."""
    for prefix, short in _DISK_NAMES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def _separate_experts(spec: TensorSpec) -> Iterator[TensorSpec]:
    """The tensors on disk of a parameter: of transformers 5's fused experts, one matrix per expert."""
    match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", spec.name)
    if match is None:
        yield spec
        return
    prefix, leaf = match.groups()
    experts, rows, columns = spec.shape
    halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    for expert in range(experts):
        for half in halves:
            name, shape = f"{prefix}.{expert}.{half}.weight", (rows // len(halves), columns)
            yield replace(spec, name=name, shape=shape, std=columns**-0.5)


def tensor_specs(config_dir: Path, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the model described by ``config_dir``/config.json, in storage order."""
    shim_torchvision()
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    config = Qwen3OmniMoeConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = Qwen3OmniMoeForConditionalGeneration(config)
    specs = [part for spec in parameter_specs(model, disk_name, dtype) for part in _separate_experts(spec)]
    parts = ("thinker", "talker", "code2wav")
    return sorted(specs, key=lambda spec: (parts.index(spec.name.split(".")[0]), name_order(spec.name)))


def write_checkpoint(out: Path, shape: Qwen3OmniShape, *, dtype: str, **options: Any) -> list[TensorSpec]:
    """Write a complete checkpoint of the given shape into ``out``. ``options``: see make_tiny_omni.write_model."""
    specs = write_model(out, qwen3_omni_config(shape, dtype), shape.endoftext_id, tensor_specs, dtype=dtype, **options)
    write_processor(out, shape)
    return specs


def make_tiny_qwen3_omni(
    out: Path, *, thinker_only: bool = False, dtype: str = "bfloat16", seed: int = 0, layers: int = 3, shards: int = 2
) -> Path:
    """Write the tiny checkpoint into ``out`` (created, must hold no checkpoint yet) and return ``out``."""
    out = Path(out)
    shape = replace(tiny_shape(), speaks=not thinker_only).with_layers(layers)
    write_checkpoint(out, shape, dtype=dtype, seed=seed, shards=shards, normal=SeededNormal(seed))
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny Qwen3-Omni with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint into")
    parser.add_argument("--thinker_only", action="store_true", help="no talker, as in Thinking and Captioner")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3, help="decoder layers of the thinker")
    args = parser.parse_args()
    out = make_tiny_qwen3_omni(
        args.out, thinker_only=args.thinker_only, dtype=args.dtype, seed=args.seed, layers=args.layers
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
