"""One sample on its way to the first decoder layer: its modalities, its tensors, and what makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MODALITIES = ("text", "image", "audio", "video")


@dataclass(frozen=True)
class MediaLimits:
    """Bounds on what one sample may bring."""

    max_tokens: int
    max_pixels: int | None
    video_fps: float


@dataclass(frozen=True)
class ModelInputs:
    """One sample as the model's forward takes it. `modality`: int8 [tokens], an index into MODALITIES.

    answer: the positions [first, end) of the last assistant turn's tokens, the token that ends it included; None for a
    sample without one, or with media in it.
    """

    tensors: dict[str, torch.Tensor]
    use_audio_in_video: bool
    modality: torch.Tensor
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerInput:
    """What reaches a decoder layer for one sample: hidden float32 [1, tokens, hidden] and the other arguments."""

    hidden: torch.Tensor
    arguments: dict[str, Any]


class Stem(Protocol):
    """Everything before the first decoder layer: embedding, towers, merging, positions and masks."""

    def layer_input(self, inputs: ModelInputs) -> LayerInput: ...


class MediaProcessor(Protocol):
    def prepare(self, messages: list[dict[str, Any]], use_audio_in_video: bool) -> ModelInputs: ...
