"""Run AutoAWQ on the complete Omni; it quantizes the thinker's decoder layers.

The library's loader needs a media processor, so transformers loads the model and it is wrapped here. AutoAWQ captures
the first layer's inputs through ``forward``, which the Omni class does not have, so the thinker's forward is added.

On a CPU, AutoAWQ 0.2.9 changes the model while it searches scales: it keeps a module's weights with ``.cpu()``, which
copies them on a GPU, but on a CPU gives the weights themselves. The first point of the grid then multiplies what the
search restores from, and the weights keep these factors (0.3 to 3.3 in the first layer of SmolLM2-135M).
CopyingQuantizer gives it copies; nothing else is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from driver import read_job, record, timed
from safetensors.torch import save_file

# Import transformers first, because importing awq replaces parts of it.
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration  # isort: skip
from awq.models.base import AwqConfig
from awq.models.qwen2_5_omni import Qwen2_5_OmniAWQForConditionalGeneration
from awq.quantize.quantizer import AwqQuantizer


def _copy_tensors(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    state.update({name: tensor.clone() for name, tensor in state.items()})


class CopyingQuantizer(AwqQuantizer):
    """AutoAWQ's quantizer; its search restores the weights from copies, on a CPU as on a GPU."""

    def _search_best_scale(self, module, prev_op, layers, inp, module2inspect=None, kwargs=None):
        inspected = layers[0] if module2inspect is None else module2inspect
        hook = inspected.register_state_dict_post_hook(_copy_tensors)
        try:
            return super()._search_best_scale(module, prev_op, layers, inp, module2inspect, kwargs or {})
        finally:
            hook.remove()


def _forward(self, input_ids=None, attention_mask=None, **kwargs):
    return self.thinker(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def main() -> None:
    job = read_job()
    Qwen2_5OmniForConditionalGeneration.forward = _forward
    config = Qwen2_5OmniConfig.from_pretrained(job.model)
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        job.model, torch_dtype=torch.float32, device_map="cpu"
    ).eval()
    wrapped = Qwen2_5_OmniAWQForConditionalGeneration(model, "qwen2_5_omni", False, config, AwqConfig(), None)
    _, seconds = timed(
        lambda: wrapped.quantize(
            tokenizer=None,
            quant_config={"w_bit": 4, "q_group_size": job.options.group_size, "zero_point": True, "version": "GEMM"},
            calib_data=job.tokens.tolist(),
            max_calib_samples=len(job.tokens),
            max_calib_seq_len=job.tokens.shape[1],
            quantizer_cls=CopyingQuantizer,
        )
    )
    state = {f"thinker.{name}": value.contiguous() for name, value in model.thinker.state_dict().items()}
    save_file({name: value for name, value in state.items() if ".model." in name}, job.out / "weights.safetensors")
    record(job, "autoawq", seconds, "weights.safetensors", "complete Omni; duo scaling and clipping on (defaults)")


if __name__ == "__main__":
    main()
