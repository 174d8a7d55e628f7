"""The files beside the weights: tokenizer, processor, chat template, voices. JSON is parsed; pickles are not opened."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import parse_json, read_regular
from .findings import Finding, found
from .headers import MAX_JSON_BYTES, read_json

# Read by other checks.
_NOT_PARSED = {"config.json", "quant_model_description.json"}

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.json", "chat_template.jinja")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def check_companions(path: Path, speaks: bool) -> Iterator[Finding]:
    """Everything that a processor, a tokenizer and the full class read besides the weights; the voices if it speaks."""
    names = {file.name for file in path.iterdir() if file.is_file()}
    if "tokenizer_config.json" not in names:
        yield found("tokenizer_missing", "tokenizer_config.json", "is missing")
    if not any(set(files) <= names for files in _TOKENIZERS):
        yield found("tokenizer_missing", "tokenizer.json", "neither it nor vocab.json with merges.txt is there")
    if not set(_PROCESSORS) & names:
        yield found("processor_missing", _PROCESSORS[0], "is missing")
    if not set(_TEMPLATES) & names and "chat_template" not in _parsed(path / "tokenizer_config.json"):
        yield found("chat_template_missing", _TEMPLATES[0], "is missing")
    if "generation_config.json" not in names:
        yield found("generation_config_missing", "generation_config.json", "is missing")
    if speaks:
        yield from _check_voices(path)
    for name in sorted(names):
        yield from _check_file(path / name)


def _check_voices(path: Path) -> Iterator[Finding]:
    voices = path / "spk_dict.pt"
    if not voices.is_file():
        yield found("spk_dict_missing", voices.name, "is missing")
    elif not zipfile.is_zipfile(voices):  # what torch.save writes
        yield found("spk_dict_broken", voices.name, f"{voices.stat().st_size} bytes that torch cannot load")


def _check_file(file: Path) -> Iterator[Finding]:
    if file.suffix not in (".json", ".txt", ".jinja", ".pt", ".py"):
        return
    size = file.stat().st_size
    if not size:
        yield found("file_empty", file.name, "0 bytes")
    elif file.suffix == ".json" and size <= MAX_JSON_BYTES and not _is_examined(file.name):
        try:
            parse_json(read_regular(file, MAX_JSON_BYTES).decode("utf-8"))
        except OSError as error:
            yield found("file_unreadable", file.name, f"cannot be read: {error.strerror or error}")
        except ValueError as error:
            yield found("json_broken", file.name, f"is not JSON: {error}")


def _is_examined(name: str) -> bool:
    """Files that another check reads, with its own finding."""
    return name in _NOT_PARSED or name.endswith(".safetensors.index.json")


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except QuantError:
        return {}  # told by the check of all files
