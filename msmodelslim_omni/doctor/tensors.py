"""Whether every tensor that config.json implies is there, by name, shape and dtype, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..models import ModelSpec
from ..storage import FLOAT_DTYPES, TensorInfo
from .findings import Finding, found, some
from .headers import Folder
from .linears import Shapes, StoredLinear, linear_of
from .quantization import Declared

# dtypes of a quantized Linear's bias by format.
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
    """Names first, then shapes and dtypes of all that is not a quantized Linear's own."""
    owned = {info.name for linear in linears.values() if linear.quantized for info in linear.tensors.values()}
    missing = _missing(folder, expected, optional, linears)
    surplus = folder.tensors.keys() - expected.keys() - owned - optional
    foreign = {name for name in folder.tensors if not model.part_of(name).prefix}
    prefix = f"{model.layer_prefix.partition('.')[0]}."
    dropped, prefixed = surplus & foreign, {prefix + name for name in foreign}
    if dropped and prefixed & (missing | {f"{name}.weight" for name in linears} | set(expected)):
        yield found("prefix_dropped", some(dropped), f"{len(dropped)} names without {prefix}")
        surplus -= dropped
        missing -= prefixed
    for name in sorted(surplus):
        yield found("tensor_unexpected", name, "config.json implies no such tensor")
    for part in model.speech_prefixes:
        of_part = {name for name in expected if name.startswith(part)} - optional
        if of_part and of_part <= missing:
            missing -= of_part
            if config.get("enable_audio_output", True) is not False:
                yield found("part_missing", part.rstrip("."), f"none of its {len(of_part)} tensors is there")
    for name in sorted(missing):
        yield found("tensor_missing", name, f"of shape {list(expected[name])}; config.json implies it")
    for name, info in folder.tensors.items():
        if name in expected and name not in owned:
            yield from _check_float(info, expected[name], _dtypes(name, linears, declared))


def _missing(folder: Folder, expected: Shapes, optional: frozenset[str], linears: dict[str, StoredLinear]) -> set[str]:
    """Expected names that are not there, are not a quantized Linear's weight, and lie in no lost file."""
    if folder.broken and not folder.weight_map:
        return set()  # whatever is missing may be in the broken file
    lost = {linear_of(name)[0] for name in folder.lost}
    replaced = {f"{name}.weight" for name, linear in linears.items() if linear.quantized}
    absent = expected.keys() - folder.tensors.keys() - replaced - optional - folder.lost
    return {name for name in absent if linear_of(name)[0] not in lost}


def _dtypes(name: str, linears: dict[str, StoredLinear], declared: Declared) -> tuple[str, ...]:
    owner, suffix = linear_of(name)
    if suffix == "bias" and owner in linears and linears[owner].quantized:
        return _BIAS_DTYPES.get(declared.format, ()) or tuple(sorted(FLOAT_DTYPES))
    return tuple(sorted(FLOAT_DTYPES))


def _check_float(info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Finding]:
    if info.shape != shape:
        yield found("tensor_shape", info.name, f"is {list(info.shape)}; config.json implies {list(shape)}")
    if info.dtype not in dtypes:
        yield found("tensor_dtype", info.name, f"is {info.dtype}, not {' or '.join(dtypes)}")
