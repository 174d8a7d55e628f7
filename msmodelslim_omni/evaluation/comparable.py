"""Whether two checkpoints can be compared token by token: same shapes, same tokenizer, only decoder layers quantized.

Tokenizers are compared by what they say, not by their bytes: every tool writes these files in its own order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..quantized import Source
from ..storage import load_json_object


def check_comparable(exact: Source, other: Source) -> list[str]:
    """Raises QuantError for a pair whose distributions cannot be compared; returns what is worth a warning.

    exact: the float model, whose tokenizer and processor are used.
    """
    if exact.linears:
        raise QuantError(
            f"{exact.path} is quantized; the float model is what a quantized one is compared with",
            "give the float checkpoint as --float and the quantized one as --quant",
        )
    if exact.model.hf_model_type != other.model.hf_model_type:
        raise QuantError(
            f"{exact.path} is a {exact.model.hf_model_type}, {other.path} a {other.model.hf_model_type}",
            "compare models of one type",
        )
    _check_shapes(exact, other)
    _check_quantized(other)
    return _check_tokenizers(exact.path, other.path)


def _check_shapes(exact: Source, other: Source) -> None:
    """The configurations against each other, then each checkpoint's tensors against its own."""
    ours = _expected(exact)
    theirs = ours if other.config == exact.config else _expected(other)
    if ours != theirs:
        name = min(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        shapes = [_told(shapes.get(name)) for shapes in (ours, theirs)]
        raise QuantError(
            f"models of different shapes: {name} is {shapes[0]} in {exact.path} and {shapes[1]} in {other.path}",
            "give the float checkpoint that the quantized one was made from",
        )
    for source, expected in ((exact, ours), (other, theirs)):
        for name, shape in expected.items():
            found = source.shape_of(name)
            if found != shape:
                raise QuantError(
                    f"{source.path}: {name} is {_told(found)}, config.json implies {_told(shape)}",
                    "write or fetch the checkpoint again",
                )


def _expected(source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that decide the next token; those that speak are not asked for."""
    speaking = source.model.speaking
    silent = speaking.without_speech(source.config) if speaking else source.config
    shapes, optional = source.model.family.expected_tensors(silent)
    return {name: shape for name, shape in shapes.items() if name not in optional}


def _told(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _check_quantized(source: Source) -> None:
    """Linears of towers or lm_head would be read as float tensors that are not there."""
    model = source.model
    linears = {
        model.layer_name(index, linear)
        for index in range(model.family.num_layers(source.config))
        for linear in model.family.layer_spec(source.config).linears
    }
    beyond = [n for n in source.linears if n not in linears and not n.startswith(model.speech_prefixes)]
    if beyond:
        raise QuantError(
            f"{source.path}: {min(beyond)} is quantized; only Linears of decoder layers are evaluated",
            "quantize it with the towers, the embedding and lm_head kept float",
        )


# --- tokenizers ----------------------------------------------------------------------------------------------


def _check_tokenizers(exact: Path, other: Path) -> list[str]:
    ours, theirs = _vocabulary(exact), _vocabulary(other)
    if theirs is None:
        return [f"{other} holds no tokenizer; that of {exact} is used"]
    if ours is not None and ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise QuantError(
            f"different tokenizers: {token[:40]!r} is token {ours.get(token, 'none')} in {exact}"
            f" and {theirs.get(token, 'none')} in {other}",
            "give the float checkpoint that the quantized one was made from",
        )
    merges = _merges(exact), _merges(other)
    if None not in merges and merges[0] != merges[1]:
        raise QuantError(f"different tokenizers: the merges in {exact} and {other} differ", "copy the float model's")
    templates = _chat_template(exact), _chat_template(other)
    if None not in templates and templates[0] != templates[1]:
        raise QuantError(
            f"different chat templates in {exact} and {other}: each model would see its own prompts",
            "copy the float model's, if the quantized one was made from it",
        )
    return []


def _vocabulary(folder: Path) -> dict[str, Any] | None:
    """Every token's id: of tokenizer.json, else of vocab.json and the added tokens beside it; None where none is."""
    file = folder / "tokenizer.json"
    if file.is_file():
        whole = load_json_object(file)
        vocabulary = dict(_checked(file, _checked(file, whole.get("model"), dict).get("vocab"), dict))
        for token in _checked(file, whole.get("added_tokens") or [], list):
            vocabulary[str(_checked(file, token, dict).get("content"))] = token.get("id")
        return vocabulary
    if not (folder / "vocab.json").is_file():
        return None
    vocabulary = load_json_object(folder / "vocab.json") | _optional(folder / "added_tokens.json")
    file = folder / "tokenizer_config.json"
    for number, token in _checked(file, _optional(file).get("added_tokens_decoder") or {}, dict).items():
        vocabulary[str(_checked(file, token, dict).get("content"))] = int(number) if number.isdecimal() else number
    return vocabulary


def _merges(folder: Path) -> list[str] | None:
    """The pairs in their order; files write them as `a b` or as [a, b]."""
    file = folder / "tokenizer.json"
    if file.is_file():
        merges = _checked(file, _checked(file, load_json_object(file).get("model"), dict).get("merges") or [], list)
        return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]
    file = folder / "merges.txt"
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _chat_template(folder: Path) -> str | None:
    """As a processor looks for it: its own file, else the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace").strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        said = _optional(folder / name).get("chat_template")
        if isinstance(said, str):
            return said.strip()
    return None


def _optional(file: Path) -> dict[str, Any]:
    return load_json_object(file) if file.is_file() else {}


def _checked(file: Path, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise QuantError(
            f"{file}: {str(value)[:40]!r} stands where a {kind.__name__} is read", "copy the float model's"
        )
    return value
