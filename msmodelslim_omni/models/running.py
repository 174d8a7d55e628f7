"""What `generate` and `export` must know of a model type beyond data: protocols of what its models/ modules offer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .inputs import ModelInputs

if TYPE_CHECKING:
    import torch


class RunnableModel(Protocol):
    """The library's whole model. `module` has parameters without memory until somebody fills them."""

    module: torch.nn.Module

    def slots(self) -> dict[str, str]:
        """Every name of the module's state dict -> the checkpoint's name of that tensor; tied ones share theirs."""
        ...

    def answer(self, inputs: ModelInputs, path: Path, max_new_tokens: int, on_text: Callable[[str], None]) -> list[int]:
        """Greedy tokens of the answer, its text handed to `on_text` as it comes. `path`: of tokenizer and settings."""
        ...


class SpeakingModel(RunnableModel, Protocol):
    def speak(
        self, inputs: ModelInputs, path: Path, speaker: str, max_new_tokens: int, on_text: Callable[[str], None]
    ) -> tuple[list[int], torch.Tensor]:
        """`answer`, and the answer's speech: float32 [samples] in [-1, 1] on the CPU."""
        ...


class Running(Protocol):
    """The functions of a models/ module that runs a whole model.

    FLOAT32_PREFIXES: of the tensors that compute in float32 whatever is asked.
    """

    FLOAT32_PREFIXES: tuple[str, ...]

    def open_model(self, config: dict[str, Any], speech: bool) -> RunnableModel:
        """The library's model in evaluation mode, its parameters still without memory.

        speech: with the parts that speak, as a SpeakingModel; asked for only where ModelSpec.speaking is there.
        """
        ...


class Speaking(Protocol):
    """The functions of a models/ module whose model speaks. SPEECH_RATE: samples a second."""

    SPEECH_RATE: int

    def speaks(self, config: dict[str, Any]) -> bool:
        """Whether config.json announces the parts that speak."""
        ...

    def without_speech(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json for a checkpoint without the parts that speak, which loaders of the whole model still take."""
        ...

    def speakers(self, path: Path) -> list[str]:
        """The voices that a checkpoint brings. Raises QuantError where there are none."""
        ...
