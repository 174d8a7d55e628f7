"""A real decoder layer with random weights, and inputs for it, shared by several tests.

It is a smaller version of the layer of the tiny Omni: 4 query heads and 2 key-value heads of 16 channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from make_tiny_omni import TINY, omni_config

from msmodelslim_omni.calibration.token_roles import token_importance
from msmodelslim_omni.models import qwen2_5_omni
from msmodelslim_omni.models.inputs import MODALITIES, LayerInput
from msmodelslim_omni.models.spec import LayerSpec
from msmodelslim_omni.models.torchvision_shim import ensure_torchvision_imports
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors.work import LayerWork
from msmodelslim_omni.statistics.capture import InputRecorder, InputStats, run_layer

ensure_torchvision_imports()

HIDDEN, INTERMEDIATE, HEAD_DIM = 64, 96, 16
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "mrope_section": [2, 3, 3]}
CONFIG: dict[str, Any] = omni_config(replace(TINY, text={**TINY.text, **_SIZES}), "bfloat16")
SPEC: LayerSpec = qwen2_5_omni.layer_spec(CONFIG)
W8A8 = QuantScheme(8, 8)
OUTLIERS = (3, 20, 50)  # channels of the hidden states with far larger values than the others


@dataclass(frozen=True)
class Sample:
    inputs: LayerInput
    modality: torch.Tensor


def layer_weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by relative name: norms near one with outlier channels, the rest small."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in SPEC.shapes.items():
        values = torch.randn(shape, generator=generator)
        if "layernorm" in name:
            values = 1 + 0.2 * values
            values[list(OUTLIERS)] *= 30
        elif name.endswith(".bias"):
            values = 0.1 * values
        else:
            values = values / shape[1] ** 0.5
        weights[name] = values.to(dtype)
    return weights


def received_attention(weights: dict[str, torch.Tensor], samples: list[Sample]) -> torch.Tensor:
    """Σ a² over the queries of each token, mean over the heads, from the library's eager attention: [tokens]."""
    layer, received = build(weights), []

    def keep(_module: object, _args: object, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        received.append(out[1][0].square().sum(dim=1).mean(dim=0))  # [heads, queries, tokens] -> [tokens]

    layer.self_attn.config._attn_implementation = "eager"
    layer.self_attn.register_forward_hook(
        lambda _module, _args, out: received.append(out[1][0].square().sum(1).mean(0))
    )
    for each in samples:
        tokens = each.inputs.hidden.shape[1]
        mask = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)  # without one, eager attention is not causal
        run_layer(layer, LayerInput(each.inputs.hidden, {**each.inputs.arguments, "attention_mask": mask}))
    return torch.cat(received)


def tensors(work: LayerWork) -> dict[str, torch.Tensor]:
    """The current tensors of the layer with their folds."""
    return {name: work.tensor(name) for name in work.weights}


def layer_work(dtype: torch.dtype = torch.bfloat16, seed: int = 0, samples: list[Sample] | None = None) -> LayerWork:
    """A layer that quantizes all Linears, with the statistics of the samples."""
    return work_of(layer_weights(dtype, seed), samples if samples is not None else [sample()])


def work_of(weights: dict[str, torch.Tensor], samples: list[Sample], scheme: QuantScheme = W8A8) -> LayerWork:
    """A layer with these weights. For a weight-only scheme, the statistics include the second moments."""
    stats = record(weights, samples, grams=scheme.act_bits is None)
    weight = token_importance("balanced", token_counts(samples))
    return LayerWork(0, SPEC, dict.fromkeys(SPEC.linears, scheme), weights, stats, weight)


def token_counts(samples: list[Sample]) -> list[int]:
    return torch.cat([sample.modality for sample in samples]).bincount(minlength=len(MODALITIES)).tolist()


def sample(tokens: int = 24, seed: int = 0) -> Sample:
    """Hidden states of alternating text, image, audio and video tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    hidden = torch.randn((1, tokens, HIDDEN), generator=generator)
    return Sample(
        LayerInput(hidden, arguments(tokens, HEAD_DIM, generator)), torch.arange(tokens, dtype=torch.int8) % 4
    )


def arguments(tokens: int, head_dim: int, generator: torch.Generator) -> dict[str, Any]:
    """Layer arguments other than the hidden states: rotary tables of three axes; one table in transformers 5."""
    angles = torch.rand((3, 1, tokens, head_dim // 2), generator=generator) * 6
    angles = torch.cat([angles, angles], dim=-1)
    if not transformers.__version__.startswith("4."):
        angles = angles[0]
    return {"attention_mask": None, "position_embeddings": (angles.cos(), angles.sin())}


def build(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The transformers layer in float32."""
    as_float = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    return qwen2_5_omni.build_layer(CONFIG, 0, as_float)


def record(weights: dict[str, torch.Tensor], samples: list[Sample], grams: bool = False) -> dict[str, InputStats]:
    """Statistics of the input of each group; every token is kept."""
    layer = build(weights)
    recorder = InputRecorder(layer, SPEC, token_counts(samples) if grams else None)
    for sample in samples:
        recorder.begin(sample.modality, torch.arange(len(sample.modality)))
        recorder.end(run_layer(layer, sample.inputs))
    return recorder.finish()


def output(weights: dict[str, torch.Tensor], sample: Sample) -> torch.Tensor:
    return run_layer(build(weights), sample.inputs)
