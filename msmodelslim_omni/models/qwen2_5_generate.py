"""What answers in text have in common: a greedy generate, its tokens and its text as it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..storage import load_json_object
from .inputs import ModelInputs
from .qwen2_5 import library, parameters_on_meta, refuse_depth


def build_model(config: dict[str, Any], build: Callable[[], Any]) -> Any:
    """The library's whole model in evaluation mode, its parameters without memory."""
    refuse_depth(config)
    library()
    try:
        with parameters_on_meta():
            return build().eval()
    except Exception as error:  # whatever a config.json of another shape makes the library raise
        raise QuantError(f"config.json: transformers cannot build this model: {error}") from error


def open_tokenizer(path: Path) -> Any:
    try:
        return library().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # what the libraries raise over damaged files has no common class
        raise QuantError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def greedy(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Arguments of generate: no sampling, and what ends an answer."""
    file = path / "generation_config.json"
    said = load_json_object(file).get("eos_token_id") if file.is_file() else None
    ends = tokenizer.eos_token_id if said is None else said
    return {"do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


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
    """Greedy tokens of the answer of a model of the library. options: more arguments of its generate."""
    tokenizer = open_tokenizer(path)
    sequences = model.generate(
        **inputs.tensors,
        **options,
        max_new_tokens=max_new_tokens,
        **greedy(tokenizer, path),
        streamer=text_streamer(tokenizer, on_text),
    )
    return new_tokens(sequences, inputs)


def new_tokens(sequences: Any, inputs: ModelInputs) -> list[int]:
    ids = getattr(sequences, "sequences", sequences)[0]
    new: list[int] = ids[inputs.tensors["input_ids"].shape[1] :].tolist()
    return new
