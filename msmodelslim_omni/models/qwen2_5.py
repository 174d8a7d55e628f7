"""What Qwen2.5-Omni and Qwen2.5-VL have in common: the decoder layer, and the way from media to the first of them.

The library has a decoder layer and a tower class of its own for each; their names and shapes are the same. What differs
(where config.json holds the decoder's block, names on disk, the classes) is handed in by the model's own file.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import QuantError
from .inputs import LayerInput, ModelInputs
from .spec import LayerSpec, LinearGroup
from .torchvision_shim import ensure_torchvision_imports

if TYPE_CHECKING:
    from ..storage import Checkpoint

# Recipe processors that know the groups of this decoder layer.
PROCESSORS = frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq"})

# More than any model has: what a hostile config.json may make us build.
_MAX_LAYERS = 1024

# What the library's classes gave for the content of a config.json, by the names of the modules.
_MOST_BUILT = 8
_built_shapes: dict[str, dict[str, tuple[int, ...]]] = {}

DiskName = Callable[[str], str]  # a module's tensor -> its name on disk


# --- shapes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextBlock:
    """The decoder's block of a config.json. place: what stands before its keys in messages, with the dot."""

    values: dict[str, Any]
    place: str

    def size(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 < value < 2**24:
            raise QuantError(f"config.json: {self.place}{key} is {value!r}, not a size")
        return value


def num_layers(text: TextBlock) -> int:
    count = text.size("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise QuantError(f"config.json: num_hidden_layers is {count}; at most {_MAX_LAYERS} are read")
    return count


def published_name(text: TextBlock, shapes: Mapping[tuple[int, int], str]) -> str:
    """The model of this (hidden size, number of layers), or an empty string."""
    return shapes.get((text.size("hidden_size"), text.size("num_hidden_layers")), "")


def layer_spec(text: TextBlock) -> LayerSpec:
    """Groups and shapes of a decoder layer: pre-norm attention with GQA and biases on q, k, v; SwiGLU MLP."""
    hidden, inter = text.size("hidden_size"), text.size("intermediate_size")
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    head_dim = text.size("head_dim") if text.values.get("head_dim") is not None else hidden // heads
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


def expected_shapes(
    config: dict[str, Any],
    text: TextBlock,
    layer_prefix: str,
    disk_name: DiskName,
    build: Callable[[], Any],
) -> dict[str, tuple[int, ...]]:
    """Every tensor that config.json implies: decoder layers from our table, the rest from the library's class.

    build: gives the library's whole model with one decoder layer. It takes a second, so one config.json after another
    of the same content is not built again.
    """
    layers, layer_shapes = num_layers(text), layer_spec(text).shapes
    key = json.dumps([layer_prefix, config], sort_keys=True)
    if key not in _built_shapes:
        refuse_depth(config)
        if len(_built_shapes) == _MOST_BUILT:
            _built_shapes.clear()
        _built_shapes[key] = _shapes_of(build)
    first = layer_prefix.format(index=0)
    shapes = {disk_name(name): shape for name, shape in _built_shapes[key].items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(first)}
    for index in range(layers):
        prefix = layer_prefix.format(index=index)
        shapes.update({prefix + name: shape for name, shape in layer_shapes.items()})
    return shapes


def _shapes_of(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Of a module that is built on the meta device, so that it takes no memory."""
    import torch

    library()
    try:
        with torch.device("meta"):
            module = build()
    except Exception as error:  # whatever a config.json of another shape makes the library raise
        raise QuantError(f"config.json: transformers cannot build this model: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def refuse_depth(config: Any, key: str = "config") -> None:
    """Refuse counts of layers, and lists with an entry for each, that would keep the library building for hours."""
    if isinstance(config, dict):
        for name, value in config.items():
            refuse_depth(value, str(name))
    elif isinstance(config, list) and len(config) > _MAX_LAYERS:
        raise QuantError(f"config.json: {key} has {len(config)} entries; at most {_MAX_LAYERS} are read")
    elif isinstance(config, int) and (key == "depth" or "layers" in key) and config > _MAX_LAYERS:
        raise QuantError(f"config.json: {key} is {config}; at most {_MAX_LAYERS} are read")


def changed(block: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A block of config.json with changed keys; None removes a key."""
    return {k: v for k, v in {**block, **changes}.items() if v is not None or k not in changes}


# --- the library's classes -----------------------------------------------------------------------------------


def library() -> Any:
    """transformers, imported on first need."""
    ensure_torchvision_imports()
    import transformers

    _import_generation()
    return transformers


def _import_generation() -> None:
    """Import transformers' generation without scikit-learn, which costs each run seconds.

    transformers 4 takes one function of it, wherever it is installed, for a kind of generation that is not used here;
    transformers 5 takes it when it is called. So does what we put in its place.
    """
    name = "transformers.generation.candidate_generator"
    utils: Any = importlib.import_module("transformers.utils")
    if name in sys.modules or version("transformers").split(".")[0] != "4":
        return
    asked = utils.is_sklearn_available
    utils.is_sklearn_available = lambda: False
    try:
        module: Any = importlib.import_module(name)
    finally:
        utils.is_sklearn_available = asked
    module.is_sklearn_available, module.roc_curve = asked, _roc_curve


def _roc_curve(*arguments: Any, **named: Any) -> Any:
    return importlib.import_module("sklearn.metrics").roc_curve(*arguments, **named)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
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


def with_weights(build: Callable[[], Any], weights: dict[str, Any]) -> Any:
    """The module that `build` gives, holding these weights (all of its own, by name), in evaluation mode."""
    with parameters_on_meta():
        module = build()
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


# --- up to the first decoder layer ---------------------------------------------------------------------------


class _ReachedLayers(Exception):
    """Carries what the first decoder layer was called with out of the library's forward."""

    def __init__(self, hidden: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments = hidden, arguments


class DecoderStem:
    """The model up to its first decoder layer, run by the library's own forward.

    Towers compute in float32, their Linears held as they are stored, up to `held_bytes` of them: the others, and
    embedding rows, are read from disk whenever they are needed. Instead of decoder layers there is one module that
    raises what reaches it, so embedding, merging, 3-D positions and masks are the library's for every mix of
    modalities.

    build: gives the library's class, in float32, with one decoder layer. towers: what the names on disk of the towers'
    tensors begin with. embedding: its weight on disk.
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
            raise QuantError("config.json: use_sliding_window is true", "sliding-window attention is not calibrated")
        with parameters_on_meta():
            self._module = build()
        self._device = device
        text_model = getattr(self._module.model, "language_model", self._module.model)
        text_model.layers[0] = _catching_module()
        text_model.embed_tokens = _rows_from_disk(checkpoint, embedding, device)
        self._load_towers(checkpoint, disk_name, towers, held_bytes)
        for module in self._module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._module.eval()

    def _load_towers(
        self, checkpoint: Checkpoint, disk_name: DiskName, towers: tuple[str, ...], held_bytes: int
    ) -> None:
        """Parameters in float32, but for the Linears, which are nearly all of them: these stay as stored."""
        import torch

        rest = {}
        for name in self._module.state_dict():
            disk = disk_name(name)
            if not disk.startswith(towers):
                continue
            read = partial(_to_device, checkpoint, disk, self._device)
            owner, _, attribute = name.rpartition(".")
            module = self._module.get_submodule(owner)
            if not isinstance(module, torch.nn.Linear) or attribute != "weight":
                rest[name] = read().to(torch.float32)
                continue
            parent, _, child = owner.rpartition(".")
            held_bytes -= checkpoint.tensors[disk].nbytes
            linear = _stored_linear()(read() if held_bytes >= 0 else read, module.bias)
            setattr(self._module.get_submodule(parent), child, linear)
        unknown = self._module.load_state_dict(rest, strict=False, assign=True).unexpected_keys
        if unknown:
            raise RuntimeError(f"the towers did not take {unknown[:5]}")

    def layer_input(self, inputs: ModelInputs) -> LayerInput:
        import torch

        tensors = {name: tensor.to(self._device) for name, tensor in inputs.tensors.items()}
        try:
            with torch.inference_mode():
                self._module(**tensors, **self.options(inputs), use_cache=False)
        except _ReachedLayers as reached:
            return LayerInput(reached.hidden, reached.arguments)
        except (ValueError, IndexError) as error:  # tokens and features that do not match
            raise QuantError(f"the model refused the sample: {error}") from error
        raise RuntimeError("the model's forward never reached its decoder layers")

    def options(self, inputs: ModelInputs) -> dict[str, Any]:
        """Arguments of the forward besides the sample's tensors."""
        return {}


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


def _to_device(checkpoint: Checkpoint, name: str, device: Any) -> Any:
    return checkpoint.load_finite(name).to(device)


@cache
def _stored_linear() -> Any:
    import torch

    class StoredLinear(torch.nn.Module):
        """A Linear whose weight keeps its stored dtype, or is read from disk, and is widened for each product."""

        def __init__(self, weight: torch.Tensor | Callable[[], torch.Tensor], bias: torch.nn.Parameter | None) -> None:
            super().__init__()
            self._weight = weight
            self.bias = bias  # None, or still on meta: it is loaded with the rest

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self._weight() if callable(self._weight) else self._weight
            return torch.nn.functional.linear(x, weight.to(torch.float32), self.bias)

    return StoredLinear


def _rows_from_disk(checkpoint: Checkpoint, name: str, device: Any) -> Any:
    import torch

    class RowsFromDisk(torch.nn.Module):
        def forward(self, ids: Any) -> Any:
            unique, inverse = torch.unique(ids.cpu(), return_inverse=True)
            rows = checkpoint.load_rows(name, unique.tolist()).to(device=device, dtype=torch.float32)
            return rows[inverse.to(device)]

    return RowsFromDisk()
