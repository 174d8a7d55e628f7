"""Calibration of a rounded KV cache: the largest keys and values of a layer, and the scales that cover them.

They are those of the float layer; smoothing that divides the rows of v_proj is applied afterwards.
"""

from __future__ import annotations

import torch

from ..errors import QuantError
from ..models import pass_cache_through
from ..numerics import CacheDtype, CacheScales, cache_scales, pair_lengths
from ..processors import LayerWork
from ..runtime import Team
from ..storage import is_finite


class CachePeaks:
    """The largest pair_lengths of keys and |values| that pass through the attention of one layer, by channel."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._peaks: tuple[torch.Tensor, torch.Tensor] | None = None  # [kv heads, d] each
        pass_cache_through(layer, self._observe)

    def _observe(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = pair_lengths(key[0]).amax(dim=1), value[0].abs().amax(dim=1)
        seen = self._peaks or new
        self._peaks = torch.maximum(seen[0], new[0]), torch.maximum(seen[1], new[1])
        return key, value

    def scales(self, dtype: CacheDtype, work: LayerWork, team: Team) -> CacheScales:
        """The scales for the samples of all processes. work: the finished layer, for the smoothing of v_proj."""
        own = None if self._peaks is None else [peaks.cpu() for peaks in self._peaks]
        keys, values = zip(*(pair for pair in team.all_gather(own) if pair is not None), strict=True)
        key, value = torch.stack(keys).amax(dim=0), torch.stack(values).amax(dim=0)
        rows = work.fold("self_attn.v_proj").rows
        if rows is not None:
            value = value / rows.cpu().abs().view_as(value)
        if not (is_finite(key) and is_finite(value)):
            raise QuantError(f"layer {work.index}: a key or value is NaN or Inf", "check the float checkpoint")
        return cache_scales(dtype, key, value)
