"""What a checkpoint must be before anything is planned for it: float, of its model type, and whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..formats import DESCRIPTION_FILE
from ..models import MODEL_TYPES, ModelSpec, derive_model_type
from ..storage import Checkpoint, load_json_object

_QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")
_LISTED_NAMES = 5


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, at the top or in one of its blocks."""
    blocks = [config, *(block for block in config.values() if isinstance(block, dict))]
    found = (block.get("quantization_config") for block in blocks)
    return next((q for q in found if isinstance(q, dict)), None)


def declared_scheme(path: Path, config: dict[str, Any]) -> str:
    """How a checkpoint says it is quantized: `awq 4 bits`, `ascend W8A8_DYNAMIC`; `float` for one that says nothing."""
    quantization = quantization_of(config)
    if (path / DESCRIPTION_FILE).is_file():
        said = ["ascend", load_json_object(path / DESCRIPTION_FILE).get("model_quant_type")]
    elif quantization is None:
        return "float"
    else:
        bits = quantization.get("bits", quantization.get("w_bit"))
        form = quantization.get("format", quantization.get("bnb_4bit_quant_type"))
        said = [quantization.get("quant_method", "unknown"), form, bits and f"{bits} bits"]
    return " ".join(str(word)[:80] for word in said if word)


def refuse_quantized(path: Path) -> None:
    """Raises QuantError for a folder that says that it is quantized, by any tool, naming how."""
    config = load_json_object(path / "config.json") if (path / "config.json").is_file() else {}
    scheme = declared_scheme(path, config)
    if scheme != "float":
        raise QuantError(f"{path} is already quantized ({scheme})", "give the float checkpoint it was made from")


def check_type(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """config.json and the names of the tensors are of this model type; where they are of another, that one is named."""
    said = checkpoint.config.get("model_type")
    if said != model.hf_model_type:
        right = "give the checkpoint that belongs to --model_type"
        with suppress(QuantError):  # of no model that is read
            right = f"give --model_type {derive_model_type(checkpoint.config).model_type}"
        raise QuantError(
            f"config.json has model_type {said!r}; {model.model_type} is {model.hf_model_type!r}",
            f"{right}, or leave --model_type out",
        )
    names = checkpoint.tensors.keys()
    others = [spec for spec in MODEL_TYPES.values() if spec.hf_model_type != said and names]
    if other := next((spec for spec in others if all(spec.part_of(n).prefix for n in names)), None):
        raise QuantError(
            f"config.json has model_type {said!r}, but the tensors are named as those of {other.hf_model_type!r}"
            f" ({min(names)})",
            f"fetch the config.json of this checkpoint; it is a {other.model_type} or of that family",
        )


def check_layers(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """The decoder layers' tensors against config.json, without the library."""
    shapes = model.family.layer_spec(checkpoint.config).shapes
    layers = range(model.family.num_layers(checkpoint.config))
    expected = {model.layer_name(index, name): shape for index in layers for name, shape in shapes.items()}
    _compare(checkpoint, expected, frozenset())
    found = [name for name in checkpoint.tensors if name.startswith(model.layers_prefix)]
    if surplus := sorted(set(found) - set(expected)):
        raise QuantError(
            f"{checkpoint.path}: {_named(surplus)} {_verb(surplus)} not in a model of this config.json",
            "config.json and the weights are of different models",
        )
    if odd := [name for name in found if checkpoint.tensors[name].dtype not in _QUANTIZABLE_DTYPES]:
        raise QuantError(f"{checkpoint.path}: {odd[0]} is {checkpoint.tensors[odd[0]].dtype}, not a float to quantize")


def check_whole(model: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    """Every tensor against what the library's classes make of config.json: seconds, most of them for imports.

    Returns warnings: surplus tensors, which are kept, and a config.json of another shape than the model type's.
    """
    expected, optional = model.family.expected_tensors(checkpoint.config)
    _compare(checkpoint, expected, optional)
    surplus = sorted(set(checkpoint.tensors) - set(expected) - optional)
    warnings = [f"{_named(surplus)} {_verb(surplus)} unknown to this model; kept as is"] if surplus else []
    shape = model.family.shape_name(checkpoint.config)
    if shape and shape != model.model_type:
        warnings.append(f"config.json has the shape of {shape}, not of {model.model_type}; its shape is what counts")
    return warnings


def _compare(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], optional: frozenset[str]) -> None:
    found = checkpoint.tensors
    missing = sorted(set(expected) - set(found) - optional)
    if missing:
        raise QuantError(
            f"{checkpoint.path}: {_named(missing)} {_verb(missing)} missing",
            "fetch the checkpoint again; it is not whole",
        )
    wrong = sorted(name for name, shape in expected.items() if name in found and found[name].shape != shape)
    if wrong:
        first = wrong[0]
        raise QuantError(
            f"{checkpoint.path}: {first} has shape {list(found[first].shape)},"
            f" config.json implies {list(expected[first])} ({len(wrong)} such)",
            "config.json and the weights are of different models",
        )


def _named(names: list[str]) -> str:
    """`tensor a` or `12 tensors: a, b, c, ...`."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", ..." if len(names) > _LISTED_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:_LISTED_NAMES])}{more}"


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
