"""Code shared by Qwen2.5-Omni and Qwen2.5-VL: the decoder layer, and the model up to the first decoder layer.

transformers has separate decoder layer and tower classes for each model, with equal names and shapes. The differences
(position of the decoder's block in config.json, checkpoint names, classes) are passed in by the model's own module.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import QuantError
from .inputs import Deepstack, LayerInput, ModelInputs
from .spec import LayerSpec, LinearGroup
from .torchvision_shim import ensure_torchvision_imports

if TYPE_CHECKING:
    from ..storage import Checkpoint

# Recipe processors that support the groups of this decoder layer.
PROCESSORS = frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq"})

# Above any real model; limits what a malicious config.json can make this process build.
_MAX_LAYERS = 1024
_MAX_SIZE = 2**24 - 1

# Cache: content of config.json -> tensor shapes by module name, as built by transformers.
_MAX_CACHED_CONFIGS = 8
_cached_shapes: dict[str, dict[str, tuple[int, ...]]] = {}

DiskName = Callable[[str], str]  # name in the module's state dict -> name in the checkpoint


# --- shapes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextBlock:
    """The decoder's block of config.json. prefix: path of the block with a trailing dot, for error messages."""

    values: dict[str, Any]
    prefix: str

    def size(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise QuantError(f"config.json: {self.prefix}{key} is {value!r}; expected an integer from 1 to {_MAX_SIZE}")
        return value


def num_layers(text: TextBlock) -> int:
    count = text.size("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise QuantError(f"config.json: num_hidden_layers is {count}; the limit is {_MAX_LAYERS}")
    return count


def published_model_type(text: TextBlock, shapes: Mapping[tuple[int, int], str]) -> str:
    """The published model with this (hidden size, number of layers), or an empty string."""
    return shapes.get((text.size("hidden_size"), text.size("num_hidden_layers")), "")


def layer_spec(text: TextBlock) -> LayerSpec:
    """Groups and shapes of a decoder layer: pre-norm attention with GQA and q, k, v biases; SwiGLU MLP."""
    hidden, inter = text.size("hidden_size"), text.size("intermediate_size")
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    head_dim = text.size("head_dim") if text.values.get("head_dim") is not None else hidden // heads
    if heads % kv_heads:
        raise QuantError(
            f"config.json: num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is {kv_heads}"
        )
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


def expected_shapes(
    config: dict[str, Any],
    text: TextBlock,
    spec: LayerSpec,
    layer_prefix: str,
    disk_name: DiskName,
    build: Callable[[], Any],
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that config.json implies: decoder layers from `spec`, the rest from transformers.

    build: returns the complete transformers model with one decoder layer. This takes a second, so the shapes are cached
    by the content of config.json.
    """
    layers, layer_shapes = num_layers(text), spec.shapes
    key = json.dumps([layer_prefix, config], sort_keys=True)
    if key not in _cached_shapes:
        check_depth(config)
        if len(_cached_shapes) == _MAX_CACHED_CONFIGS:
            _cached_shapes.clear()
        _cached_shapes[key] = _build_shapes(build)
    first = layer_prefix.format(index=0)
    shapes = {disk_name(name): shape for name, shape in _cached_shapes[key].items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(first)}
    for index in range(layers):
        prefix = layer_prefix.format(index=index)
        shapes.update({prefix + name: shape for name, shape in layer_shapes.items()})
    return shapes


def _build_shapes(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a module, which is built on the meta device and so takes no memory."""
    import torch

    load_transformers()
    try:
        with torch.device("meta"), _without_initial_values():
            module = build()
    except Exception as error:  # an unexpected config.json makes transformers raise exceptions of any type
        raise QuantError(f"config.json: transformers cannot build this model: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _without_initial_values() -> AbstractContextManager[Any]:
    """A context in which transformers gives new parameters no values: on the meta device that only costs time."""
    places = [importlib.import_module("transformers.modeling_utils")]  # of transformers 4; 5 has a module of its own
    with suppress(ImportError):
        places.append(importlib.import_module("transformers.initialization"))
    found = next((place for place in places if hasattr(place, "no_init_weights")), None)
    context: AbstractContextManager[Any] = nullcontext() if found is None else found.no_init_weights()
    return context


def check_depth(config: Any, key: str = "config") -> None:
    """Raise QuantError for layer counts or lists above the limit. transformers would build them for hours."""
    if isinstance(config, dict):
        for name, value in config.items():
            check_depth(value, str(name))
    elif isinstance(config, list) and len(config) > _MAX_LAYERS:
        raise QuantError(f"config.json: {key} has {len(config)} entries; the limit is {_MAX_LAYERS}")
    elif isinstance(config, int) and (key == "depth" or "layers" in key) and config > _MAX_LAYERS:
        raise QuantError(f"config.json: {key} is {config}; the limit is {_MAX_LAYERS}")


def with_changes(block: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json block with changed keys. None removes a key."""
    return {k: v for k, v in {**block, **changes}.items() if v is not None or k not in changes}


# --- transformers classes ------------------------------------------------------------------------------------


def load_transformers() -> Any:
    """Import transformers on first use and return it."""
    ensure_torchvision_imports()
    import transformers

    _import_generation()
    return transformers


def _import_generation() -> None:
    """Import the generation code of transformers without scikit-learn, whose import takes seconds.

    If scikit-learn is installed, transformers 4 imports roc_curve from it for a kind of generation that is not used
    here. Like transformers 5, the replacement imports roc_curve only when it is called.
    """
    name = "transformers.generation.candidate_generator"
    utils: Any = importlib.import_module("transformers.utils")
    if name in sys.modules or version("transformers").split(".")[0] != "4":
        return
    original = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        module: Any = importlib.import_module(name)
    finally:
        utils.is_sklearn_available = original
    module.is_sklearn_available, module.roc_curve = original, _roc_curve


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    return importlib.import_module("sklearn.metrics").roc_curve(*arguments, **named)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in this context have meta parameters but real buffers, e.g. rotary frequencies."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(_module: Any, _name: str, parameter: Any) -> Any:
        return None if parameter is None else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


@lru_cache(maxsize=8)
def _built(build: Callable[[dict[str, Any]], Any], config: str) -> Any:
    return build(json.loads(config))


def layer_settings(build: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> Any:
    """A copy of the settings that `build` makes of config.json, for one layer, which may change it.

    They are built once for all layers: transformers makes a text of them for a log each time, which takes 20 ms.
    """
    return copy.copy(_built(build, json.dumps(config)))


def build_with_weights(build: Callable[[], Any], weights: dict[str, Any]) -> Any:
    """Build a module, load its weights (all of them, by name) and return it in evaluation mode."""
    with parameters_on_meta():
        module = build()
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


# --- stem ----------------------------------------------------------------------------------------------------


class _ReachedLayers(Exception):
    """Leaves the model's forward at the first decoder layer, carrying the arguments of that layer."""

    def __init__(self, hidden: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments = hidden, arguments


class DecoderStem:
    """The model up to its first decoder layer, run by the forward of transformers.

    Towers compute in float32. Their Linears are kept in memory in the stored dtype, up to `held_bytes`; the remaining
    Linears and the embedding rows are re-read from disk on each use. One module that captures its arguments and stops
    the forward replaces the decoder layers. Embedding, merging, 3-D positions and masks are therefore those of
    transformers for every mix of modalities.

    build: returns the transformers model in float32 with one decoder layer. towers: prefixes of the towers' checkpoint
    names. embedding: checkpoint name of the embedding weight.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Any,
        text: TextBlock,
        build: Callable[[], Any],
        disk_name: DiskName,
        towers: tuple[str, ...],
        embedding: str,
        held_bytes: int,
    ) -> None:
        if text.values.get("use_sliding_window"):
            raise QuantError(
                "config.json: use_sliding_window is true",
                "calibration does not support sliding-window attention",
            )
        with parameters_on_meta():
            self._module = build()
        self._device = device
        text_model = getattr(self._module.model, "language_model", self._module.model)
        text_model.layers[0] = _capture_layer()
        text_model.register_forward_pre_hook(self._keep_deepstack, with_kwargs=True)
        self._deepstack: Deepstack | None = None
        text_model.embed_tokens = _disk_embedding(checkpoint, embedding, device)
        self._load_towers(checkpoint, disk_name, towers, held_bytes)
        for module in self._module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._module.eval()

    def _load_towers(
        self, checkpoint: Checkpoint, disk_name: DiskName, towers: tuple[str, ...], held_bytes: int
    ) -> None:
        """Load the towers: Linear weights, nearly all bytes, in the stored dtype, other parameters in float32."""
        import torch

        other_parameters = {}
        for name in self._module.state_dict():
            disk = disk_name(name)
            if not disk.startswith(towers):
                continue
            read = partial(_load_to_device, checkpoint, disk, self._device)
            owner, _, attribute = name.rpartition(".")
            module = self._module.get_submodule(owner)
            if not isinstance(module, torch.nn.Linear) or attribute != "weight":
                other_parameters[name] = read().to(torch.float32)
                continue
            parent, _, child = owner.rpartition(".")
            held_bytes -= checkpoint.tensors[disk].nbytes
            linear = _stored_linear_class()(read() if held_bytes >= 0 else read, module.bias)
            setattr(self._module.get_submodule(parent), child, linear)
        unknown = self._module.load_state_dict(other_parameters, strict=False, assign=True).unexpected_keys
        if unknown:
            raise RuntimeError(f"the towers have no parameters named {unknown[:5]}")

    def layer_input(self, inputs: ModelInputs) -> LayerInput:
        import torch

        tensors = {name: tensor.to(self._device) for name, tensor in inputs.tensors.items()}
        try:
            with torch.inference_mode():
                self._module(**tensors, **self.options(inputs), use_cache=False)
        except _ReachedLayers as reached:
            return LayerInput(reached.hidden, reached.arguments, self._deepstack)
        except (ValueError, IndexError) as error:  # e.g. the numbers of placeholder tokens and features differ
            raise QuantError(f"the model rejected the sample: {error}") from error
        raise RuntimeError("the model's forward did not call its decoder layers")

    def _keep_deepstack(self, _module: Any, _args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Keep the features that the text model gets in addition to its input; None without pictures and clips."""
        features, mask = arguments.get("deepstack_visual_embeds"), arguments.get("visual_pos_masks")
        self._deepstack = None
        if features is not None and mask is not None:
            is_visual = mask[0].reshape(mask.shape[1], -1)[:, 0]  # some versions repeat the mask over the width
            self._deepstack = Deepstack(is_visual.nonzero().flatten(), tuple(features))

    def options(self, inputs: ModelInputs) -> dict[str, Any]:
        """Extra arguments of the forward, in addition to the sample's tensors."""
        return {}


def _capture_layer() -> Any:
    import torch

    class CaptureLayer(torch.nn.Module):
        attention_type = "full_attention"

        def forward(self, hidden_states: Any, **arguments: Any) -> None:
            tensor_arguments = {
                name: value
                for name, value in arguments.items()
                if isinstance(value, torch.Tensor)
                or (isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value))
            }
            raise _ReachedLayers(hidden_states, tensor_arguments)

    return CaptureLayer()


def _load_to_device(checkpoint: Checkpoint, name: str, device: Any) -> Any:
    return checkpoint.load_finite(name).to(device)


@cache
def _stored_linear_class() -> Any:
    import torch

    class StoredLinear(torch.nn.Module):
        """A Linear whose weight stays in the stored dtype or on disk, and is cast to float32 for each product."""

        def __init__(self, weight: torch.Tensor | Callable[[], torch.Tensor], bias: torch.nn.Parameter | None) -> None:
            super().__init__()
            self._weight = weight
            self.bias = bias  # None, or on meta until _load_towers loads it

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self._weight() if callable(self._weight) else self._weight
            return torch.nn.functional.linear(x, weight.to(torch.float32), self.bias)

    return StoredLinear


def _disk_embedding(checkpoint: Checkpoint, name: str, device: Any) -> Any:
    import torch

    class DiskEmbedding(torch.nn.Module):
        def forward(self, ids: Any) -> Any:
            unique, inverse = torch.unique(ids.cpu(), return_inverse=True)
            rows = checkpoint.load_rows(name, unique.tolist()).to(device=device, dtype=torch.float32)
            return rows[inverse.to(device)]

    return DiskEmbedding()
