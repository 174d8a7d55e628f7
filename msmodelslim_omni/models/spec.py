"""What the pipeline must know of a model type, as data and a few functions; no torch and no transformers here.

All tensor names are checkpoint names (`thinker.model.layers.0.self_attn.q_proj.weight`), the same for every
transformers version. Inside one layer, names are relative to the layer (`self_attn.q_proj`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from ..storage import Checkpoint
    from .inputs import MediaLimits, MediaProcessor, Stem
    from .running import Running, Speaking

Subgraph = Literal["norm-linear", "ov", "up-down"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a layer that read the same input, and what produces that input.

    A factor per input channel can be folded exactly: `previous` is divided by it, the Linears' columns multiplied.
    previous: a norm (`norm-linear`), or the Linear whose output channels these are (`ov`, `up-down`).
    repeat: how many consecutive query heads read one head of `previous` (GQA; 1 elsewhere).
    head_dim: channels of one head, where `repeat` matters.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    subgraph: Subgraph
    repeat: int = 1
    head_dim: int = 1

    @property
    def block(self) -> str:
        """The module whose output the group's Linears serve: `self_attn`, `mlp`."""
        return self.linears[0].split(".", 1)[0]


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer: its groups in the order of the forward, and every tensor's shape by relative name."""

    groups: tuple[LinearGroup, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    def of(self, linear: str) -> LayerSpec:
        """One Linear's weight, without its bias, and what it is of the layer."""
        groups = tuple(replace(group, linears=(linear,)) for group in self.groups if linear in group.linears)
        return LayerSpec(groups, {f"{linear}.weight": self.shapes[f"{linear}.weight"]})

    @property
    def cache_width(self) -> int:
        """Keys and values of one token."""
        return sum(self.shapes[f"self_attn.{name}_proj.weight"][0] for name in ("k", "v"))


@dataclass(frozen=True)
class Part:
    """A named part of the checkpoint, for sizes and reasons: every tensor whose name begins with `prefix`."""

    name: str
    prefix: str
    why_float: str


# Beginnings of names, and what they become; the first that fits counts. None: not loaded.
Renaming = tuple[tuple[str, str | None], ...]


def renamed(name: str, renaming: Renaming) -> str | None:
    """The name with its beginning replaced; None where no beginning fits, or where it is not loaded."""
    for old, new in renaming:
        if name.startswith(old):
            return None if new is None else new + name.removeprefix(old)
    return None


@dataclass(frozen=True)
class LibraryClass:
    """A class of transformers that loads the checkpoint.

    name: as doctor tells it. modules, modules_5: names on disk -> of its modules, in transformers 4.57 and 5.
    config_path: the block of config.json whose quantization_config it reads; () is the top level.
    """

    name: str
    architecture: str
    modules: Renaming
    modules_5: Renaming
    config_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoaderNames:
    """What the loaders of a checkpoint ask of its names and config.json.

    classes: the first loads the whole model. vllm: names on disk -> of the modules that vLLM can quantize, lm_head
    included. architectures: those by which vLLM knows the whole model. config_parts: the blocks that config.json must
    have.
    """

    classes: tuple[LibraryClass, ...]
    vllm: Renaming
    architectures: tuple[str, ...]
    config_parts: tuple[tuple[str, ...], ...]

    @property
    def config_paths(self) -> tuple[tuple[str, ...], ...]:
        """Where in config.json loaders look for quantization_config, the top level first."""
        return tuple(dict.fromkeys([(), *(loaded.config_path for loaded in self.classes)]))

    def modules_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names on disk of Linears -> what any class in any version of the library calls them."""
        renamings = [renaming for loaded in self.classes for renaming in (loaded.modules, loaded.modules_5)]
        called = [renamed(name, renaming) for name in names for renaming in renamings]
        return tuple(dict.fromkeys(name for name in called if name is not None))


@dataclass(frozen=True)
class ModelSpec:
    """One model type: data for the plan, and the module that knows the library's classes.

    system: the system turn of a conversation that has none. modalities: what a sample may hold, of MODALITIES.
    speech_prefixes: of the tensors that speak; speaking: None for a model that answers in text alone.
    """

    model_type: str
    hf_model_type: str
    publisher: str  # who has the published shapes on the Hugging Face hub
    system: str
    modalities: tuple[str, ...]
    layer_prefix: str  # with {index}
    parts: tuple[Part, ...]  # the first prefix that fits names a tensor's part
    processors: frozenset[str]  # recipe processors that this model type admits
    ignore_patterns: tuple[str, ...]  # `re:` patterns of the modules a runtime must leave float
    loaders: LoaderNames
    speech_prefixes: tuple[str, ...]
    stem_prefixes: tuple[str, ...]  # of the tensors in front of the decoder layers: towers and embedding
    norm: str  # the tensors behind them: the final norm's weight, and lm_head [vocabulary, hidden]
    head: str
    family: ModelFamily
    running: Running
    speaking: Speaking | None

    @property
    def config_paths(self) -> tuple[tuple[str, ...], ...]:
        return self.loaders.config_paths

    @property
    def layers_prefix(self) -> str:
        """What the names of all decoder layers begin with."""
        return self.layer_prefix.split("{index}")[0]

    def head_of(self, config: dict[str, Any]) -> str:
        """The tensor on disk that is lm_head's weight: its own, or the embedding it is tied to."""
        return self.family.tied_tensors(config).get(self.head, self.head)

    def layer_name(self, index: int, relative: str) -> str:
        return self.layer_prefix.format(index=index) + relative

    def part_of(self, tensor: str) -> Part:
        return next(part for part in self.parts if tensor.startswith(part.prefix))


class ModelFamily(Protocol):
    """The functions of a models/ module; transformers is imported inside them only."""

    def num_layers(self, config: dict[str, Any]) -> int: ...

    def layer_spec(self, config: dict[str, Any]) -> LayerSpec: ...

    def shape_name(self, config: dict[str, Any]) -> str:
        """The model type whose published shape config.json has, or an empty string."""
        ...

    def expected_tensors(self, config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Shapes by checkpoint name as config.json implies them, and the names that may be absent."""
        ...

    def tied_tensors(self, config: dict[str, Any]) -> dict[str, str]:
        """Tensors that are another one, with the names on disk of those. A checkpoint may leave them out."""
        ...

    def build_layer(self, config: dict[str, Any], index: int, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The library's decoder layer with these weights (relative names)."""
        ...

    def build_norm(self, config: dict[str, Any], weight: torch.Tensor) -> torch.nn.Module:
        """The library's norm between the last decoder layer and lm_head."""
        ...

    def open_stem(self, checkpoint: Checkpoint, device: torch.device, held_bytes: int) -> Stem:
        """held_bytes: of the towers' Linears that are kept in memory; the others are read each time."""
        ...

    def open_media_processor(self, path: Path, limits: MediaLimits, trust_remote_code: bool) -> MediaProcessor: ...
