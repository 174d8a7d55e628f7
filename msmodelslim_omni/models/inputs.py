"""Interfaces for one sample: media limits, model inputs, and inputs of the first decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MODALITIES = ("text", "image", "audio", "video")

# Samples are joined up to so many tokens: enough that the products of a Linear run at full speed.
JOINED_TOKENS = 1024

# The dimension of the tokens in the arguments of a decoder layer.
_TOKENS_AT = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}


@dataclass(frozen=True)
class MediaLimits:
    """Limits for one sample: tokens, pixels per picture or frame (None: no limit), frames per second of video."""

    max_tokens: int
    max_pixels: int | None
    video_fps: float


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of the model's forward for one sample. modality: int8 [tokens], indices into MODALITIES.

    answer: token positions [first, end) of the last assistant turn, including the token that ends the turn. None if
    the sample has no such turn, or if the turn contains media.
    """

    tensors: dict[str, torch.Tensor]
    use_audio_in_video: bool
    modality: torch.Tensor
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class Deepstack:
    """Visual features that the model adds to the hidden states between its first layers (DeepStack, arXiv 2406.04334).

    positions: int64 [visual], the tokens of pictures and clips. features: float32 [visual, hidden] each; the model adds
    features[i] at `positions` after layer i.
    """

    positions: torch.Tensor
    features: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LayerInput:
    """Input of a decoder layer for one sample: hidden states, float32 [1, tokens, hidden], and the other arguments.

    deepstack: what the model adds after the first layers; only a stem returns it.
    lengths, masks: of samples that are joined, the tokens and the attention mask of each; see join_samples.
    """

    hidden: torch.Tensor
    arguments: dict[str, Any]
    deepstack: Deepstack | None = None
    lengths: tuple[int, ...] = ()
    masks: tuple[torch.Tensor | None, ...] = ()


def can_join(arguments: Collection[str]) -> bool:
    """Whether samples with these arguments of a decoder layer can be joined: whether all of them are known."""
    return {*arguments} <= {*_TOKENS_AT, "attention_mask"}


def cut_arguments(arguments: dict[str, Any], position: int) -> dict[str, Any]:
    """The other arguments of a decoder layer for one token of a sample, which attends to all tokens before it."""

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.narrow(_TOKENS_AT[name], position, 1)

    known = {name: value for name, value in arguments.items() if name != "attention_mask"}
    return {"attention_mask": None} | {
        name: tuple(cut(name, part) for part in value) if isinstance(value, tuple) else cut(name, value)
        for name, value in known.items()
    }


def join_samples(samples: Sequence[LayerInput]) -> LayerInput:
    """The inputs of several samples one after the other, in one. Their attention is to be kept apart."""
    import torch

    if len(samples) == 1:
        return samples[0]
    arguments: dict[str, Any] = {}
    for name in samples[0].arguments.keys() - {"attention_mask"}:
        values = [sample.arguments[name] for sample in samples]
        if isinstance(values[0], tuple):
            arguments[name] = tuple(torch.cat(parts, dim=_TOKENS_AT[name]) for parts in zip(*values, strict=True))
        else:
            arguments[name] = torch.cat(values, dim=_TOKENS_AT[name])
    return LayerInput(
        torch.cat([sample.hidden for sample in samples], dim=1),
        arguments | {"attention_mask": None},
        lengths=tuple(sample.hidden.shape[1] for sample in samples),
        masks=tuple(sample.arguments.get("attention_mask") for sample in samples),
    )


class Stem(Protocol):
    """The part of the model before the first decoder layer: embedding, towers, merging, positions and masks."""

    def layer_input(self, inputs: ModelInputs) -> LayerInput: ...


@dataclass(frozen=True)
class ClipSize:
    """Size of a clip: its number of frames, frames per second, and the pixels of a frame."""

    frames: int
    rate: float
    height: int
    width: int


@dataclass(frozen=True)
class FrameChoice:
    """Frames of a clip by ascending index, which may repeat, and what each is changed to.

    change: makes a frame smaller; uint8 [1, 3, height, width] both.
    """

    indices: list[int]
    change: Callable[[torch.Tensor], torch.Tensor]


class Clip(Protocol):
    """A clip that is decoded when its frames are asked for."""

    def frames(self, choose: Callable[[ClipSize], FrameChoice]) -> tuple[ClipSize, torch.Tensor]:
        """The clip's size, and its chosen and changed frames, uint8 [frames, 3, height, width].

        choose: called before any frame but the first is decoded, and again if the file has not as many frames as its
        packets promise. An error that it raises ends the call.
        """
        ...


class MediaProcessor(Protocol):
    """Converts the messages of a sample to model inputs."""

    def prepare(self, messages: list[dict[str, Any]], use_audio_in_video: bool) -> ModelInputs:
        """Parts of pictures hold a function that decodes the picture; parts of clips hold a Clip, and under `sound`
        their sound track if it is used; parts of sounds hold a float32 array at 16 kHz."""
        ...

    def text_tokens(self) -> list[int]:
        """The tokens that a text can have: all but special and added ones."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without special tokens."""
        ...
