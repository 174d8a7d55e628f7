"""Run llm-compressor's AWQ and asymmetric 4-bit rounding on the thinker's text model.

Only the text model is passed. On the complete thinker the default mappings also match the audio tower, and with custom
mappings the pipeline traces one graph for all layers, so that AWQ only warns.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from driver import read_job, record, timed
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration


def main() -> None:
    job = read_job()
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32)
    text = getattr(thinker.model, "language_model", thinker.model)
    text.config._name_or_path = str(job.model)  # the config is read from there; a submodule has no path
    # llm-compressor pins memory for an accelerator, which a CPU run does not have.
    IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    samples = Dataset.from_dict(
        {"input_ids": job.tokens.tolist(), "attention_mask": torch.ones_like(job.tokens).tolist()}
    )
    _, seconds = timed(
        lambda: oneshot(
            model=text,
            processor=AutoTokenizer.from_pretrained(job.model),
            dataset=samples,
            recipe=[AWQModifier(), QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM")],
            max_seq_length=job.tokens.shape[1],
            num_calibration_samples=len(job.tokens),
        )
    )
    text.save_pretrained(job.out / "weights", save_compressed=True)
    record(job, "llmcompressor", seconds, "weights", "text model only (thinker.model); duo_scaling on, 20 points")


if __name__ == "__main__":
    main()
