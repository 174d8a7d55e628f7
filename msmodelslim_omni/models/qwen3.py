"""Code shared by the Qwen3 models: the decoder layer's attention, and its dense MLP.

Other than in Qwen2.5, the Linears have no biases, q and k pass a norm per head before the rotary embedding, and the
number of heads times the head's width need not be the hidden size. The norm per head forbids to scale the outputs of
q and k, which no group does.
"""

from __future__ import annotations

from typing import Any

from ..errors import QuantError
from .inputs import MediaLimits
from .qwen2_5 import TextBlock
from .qwen2_5_media import VisionProcessor
from .spec import LayerSpec, LinearGroup

# Side of a visual token in pixels: 2 x 2 patches of 16 x 16.
VISUAL_TOKEN_SIDE = 32

_MIN_VISUAL_TOKENS = 4  # qwen_omni_utils does not make smaller pictures

Shapes = dict[str, tuple[int, ...]]


def attention(text: TextBlock) -> tuple[tuple[LinearGroup, ...], Shapes]:
    """Groups and shapes of everything in a layer but its MLP: both norms, and attention with GQA."""
    hidden, head_dim = text.size("hidden_size"), text.size("head_dim")
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    if heads % kv_heads:
        raise QuantError(
            f"config.json: {text.prefix}num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is"
            f" {kv_heads}"
        )
    q, kv = heads * head_dim, kv_heads * head_dim
    groups = (
        LinearGroup(
            "qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm-linear"
        ),
        LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "ov", heads // kv_heads, head_dim),
    )
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return groups, shapes


def dense_layer_spec(text: TextBlock) -> LayerSpec:
    """Groups and shapes of a decoder layer with a SwiGLU MLP."""
    groups, shapes = attention(text)
    hidden, inter = text.size("hidden_size"), text.size("intermediate_size")
    mlp = (
        LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm-linear"),
        LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", "up-down"),
    )
    mlp_shapes: Shapes = {
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    return LayerSpec((*groups, *mlp), {**shapes, **mlp_shapes})


def deepstack_depth(vision: Any) -> int:
    """The number of feature maps that the vision tower adds between decoder layers. vision: block of config.json."""
    indexes = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    if not isinstance(indexes, list) or not all(type(index) is int for index in indexes):
        raise QuantError(
            f"config.json: vision_config.deepstack_visual_indexes is {indexes!r}; expected a list of layer numbers",
            "fetch config.json again",
        )
    return len(indexes)


class Qwen3VisionProcessor(VisionProcessor):
    """VisionProcessor with patches of 16 x 16 pixels."""

    patch_size = VISUAL_TOKEN_SIDE // 2

    def __init__(self, processor: Any, limits: MediaLimits) -> None:
        super().__init__(processor, limits)
        check_max_pixels(limits)


def check_max_pixels(limits: MediaLimits) -> None:
    """Raise QuantError for a limit that is smaller than the smallest picture of the library's loader."""
    smallest = _MIN_VISUAL_TOKENS * VISUAL_TOKEN_SIDE**2
    if limits.max_pixels is not None and limits.max_pixels < smallest:
        raise QuantError(
            f"max_pixels is {limits.max_pixels}, less than {_MIN_VISUAL_TOKENS} visual tokens of Qwen3",
            f"give at least {smallest}",
        )
