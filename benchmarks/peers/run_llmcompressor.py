"""Run llm-compressor's AWQ or GPTQ with asymmetric 4-bit rounding, or its W8A8, on the thinker's text model.

Only the text model is passed. On the complete thinker the default mappings also match the audio tower, and with custom
mappings the pipeline traces one graph for all layers, so that AWQ only warns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from driver import Job, read_job, record, timed
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration


def recipe(method: str, group_size: int) -> list[Any]:
    """Modifiers at their defaults: AWQ (duo scaling, 20 points), GPTQ, or SmoothQuant before W8A8."""
    if method == "smoothquant":
        return [SmoothQuantModifier(), QuantizationModifier(targets=["Linear"], scheme="W8A8")]
    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group_size)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    return [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]


def quantize_text_model(
    job: Job, thinker: Any, modifiers: list[Any], note: str, prepare: Callable[[Any], Any] = lambda text: None
) -> None:
    """Run modifiers on the text model of a thinker, which `prepare` changes first; save it, and record the run."""
    text = getattr(thinker.model, "language_model", thinker.model)
    text.config._name_or_path = str(job.model)  # the config is read from there; a submodule has no path
    prepare(text)
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
            recipe=modifiers,
            max_seq_length=job.tokens.shape[1],
            num_calibration_samples=len(job.tokens),
        )
    )
    text.save_pretrained(job.out / "weights", save_compressed=True)
    record(job, "llmcompressor", seconds, "weights", f"text model only (thinker.model); {note}")


def main() -> None:
    job = read_job(method="awq")
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(job.model, dtype=torch.float32)
    quantize_text_model(job, thinker, recipe(job.options.method, job.options.group_size), job.options.method)


if __name__ == "__main__":
    main()
