"""Checks that the checkpoint has exactly the tensors that config.json implies, by name, shape and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..models import ModelSpec, is_recomputed_buffer
from ..storage import FLOAT_DTYPES, TensorInfo
from .findings import Finding, make_finding, shorten_list
from .headers import Folder
from .linears import Shapes, StoredLinear, split_tensor_name
from .quantization import Declared

# Format -> allowed dtypes of a quantized Linear's bias.
_BIAS_DTYPES = {"ascend": ("F32",), "awq": ("F16", "BF16")}


def check_tensors(
    folder: Folder,
    config: dict[str, Any],
    model: ModelSpec,
    expected: Shapes,
    optional: frozenset[str],
    linears: dict[str, StoredLinear],
    declared: Declared,
) -> Iterator[Finding]:
    """Check names, then shapes and dtypes of all tensors that are not part of a quantized Linear."""
    owned = {info.name for linear in linears.values() if linear.quantized for info in linear.tensors.values()}
    missing = _missing(folder, expected, optional, linears)
    unexpected = folder.tensors.keys() - expected.keys() - owned - optional
    unexpected = {name for name in unexpected if not is_recomputed_buffer(name)}
    foreign = {name for name in folder.tensors if not model.part_of(name).prefix}
    prefix = f"{model.layer_prefix.partition('.')[0]}."
    dropped, prefixed = unexpected & foreign, {prefix + name for name in foreign}
    if dropped and prefixed & (missing | {f"{name}.weight" for name in linears} | set(expected)):
        yield make_finding("prefix_dropped", shorten_list(dropped), f"{len(dropped)} names lack the prefix {prefix}")
        unexpected -= dropped
        missing -= prefixed
    for name in sorted(unexpected):
        yield make_finding("tensor_unexpected", name, "does not belong to the model in config.json")
    for part in model.speech_prefixes:
        of_part = {name for name in expected if name.startswith(part)} - optional
        if of_part and of_part <= missing:
            missing -= of_part
            if config.get("enable_audio_output", True) is not False:
                yield make_finding("part_missing", part.rstrip("."), f"all {len(of_part)} tensors are missing")
    for name in sorted(missing):
        yield make_finding("tensor_missing", name, f"is missing; config.json implies shape {list(expected[name])}")
    for name, info in folder.tensors.items():
        if name in expected and name not in owned:
            yield from _check_float(info, expected[name], _allowed_dtypes(name, linears, declared))


def _missing(folder: Folder, expected: Shapes, optional: frozenset[str], linears: dict[str, StoredLinear]) -> set[str]:
    """Return the names of missing tensors, without weights of quantized Linears and tensors of lost files."""
    if folder.broken and not folder.weight_map:
        return set()  # the missing tensors may be in the broken file
    lost = {split_tensor_name(name)[0] for name in folder.lost_tensors}
    replaced = {f"{name}.weight" for name, linear in linears.items() if linear.quantized}
    absent = expected.keys() - folder.tensors.keys() - replaced - optional - folder.lost_tensors
    return {name for name in absent if split_tensor_name(name)[0] not in lost}


def _allowed_dtypes(name: str, linears: dict[str, StoredLinear], declared: Declared) -> tuple[str, ...]:
    owner, suffix = split_tensor_name(name)
    if suffix == "bias" and owner in linears and linears[owner].quantized:
        return _BIAS_DTYPES.get(declared.format, ()) or tuple(sorted(FLOAT_DTYPES))
    return tuple(sorted(FLOAT_DTYPES))


def _check_float(info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Finding]:
    if info.shape != shape:
        yield make_finding(
            "tensor_shape", info.name, f"has shape {list(info.shape)}; config.json implies {list(shape)}"
        )
    if info.dtype not in dtypes:
        yield make_finding("tensor_dtype", info.name, f"is {info.dtype}, not {' or '.join(dtypes)}")
