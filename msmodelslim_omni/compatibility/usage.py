"""How to load and serve an output: texts, commands and snippets made from the table of compatibility.

Names of classes come from the model's data; nothing here asks for a model type by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ..models import ModelSpec
from .table import PROOFS, RUNTIMES, ClassUse, Loads

# Stands for the repository on a hub, which an output does not know.
REPOSITORY = "ORG/NAME"

DEQUANTIZE_NOTE = (
    "From transformers 5.24 on, `run_compressed=False` is called `dequantize=True`; 5.24 still takes the old name."
)

# Runtime that serves -> its command. The CPU build's `vllm serve` does not start; weights of 7B and the cache of the
# longest context do not fit into the memory of most machines without a card.
_SERVERS = {
    "vllm": "vllm serve {name}",
    "vllm_cpu": "python -m vllm.entrypoints.openai.api_server --model {name} --dtype bfloat16 --max-model-len 2048",
    "vllm_ascend": "vllm serve {name} --quantization ascend",
}
_TRANSFORMERS_RUNTIMES = ("transformers_4", "transformers_5")


def answering_class(model: ModelSpec) -> str:
    """The class of transformers that answers in text: of an Omni, its thinker's."""
    return model.loaders.classes[-1].architecture


def speaking_class(model: ModelSpec) -> str:
    """The class of transformers that also speaks; empty for a model that does not."""
    return model.loaders.classes[0].architecture if model.speech_prefixes else ""


def serve_commands(loads: Mapping[str, Loads], name: str) -> dict[str, str]:
    """The command that serves an output, for each runtime of the table that does; empty if none is known to.

    name: a repository on a hub, or a folder.
    """
    quoted = shlex.quote(name)
    return {r: command.format(name=quoted) for r, command in _SERVERS.items() if loads[r].verdict == "yes"}


def image_request(name: str) -> str:
    """A request with an image to the server that a command of `serve_commands` starts."""
    content = (
        '[{"type": "image_url", "image_url": {"url": "https://example.org/picture.jpg"}},\n'
        '     {"type": "text", "text": "What do you see?"}]'
    )
    return (
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{\n"
        f'  "model": "{name}",\n'
        f'  "messages": [{{"role": "user", "content":\n    {content}}}]}}\''
    )


def load_snippet(architecture: str, use: ClassUse, name: str) -> str:
    """Python code that loads an output with a class of transformers."""
    lines = [f"from transformers import {architecture}"]
    settings = ['dtype="bfloat16"']
    if use == "dequantized":
        lines.append("from transformers.utils.quantization_config import CompressedTensorsConfig")
        settings.append("quantization_config=CompressedTensorsConfig(run_compressed=False)")
    arguments = "".join(f"\n    {setting}," for setting in (f'"{name}"', *settings))
    return "\n".join([*lines, "", f"model = {architecture}.from_pretrained({arguments}\n)"])


def class_uses(loads: Mapping[str, Loads]) -> tuple[dict[str, ClassUse], dict[str, ClassUse]]:
    """By version of transformers, how the answering class loads the output, and how the speaking class does."""
    loading = {r: loads[r] for r in _TRANSFORMERS_RUNTIMES if loads[r].verdict == "yes"}
    answering: dict[str, ClassUse] = {r: found.answering for r, found in loading.items() if found.answering}
    speaking: dict[str, ClassUse] = {r: found.speaking for r, found in loading.items() if found.speaking}
    return answering, speaking


def describe_readers(loads: Mapping[str, Loads]) -> tuple[str, str]:
    """Two phrases: the runtimes that read an output, each with its proof, and those that do not or are unknown."""
    readers = [f"{RUNTIMES[runtime]} ({found.proof})" for runtime, found in loads.items() if found.verdict == "yes"]
    others = [
        f"{RUNTIMES[runtime]} ({'unknown' if found.verdict == 'unknown' else 'no'}: {found.how})"
        for runtime, found in loads.items()
        if found.verdict != "yes"
    ]
    return ", ".join(readers) or "no runtime of the table", "; ".join(others)


def describe_proof(loads: Loads) -> str:
    """The proof of a verdict in words."""
    return PROOFS[loads.proof]
