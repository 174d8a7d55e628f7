"""Description of a model type: data and a few functions. This module imports neither torch nor transformers.

All tensor names are checkpoint names (`thinker.model.layers.0.self_attn.q_proj.weight`), which do not depend on the
version of transformers. Names inside a layer are relative to the layer (`self_attn.q_proj`).
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
    from .running import ModelRunner, SpeechSupport

SubgraphType = Literal["norm-linear", "ov", "up-down"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a layer that read the same input, and the module that produces this input.

    A scale factor per input channel can be folded exactly: divide `previous` by it, multiply the Linears' columns.
    previous: a norm (`norm-linear`), or the Linear that outputs these channels (`ov`, `up-down`).
    repeat: number of consecutive query heads that read one head of `previous` (GQA; otherwise 1).
    head_dim: channels of one head; used only with `repeat`.
    expert: the number of the expert that the Linears belong to; they read only the tokens routed to it.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    subgraph: SubgraphType
    repeat: int = 1
    head_dim: int = 1
    expert: int | None = None

    @property
    def block(self) -> str:
        """The submodule of the layer that contains the group's Linears: `self_attn` or `mlp`."""
        return self.linears[0].split(".", 1)[0]

    @property
    def adds_to_residual(self) -> bool:
        """Whether the output of the group's Linear is added to the residual stream, as those of o and down are."""
        return self.subgraph != "norm-linear"


@dataclass(frozen=True)
class Subgraph:
    """A module and all Linears that read its output, which therefore share one vector of factors.

    groups: one, or those of all experts behind their norm. float_readers: Linears that read the output too and stay
    float, as the router does. Their columns get the factors as well, which are then powers of two: no bit of their
    output changes.
    """

    name: str
    groups: tuple[LinearGroup, ...]
    float_readers: tuple[str, ...] = ()

    @property
    def previous(self) -> str:
        return self.groups[0].previous

    @property
    def type(self) -> SubgraphType:
        return self.groups[0].subgraph

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def is_tunable(self) -> bool:
        """Whether a norm feeds the groups alone, so that its weight may be tuned after rounding."""
        return self.type == "norm-linear" and not self.float_readers


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: MLPs, of which a router assigns `active` to each token.

    router: its Linear, [count, hidden], which stays float. block: the submodule that routes, a RoutedBlock.
    prefix: of the Linears of one expert; contains {expert}.
    """

    router: str
    block: str
    prefix: str
    count: int
    active: int


class RoutedBlock(Protocol):
    """A module with experts. routed: for each expert, the token positions of the current call, ascending."""

    routed: list[torch.Tensor]


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer: its groups in forward order, and the shape of every tensor by relative name.

    experts: None for a layer with a dense MLP.
    """

    groups: tuple[LinearGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    experts: Experts | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def subgraphs(self) -> tuple[Subgraph, ...]:
        """The groups in forward order, those of the experts behind their norm as one."""
        alone = [Subgraph(group.name, (group,)) for group in self.groups]
        shared = [n for n, g in enumerate(self.groups) if g.expert is not None and g.subgraph == "norm-linear"]
        if self.experts is None or not shared:
            return tuple(alone)
        name = self.experts.prefix.format(expert="*") + alone[shared[0]].name.rpartition(".")[2]
        alone[shared[0]] = Subgraph(name, tuple(self.groups[n] for n in shared), (self.experts.router,))
        others = set(shared[1:])
        return tuple(part for number, part in enumerate(alone) if number not in others)

    @property
    def units(self) -> tuple[tuple[LinearGroup, ...], ...]:
        """Groups that share a scheme, because runtimes fuse their Linears: all experts are one unit."""
        alone = [(group,) for group in self.groups if group.expert is None]
        experts = tuple(group for group in self.groups if group.expert is not None)
        return (*alone, experts) if experts else tuple(alone)

    def parallel_sizes(self, group_size: int | None) -> tuple[int, ...]:
        """Numbers of cards up to 16 that can share every expert: each gets whole groups of its inner channels.

        group_size: inputs that share a scale; None for one scale per output channel. Empty without experts.
        """
        down = next((g.linears[0] for g in self.groups if g.expert is not None and g.subgraph == "up-down"), None)
        if down is None:
            return ()
        inner = self.shapes[f"{down}.weight"][1]
        return tuple(cards for cards in (1, 2, 4, 8, 16) if inner % (cards * (group_size or 1)) == 0)

    def for_linear(self, linear: str) -> LayerSpec:
        """A LayerSpec with one Linear only: its group and its weight, without the bias."""
        groups = tuple(replace(group, linears=(linear,)) for group in self.groups if linear in group.linears)
        return LayerSpec(groups, {f"{linear}.weight": self.shapes[f"{linear}.weight"]})

    @property
    def value_group(self) -> LinearGroup | None:
        """The group with v_proj, whose outputs reach other tokens by attention; None if the layer has none."""
        values = next((group.previous for group in self.groups if group.subgraph == "ov"), "")
        return next((group for group in self.groups if values in group.linears), None)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, which the layer reads and returns."""
        return self.shapes["input_layernorm.weight"][0]

    @property
    def key_width(self) -> int:
        """Output channels of k_proj, which are as many as those of v_proj."""
        return self.shapes["self_attn.k_proj.weight"][0]

    @property
    def cache_width(self) -> int:
        """Number of KV-cache elements per token: output channels of k_proj and v_proj."""
        return sum(self.shapes[f"self_attn.{name}_proj.weight"][0] for name in ("k", "v"))


@dataclass(frozen=True)
class Part:
    """A named part of the checkpoint: all tensors whose names start with `prefix`.

    why_float: the reason that the plan and the report show for tensors of this part that stay float.
    """

    name: str
    prefix: str
    why_float: str


# (prefix, replacement) pairs; the first prefix that matches applies. None: the tensor is not loaded.
Renaming = tuple[tuple[str, str | None], ...]


def is_recomputed_buffer(name: str) -> bool:
    """Whether a tensor is the rotary buffer that older tools save in every layer. Loaders compute it and skip it."""
    return name.endswith(".rotary_emb.inv_freq")


def apply_renaming(name: str, renaming: Renaming) -> str | None:
    """Replace the prefix of a name. None if no prefix matches or the tensor is not loaded."""
    for old, new in renaming:
        if name.startswith(old):
            return None if new is None else new + name.removeprefix(old)
    return None


@dataclass(frozen=True)
class LibraryClass:
    """A transformers class that loads the checkpoint.

    name: the name that doctor prints. modules, modules_5: checkpoint names -> module names in transformers 4.57 and 5.
    config_path: path of the config.json block whose quantization_config the class reads; () is the top level.
    """

    name: str
    architecture: str
    modules: Renaming
    modules_5: Renaming
    config_path: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoaderNames:
    """Names and config.json blocks that the loaders of a checkpoint expect.

    classes: the first one loads the complete model. vllm: checkpoint names -> names of the modules that vLLM can
    quantize, including lm_head. architectures: names under which vLLM registers the complete model. config_parts:
    paths of the blocks that config.json must have. vllm_omni: like `vllm` for vLLM-Omni, whose names have other
    prefixes; empty if it is not emulated.
    """

    classes: tuple[LibraryClass, ...]
    vllm: Renaming
    architectures: tuple[str, ...]
    config_parts: tuple[tuple[str, ...], ...]
    vllm_omni: Renaming = ()

    @property
    def config_paths(self) -> tuple[tuple[str, ...], ...]:
        """Paths in config.json where loaders look for quantization_config, the top level first."""
        return tuple(dict.fromkeys([(), *(loaded.config_path for loaded in self.classes)]))

    def modules_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Module names of Linears, given by checkpoint name, in all classes and transformers versions."""
        renamings = [renaming for loaded in self.classes for renaming in (loaded.modules, loaded.modules_5)]
        modules = [apply_renaming(name, renaming) for name in names for renaming in renamings]
        return tuple(dict.fromkeys(name for name in modules if name is not None))


@dataclass(frozen=True)
class ModelSpec:
    """One model type: data for the plan, and the modules that use the transformers classes.

    system: system prompt for conversations without one; empty for none. modalities: the MODALITIES that a sample may
    contain. speech_prefixes: prefixes of the talker and vocoder tensors. speech_support: None for text-only models.
    """

    model_type: str
    hf_model_type: str
    publisher: str  # organization of the published models on the Hugging Face hub
    system: str
    modalities: tuple[str, ...]
    layer_prefix: str  # contains {index}
    parts: tuple[Part, ...]  # a tensor belongs to the first part whose prefix matches
    processors: frozenset[str]  # recipe processors that support this model type
    ignore_patterns: tuple[str, ...]  # `re:` patterns of the modules that a runtime must not quantize
    loaders: LoaderNames
    speech_prefixes: tuple[str, ...]
    stem_prefixes: tuple[str, ...]  # tensors before the decoder layers: towers and embedding
    norm: str  # weight of the final norm, after the decoder layers
    head: str  # weight of lm_head, [vocabulary, hidden]
    embedding: str  # weight of the embedding, [vocabulary, hidden]
    family: ModelFamily
    runner: ModelRunner
    speech_support: SpeechSupport | None
    visual_token_side: int = 28  # pixels; a visual token is a square of a picture or frame
    least_sound_samples: int = 1  # at 16 kHz; the audio tower cannot take less
    voices_file: str = "spk_dict.pt"  # of a model with speech; empty if config.json names the voices
    gguf_architecture: str = ""  # of the text decoder in llama.cpp; empty if it cannot be written
    shape_of: str = ""  # the model type that config.json is taken for, if it is another one with the same shape

    @property
    def config_paths(self) -> tuple[tuple[str, ...], ...]:
        return self.loaders.config_paths

    @property
    def generation(self) -> str:
        """Models of one generation share the names of their Linears, and recipes: `Qwen2.5`, `Qwen3`."""
        return self.model_type.partition("-")[0]

    @property
    def visual_token_pixels(self) -> int:
        return self.visual_token_side**2

    @property
    def layers_prefix(self) -> str:
        """Common prefix of the names of all decoder layers."""
        return self.layer_prefix.split("{index}")[0]

    def lm_head_tensor(self, config: dict[str, Any]) -> str:
        """Checkpoint name of the lm_head weight: its own, or that of the tied embedding."""
        return self.family.tied_tensors(config).get(self.head, self.head)

    def layer_name(self, index: int, relative: str) -> str:
        return self.layer_prefix.format(index=index) + relative

    def part_of(self, tensor: str) -> Part:
        for part in self.parts:  # called for every tensor, several times
            if tensor.startswith(part.prefix):
                return part
        raise KeyError(tensor)


class ModelFamily(Protocol):
    """Functions of a models/ module. They import transformers only when called."""

    def num_layers(self, config: dict[str, Any]) -> int: ...

    def layer_spec(self, config: dict[str, Any]) -> LayerSpec: ...

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The block of config.json that describes the text decoder."""
        ...

    def deepstack_depth(self, config: dict[str, Any]) -> int:
        """The number of layers after which the model adds visual features; see inputs.Deepstack."""
        ...

    def published_model_type(self, config: dict[str, Any]) -> str:
        """The model type whose published shape matches config.json, or an empty string."""
        ...

    def expected_tensors(self, config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
        """Tensor shapes by checkpoint name, derived from config.json, and the names that may be absent."""
        ...

    def tied_tensors(self, config: dict[str, Any]) -> dict[str, str]:
        """Tied tensors -> checkpoint name of the tensor that they share. A checkpoint may omit tied tensors."""
        ...

    def build_layer(self, config: dict[str, Any], index: int, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The transformers decoder layer with these weights (relative names)."""
        ...

    def build_norm(self, config: dict[str, Any], weight: torch.Tensor) -> torch.nn.Module:
        """The transformers norm between the last decoder layer and lm_head."""
        ...

    def open_stem(self, checkpoint: Checkpoint, device: torch.device, held_bytes: int) -> Stem:
        """held_bytes: memory budget for the Linears of the towers; the rest is re-read from disk on each use."""
        ...

    def open_media_processor(self, path: Path, limits: MediaLimits, trust_remote_code: bool) -> MediaProcessor: ...
