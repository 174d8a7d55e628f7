"""Checks before planning: the checkpoint is float, has the right model type, and is complete."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..formats import DESCRIPTION_FILE
from ..models import MODEL_TYPES, ModelSpec, derive_model_type, is_recomputed_buffer
from ..storage import Checkpoint, load_json_object

_QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")
_MAX_LISTED_NAMES = 5


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantization_config at the top level of a config.json or in one of its blocks, else None."""
    blocks = [config, *(block for block in config.values() if isinstance(block, dict))]
    candidates = (block.get("quantization_config") for block in blocks)
    return next((candidate for candidate in candidates if isinstance(candidate, dict)), None)


def declared_scheme(path: Path, config: dict[str, Any]) -> str:
    """Return the scheme that a checkpoint declares, e.g. `awq 4 bits` or `ascend W8A8_DYNAMIC`; `float` if none."""
    quantization = quantization_of(config)
    if (path / DESCRIPTION_FILE).is_file():
        words = ["ascend", load_json_object(path / DESCRIPTION_FILE).get("model_quant_type")]
    elif quantization is None:
        return "float"
    else:
        bits = quantization.get("bits", quantization.get("w_bit"))
        layout = quantization.get("format", quantization.get("bnb_4bit_quant_type"))
        words = [quantization.get("quant_method", "unknown"), layout, bits and f"{bits} bits"]
    return " ".join(str(word)[:80] for word in words if word)


def refuse_quantized(path: Path) -> None:
    """Raise QuantError, which names the scheme, if a folder declares that it is quantized, by any tool."""
    config = load_json_object(path / "config.json") if (path / "config.json").is_file() else {}
    scheme = declared_scheme(path, config)
    if scheme != "float":
        raise QuantError(f"{path} is already quantized ({scheme})", "give the float checkpoint that it was made from")


def check_type(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise QuantError, which names the right model type, if config.json or the tensor names are of another one."""
    declared = checkpoint.config.get("model_type")
    if declared != model.hf_model_type:
        fix = "give a checkpoint of that model type"
        with suppress(QuantError):  # the architecture is not supported
            fix = f"give --model_type {derive_model_type(checkpoint.config).model_type}"
        raise QuantError(
            f"config.json has model_type {declared!r}; {model.model_type} requires {model.hf_model_type!r}",
            f"{fix}, or omit --model_type",
        )
    names = checkpoint.tensors.keys()
    is_own = all(model.part_of(name).prefix for name in names)
    others = [spec for spec in MODEL_TYPES.values() if spec.hf_model_type != declared and names and not is_own]
    if other := next((spec for spec in others if all(spec.part_of(n).prefix for n in names)), None):
        raise QuantError(
            f"config.json has model_type {declared!r}, but the tensor names are those of {other.hf_model_type!r}"
            f" ({min(names)})",
            f"fetch the config.json that belongs to these weights; they are of {other.model_type} or a related model",
        )


def check_layers(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Check the tensors of the decoder layers against config.json, without transformers. Raises QuantError."""
    shapes = model.family.layer_spec(checkpoint.config).shapes
    layers = range(model.family.num_layers(checkpoint.config))
    expected = {model.layer_name(index, name): shape for index in layers for name, shape in shapes.items()}
    _refuse_fused_experts(model, checkpoint)
    _compare(checkpoint, expected, frozenset())
    in_layers = (name for name in checkpoint.tensors if name.startswith(model.layers_prefix))
    names = [name for name in in_layers if not is_recomputed_buffer(name)]
    if surplus := sorted(set(names) - set(expected)):
        raise QuantError(
            f"{checkpoint.path}: {_listed(surplus)} {_verb(surplus)} not part of the model that config.json describes",
            "config.json and the weights belong to different models; fetch the checkpoint again",
        )
    if wrong := [name for name in names if checkpoint.tensors[name].dtype not in _QUANTIZABLE_DTYPES]:
        raise QuantError(
            f"{checkpoint.path}: {wrong[0]} has dtype {checkpoint.tensors[wrong[0]].dtype};"
            f" expected {', '.join(_QUANTIZABLE_DTYPES)}",
            "give a float checkpoint",
        )


def _refuse_fused_experts(model: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise QuantError for layers whose experts are fused in three-dimensional tensors."""
    fused = [n for n, info in checkpoint.tensors.items() if n.startswith(model.layers_prefix) and len(info.shape) == 3]
    if fused:
        raise QuantError(
            f"{checkpoint.path}: {fused[0]} has shape {list(checkpoint.tensors[fused[0]].shape)}: all experts of the"
            " layer in one tensor, as Qwen3-VL-MoE and Qwen3.5-MoE store them",
            f"{model.model_type} stores one matrix per expert; fetch the published checkpoint",
        )


def check_all_tensors(model: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    """Check all tensors against the model that transformers builds from config.json. Raises QuantError.

    Takes seconds, mostly for imports. Returns warnings: unknown tensors, which are copied, and a config.json whose
    shape is that of another model type.
    """
    expected, optional = model.family.expected_tensors(checkpoint.config)
    _compare(checkpoint, expected, optional)
    surplus = sorted(set(checkpoint.tensors) - set(expected) - optional)
    warnings = [f"{_listed(surplus)} {_verb(surplus)} unknown to this model; copied unchanged"] if surplus else []
    shape = model.family.published_model_type(checkpoint.config)
    if shape and shape not in (model.model_type, model.shape_of):
        warnings.append(
            f"config.json has the shape of {shape}, not of {model.model_type}; the shape in config.json is used"
        )
    return warnings


def _compare(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], optional: frozenset[str]) -> None:
    """Raise QuantError for a missing tensor and for a wrong shape."""
    tensors = checkpoint.tensors
    missing = sorted(set(expected) - set(tensors) - optional)
    if missing:
        raise QuantError(
            f"{checkpoint.path}: {_listed(missing)} {_verb(missing)} missing",
            "fetch the checkpoint again; it is incomplete",
        )
    wrong = sorted(name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape)
    if wrong:
        first = wrong[0]
        raise QuantError(
            f"{checkpoint.path}: {first} has shape {list(tensors[first].shape)},"
            f" config.json implies {list(expected[first])} (mismatches: {len(wrong)})",
            "config.json and the weights belong to different models; fetch the checkpoint again",
        )


def _listed(names: list[str]) -> str:
    """Return `tensor a` or `12 tensors: a, b, c, ...`."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", ..." if len(names) > _MAX_LISTED_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:_MAX_LISTED_NAMES])}{more}"


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
