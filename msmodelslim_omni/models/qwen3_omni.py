"""Qwen3-Omni-30B-A3B: names, shapes, and the transformers classes for layers, towers and media.

The thinker's layers have experts: a router assigns every token to a few of them. Attention and experts are quantized;
routers stay float; towers, talker (which has experts too) and code2wav stay unchanged. Thinking and Captioner hold the
thinker alone. On disk every expert has its own tensors; transformers 5 fuses them in memory, see qwen3_experts.py.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import qwen2_5, qwen3, qwen3_omni_generate
from .inputs import MediaLimits, ModelInputs
from .qwen2_5 import DecoderStem, build_with_weights, layer_settings, load_transformers, with_changes
from .qwen2_5_media import open_processor
from .qwen2_5_omni_media import OmniMediaProcessor
from .qwen3_experts import NO_EXPERTS, experts_of, sparse_mlp, thinker_text
from .qwen3_omni_names import EMBEDDING, IGNORE_PATTERNS, LAYER_PREFIX, LOADERS, PARTS, SPEECH, TOWERS, disk_name
from .spec import LayerSpec, LinearGroup, ModelFamily, ModelSpec

if TYPE_CHECKING:
    from ..storage import Checkpoint

_SIZE = "Qwen3-Omni-30B-A3B"
INSTRUCT, THINKING, CAPTIONER = f"{_SIZE}-Instruct", f"{_SIZE}-Thinking", f"{_SIZE}-Captioner"

# (hidden, layers) of the published models, with and without a talker.
_PUBLISHED_SHAPE = (2048, 48)

_TALKER_LAYERS = "talker.model.layers."
_MAX_TALKER_LAYERS = 1000


def model_spec(model_type: str) -> ModelSpec:
    return ModelSpec(
        model_type=model_type,
        hf_model_type="qwen3_omni_moe",
        publisher="Qwen",
        system="",  # the chat template adds none
        modalities=("text", "image", "audio", "video"),
        least_sound_samples=201,  # more than half a window, by which the spectrum is mirrored
        layer_prefix=LAYER_PREFIX,
        parts=PARTS,
        processors=qwen2_5.PROCESSORS,
        ignore_patterns=IGNORE_PATTERNS,
        loaders=LOADERS,
        speech_prefixes=SPEECH if model_type == INSTRUCT else (),
        stem_prefixes=(*TOWERS, "thinker.model.embed_tokens."),
        norm="thinker.model.norm.weight",
        head="thinker.lm_head.weight",
        embedding=EMBEDDING,
        family=cast(ModelFamily, sys.modules[__name__]),
        runner=qwen3_omni_generate,
        speech_support=qwen3_omni_generate if model_type == INSTRUCT else None,
        visual_token_side=qwen3.VISUAL_TOKEN_SIDE,
        voices_file="",
        shape_of=THINKING if model_type == CAPTIONER else "",
    )


# --- shapes --------------------------------------------------------------------------------------------------


def num_layers(config: dict[str, Any]) -> int:
    return qwen2_5.num_layers(thinker_text(config))


def layer_spec(config: dict[str, Any]) -> LayerSpec:
    """Attention, the router, and for each expert a SwiGLU MLP. Every layer must have experts, as the published ones.

    The norm in front of the experts feeds the router and gate and up of all experts: they share its factors. Between up
    and down of an expert, factors concern this expert alone.
    """
    text = thinker_text(config)
    hidden, inter = text.size("hidden_size"), text.size("moe_intermediate_size")
    experts = experts_of(text)
    groups, shapes = qwen3.attention(text)
    expert_groups = []
    shapes[f"{experts.router}.weight"] = (experts.count, hidden)
    for number in range(experts.count):
        prefix = experts.prefix.format(expert=number)
        gate, up, down = (f"{prefix}{name}_proj" for name in ("gate", "up", "down"))
        expert_groups += [
            LinearGroup(f"{prefix}gate_up", (gate, up), "post_attention_layernorm", "norm-linear", expert=number),
            LinearGroup(f"{prefix}down", (down,), up, "up-down", expert=number),
        ]
        shapes |= {f"{name}.weight": (inter, hidden) for name in (gate, up)}
        shapes[f"{down}.weight"] = (hidden, inter)
    return LayerSpec((*groups, *expert_groups), shapes, experts)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return thinker_text(config).values


def deepstack_depth(config: dict[str, Any]) -> int:
    return qwen3.deepstack_depth(config["thinker_config"].get("vision_config"))


def published_model_type(config: dict[str, Any]) -> str:
    """Without a talker, Thinking: Captioner has the same config.json."""
    text = thinker_text(config)
    if (text.size("hidden_size"), text.size("num_hidden_layers")) != _PUBLISHED_SHAPE:
        return "" if _speaks(config) else THINKING
    return INSTRUCT if _speaks(config) else THINKING


def _speaks(config: dict[str, Any]) -> bool:
    return config.get("enable_audio_output", True) is True


def tied_tensors(config: dict[str, Any]) -> dict[str, str]:
    return {}


def expected_tensors(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    def build() -> Any:
        one_layer = load_transformers().Qwen3OmniMoeConfig.from_dict(_one_layer(config))
        return load_transformers().Qwen3OmniMoeForConditionalGeneration(one_layer)

    shapes = qwen2_5.expected_shapes(config, thinker_text(config), layer_spec(config), LAYER_PREFIX, disk_name, build)
    return _with_all_talker_layers(config, _with_separate_experts(shapes)), frozenset()


def _with_all_talker_layers(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all layers of the talker, given those of its first: 20 layers of 128 experts take seconds to build."""
    first = f"{_TALKER_LAYERS}0."
    count = _talker_layers(config)
    return {
        name if not name.startswith(first) else f"{_TALKER_LAYERS}{index}.{name.removeprefix(first)}": shape
        for name, shape in shapes.items()
        for index in range(count if name.startswith(first) else 1)
    }


def _talker_layers(config: dict[str, Any]) -> int:
    """The number of layers of the talker in config.json; 1, which changes nothing, if there is no sound number."""
    talker = config.get("talker_config")
    text = talker.get("text_config") if isinstance(talker, dict) else None
    count = text.get("num_hidden_layers") if isinstance(text, dict) else None
    return count if type(count) is int and 0 < count <= _MAX_TALKER_LAYERS else 1


def _with_separate_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes with one tensor per expert, as on disk, in place of the talker's fused experts of transformers 5."""
    separate: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, fused, leaf = name.rpartition("experts.")
        if not fused or leaf not in ("gate_up_proj", "down_proj"):
            separate[name] = shape
            continue
        count, rows, columns = shape
        for expert in range(count):
            if leaf == "down_proj":
                separate[f"{prefix}experts.{expert}.down_proj.weight"] = (rows, columns)
            else:
                for half in ("gate_proj", "up_proj"):
                    separate[f"{prefix}experts.{expert}.{half}.weight"] = (rows // 2, columns)
    return separate


def _one_layer(config: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of config.json with one decoder layer, without experts: these come from layer_spec. The talker has
    one layer too."""
    copied = copy.deepcopy(config)
    changes = {"num_hidden_layers": 1, **NO_EXPERTS}
    copied["thinker_config"]["text_config"] = with_changes(thinker_text(copied).values, changes)
    if _talker_layers(copied) > 1:
        copied["talker_config"]["text_config"]["num_hidden_layers"] = 1
    return copied


# --- transformers classes ------------------------------------------------------------------------------------


def _thinker_config(config: dict[str, Any]) -> Any:
    built = load_transformers().Qwen3OmniMoeThinkerConfig.from_dict(copy.deepcopy(config["thinker_config"]))
    for part in (built, built.text_config, built.vision_config, built.audio_config):
        part._attn_implementation = "sdpa"
    return built


def _layer_config(config: dict[str, Any]) -> Any:
    return _thinker_config(config).text_config


def _layer(config: dict[str, Any], index: int) -> Any:
    """The library's decoder layer without experts."""
    load_transformers()
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextDecoderLayer

    layer: Any = Qwen3OmniMoeThinkerTextDecoderLayer  # untyped in transformers
    return layer(layer_settings(_layer_config, _one_layer(config)), index)


def build_layer(config: dict[str, Any], index: int, weights: dict[str, Any]) -> Any:
    """The decoder layer `index` with these weights (relative names, float32), in evaluation mode.

    Attention and norms are those of transformers; the experts are qwen3_experts.SparseMlp.
    """

    def build() -> Any:
        layer = _layer(config, index)
        layer.mlp = sparse_mlp(thinker_text(config))
        return layer

    return build_with_weights(build, weights)


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
            thinker = load_transformers().Qwen3OmniMoeThinkerForConditionalGeneration._from_config(
                _thinker_config(_one_layer(checkpoint.config)), dtype=torch.float32
            )
            qwen3_omni_generate.mend_placeholder_masks(thinker)
            return thinker

        def thinker_disk_name(module_name: str) -> str:
            return disk_name("thinker." + module_name)

        text = thinker_text(checkpoint.config)
        super().__init__(checkpoint, device, text, build, thinker_disk_name, TOWERS, EMBEDDING, held_bytes)

    def options(self, inputs: ModelInputs) -> dict[str, Any]:
        return {"use_audio_in_video": inputs.use_audio_in_video}


# --- media ---------------------------------------------------------------------------------------------------


def open_media_processor(path: Path, limits: MediaLimits, trust_remote_code: bool) -> Qwen3OmniMediaProcessor:
    return Qwen3OmniMediaProcessor(open_processor("Qwen3OmniMoeProcessor", path, trust_remote_code), limits)


class Qwen3OmniMediaProcessor(OmniMediaProcessor):
    """OmniMediaProcessor with patches of 16 x 16 pixels."""

    patch_size = qwen3.VISUAL_TOKEN_SIDE // 2

    def __init__(self, processor: Any, limits: MediaLimits) -> None:
        super().__init__(processor, limits)
        qwen3.check_max_pixels(limits)
