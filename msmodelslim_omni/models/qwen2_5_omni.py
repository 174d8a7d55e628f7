"""Qwen2.5-Omni 3B and 7B: names, shapes, and the transformers classes for layers, towers and media.

The module trees of transformers 4.57 and 5.x differ; checkpoint names do not. Only the Linears of the thinker's decoder
layers are quantized. Towers, talker and token2wav stay unchanged.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, cast

from ..errors import QuantError
from . import qwen2_5, qwen2_5_omni_generate
from .inputs import ModelInputs
from .qwen2_5 import (
    DecoderStem,
    TextBlock,
    build_with_weights,
    layer_settings,
    load_transformers,
    with_changes,
)
from .qwen2_5_omni_media import open_media_processor
from .qwen2_5_omni_names import (
    EMBEDDING,
    IGNORE_PATTERNS,
    LAYER_PREFIX,
    LOADERS,
    PARTS,
    SPEECH,
    TOWERS,
    disk_name,
)
from .spec import LayerSpec, ModelFamily, ModelSpec

if TYPE_CHECKING:
    from ..storage import Checkpoint

__all__ = ["model_spec", "open_media_processor"]

# The system prompt used in training. With another one the talker's voice is unreliable.
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)

# (hidden, layers) of the published models.
_PUBLISHED_SHAPES = {(3584, 28): "Qwen2.5-Omni-7B", (2048, 36): "Qwen2.5-Omni-3B"}

# This buffer is saved by transformers 4 only.
_OPTIONAL_TENSORS = frozenset({"token2wav.code2wav_dit_model.rotary_embed.inv_freq"})


def model_spec(model_type: str) -> ModelSpec:
    return ModelSpec(
        model_type=model_type,
        hf_model_type="qwen2_5_omni",
        gguf_architecture="qwen2vl",
        publisher="Qwen",
        system=SYSTEM,
        modalities=("text", "image", "audio", "video"),
        least_sound_samples=321,  # two frames behind the convolution of stride 2, 160 samples each
        layer_prefix=LAYER_PREFIX,
        parts=PARTS,
        processors=qwen2_5.PROCESSORS,
        ignore_patterns=IGNORE_PATTERNS,
        loaders=LOADERS,
        speech_prefixes=SPEECH,
        stem_prefixes=(*TOWERS, "thinker.model.embed_tokens."),
        norm="thinker.model.norm.weight",
        head="thinker.lm_head.weight",
        embedding=EMBEDDING,
        family=cast(ModelFamily, sys.modules[__name__]),
        runner=qwen2_5_omni_generate,
        speech_support=qwen2_5_omni_generate,
    )


# --- shapes --------------------------------------------------------------------------------------------------


def _text(config: dict[str, Any]) -> TextBlock:
    try:
        return TextBlock(dict(config["thinker_config"]["text_config"]), "thinker_config.text_config.")
    except (KeyError, TypeError, ValueError) as error:
        raise QuantError(
            "config.json has no thinker_config.text_config",
            "give the complete Qwen2.5-Omni checkpoint, not only its thinker",
        ) from error


def num_layers(config: dict[str, Any]) -> int:
    return qwen2_5.num_layers(_text(config))


def layer_spec(config: dict[str, Any]) -> LayerSpec:
    return qwen2_5.layer_spec(_text(config))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return _text(config).values


def deepstack_depth(config: dict[str, Any]) -> int:
    return 0


def published_model_type(config: dict[str, Any]) -> str:
    return qwen2_5.published_model_type(_text(config), _PUBLISHED_SHAPES)


def tied_tensors(config: dict[str, Any]) -> dict[str, str]:
    return {}


def expected_tensors(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    def build() -> Any:
        one_layer = load_transformers().Qwen2_5OmniConfig.from_dict(_one_layer(config))
        return load_transformers().Qwen2_5OmniForConditionalGeneration(one_layer)

    shapes = qwen2_5.expected_shapes(config, _text(config), layer_spec(config), LAYER_PREFIX, disk_name, build)
    return shapes, _OPTIONAL_TENSORS


def _one_layer(config: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of config.json with one decoder layer. transformers 5 modifies the dict that it gets."""
    copied = copy.deepcopy(config)
    changes = {"num_hidden_layers": 1, "layer_types": None}
    copied["thinker_config"]["text_config"] = with_changes(_text(copied).values, changes)
    return copied


# --- transformers classes ------------------------------------------------------------------------------------


def _thinker_config(config: dict[str, Any]) -> Any:
    built = load_transformers().Qwen2_5OmniThinkerConfig.from_dict(copy.deepcopy(config["thinker_config"]))
    for part in (built, built.text_config, built.vision_config, built.audio_config):
        part._attn_implementation = "sdpa"
    return built


def _layer_config(config: dict[str, Any]) -> Any:
    return _thinker_config(config).text_config


def _layer(config: dict[str, Any], index: int) -> Any:
    load_transformers()
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer

    return Qwen2_5OmniDecoderLayer(layer_settings(_layer_config, config), index)


def build_layer(config: dict[str, Any], index: int, weights: dict[str, Any]) -> Any:
    """The transformers decoder layer `index` with these weights (relative names, float32), in evaluation mode."""
    return build_with_weights(lambda: _layer(config, index), weights)


def build_norm(config: dict[str, Any], weight: Any) -> Any:
    """The transformers RMSNorm after the last decoder layer. Its class is that of the norms inside the layers."""
    return build_with_weights(lambda: _layer(config, 0).input_layernorm, {"weight": weight})


def open_stem(checkpoint: Checkpoint, device: Any, held_bytes: int) -> OmniStem:
    return OmniStem(checkpoint, device, held_bytes)


class OmniStem(DecoderStem):
    """The thinker up to its first decoder layer."""

    def __init__(self, checkpoint: Checkpoint, device: Any, held_bytes: int) -> None:
        import torch

        def build() -> Any:
            return load_transformers().Qwen2_5OmniThinkerForConditionalGeneration._from_config(
                _thinker_config(_one_layer(checkpoint.config)), dtype=torch.float32
            )

        def thinker_disk_name(module_name: str) -> str:
            return disk_name("thinker." + module_name)

        text = _text(checkpoint.config)
        super().__init__(checkpoint, device, text, build, thinker_disk_name, TOWERS, EMBEDDING, held_bytes)

    def options(self, inputs: ModelInputs) -> dict[str, Any]:
        return {"use_audio_in_video": inputs.use_audio_in_video}
