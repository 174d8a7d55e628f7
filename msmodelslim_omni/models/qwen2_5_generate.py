"""Greedy text generation shared by all models: options, streaming, tokens of the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..storage import load_json_object
from .inputs import ModelInputs
from .qwen2_5 import check_depth, load_transformers, parameters_on_meta


def build_model(config: dict[str, Any], build: Callable[[], Any]) -> Any:
    """Build the complete transformers model in evaluation mode, with its parameters on meta."""
    check_depth(config)
    load_transformers()
    try:
        with parameters_on_meta():
            return build().eval()
    except Exception as error:  # an unexpected config.json makes transformers raise exceptions of any type
        raise QuantError(f"config.json: transformers cannot build this model: {error}") from error


def open_tokenizer(path: Path) -> Any:
    try:
        return load_transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # damaged files make the libraries raise exceptions of any type
        raise QuantError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def greedy_options(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Arguments of generate for greedy decoding: no sampling, and the tokens that end an answer."""
    file = path / "generation_config.json"
    configured = load_json_object(file).get("eos_token_id") if file.is_file() else None
    eos = tokenizer.eos_token_id if configured is None else configured
    return {"do_sample": False, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


def text_streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def answer_tokens(
    model: Any,
    inputs: ModelInputs,
    path: Path,
    max_new_tokens: int,
    on_text: Callable[[str], None],
    options: dict[str, Any],
) -> list[int]:
    """Generate greedily with a transformers model and return the answer's tokens. options: extra generate arguments."""
    tokenizer = open_tokenizer(path)
    sequences = model.generate(
        **inputs.tensors,
        **options,
        max_new_tokens=max_new_tokens,
        **greedy_options(tokenizer, path),
        streamer=text_streamer(tokenizer, on_text),
    )
    return new_tokens(sequences, inputs)


def new_tokens(sequences: Any, inputs: ModelInputs) -> list[int]:
    """The tokens that generate added to the prompt."""
    ids = getattr(sequences, "sequences", sequences)[0]
    added: list[int] = ids[inputs.tensors["input_ids"].shape[1] :].tolist()
    return added
