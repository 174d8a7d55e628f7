"""Run llm-compressor's GPTQ with symmetric int4 rounding on the thinker's text model of a Qwen3-Omni.

Its experts, which transformers 5 fuses, become Linears again by llm-compressor's own function. Routers stay float.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from driver import read_job
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from run_llmcompressor import quantize_text_model
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration


def main() -> None:
    job = read_job()
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=job.options.group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifiers = [GPTQModifier(config_groups=groups, ignore=["re:.*mlp.gate$"])]
    quantize_text_model(job, thinker, modifiers, "gptq", prepare=linearize_moe)


if __name__ == "__main__":
    main()
