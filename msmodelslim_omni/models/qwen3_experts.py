"""The experts of Qwen3-Omni's thinker: their numbers in config.json, and the MLP of a decoder layer with experts.

The MLP has one Linear per matrix of an expert, as on disk.

transformers 4.57 has the same modules; transformers 5 fuses the experts of a layer into two tensors, which no hook on a
Linear sees. This module therefore replaces the library's MLP in both versions. Its arithmetic is that of
Qwen3OmniMoeThinkerTextSparseMoeBlock, in the same order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..errors import QuantError
from .qwen2_5 import TextBlock
from .spec import Experts

_MAX_EXPERTS = 1024

# Changes of text_config that make transformers build small dense MLPs, in whose place SparseMlp is put.
NO_EXPERTS = {"num_experts": 0, "intermediate_size": 8}


def thinker_text(config: dict[str, Any]) -> TextBlock:
    try:
        return TextBlock(dict(config["thinker_config"]["text_config"]), "thinker_config.text_config.")
    except (KeyError, TypeError, ValueError) as error:
        raise QuantError(
            "config.json has no thinker_config.text_config",
            "give the complete Qwen3-Omni checkpoint, with the config.json of the repository",
        ) from error


def experts_of(text: TextBlock) -> Experts:
    count, active = text.size("num_experts"), text.size("num_experts_per_tok")
    if not active <= count <= _MAX_EXPERTS:
        raise QuantError(
            f"config.json: {text.prefix}num_experts is {count}; expected num_experts_per_tok, {active}, to"
            f" {_MAX_EXPERTS}"
        )
    if text.values.get("mlp_only_layers") or text.values.get("decoder_sparse_step", 1) != 1:
        raise QuantError(
            f"config.json: {text.prefix}mlp_only_layers or decoder_sparse_step says that some layers have no experts",
            "only models with experts in every layer are supported",
        )
    return Experts(router="mlp.gate", block="mlp", prefix="mlp.experts.{expert}.", count=count, active=active)


def sparse_mlp(text: TextBlock) -> Any:
    """The MLP of every layer, without weights."""
    experts, normalize = experts_of(text), text.values.get("norm_topk_prob", True) is True
    hidden, inter = text.size("hidden_size"), text.size("moe_intermediate_size")
    return _sparse_mlp_class()(hidden, inter, experts.count, experts.active, normalize)


@cache
def _sparse_mlp_class() -> Any:
    import torch
    import torch.nn.functional as F

    class Expert(torch.nn.Module):
        def __init__(self, hidden: int, inter: int) -> None:
            super().__init__()
            self.gate_proj = torch.nn.Linear(hidden, inter, bias=False)
            self.up_proj = torch.nn.Linear(hidden, inter, bias=False)
            self.down_proj = torch.nn.Linear(inter, hidden, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return out

    class SparseMlp(torch.nn.Module):
        """See spec.RoutedBlock. The router is `gate`; it computes in the dtype of its weight, softmax in float32."""

        def __init__(self, hidden: int, inter: int, experts: int, active: int, normalize: bool) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(hidden, experts, bias=False)
            self.experts = torch.nn.ModuleList(Expert(hidden, inter) for _ in range(experts))
            self.routed: list[torch.Tensor] = []
            self._active = active
            self._normalize = normalize

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [tokens, hidden]
            probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
            weights, chosen = probabilities.topk(self._active, dim=-1)  # [tokens, active]
            if self._normalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            weights = weights.to(x.dtype)
            places = [torch.nonzero(chosen == number) for number in range(len(self.experts))]
            self.routed = [place[:, 0] for place in places]
            out = torch.zeros_like(x)
            for expert, place in zip(self.experts, places, strict=True):
                if len(place):
                    tokens, slot = place.unbind(dim=1)
                    part = expert(x[tokens][None])[0] * weights[tokens, slot, None]  # [routed, hidden]
                    out.index_add_(0, tokens, part.to(x.dtype))
            return out.reshape(hidden_states.shape)

    return SparseMlp
