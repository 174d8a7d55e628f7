"""Run auto-round with tuned rounding (the default, 200 iterations) or plain rounding (``--iters 0``).

auto-round gets a Qwen2 language model with the thinker's weights: the tensors and, for text, the outputs are the same.
In a loaded Omni it finds no blocks unless it has a processor, and with a processor it makes the tokens itself. Mixed
precision (bfloat16 products) and torch.compile are on, as by default.
"""

from __future__ import annotations

import json

import torch
from auto_round import AutoRound
from driver import Job, read_job, record, timed
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM


def text_twin(job: Job) -> Qwen2ForCausalLM:
    """A Qwen2ForCausalLM with the weights of the thinker's text model and lm_head."""
    text = json.loads((job.model / "config.json").read_text(encoding="utf-8"))["thinker_config"]["text_config"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    omitted = ("model_type", "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers")
    config = Qwen2Config(**{key: value for key, value in text.items() if key not in omitted}, rope_parameters=rope)
    model = Qwen2ForCausalLM(config).to(torch.float32)
    weights = load_file(job.model / "model.safetensors")
    model.load_state_dict({name: weights[f"thinker.{name}"] for name in model.state_dict()})
    return model.eval()


def main() -> None:
    job = read_job(iters=200)
    model = text_twin(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in job.tokens]
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=job.options.group_size,
        sym=False,
        iters=job.options.iters,
        dataset=batches,
        nsamples=len(job.tokens),
        seqlen=job.tokens.shape[1],
        device_map="cpu",
    )
    _, seconds = timed(lambda: quantizer.quantize_and_save(str(job.out / "weights"), format="auto_awq"))
    record(job, "auto-round", seconds, "weights", "text model with the thinker's weights; seconds with saving")


if __name__ == "__main__":
    main()
