"""The examples below the help of each verb."""

from __future__ import annotations

from .shell import INDEX_LIMITS, MEDIA_LIMITS

EXAMPLES = {
    "quant": (
        "quant ./Qwen2.5-Omni-7B ./out --dry_run",
        "quant ./Qwen2.5-Omni-7B ./out --quant_type w8a8 --device npu",
        "quant ./Qwen2.5-Omni-7B ./out --quant_type w4a16 --device cuda",
        "quant ./Qwen2.5-VL-3B-Instruct ./out --quant_type w8a8_minmax",
    ),
    "analyze": (
        "analyze ./Qwen2.5-Omni-7B",
        "analyze ./Qwen2.5-Omni-7B --pattern '*.layers.0.*' --pattern '*.down_proj'",
        "analyze ./Qwen2.5-Omni-7B ./for_18GB --target_size 18GB",
    ),
    "inspect": ("inspect ./out",),
    "doctor": ("doctor ./out --source ./Qwen2.5-Omni-7B",),
    "export": ("export ./out ./out-ct --save_format compressed_tensors",),
    "generate": ('generate ./out --text "What do you hear?" --audio a.wav --speech answer.wav',),
    "eval": ("eval ./out --float ./Qwen2.5-Omni-7B --dataset ./heldout",),
    "env": ("env --json",),
}


def examples(verb: str) -> str:
    """The text below the help of a verb."""
    lines = EXAMPLES[verb]
    title = "Example:" if len(lines) == 1 else "Examples:"
    limits = [f"Limits of samples: {INDEX_LIMITS} {MEDIA_LIMITS}"] if verb in ("quant", "analyze", "eval") else []
    return "\n\n".join([title, *(f"msmodelslim {line}" for line in lines), *limits])
