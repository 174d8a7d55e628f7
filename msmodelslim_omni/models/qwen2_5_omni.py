"""Qwen2.5-Omni 3B and 7B: names, shapes, and the library's own classes for layers, towers and media.

The one place that meets the module tree of the installed transformers (4.57 and 5.x differ; the names on disk do
not). Quantized are the Linears of the thinker's decoder layers; towers, talker and token2wav stay as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from ..checkpoint import Checkpoint
from ..errors import QuantError
from .qwen2_5_omni_media import open_media_processor
from .spec import LayerInput, LayerSpec, LinearGroup, ModelFamily, ModelInputs, ModelSpec, Part
from .torchvision_shim import ensure_torchvision_imports

__all__ = ["model_spec", "open_media_processor"]

LAYER_PREFIX = "thinker.model.layers.{index}."

PARTS = (
    Part("decoder layers", "thinker.model.layers.", "not a Linear of a decoder layer"),
    Part("embedding", "thinker.model.embed_tokens.", "looked up, not multiplied"),
    Part("final norm", "thinker.model.norm.", "a norm"),
    Part("lm_head", "thinker.lm_head.", "decides the token; kept for quality"),
    Part("visual tower", "thinker.visual.", "towers are kept for quality"),
    Part("audio tower", "thinker.audio_tower.", "towers are kept for quality"),
    Part("talker", "talker.", "speech quality depends on it"),
    Part("token2wav", "token2wav.", "speech quality depends on it"),
    Part("other", "", "not part of a decoder layer"),
)

# Modules that a runtime must leave float, as `re:` patterns: exact names miss vLLM's fused visual qkv, and prefixes
# differ between transformers 4, 5 and vLLM.
IGNORE_PATTERNS = (
    "re:.*visual.*",
    "re:.*audio_tower.*",
    "re:.*lm_head",
    "re:talker.*",
    "re:token2wav.*",
)

# (hidden, layers) of the published models.
_PUBLISHED_SHAPES = {(3584, 28): "Qwen2.5-Omni-7B", (2048, 36): "Qwen2.5-Omni-3B"}

# More than any model has: what a hostile config.json may make us build.
_MAX_LAYERS = 1024

# A buffer that transformers 4 saves and transformers 5 does not.
_OPTIONAL_TENSORS = frozenset({"token2wav.code2wav_dit_model.rotary_embed.inv_freq"})


def model_spec(model_type: str) -> ModelSpec:
    return ModelSpec(
        model_type=model_type,
        hf_model_type="qwen2_5_omni",
        publisher="Qwen",
        layer_prefix=LAYER_PREFIX,
        parts=PARTS,
        processors=frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq"}),
        ignore_patterns=IGNORE_PATTERNS,
        # vLLM and the full transformers class read the first, the thinker class the second.
        config_paths=((), ("thinker_config",)),
        stem_prefixes=("thinker.visual.", "thinker.audio_tower.", "thinker.model.embed_tokens."),
        norm="thinker.model.norm.weight",
        head="thinker.lm_head.weight",
        family=cast(ModelFamily, sys.modules[__name__]),
    )


# --- shapes --------------------------------------------------------------------------------------------------


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(config["thinker_config"]["text_config"])
    except (KeyError, TypeError) as error:
        raise QuantError(
            "config.json has no thinker_config.text_config",
            "give the whole Qwen2.5-Omni, not its thinker alone",
        ) from error


def _size(text: dict[str, Any], key: str) -> int:
    value = text.get(key)
    if type(value) is not int or not 0 < value < 2**24:
        raise QuantError(f"config.json: thinker_config.text_config.{key} is {value!r}, not a size")
    return value


def num_layers(config: dict[str, Any]) -> int:
    count = _size(_text_config(config), "num_hidden_layers")
    if count > _MAX_LAYERS:
        raise QuantError(f"config.json: num_hidden_layers is {count}; at most {_MAX_LAYERS} are read")
    return count


def shape_name(config: dict[str, Any]) -> str:
    text = _text_config(config)
    return _PUBLISHED_SHAPES.get((_size(text, "hidden_size"), _size(text, "num_hidden_layers")), "")


def layer_spec(config: dict[str, Any]) -> LayerSpec:
    """Groups and shapes of a decoder layer: pre-norm attention with GQA and biases on q, k, v; SwiGLU MLP."""
    text = _text_config(config)
    hidden, inter = _size(text, "hidden_size"), _size(text, "intermediate_size")
    heads, kv_heads = _size(text, "num_attention_heads"), _size(text, "num_key_value_heads")
    head_dim = _size(text, "head_dim") if text.get("head_dim") is not None else hidden // heads
    if heads % kv_heads:
        raise QuantError(f"config.json: {heads} attention heads do not share {kv_heads} key-value heads evenly")
    q, kv = heads * head_dim, kv_heads * head_dim
    groups = (
        LinearGroup(
            "qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "input_layernorm",
            "norm-linear",
        ),
        LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "ov", heads // kv_heads, head_dim),
        LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm-linear"),
        LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", "up-down"),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    return LayerSpec(groups, shapes)


def expected_tensors(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Every tensor that config.json implies: decoder layers from our table, the rest from the library's class.

    The class is built on the meta device with one decoder layer, so that this takes no memory and little time.
    """
    import torch

    layers, layer_shapes = num_layers(config), layer_spec(config).shapes
    library = _library()
    _refuse_depth(config)
    one_layer = _with_text(config, num_hidden_layers=1, layer_types=None)
    try:
        with torch.device("meta"):
            model = library.Qwen2_5OmniForConditionalGeneration(library.Qwen2_5OmniConfig.from_dict(one_layer))
    except Exception as error:  # whatever a config.json of another shape makes the library raise
        raise QuantError(f"config.json: transformers cannot build this model: {error}") from error
    shapes = {_disk_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    first = LAYER_PREFIX.format(index=0)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(first)}
    for index in range(layers):
        prefix = LAYER_PREFIX.format(index=index)
        shapes.update({prefix + name: shape for name, shape in layer_shapes.items()})
    return shapes, _OPTIONAL_TENSORS


def _refuse_depth(config: Any, key: str = "config") -> None:
    """Refuse counts of layers that would keep the library building for hours."""
    if isinstance(config, dict):
        for name, value in config.items():
            _refuse_depth(value, str(name))
    elif isinstance(config, int) and (key == "depth" or "layers" in key) and config > _MAX_LAYERS:
        raise QuantError(f"config.json: {key} is {config}; at most {_MAX_LAYERS} are read")


# --- the library's classes -----------------------------------------------------------------------------------


def _library() -> Any:
    """transformers' module of this model, imported on first need."""
    ensure_torchvision_imports()
    import transformers

    return transformers


def _disk_name(module_name: str) -> str:
    """transformers 5 nests the thinker's parts one level deeper than they are saved."""
    return (
        module_name.replace("thinker.model.language_model.", "thinker.model.")
        .replace("thinker.model.visual.", "thinker.visual.")
        .replace("thinker.model.audio_tower.", "thinker.audio_tower.")
    )


def _with_text(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of config.json with changed keys in thinker_config.text_config; None removes a key.

    A deep copy, since transformers 5 writes into what it is given.
    """
    copied = copy.deepcopy(config)
    text = {**_text_config(copied), **changes}
    copied["thinker_config"]["text_config"] = {k: v for k, v in text.items() if v is not None or k not in changes}
    return copied


def _thinker_config(config: dict[str, Any], **text_changes: Any) -> Any:
    thinker = _with_text(config, **text_changes)["thinker_config"]
    built = _library().Qwen2_5OmniThinkerConfig.from_dict(thinker)
    for part in (built, built.text_config, built.vision_config, built.audio_config):
        part._attn_implementation = "sdpa"
    return built


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory, but real buffers (rotary frequencies and the like)."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(_module: Any, _name: str, parameter: Any) -> Any:
        return None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def build_layer(config: dict[str, Any], index: int, weights: dict[str, Any]) -> Any:
    """The library's decoder layer `index` holding these weights (relative names, float32), in evaluation mode."""
    _library()
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer

    with _parameters_on_meta():
        layer = Qwen2_5OmniDecoderLayer(_thinker_config(config).text_config, index)
    layer.load_state_dict(weights, strict=True, assign=True)
    return layer.eval()


def build_norm(config: dict[str, Any], weight: Any) -> Any:
    """The library's norm behind the last decoder layer, whatever its class is called."""
    thinker = _thinker_config(config, num_hidden_layers=1, layer_types=None)
    with _parameters_on_meta():
        norm = _library().Qwen2_5OmniThinkerTextModel(thinker.text_config).norm
    norm.load_state_dict({"weight": weight}, strict=True, assign=True)
    return norm.eval()


class _ReachedLayers(Exception):
    """Carries what the first decoder layer was called with out of the library's forward."""

    def __init__(self, hidden: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments = hidden, arguments


def open_stem(checkpoint: Checkpoint, device: Any) -> OmniStem:
    return OmniStem(checkpoint, device)


class OmniStem:
    """The thinker up to its first decoder layer, run by the library's own forward.

    Towers compute in float32, their Linears held as they are stored; embedding rows are read from disk as they are
    needed. Instead of decoder layers there is one module that raises what reaches it, so embedding, merging, 3-D
    positions and masks are the library's for every mix of modalities.
    """

    def __init__(self, checkpoint: Checkpoint, device: Any) -> None:
        import torch

        text = _text_config(checkpoint.config)
        if text.get("use_sliding_window"):
            raise QuantError("config.json: use_sliding_window is true", "sliding-window attention is not calibrated")
        with _parameters_on_meta():
            self._thinker = _library().Qwen2_5OmniThinkerForConditionalGeneration._from_config(
                _thinker_config(checkpoint.config, num_hidden_layers=1, layer_types=None), dtype=torch.float32
            )
        self._device = device
        text_model = getattr(self._thinker.model, "language_model", self._thinker.model)
        text_model.layers[0] = _catching_module()
        text_model.embed_tokens = _rows_from_disk(checkpoint, "thinker.model.embed_tokens.weight", device)
        self._load_towers(checkpoint)
        for module in self._thinker.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._thinker.eval()

    def _load_towers(self, checkpoint: Checkpoint) -> None:
        """Parameters in float32, but for the Linears, which are nearly all of them: these stay as stored."""
        import torch

        rest = {}
        for name in self._thinker.state_dict():
            disk = _disk_name("thinker." + name)
            if not disk.startswith(("thinker.visual.", "thinker.audio_tower.")):
                continue
            tensor = checkpoint.load_finite(disk).to(self._device)
            owner, _, attribute = name.rpartition(".")
            module = self._thinker.get_submodule(owner)
            if isinstance(module, torch.nn.Linear) and attribute == "weight":
                parent, _, child = owner.rpartition(".")
                setattr(self._thinker.get_submodule(parent), child, _stored_linear(tensor, module.bias))
            else:
                rest[name] = tensor.to(torch.float32)
        unknown = self._thinker.load_state_dict(rest, strict=False, assign=True).unexpected_keys
        if unknown:
            raise RuntimeError(f"the towers did not take {unknown[:5]}")

    def layer_input(self, inputs: ModelInputs) -> LayerInput:
        import torch

        tensors = {name: tensor.to(self._device) for name, tensor in inputs.tensors.items()}
        try:
            with torch.inference_mode():
                self._thinker(**tensors, use_audio_in_video=inputs.use_audio_in_video, use_cache=False)
        except _ReachedLayers as reached:
            return LayerInput(reached.hidden, reached.arguments)
        except (ValueError, IndexError) as error:  # tokens and features that do not match
            raise QuantError(f"the model refused the sample: {error}") from error
        raise RuntimeError("the thinker's forward never reached its decoder layers")


def _catching_module() -> Any:
    import torch

    class CatchingLayer(torch.nn.Module):
        attention_type = "full_attention"

        def forward(self, hidden_states: Any, **arguments: Any) -> None:
            kept = {
                name: value
                for name, value in arguments.items()
                if isinstance(value, torch.Tensor)
                or (isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value))
            }
            raise _ReachedLayers(hidden_states, kept)

    return CatchingLayer()


def _stored_linear(weight: Any, bias: Any) -> Any:
    import torch

    class StoredLinear(torch.nn.Module):
        """A Linear whose weight keeps its stored dtype and is widened to float32 for each product."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.bias = bias  # None, or still on meta: it is loaded with the rest

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight.to(torch.float32), self.bias)

    return StoredLinear()


def _rows_from_disk(checkpoint: Checkpoint, name: str, device: Any) -> Any:
    import torch

    class RowsFromDisk(torch.nn.Module):
        def forward(self, ids: Any) -> Any:
            unique, inverse = torch.unique(ids.cpu(), return_inverse=True)
            rows = checkpoint.load_rows(name, unique.tolist()).to(device=device, dtype=torch.float32)
            return rows[inverse.to(device)]

    return RowsFromDisk()
