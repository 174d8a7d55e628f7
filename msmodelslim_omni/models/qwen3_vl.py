"""Qwen3-VL 4B, 8B and 32B (dense): names, shapes, transformers classes, media and answers.

Input is text, pictures and clips; output is text. The names on disk are those of the modules in transformers. The 4B
model's lm_head is tied to its embedding and is not on disk. The vision tower has one Linear for q, k and v, and adds
its features again after the first decoder layers (DeepStack). Only the Linears of the decoder layers are quantized.
Not here: the models with experts, whose files hold all experts of a layer in one tensor.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import QuantError
from . import qwen2_5, qwen3
from .frames import SampledClip
from .inputs import MediaLimits, ModelInputs
from .qwen2_5 import (
    DecoderStem,
    TextBlock,
    build_with_weights,
    layer_settings,
    load_transformers,
    with_changes,
)
from .qwen2_5_generate import answer_tokens, build_model
from .qwen2_5_media import Messages, open_processor
from .running import ModelRunner
from .spec import LayerSpec, LibraryClass, LoaderNames, ModelFamily, ModelSpec, Part

if TYPE_CHECKING:
    from ..storage import Checkpoint

FLOAT32_PREFIXES: tuple[str, ...] = ()

_LAYER_PREFIX = "model.language_model.layers.{index}."
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_TOWERS = ("model.visual.",)

_PARTS = (
    Part("decoder layers", "model.language_model.layers.", "not a Linear of a decoder layer"),
    Part("embedding", "model.language_model.embed_tokens.", "read by row, not used in a matrix product"),
    Part("final norm", "model.language_model.norm.", "a norm"),
    Part("lm_head", "lm_head.", "selects the output token; kept for accuracy"),
    Part("visual tower", "model.visual.", "towers are kept for accuracy"),
    Part("other", "", "not part of a decoder layer"),
)

# Source: transformers 4.57 and 5.23, modeling_qwen3_vl.py.
_MODULES = (("", ""),)

_LOADERS = LoaderNames(
    classes=(LibraryClass("full class", "Qwen3VLForConditionalGeneration", _MODULES, _MODULES),),
    # Source: vLLM 0.32, models/qwen3_vl.py, hf_to_vllm_mapper.
    vllm=(
        ("model.visual.", "visual."),
        ("lm_head", "language_model.lm_head"),
        ("model.language_model.", "language_model.model."),
    ),
    architectures=("Qwen3VLForConditionalGeneration",),
    config_parts=(("text_config",), ("vision_config",)),
)

# (hidden, layers) of the published models.
_PUBLISHED_SHAPES = {
    (2560, 36): "Qwen3-VL-4B-Instruct",
    (4096, 36): "Qwen3-VL-8B-Instruct",
    (5120, 64): "Qwen3-VL-32B-Instruct",
}


def model_spec(model_type: str) -> ModelSpec:
    module = sys.modules[__name__]
    return ModelSpec(
        model_type=model_type,
        hf_model_type="qwen3_vl",
        gguf_architecture="qwen3vl",
        publisher="Qwen",
        system="",  # the chat template adds none
        modalities=("text", "image", "video"),
        layer_prefix=_LAYER_PREFIX,
        parts=_PARTS,
        processors=qwen2_5.PROCESSORS,
        ignore_patterns=("re:.*visual.*", "re:.*lm_head"),
        loaders=_LOADERS,
        speech_prefixes=(),
        stem_prefixes=(*_TOWERS, "model.language_model.embed_tokens."),
        norm="model.language_model.norm.weight",
        head=_HEAD,
        embedding=_EMBEDDING,
        family=cast(ModelFamily, module),
        runner=cast(ModelRunner, module),
        speech_support=None,
        visual_token_side=qwen3.VISUAL_TOKEN_SIDE,
    )


# --- shapes --------------------------------------------------------------------------------------------------


def _text(config: dict[str, Any]) -> TextBlock:
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        raise QuantError("config.json has no text_config", "give the complete Qwen3-VL checkpoint")
    return TextBlock(nested, "text_config.")


def num_layers(config: dict[str, Any]) -> int:
    return qwen2_5.num_layers(_text(config))


def layer_spec(config: dict[str, Any]) -> LayerSpec:
    return qwen3.dense_layer_spec(_text(config))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return _text(config).values


def deepstack_depth(config: dict[str, Any]) -> int:
    return qwen3.deepstack_depth(config.get("vision_config"))


def published_model_type(config: dict[str, Any]) -> str:
    return qwen2_5.published_model_type(_text(config), _PUBLISHED_SHAPES)


def tied_tensors(config: dict[str, Any]) -> dict[str, str]:
    tied = any(block.get("tie_word_embeddings") is True for block in (config, _text(config).values))
    return {_HEAD: _EMBEDDING} if tied else {}


def expected_tensors(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    def build() -> Any:
        return load_transformers().Qwen3VLForConditionalGeneration(_transformers_config(_one_layer(config)))

    shapes = qwen2_5.expected_shapes(config, _text(config), layer_spec(config), _LAYER_PREFIX, _disk_name, build)
    return shapes, frozenset(tied_tensors(config))


def _disk_name(module_name: str) -> str:
    return module_name


def _one_layer(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with one decoder layer."""
    text = with_changes(_text(config).values, {"num_hidden_layers": 1, "layer_types": None})
    return {**config, "text_config": text}


# --- transformers classes ------------------------------------------------------------------------------------


def _transformers_config(config: dict[str, Any]) -> Any:
    built = load_transformers().Qwen3VLConfig.from_dict(copy.deepcopy(config))  # from_dict modifies its argument
    for part in (built, built.text_config, built.vision_config):
        part._attn_implementation = "sdpa"
    return built


def _layer_config(config: dict[str, Any]) -> Any:
    return _transformers_config(config).text_config


def _layer(config: dict[str, Any], index: int) -> Any:
    load_transformers()
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

    return Qwen3VLTextDecoderLayer(layer_settings(_layer_config, config), index)


def build_layer(config: dict[str, Any], index: int, weights: dict[str, Any]) -> Any:
    """The transformers decoder layer `index` with these weights (relative names, float32), in evaluation mode."""
    return build_with_weights(lambda: _layer(config, index), weights)


def build_norm(config: dict[str, Any], weight: Any) -> Any:
    """The transformers RMSNorm after the last decoder layer. Its class is that of the norms inside the layers."""
    return build_with_weights(lambda: _layer(config, 0).input_layernorm, {"weight": weight})


def open_stem(checkpoint: Checkpoint, device: Any, held_bytes: int) -> DecoderStem:
    import torch

    config = checkpoint.config

    def build() -> Any:
        one_layer = _transformers_config(_one_layer(config))
        return load_transformers().Qwen3VLForConditionalGeneration._from_config(one_layer, dtype=torch.float32)

    return DecoderStem(checkpoint, device, _text(config), build, _disk_name, _TOWERS, _EMBEDDING, held_bytes)


# --- media ---------------------------------------------------------------------------------------------------


def open_media_processor(path: Path, limits: MediaLimits, trust_remote_code: bool) -> VlMediaProcessor:
    return VlMediaProcessor(open_processor("Qwen3VLProcessor", path, trust_remote_code), limits)


class VlMediaProcessor(qwen3.Qwen3VisionProcessor):
    """Media processor whose prompt names the time of each pair of frames, computed from the clip's metadata."""

    def options(self, messages: Messages, clips: list[SampledClip], use_audio_in_video: bool) -> dict[str, Any]:
        if any(part["type"] == "audio" for m in messages if isinstance(m["content"], list) for part in m["content"]):
            raise QuantError("the sample has audio, which Qwen3-VL does not support", "remove the audio")
        # Pictures and frames have their final size already.
        videos: dict[str, Any] = {"do_sample_frames": False, "do_resize": False}
        if clips:
            videos["video_metadata"] = [clip.metadata for clip in clips]
        return {"images_kwargs": {"do_resize": False}, "videos_kwargs": videos}


# --- answers -------------------------------------------------------------------------------------------------


def open_model(config: dict[str, Any], speech: bool) -> VlModel:
    return VlModel(config)


class VlModel:
    """See running.RunnableModel."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._tied = tied_tensors(config)

        def build() -> Any:
            return load_transformers().Qwen3VLForConditionalGeneration(_transformers_config(config))

        self.module: Any = build_model(config, build)

    def checkpoint_names(self) -> dict[str, str]:
        names = {name: _disk_name(name) for name in self.module.state_dict()}
        return {name: self._tied.get(disk, disk) for name, disk in names.items()}

    def answer(self, inputs: ModelInputs, path: Path, max_new_tokens: int, on_text: Callable[[str], None]) -> list[int]:
        return answer_tokens(self.module, inputs, path, max_new_tokens, on_text, {})
