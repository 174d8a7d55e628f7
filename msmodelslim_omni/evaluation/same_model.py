"""Check that two checkpoints can be compared token by token.

Required are equal tensor shapes, equal tokenizers and chat templates, and quantized Linears only in the decoder layers.
Tokenizers are compared by content, since every tool writes the files in its own order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..quantized import Source
from ..storage import load_json_object

Shapes = dict[str, tuple[int, ...]]


def check_same_model(float_source: Source, quant_source: Source) -> list[str]:
    """Return warnings. Raises QuantError if the next-token distributions of the two models cannot be compared.

    float_source: the float model, whose tokenizer and processor are used for both.
    """
    _check_float(float_source)
    _check_same_type(float_source, quant_source)
    _check_same_shapes(float_source, quant_source)
    _check_only_layers_quantized(quant_source)
    return _check_same_tokenizer(float_source.path, quant_source.path)


# --- models --------------------------------------------------------------------------------------------------


def _check_float(source: Source) -> None:
    if source.linears:
        raise QuantError(
            f"{source.path} is quantized, but the reference must be the float model",
            "give the float checkpoint as --float and the quantized one as --quant",
        )


def _check_same_type(float_source: Source, quant_source: Source) -> None:
    float_type, quant_type = float_source.model.hf_model_type, quant_source.model.hf_model_type
    if float_type != quant_type:
        raise QuantError(
            f"{float_source.path} is a {float_type}, {quant_source.path} a {quant_type}",
            "compare two models of the same type",
        )


def _check_same_shapes(float_source: Source, quant_source: Source) -> None:
    """Compare the two configurations, then each checkpoint's tensors with its own configuration."""
    float_shapes = _expected_shapes(float_source)
    same_config = quant_source.config == float_source.config
    quant_shapes = float_shapes if same_config else _expected_shapes(quant_source)
    if float_shapes != quant_shapes:
        name = _first_difference(float_shapes, quant_shapes)
        raise QuantError(
            f"the models have different shapes: {name} is {_describe_shape(float_shapes.get(name))} in"
            f" {float_source.path} and {_describe_shape(quant_shapes.get(name))} in {quant_source.path}",
            "give the float checkpoint that the quantized one was made from",
        )
    _check_tensor_shapes(float_source, float_shapes)
    _check_tensor_shapes(quant_source, quant_shapes)


def _check_tensor_shapes(source: Source, expected: Shapes) -> None:
    for name, shape in expected.items():
        actual = source.shape_of(name)
        if actual != shape:
            raise QuantError(
                f"{source.path}: {name} is {_describe_shape(actual)}, config.json implies {_describe_shape(shape)}",
                "write or fetch the checkpoint again",
            )


def _expected_shapes(source: Source) -> Shapes:
    """Shapes of all tensors that affect the next token. Speech parts are excluded."""
    speech_support = source.model.speech_support
    config = speech_support.without_speech(source.config) if speech_support else source.config
    shapes, optional = source.model.family.expected_tensors(config)
    return {name: shape for name, shape in shapes.items() if name not in optional}


def _first_difference(left: dict[str, Any], right: dict[str, Any]) -> str:
    """The first key, in alphabetical order, whose values differ."""
    return min(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def _describe_shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _check_only_layers_quantized(source: Source) -> None:
    """Towers, embedding and lm_head are read as float tensors, so their Linears must not be quantized."""
    model = source.model
    layer_linears = {
        model.layer_name(index, linear)
        for index in range(model.family.num_layers(source.config))
        for linear in model.family.layer_spec(source.config).linears
    }
    outside = [n for n in source.linears if n not in layer_linears and not n.startswith(model.speech_prefixes)]
    if outside:
        raise QuantError(
            f"{source.path}: {min(outside)} is quantized; only Linears of decoder layers are evaluated",
            "quantize the model again and keep the towers, the embedding and lm_head float",
        )


# --- tokenizers ----------------------------------------------------------------------------------------------


def _check_same_tokenizer(float_path: Path, quant_path: Path) -> list[str]:
    """Return a warning if the quantized checkpoint has no tokenizer. Raises QuantError if the tokenizers differ."""
    float_vocabulary, quant_vocabulary = _read_vocabulary(float_path), _read_vocabulary(quant_path)
    if quant_vocabulary is None:
        return [f"{quant_path} holds no tokenizer; the tokenizer of {float_path} is used"]
    if float_vocabulary is not None and float_vocabulary != quant_vocabulary:
        token = _first_difference(float_vocabulary, quant_vocabulary)
        raise QuantError(
            f"different tokenizers: {token[:40]!r} is token {float_vocabulary.get(token, 'none')} in {float_path}"
            f" and {quant_vocabulary.get(token, 'none')} in {quant_path}",
            "give the float checkpoint that the quantized one was made from",
        )
    merges = _read_merges(float_path), _read_merges(quant_path)
    if None not in merges and merges[0] != merges[1]:
        raise QuantError(
            f"different tokenizers: the merges in {float_path} and {quant_path} differ",
            "copy the float model's tokenizer",
        )
    templates = _read_chat_template(float_path), _read_chat_template(quant_path)
    if None not in templates and templates[0] != templates[1]:
        raise QuantError(
            f"different chat templates in {float_path} and {quant_path}: the models would see different prompts",
            "copy the float model's chat template, if the quantized model was made from it",
        )
    return []


def _read_vocabulary(folder: Path) -> dict[str, Any] | None:
    """The id of every token, from tokenizer.json, else from vocab.json and the added tokens. None without both."""
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = load_json_object(file)
        vocabulary = dict(_require(file, _require(file, tokenizer.get("model"), dict).get("vocab"), dict))
        for token in _require(file, tokenizer.get("added_tokens") or [], list):
            vocabulary[str(_require(file, token, dict).get("content"))] = token.get("id")
        return vocabulary
    if not (folder / "vocab.json").is_file():
        return None
    vocabulary = load_json_object(folder / "vocab.json") | _load_optional(folder / "added_tokens.json")
    file = folder / "tokenizer_config.json"
    for number, token in _require(file, _load_optional(file).get("added_tokens_decoder") or {}, dict).items():
        vocabulary[str(_require(file, token, dict).get("content"))] = int(number) if number.isdecimal() else number
    return vocabulary


def _read_merges(folder: Path) -> list[str] | None:
    """The merge pairs in order. Files store a pair as `a b` or as [a, b]. None if the folder has no merges."""
    file = folder / "tokenizer.json"
    if file.is_file():
        merges = _require(file, _require(file, load_json_object(file).get("model"), dict).get("merges") or [], list)
        return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]
    file = folder / "merges.txt"
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _read_chat_template(folder: Path) -> str | None:
    """The chat template, in a processor's order of search: the template's own file, else tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace").strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _load_optional(folder / name).get("chat_template")
        if isinstance(template, str):
            return template.strip()
    return None


def _load_optional(file: Path) -> dict[str, Any]:
    return load_json_object(file) if file.is_file() else {}


def _require(file: Path, value: Any, kind: type) -> Any:
    """Return the value, or raise QuantError if it has another type."""
    if not isinstance(value, kind):
        raise QuantError(
            f"{file}: expected a {kind.__name__}, found {str(value)[:40]!r}", "copy the float model's tokenizer"
        )
    return value
