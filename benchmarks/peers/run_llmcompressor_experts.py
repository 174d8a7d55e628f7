"""Run llm-compressor's GPTQ with symmetric int4 rounding on the thinker's text model of a Qwen3-Omni.

Its experts, which transformers 5 fuses, become Linears again by llm-compressor's own function. Routers stay float.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from driver import read_job, record, timed
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoTokenizer, Qwen3OmniMoeThinkerForConditionalGeneration


def main() -> None:
    job = read_job()
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32)
    text = getattr(thinker.model, "language_model", thinker.model)
    text.config._name_or_path = str(job.model)  # the config is read from there; a submodule has no path
    linearize_moe(text)
    # llm-compressor pins memory for an accelerator, which a CPU run does not have.
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=job.options.group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    samples = Dataset.from_dict(
        {"input_ids": job.tokens.tolist(), "attention_mask": torch.ones_like(job.tokens).tolist()}
    )
    _, seconds = timed(
        lambda: oneshot(
            model=text,
            processor=AutoTokenizer.from_pretrained(job.model),
            dataset=samples,
            recipe=[GPTQModifier(config_groups=groups, ignore=["re:.*mlp.gate$"])],
            max_seq_length=job.tokens.shape[1],
            num_calibration_samples=len(job.tokens),
        )
    )
    text.save_pretrained(job.out / "weights", save_compressed=True)
    record(job, "llmcompressor", seconds, "weights", "text model only (thinker.model); gptq")


if __name__ == "__main__":
    main()
