"""A quantized checkpoint against the float one it was made from: byte for byte, and weight for weight.

Smoothing folds a factor s per input channel: what precedes a group of Linears is divided by it, their columns are
multiplied. So a norm's weight n may change to n', and the Linears behind it are compared with W[:, c] * n[c] / n'[c].
Between v and o, up and down the factors are not stored; they are estimated by least squares, per row of the first (a)
and per column of the second (g). Each g must be what undoes the division: n / n', or 1 / a of the row that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..models import LinearGroup, ModelSpec
from ..numerics import (
    QuantizedLinear,
    dequantize,
    linear_rows,
    relative_error,
)
from ..storage import (
    TORCH_DTYPES,
    Checkpoint,
    TensorInfo,
    byte_view,
    load_tensor,
    open_checkpoint,
    read_bytes,
)
from .config import KEY, blocks
from .content import is_readable, load_integers, pieces
from .findings import Finding, found, some
from .headers import Folder
from .linears import StoredLinear

# Relative error |W' - W| / |W| of a weight that is still that weight: plain rounding of 4 bits in groups of 128 gives
# 0.1, with clipping and GPTQ up to 0.3; of 8 bits 0.01, and 0.1 where outliers stretch the scale. Another weight
# altogether has 1.4. A row may be worse than the whole.
BOUND = {4: 0.5, 8: 0.25, 16: 0.02}
ROW_BOUND = {4: 0.9, 8: 0.5, 16: 0.05}
# Rounding errors average to nothing; a zero point off by one shows as 1 (in steps).
_SHIFTED = 0.3
# How far factors may be from what undoes them, as RMS weighted by the columns' energy: rounding averages out over the
# rows, but small columns of a group that has large ones shrink at 4 bits.
_FACTOR_BOUND = {4: 0.2, 8: 0.05, 16: 0.05}
_BLOCK_ELEMENTS = 1 << 17
_EXEMPT = {"enable_audio_output", "enable_talker"}
# Files that a run writes, or that differ between float and quantized for good reason.
_OWN_FILES = {"config.json", "quant_model_description.json", "quant_report.json", "quant_report.md", "README.md"}
_COMPARED_SUFFIXES = (".json", ".txt", ".jinja", ".pt", ".py", ".model")


@dataclass(frozen=True)
class Comparison:
    """relative: |y - x| / |x| of the whole; rows: of each row; shift: mean of (y - x) / step; factors: a, per row."""

    relative: float
    rows: torch.Tensor
    shift: float
    factors: torch.Tensor


def check_source(
    path: Path,
    source: Path,
    config: dict[str, Any],
    model: ModelSpec,
    folder: Folder,
    linears: dict[str, StoredLinear],
) -> Iterator[Finding]:
    """Config, other files, float tensors, quantized weights."""
    try:
        original = open_checkpoint(source)
    except QuantError as error:
        yield found("source_unreadable", source, error.message)
        return
    if why := _other_model(config, original, linears):
        yield found("source_other_model", source, why)
        return
    yield from _check_settings(path, config, original)
    spec = model.family.layer_spec(config)
    layers = range(model.family.num_layers(config))
    changeable: set[str] = set()
    for index in layers:
        for group in spec.groups:
            changeable |= _changeable(model, index, group, linears)
    yield from _check_floats(folder, original, linears, changeable)
    for index in layers:
        yield from _check_layer(model, index, spec.groups, folder, original, linears)


def _other_model(config: dict[str, Any], original: Checkpoint, linears: dict[str, StoredLinear]) -> str:
    if blocks(original.config):
        return "its config.json holds a quantization_config: it is quantized itself"
    if config.get("model_type") != original.config.get("model_type"):
        return f"its model_type is {str(original.config.get('model_type'))[:60]!r}"
    for linear in linears.values():
        info = original.tensors.get(f"{linear.name}.weight")
        if linear.quantized and linear.shape is not None and (info is None or info.shape != linear.shape):
            return f"{linear.name}.weight is {'missing' if info is None else list(info.shape)} there"
    return ""


def _check_settings(path: Path, config: dict[str, Any], original: Checkpoint) -> Iterator[Finding]:
    differing = sorted(_differing(_plain(config), _plain(original.config)))
    if differing:
        yield found("source_config_differs", "config.json", some(differing))
    for relative in original.path.iterdir():
        mine = path / relative.name
        compared = relative.suffix in _COMPARED_SUFFIXES and not relative.name.endswith(".index.json")
        if not compared or relative.name in _OWN_FILES or not relative.is_file() or not mine.is_file():
            continue
        if not _same_bytes(mine, relative):
            yield found("source_file_differs", relative.name, "differs from the source's")


def _plain(block: Any) -> Any:
    """Without quantization_config and what says whether the model speaks."""
    if not isinstance(block, dict):
        return block
    return {key: _plain(value) for key, value in block.items() if key != KEY and key not in _EXEMPT}


def _differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}"


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        while block := a.read(1 << 20):
            if block != b.read(1 << 20):
                return False
    return True


# --- float tensors -------------------------------------------------------------------------------------------


def _changeable(model: ModelSpec, index: int, group: LinearGroup, linears: dict[str, StoredLinear]) -> set[str]:
    """Float tensors that folding into this group may change; nothing is folded unless all its Linears are quantized."""
    names = [model.layer_name(index, linear) for linear in group.linears]
    if not all(name in linears and linears[name].quantized for name in names):
        return set()
    previous = model.layer_name(index, group.previous)
    return {f"{previous}.weight", f"{previous}.bias"}


def _check_floats(
    folder: Folder, original: Checkpoint, linears: dict[str, StoredLinear], changeable: set[str]
) -> Iterator[Finding]:
    biases = {f"{name}.bias" for name, linear in linears.items() if linear.quantized}
    replaced = {f"{name}.weight" for name, linear in linears.items() if linear.quantized}
    for name, info in folder.tensors.items():
        theirs = original.tensors.get(name)
        if theirs is None or name in replaced or info.shape != theirs.shape or name in changeable:
            continue
        if info.dtype != theirs.dtype and name not in biases:
            yield found("float_dtype_changed", name, f"is {info.dtype}, was {theirs.dtype}")
        if not _same_numbers(info, theirs):
            yield found("float_changed", name, "differs from the source")


def _same_numbers(info: TensorInfo, theirs: TensorInfo) -> bool:
    """The same bytes; of another dtype, the same numbers once the source's are cast."""
    dtype = TORCH_DTYPES[info.dtype]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize, torch.uint8)
    for mine, original in zip(pieces(info), pieces(theirs), strict=True):
        cast = original if info.dtype == theirs.dtype else original.to(dtype)
        if not torch.equal(mine.view(bits), cast.view(bits)):  # NaN and -0 too
            return False
    return True


# --- quantized weights ---------------------------------------------------------------------------------------


def _check_layer(
    model: ModelSpec,
    index: int,
    groups: tuple[LinearGroup, ...],
    folder: Folder,
    original: Checkpoint,
    linears: dict[str, StoredLinear],
) -> Iterator[Finding]:
    """Every quantized Linear of a layer, and a float one whose rows may have been divided."""
    divided = {group.previous for group in groups if group.subgraph != "norm-linear"}
    factors: dict[str, torch.Tensor] = {}
    for group in groups:
        wanted = _wanted_columns(model.layer_name(index, group.previous), group, folder, original, factors)
        for relative in group.linears:
            name = model.layer_name(index, relative)
            weight, linear = original.tensors.get(f"{name}.weight"), linears.get(name)
            if linear is None or weight is None or weight.shape != linear.shape:
                continue
            stored = _stored(linear)
            if stored is None or (not linear.quantized and relative not in divided):
                continue
            ones = torch.ones(weight.shape[0])
            rows_unknown, from_norm = relative in divided, group.subgraph == "norm-linear"
            columns, energy = torch.ones(weight.shape[1]), ones
            if linear.quantized and not from_norm:
                columns, energy = _estimated_columns(stored, weight, ones)
            elif linear.quantized and wanted is not None and wanted.shape == columns.shape:
                columns = wanted
            result = _compare(stored, weight, columns, rows_unknown)
            if linear.quantized and from_norm:
                columns, energy = _estimated_columns(stored, weight, result.factors)
            if linear.quantized and wanted is not None and wanted.shape == columns.shape:
                yield from _factor_faults(f"{name} and {group.previous}", columns, wanted, energy, stored.bits)
            factors[relative] = result.factors
            yield from _weight_faults(name, result, stored.bits)
            if rows_unknown:
                yield from _check_bias(name, result.factors, folder, original, stored.bits)


def _wanted_columns(
    previous: str, group: LinearGroup, folder: Folder, original: Checkpoint, factors: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """What the columns of a group must be multiplied by to undo what was done before it; None if that is unknown."""
    if group.subgraph != "norm-linear":
        if group.previous not in factors:
            return None
        rows = factors[group.previous].view(-1, 1, group.head_dim)
        return 1 / rows.expand(-1, group.repeat, -1).flatten()
    before, after = original.tensors.get(f"{previous}.weight"), folder.tensors.get(f"{previous}.weight")
    if before is None or after is None or before.shape != after.shape:
        return None
    n, changed = load_tensor(before).to(torch.float32), load_tensor(after).to(torch.float32)
    return torch.where(changed != 0, n / changed, torch.ones_like(n))


@dataclass(frozen=True)
class _Stored:
    """A weight as it is stored: its rows as float32, and the step of each number where it has one."""

    bits: int
    rows: Callable[[slice], torch.Tensor]
    steps: Callable[[slice], torch.Tensor] | None


def _stored(linear: StoredLinear) -> _Stored | None:
    if not linear.quantized:
        info = linear.tensors["weight"]
        return _Stored(16, lambda rows: _rows(info, rows), None) if linear.sound else None
    if not is_readable(linear) or (linear.form == "ascend_static" and "weight_scale" not in linear.tensors):
        return None
    integers = load_integers(linear)
    return _Stored(
        integers.scheme.weight_bits,
        lambda rows: dequantize(linear_rows(integers, rows)),
        lambda rows: _steps(integers, rows),
    )


def _steps(linear: QuantizedLinear, rows: slice) -> torch.Tensor:
    """Scales repeated for every input: [rows, in]."""
    scales = linear.scales[rows]
    return scales.repeat_interleave(linear.qweight.shape[1] // scales.shape[1], dim=1)


def _rows(info: TensorInfo, rows: slice) -> torch.Tensor:
    """Consecutive rows of a two-dimensional tensor as float32."""
    first, last, _ = rows.indices(info.shape[0])
    block = torch.empty((last - first, info.shape[1]), dtype=TORCH_DTYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0]
    read_bytes(info, first * row_bytes, byte_view(block))
    return block.to(torch.float32)


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Slices over the rows, small enough that the several float32 copies of a block stay in the cache."""
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    return [slice(first, first + step) for first in range(0, shape[0], step)]


def _estimated_columns(stored: _Stored, weight: TensorInfo, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g[c] = sum over r of y x / sum of x x, the factor that brings the source's column nearest, and sum of x x.

    factors: a, by which the source's rows are multiplied first.
    """
    xy = torch.zeros(weight.shape[1], dtype=torch.float64)
    xx = torch.zeros_like(xy)
    for rows in _blocks(weight.shape):
        x, y = _rows(weight, rows) * factors[rows, None], stored.rows(rows)
        xy += (x * y).sum(dim=0)
        xx += (x * x).sum(dim=0)
    return torch.where(xx > 0, xy / xx, torch.ones_like(xx)).to(torch.float32), xx.to(torch.float32)


def _compare(stored: _Stored, weight: TensorInfo, columns: torch.Tensor, rows_unknown: bool) -> Comparison:
    """y stored, x = a W[:, c] g[c] with a = 1, or per row sum of y x / sum of x x."""
    errors, factors, shift, count = [], [], 0.0, 0
    total_error = total_signal = 0.0
    for rows in _blocks(weight.shape):
        x, y = _rows(weight, rows) * columns, stored.rows(rows)
        a = torch.ones(x.shape[0])
        if rows_unknown:
            xx = (x * x).sum(dim=1)
            a = torch.where(xx > 0, (x * y).sum(dim=1) / xx, a)
            x = x * a[:, None]
        d = y - x
        error, signal = d.square().sum(dim=1, dtype=torch.float64), x.square().sum(dim=1, dtype=torch.float64)
        errors.append(torch.where(signal > 0, (error / signal).sqrt(), error.sign() * torch.inf).nan_to_num(nan=0.0))
        factors.append(a)
        total_error, total_signal = total_error + float(error.sum()), total_signal + float(signal.sum())
        if stored.steps is not None:
            shift += float((d / stored.steps(rows)).sum(dtype=torch.float64))
        count += d.numel()
    whole = total_error if total_error != total_error else relative_error(total_error, total_signal)
    return Comparison(whole, torch.cat(errors), shift / max(1, count), torch.cat(factors))


def _weight_faults(name: str, result: Comparison, bits: int) -> Iterator[Finding]:
    if not result.relative <= BOUND[bits]:  # NaN is far too
        yield found("weight_far", name, f"relative error {result.relative:.3g}; {bits} bits stay below {BOUND[bits]}")
        return
    if bits < 16 and result.relative == 0:
        yield found("weight_unchanged", name, "relative error 0")
    far = (result.rows > ROW_BOUND[bits]).nonzero().flatten().tolist()
    if far:
        yield found("rows_far", name, f"{len(far)} rows, the first {far[0]}: relative error {result.rows[far[0]]:.3g}")
    if abs(result.shift) > _SHIFTED:
        yield found("weight_shifted", name, f"by {result.shift:+.2f} steps on average")


def _check_bias(name: str, factors: torch.Tensor, folder: Folder, original: Checkpoint, bits: int) -> Iterator[Finding]:
    """The bias must be divided by what the rows are divided by."""
    before, after = original.tensors.get(f"{name}.bias"), folder.tensors.get(f"{name}.bias")
    if before is None or after is None or before.shape != factors.shape or after.shape != factors.shape:
        return
    old, new = load_tensor(before).to(torch.float32), load_tensor(after).to(torch.float32)
    yield from _factor_faults(f"{name}.bias", torch.where(old != 0, new / old, factors), factors, old.square(), bits)


def _factor_faults(
    where: str, actual: torch.Tensor, wanted: torch.Tensor, energy: torch.Tensor, bits: int
) -> Iterator[Finding]:
    """Factors by channel, as they are and as they must be, weighted by the energy of what they multiply."""
    off = (actual - wanted).square() * energy
    deviation = relative_error(float(off.sum()), float((wanted.square() * energy).sum()))
    if not deviation <= _FACTOR_BOUND[bits]:
        worst = int(off.argmax())
        told = f"channel {worst} has {float(actual[worst]):.3g}, not {float(wanted[worst]):.3g}"
        yield found("scaling_inconsistent", where, f"factors differ by {deviation:.2g} on average, e.g. {told}")
