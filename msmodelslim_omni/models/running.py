"""Protocols for running a complete model: what the models/ modules provide to `generate` and `export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .inputs import ModelInputs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spoken:
    """An answer in text and speech.

    tokens: of the text. samples: float32 [samples] in [-1, 1] on the CPU. codes: the talker's tokens without its end
    token (of several codebooks, the first). likeliest: its most likely token at every step, the end's included.
    """

    tokens: list[int]
    samples: torch.Tensor
    codes: list[int]
    likeliest: list[int]


class RunnableModel(Protocol):
    """The complete transformers model. The parameters of `module` are on meta until the caller loads them."""

    module: torch.nn.Module

    def checkpoint_names(self) -> dict[str, str]:
        """Map each name of the module's state dict to its checkpoint name. Tied tensors share one checkpoint name."""
        ...

    def answer(self, inputs: ModelInputs, path: Path, max_new_tokens: int, on_text: Callable[[str], None]) -> list[int]:
        """Generate greedily and return the answer's tokens.

        path: folder of the tokenizer and generation_config.json. on_text: called with each new piece of text.
        """
        ...


class SpeakingModel(RunnableModel, Protocol):
    """A RunnableModel that can also answer in speech."""

    def speak(
        self,
        inputs: ModelInputs,
        path: Path,
        speaker: str,
        max_new_tokens: int,
        on_text: Callable[[str], None],
        *,
        said: Sequence[int] | None = None,
        codes: Sequence[int] | None = None,
        seed: int = 0,
        on_code: Callable[[int], None] = lambda count: None,
    ) -> Spoken:
        """Like `answer`, and also speak.

        said, codes: the text and the talker's tokens to force, as `tokens` and `codes` of another answer with the same
        max_new_tokens. seed: of the talker, which samples. on_code: receives the number of the
        talker's steps, after each one.
        """
        ...


class ModelRunner(Protocol):
    """Functions of a models/ module for running the complete model.

    FLOAT32_PREFIXES: prefixes of the tensors that stay float32, whatever dtype is requested.
    """

    FLOAT32_PREFIXES: tuple[str, ...]

    def open_model(self, config: dict[str, Any], speech: bool) -> RunnableModel:
        """Build the transformers model in evaluation mode, with its parameters on meta.

        speech: include the speech parts and return a SpeakingModel. Requires ModelSpec.speech_support.
        """
        ...


class SpeechSupport(Protocol):
    """Functions of a models/ module whose model generates speech. SPEECH_RATE: samples per second."""

    SPEECH_RATE: int

    def has_speech(self, config: dict[str, Any]) -> bool:
        """Whether config.json enables the speech parts."""
        ...

    def without_speech(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json for a checkpoint without the speech parts; loaders of the complete model still accept it."""
        ...

    def speakers(self, path: Path) -> list[str]:
        """Names of the voices in a checkpoint. Raises QuantError if there are none."""
        ...
