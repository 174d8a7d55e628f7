"""Inside the attention of a decoder layer: keys and values, joined samples, and how much attention a token receives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

_NAME = "msmodelslim_recorded"  # of the attention function, in the library's table
_CACHED_NAME = "msmodelslim_cached"
_APART_NAME = "msmodelslim_apart"
_BLOCK_ROWS, _BLOCK_BYTES = 128, 64 << 20  # of attention probabilities that are in memory at once


class AttentionRecord:
    """Records the attention of one decoder layer, until `remove`."""

    def __init__(self, layer: torch.nn.Module) -> None:
        import transformers

        table: Any = transformers.AttentionInterface
        self._calls: list[tuple[Any, ...]] = []  # query, key, mask and scaling of each sample
        self._module: Any = cast(Any, layer.get_submodule("self_attn"))
        self._config = cast(Any, self._module.config)
        self._before: str = self._config._attn_implementation
        library: Callable[..., Any] = table()[self._before]

        def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
            if module is self._module:
                self._calls.append((query[0], key[0], attention_mask, options.get("scaling")))
            return library(module, query, key, value, attention_mask, **options)

        table.register(_NAME, attend)
        self._config._attn_implementation = _NAME

    def received(self) -> torch.Tensor:
        """What the tokens of all samples since `forget` received, float32 [tokens]; see received_attention."""
        import torch

        return torch.cat([received_attention(*call) for call in self._calls])

    def forget(self) -> None:
        """Forget the samples so far."""
        self._calls.clear()

    def remove(self) -> None:
        """Give the layer the library's function back."""
        self._config._attn_implementation = self._before
        self._module, self._calls = None, []  # the table holds this record on; not the layer


@contextmanager
def attention_apart(layer: torch.nn.Module, lengths: Sequence[int], masks: Sequence[Any]) -> Iterator[None]:
    """Inside, each token of a decoder layer attends to the tokens of its own sample only.

    The tokens of several samples follow one another; lengths: tokens of each. masks: the attention mask of each, see
    received_attention.
    """
    import torch
    import transformers

    table: Any = transformers.AttentionInterface
    config = cast(Any, layer.get_submodule("self_attn").config)
    before: str = config._attn_implementation
    each: Callable[..., Any] = table()[before]

    def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any) -> Any:
        samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), masks, strict=True)
        return torch.cat([each(module, *sample, **options)[0] for sample in samples], dim=1), None

    table.register(_APART_NAME, attend)
    config._attn_implementation = _APART_NAME
    try:
        yield
    finally:
        config._attn_implementation = before


# Keys and values, [1, kv heads, tokens, d] after the rotary embedding -> what attention uses in their place.
CacheFunction = Callable[["torch.Tensor", "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]


def pass_cache_through(layer: torch.nn.Module, function: CacheFunction) -> None:
    """Let the attention of a decoder layer use the keys and values that the function returns, from now on."""
    import transformers

    table: Any = transformers.AttentionInterface
    module: Any = cast(Any, layer.get_submodule("self_attn"))
    module.cache_function = function
    module.config = copy.copy(module.config)  # other layers may share it
    library: Callable[..., Any] = table()[module.config._attn_implementation]
    module.library_attention = library

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        key, value = module.cache_function(key, value)
        return module.library_attention(module, query, key, value, attention_mask, **options)

    table.register(_CACHED_NAME, attend)
    module.config._attn_implementation = _CACHED_NAME


def received_attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None = None
) -> torch.Tensor:
    """Σ over the queries of the squared attention probabilities of each key, mean over the heads: float32 [tokens].

    An error in the value of token t reaches the output of query q multiplied by the probability a_qt, so it adds
    |error|² Σ_q a_qt² to the squared error of all outputs. A token that only itself attends to has at most 1; an
    attention sink, to which all later tokens attend, has hundreds.

    query: [heads, tokens, d] after the rotary embedding; key: [kv heads, tokens, d]. mask: [1, 1, tokens, tokens],
    booleans or numbers to add; None for causal attention.
    """
    import torch

    heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    total = torch.zeros(tokens, device=query.device)
    positions = torch.arange(tokens, device=query.device)
    step = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * heads * tokens)))
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        seen = tokens if mask is not None else rows.stop  # causal attention has zeros behind
        grouped = query[:, rows].reshape(len(key), -1, width)  # [kv heads, heads of each * rows, d]
        scores = grouped.float() @ key[:, :seen].float().transpose(1, 2) * scale
        scores = scores.view(len(key), -1, rows.stop - first, seen)
        if mask is None:
            scores.masked_fill_(positions[:seen] > positions[rows, None], float("-inf"))
        elif mask.dtype == torch.bool:
            scores.masked_fill_(~mask[0, 0, rows], float("-inf"))
        else:
            scores += mask[0, 0, rows].float()
        total[:seen] += scores.softmax(dim=-1).square_().sum(dim=(0, 1, 2))
    return total / heads
