"""Checks of the files next to the weights: tokenizer, processor, chat template, voices.

JSON files are parsed; pickle files are not opened.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import parse_json, read_regular
from .findings import Finding, make_finding
from .headers import MAX_JSON_BYTES, read_json

# Other checks parse these files.
_PARSED_ELSEWHERE = {"config.json", "quant_model_description.json"}

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.json", "chat_template.jinja")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def check_companions(path: Path, has_voices: bool) -> Iterator[Finding]:
    """Check the files that a processor, a tokenizer and the full class read, and the file of voices if there is one."""
    names = {file.name for file in path.iterdir() if file.is_file()}
    if "tokenizer_config.json" not in names:
        yield make_finding("tokenizer_missing", "tokenizer_config.json", "is missing")
    if not any(set(files) <= names for files in _TOKENIZERS):
        yield make_finding("tokenizer_missing", "tokenizer.json", "is missing, and so is vocab.json with merges.txt")
    if not set(_PROCESSORS) & names:
        yield make_finding("processor_missing", _PROCESSORS[0], "is missing")
    if not set(_TEMPLATES) & names and "chat_template" not in _parse_or_empty(path / "tokenizer_config.json"):
        yield make_finding("chat_template_missing", _TEMPLATES[0], "is missing")
    if "generation_config.json" not in names:
        yield make_finding("generation_config_missing", "generation_config.json", "is missing")
    if has_voices:
        yield from _check_voices(path)
    for name in sorted(names):
        yield from _check_file(path / name)


def _check_voices(path: Path) -> Iterator[Finding]:
    voices = path / "spk_dict.pt"
    if not voices.is_file():
        yield make_finding("spk_dict_missing", voices.name, "is missing")
    elif not zipfile.is_zipfile(voices):  # torch.save writes ZIP archives
        yield make_finding("spk_dict_broken", voices.name, f"{voices.stat().st_size} bytes that torch.load cannot read")


def _check_file(file: Path) -> Iterator[Finding]:
    if file.suffix not in (".json", ".txt", ".jinja", ".pt", ".py"):
        return
    size = file.stat().st_size
    if not size:
        yield make_finding("file_empty", file.name, "0 bytes")
    elif file.suffix == ".json" and size <= MAX_JSON_BYTES and not _is_parsed_elsewhere(file.name):
        try:
            parse_json(read_regular(file, MAX_JSON_BYTES).decode("utf-8"))
        except OSError as error:
            yield make_finding("file_unreadable", file.name, f"cannot be read: {error.strerror or error}")
        except ValueError as error:
            yield make_finding("json_broken", file.name, f"is not JSON: {error}")


def _is_parsed_elsewhere(name: str) -> bool:
    """Whether another check parses the file and reports its faults."""
    return name in _PARSED_ELSEWHERE or name.endswith(".safetensors.index.json")


def _parse_or_empty(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except QuantError:
        return {}  # _check_file reports the fault
