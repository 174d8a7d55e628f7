"""Write a random-weight checkpoint with the exact shapes of a Qwen2.5-Omni, Qwen2.5-VL, Qwen3-VL or Qwen3-Omni model.

    python benchmarks/make_checkpoint.py {3b,7b,vl-7b,qwen3-omni,...} OUT [--layers N] [--seed 0] [--headers_only]

Use it to measure time, memory and disk space without the real weights. Tensor names, shapes, dtypes, token ids, number
of shards and kinds of files are those of the official repository: 12.0 GB (3b), 22.4 GB (7b), 7.5 GB (vl-3b), 16.6 GB
(vl-7b), 70.5 GB (qwen3-omni). The values are slices of one pool of normal numbers, so the disk limits the speed, and
half a GB of memory is enough.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from make_tiny_omni import (
    BLOCK,
    Json,
    OmniShape,
    SeededNormal,
    TensorSpec,
    stable_hash,
    write_checkpoint,
)
from make_tiny_qwen3_omni import Qwen3OmniShape
from make_tiny_qwen3_omni import write_checkpoint as write_qwen3_omni_checkpoint
from make_tiny_qwen3_vl import Qwen3VlShape
from make_tiny_qwen3_vl import write_checkpoint as write_qwen3_vl_checkpoint
from make_tiny_vl import VlShape
from make_tiny_vl import write_checkpoint as write_vl_checkpoint

POOL_SIZE = 16_777_213  # prime, so that the rows of a large matrix do not repeat
SHARD_BYTES = 4.5e9

ENDOFTEXT_ID = 151643

_VISION: Json = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_TEXT: dict[str, Json] = {
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "mrope_section": [16, 24, 24],
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "mrope_section": [16, 24, 24],
    },
}  # fmt: skip


def _real_shape(text: Json, talker: Json) -> OmniShape:
    """Shape of a published model; the towers and token2wav of 3B and 7B differ only by the thinker's width."""
    hidden = text["hidden_size"]
    return OmniShape(
        text=text,
        vision={**_VISION, "out_hidden_size": hidden},
        audio={
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "output_dim": hidden,
        },
        talker={
            "embedding_size": hidden, "hidden_size": 896, "num_hidden_layers": 24, "vocab_size": 8448,
            **talker,
        },
        dit={
            "hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 16, "head_dim": 64,
            "emb_dim": 512, "num_embeds": 8193, "enc_emb_dim": 192, "enc_dim": 128,
            "enc_channels": [256, 256, 256, 256, 768], "enc_attention_channels": 64, "enc_se_channels": 64,
            "look_ahead_layers": [10], "look_backward_layers": [0, 20],
        },
        bigvgan={"upsample_initial_channel": 1536},
        endoftext_id=ENDOFTEXT_ID,
        codec_pad_id=8292,
        audio_seconds=300,
        reference_frames=300,
    )  # fmt: skip


SHAPES = {
    "3b": _real_shape(
        text=_TEXT["3b"],
        talker={
            "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64,
            "mrope_section": [16, 16, 0],
        },
    ),
    "7b": _real_shape(
        text=_TEXT["7b"],
        talker={
            "intermediate_size": 18944, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 128,
            "mrope_section": [16, 24, 24],
        },
    ),
}  # fmt: skip


# The 3B ties lm_head to the embedding.
VL_SHAPES = {
    f"vl-{size}": VlShape(
        text=text,
        vision={**_VISION, "out_hidden_size": text["hidden_size"]},
        tied=size == "3b",
        endoftext_id=ENDOFTEXT_ID,
    )
    for size, text in _TEXT.items()
}


def _qwen3_vl_shape(hidden: int, inter: int, layers: int, heads: int, tied: bool) -> Qwen3VlShape:
    """Shape of a published model. The 4B's vision tower is smaller than that of the others."""
    small = hidden == 2560
    return Qwen3VlShape(
        text={
            "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "mrope_section": [24, 20, 20],
        },
        vision={
            "depth": 24 if small else 27, "hidden_size": 1024 if small else 1152,
            "intermediate_size": 4096 if small else 4304, "num_heads": 16, "out_hidden_size": hidden,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24],
        },
        tied=tied,
        endoftext_id=ENDOFTEXT_ID,
    )  # fmt: skip


QWEN3_VL_SHAPES = {
    "qwen3-vl-4b": _qwen3_vl_shape(2560, 9728, 36, 32, tied=True),
    "qwen3-vl-8b": _qwen3_vl_shape(4096, 12288, 36, 32, tied=False),
    "qwen3-vl-32b": _qwen3_vl_shape(5120, 25600, 64, 64, tied=False),
}


QWEN3_OMNI_SHAPES = {
    "qwen3-omni": Qwen3OmniShape(
        text={
            "hidden_size": 2048, "intermediate_size": 768, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064,
            "mrope_section": [24, 20, 20], "num_experts": 128, "num_experts_per_tok": 8,
        },
        vision={
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
        audio={
            "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "output_dim": 2048, "downsample_hidden_size": 480,
        },
        talker_text={
            "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 384, "num_hidden_layers": 20,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 3072,
            "mrope_section": [24, 20, 20], "num_experts": 128, "num_experts_per_tok": 6,
            "shared_expert_intermediate_size": 768,
        },
        code_predictor={
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 2048, "num_code_groups": 16,
        },
        talker={
            "num_code_groups": 16, "thinker_hidden_size": 2048, "accept_hidden_layer": 24,
            "codec_eos_token_id": 2150, "codec_nothink_id": 2155, "codec_think_bos_id": 2156,
            "codec_think_eos_id": 2157, "codec_pad_id": 2148, "codec_bos_id": 2149,
            "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
        },
        code2wav={
            "codebook_size": 2048, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
            "num_key_value_heads": 16, "num_hidden_layers": 8, "num_quantizers": 16, "decoder_dim": 1536,
        },
        endoftext_id=ENDOFTEXT_ID,
        audio_seconds=300,
        assistant_token_id=77091,
        system_token_id=8948,
    ),
}  # fmt: skip


class PooledNormal:
    """Normal values sliced from one pool, at an offset that depends on (seed, tag)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        pool = SeededNormal(seed)("pool", (POOL_SIZE,))
        self.pool = torch.cat([pool, pool[:BLOCK]])  # a block may run past the end

    def __call__(self, tag: str, shape: tuple[int, ...]) -> Tensor:
        """Values of the given shape, float32: a view that must only be read."""
        size = math.prod(shape)
        if size > BLOCK:
            raise ValueError(f"{tag}: {size} values requested, at most {BLOCK} at a time are possible")
        offset = stable_hash(self.seed, tag) % POOL_SIZE
        return self.pool[offset : offset + size].view(shape)


def count_parameters(specs: list[TensorSpec]) -> dict[str, int]:
    """Number of parameters of thinker, talker and token2wav (without its one buffer), or of VL's parts."""
    counts: Counter[str] = Counter()
    for spec in specs:
        if not spec.name.endswith(".inv_freq"):
            counts[spec.name.split(".")[0]] += spec.numel
    return dict(counts)


def make_checkpoint(
    name: str, out: Path, *, layers: int | None = None, seed: int = 0, headers_only: bool = False
) -> list[TensorSpec]:
    """Write the model ``name`` (such as 3b or vl-7b) into ``out``, with ``layers`` decoder layers if given.

    ``headers_only``: the weights are a hole in the file, enough for commands that need only sizes (inspect, --dry_run).
    """
    normal = None if headers_only else PooledNormal(seed)
    if name in QWEN3_OMNI_SHAPES:
        omni_shape = QWEN3_OMNI_SHAPES[name].with_layers(layers)
        return write_qwen3_omni_checkpoint(
            out, omni_shape, dtype="bfloat16", seed=seed, shard_bytes=SHARD_BYTES, normal=normal
        )
    if name in QWEN3_VL_SHAPES:
        qwen3_shape = QWEN3_VL_SHAPES[name].with_layers(layers)
        return write_qwen3_vl_checkpoint(
            out, qwen3_shape, dtype="bfloat16", seed=seed, shard_bytes=SHARD_BYTES, normal=normal
        )
    if name in VL_SHAPES:
        shape = VL_SHAPES[name].with_layers(layers)
        return write_vl_checkpoint(out, shape, dtype="bfloat16", seed=seed, shard_bytes=SHARD_BYTES, normal=normal)
    return write_checkpoint(
        out, SHAPES[name].with_layers(layers), dtype="bfloat16", seed=seed, shard_bytes=SHARD_BYTES, normal=normal
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Write a random-weight Qwen2.5-Omni, Qwen2.5-VL, Qwen3-VL or Qwen3-Omni of full size."
    )
    names = sorted([*SHAPES, *VL_SHAPES, *QWEN3_VL_SHAPES, *QWEN3_OMNI_SHAPES])
    parser.add_argument("model", choices=names, help="model whose shapes to use")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint into")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headers_only", action="store_true", help="no values: for inspect and quant --dry_run")
    args = parser.parse_args()
    start = time.perf_counter()
    specs = make_checkpoint(args.model, args.out, layers=args.layers, seed=args.seed, headers_only=args.headers_only)
    seconds = time.perf_counter() - start
    for part, count in count_parameters(specs).items():
        print(f"{part:10} {count:15,} parameters")
    shards = len(list(args.out.glob("*.safetensors")))
    gigabytes = sum(spec.nbytes for spec in specs) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print(f"{len(specs)} tensors, {gigabytes:.2f} GB in {shards} files")
    print(f"{seconds:.0f} s, peak RSS {peak:.2f} GB")


if __name__ == "__main__":
    main()
