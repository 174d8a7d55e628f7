"""Comparison of a quantized checkpoint with its float source: float tensors by bytes, quantized weights by value.

Smoothing folds a factor s per input channel: the module before a group of Linears is divided by s, and the columns of
the Linears are multiplied by s. If this changes a norm's weight n to n', the Linears after the norm are compared with
W[:, c] * n[c] / n'[c]; a Linear after it that stays float, such as a router, must equal that to the last bit. Between v
and o, and between up and down, the factors are not stored. They are estimated by least squares, per row of the first
Linear (a) and per column of the second (g). Each g must cancel the division: it must equal n / n', or 1 / a of the row
that the column reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..models import LinearGroup, ModelSpec, Subgraph
from ..numerics import (
    relative_error,
)
from ..storage import (
    FLOAT_DTYPES,
    TORCH_DTYPES,
    Checkpoint,
    TensorInfo,
    load_tensor,
    open_checkpoint,
)
from .comparison import Comparison, compare, estimated_columns, stored_weight
from .config import quantization_configs
from .content import read_pieces
from .findings import Finding, make_finding, shorten_list
from .headers import Folder, read_json
from .linears import StoredLinear
from .method import KEY

# Maximum relative error |W' - W| / |W| by bits. Plain rounding to 4 bits in groups of 128 gives 0.1, clipping and GPTQ
# up to 0.3; 8 bits give 0.01, or 0.1 if outliers stretch the scale. An unrelated weight gives 1.4. A single row may
# have a larger error than the entire weight.
BOUND = {4: 0.5, 8: 0.25, 16: 0.02}
ROW_BOUND = {4: 0.9, 8: 0.5, 16: 0.05}
# Maximum mean difference in steps. Rounding errors average to 0; a zero point that is off by one gives 1.
_MAX_SHIFT = 0.3
# Maximum relative RMS deviation of the factors, weighted by the energy of the columns. Rounding averages out over the
# rows, but at 4 bits small columns shrink if they share a group with large ones.
_FACTOR_BOUND = {4: 0.2, 8: 0.05, 16: 0.05}
# Maximum relative change of a tuned bias. 0.08 was the largest seen.
_TUNED_BIAS = 0.5
_EXEMPT_KEYS = {"enable_audio_output", "enable_talker"}
# Files that a run writes, so they differ from the source.
_WRITTEN_FILES = {"config.json", "quant_model_description.json", "quant_report.json", "quant_report.md", "README.md"}
_COMPARED_SUFFIXES = (".json", ".txt", ".jinja", ".pt", ".py", ".model")


def check_source(
    path: Path,
    source: Path,
    config: dict[str, Any],
    model: ModelSpec,
    folder: Folder,
    linears: dict[str, StoredLinear],
) -> Iterator[Finding]:
    """Compare config.json, other files, float tensors and quantized weights with the source."""
    try:
        original = open_checkpoint(source)
    except QuantError as error:
        yield make_finding("source_unreadable", source, error.message)
        return
    if mismatch := _describe_mismatch(config, original, linears):
        yield make_finding("source_other_model", source, mismatch)
        return
    yield from _check_settings(path, config, original)
    spec = model.family.layer_spec(config)
    layers = range(model.family.num_layers(config))
    changeable: set[str] = set()
    for index in layers:
        for part in spec.subgraphs:
            changeable |= _changeable(model, index, part, linears)
    tuned: set[str] = set()
    if _was_tuned(path):
        tuned = {f"{name}.bias" for name, linear in linears.items() if linear.quantized}
        for index, part in ((index, part) for index in layers for part in spec.subgraphs if part.is_tunable):
            if any(f"{model.layer_name(index, linear)}.bias" in tuned for linear in part.linears):
                changeable.add(f"{model.layer_name(index, part.previous)}.weight")
    yield from _check_floats(folder, original, linears, changeable, tuned - changeable)
    for index in layers:
        yield from _check_layer(model, index, spec.subgraphs, folder, original, linears)


def _describe_mismatch(config: dict[str, Any], original: Checkpoint, linears: dict[str, StoredLinear]) -> str:
    """Return why `original` is not the source of this checkpoint, or an empty string."""
    if quantization_configs(original.config):
        return "its config.json has a quantization_config: it is quantized itself"
    if config.get("model_type") != original.config.get("model_type"):
        return f"its model_type is {str(original.config.get('model_type'))[:60]!r}"
    for linear in linears.values():
        info = original.tensors.get(f"{linear.name}.weight")
        if linear.quantized and linear.shape is not None and (info is None or info.shape != linear.shape):
            fault = "is missing" if info is None else f"has shape {list(info.shape)}"
            return f"{linear.name}.weight {fault} in the source"
    return ""


def _check_settings(path: Path, config: dict[str, Any], original: Checkpoint) -> Iterator[Finding]:
    differing = sorted(_differing_keys(_comparable_settings(config), _comparable_settings(original.config)))
    if differing:
        yield make_finding("source_config_differs", "config.json", f"differs in {shorten_list(differing)}")
    for source_file in original.path.iterdir():
        output_file = path / source_file.name
        is_compared = source_file.suffix in _COMPARED_SUFFIXES and not source_file.name.endswith(".index.json")
        if not is_compared or source_file.name in _WRITTEN_FILES or not source_file.is_file():
            continue
        if output_file.is_file() and not _has_same_bytes(output_file, source_file):
            yield make_finding("source_file_differs", source_file.name, "differs from the source's file")


def _comparable_settings(block: Any) -> Any:
    """Return the settings without quantization_config and the switches of speech output."""
    if not isinstance(block, dict):
        return block
    return {key: _comparable_settings(value) for key, value in block.items() if key != KEY and key not in _EXEMPT_KEYS}


def _differing_keys(settings: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in settings.keys() | other.keys():
        a, b = settings.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}"


def _has_same_bytes(file: Path, other: Path) -> bool:
    if file.stat().st_size != other.stat().st_size:
        return False
    with file.open("rb") as a, other.open("rb") as b:
        while block := a.read(1 << 20):
            if block != b.read(1 << 20):
                return False
    return True


# --- float tensors -------------------------------------------------------------------------------------------


def _changeable(model: ModelSpec, index: int, part: Subgraph, linears: dict[str, StoredLinear]) -> set[str]:
    """Return the float tensors that folding may change: none unless all Linears of the subgraph are quantized."""
    names = [model.layer_name(index, linear) for linear in part.linears]
    if not all(name in linears and linears[name].quantized for name in names):
        return set()
    previous = model.layer_name(index, part.previous)
    readers = {f"{model.layer_name(index, reader)}.weight" for reader in part.float_readers}
    return {f"{previous}.weight", f"{previous}.bias", *readers}


def _was_tuned(path: Path) -> bool:
    """Whether the output's report says that scales, norms and biases were tuned after rounding."""
    try:
        tuning = read_json(path / "quant_report.json").get("tuning")
    except QuantError:
        return False  # no report, or a broken one: then nothing excuses a changed bias
    return isinstance(tuning, dict) and bool(tuning.get("epoch"))


def _check_floats(
    folder: Folder, original: Checkpoint, linears: dict[str, StoredLinear], changeable: set[str], tuned: set[str]
) -> Iterator[Finding]:
    """Compare the bytes of float tensors; the biases in `tuned` may differ up to a bound."""
    biases = {f"{name}.bias" for name, linear in linears.items() if linear.quantized}
    replaced = {f"{name}.weight" for name, linear in linears.items() if linear.quantized}
    for name, info in folder.tensors.items():
        source_info = original.tensors.get(name)
        if source_info is None or name in replaced or info.shape != source_info.shape or name in changeable:
            continue
        if info.dtype != source_info.dtype and name not in biases:
            yield make_finding("float_dtype_changed", name, f"is {info.dtype}; the source has {source_info.dtype}")
        if name in tuned:
            old, new = (load_tensor(tensor).to(torch.float32) for tensor in (source_info, info))
            relative = relative_error(float((new - old).square().sum()), float(old.square().sum()))
            if not relative <= _TUNED_BIAS:
                yield make_finding("float_changed", name, f"differs from the source by {relative:.2g} of its length")
        elif not _has_same_values(info, source_info):
            yield make_finding("float_changed", name, "differs from the source")


def _has_same_values(info: TensorInfo, source_info: TensorInfo) -> bool:
    """Whether the bytes are equal, after a cast of the source if the dtypes differ."""
    dtype = TORCH_DTYPES[info.dtype]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize, torch.uint8)
    for piece, source_piece in zip(read_pieces(info), read_pieces(source_info), strict=True):
        cast = source_piece if info.dtype == source_info.dtype else source_piece.to(dtype)
        if not torch.equal(piece.view(bits), cast.view(bits)):  # compares bits, so NaN and -0 count too
            return False
    return True


# --- quantized weights ---------------------------------------------------------------------------------------


def _check_layer(
    model: ModelSpec,
    index: int,
    parts: tuple[Subgraph, ...],
    folder: Folder,
    original: Checkpoint,
    linears: dict[str, StoredLinear],
) -> Iterator[Finding]:
    """Compare every quantized Linear of a layer, and float Linears whose rows or columns may have been scaled."""
    divided = {part.previous for part in parts if part.type != "norm-linear"}
    factors: dict[str, torch.Tensor] = {}
    for part in parts:
        previous = model.layer_name(index, part.previous)
        expected = _expected_columns(previous, part.groups[0], folder, original, factors)
        for reader in part.float_readers:
            yield from _check_float_reader(model.layer_name(index, reader), previous, expected, folder, original)
        for relative in part.linears:
            name = model.layer_name(index, relative)
            weight, linear = original.tensors.get(f"{name}.weight"), linears.get(name)
            if linear is None or weight is None or weight.shape != linear.shape:
                continue
            stored = stored_weight(linear)
            if stored is None or (not linear.quantized and relative not in divided):
                continue
            ones = torch.ones(weight.shape[0])
            rows_unknown, from_norm = relative in divided, part.type == "norm-linear"
            columns, energy = torch.ones(weight.shape[1]), ones
            if linear.quantized and not from_norm:
                columns, energy = estimated_columns(stored, weight, ones)
            elif linear.quantized and expected is not None and expected.shape == columns.shape:
                columns = expected
            is_known = linear.quantized and expected is not None and expected.shape == columns.shape
            regressed = expected / columns if is_known and expected is not None else torch.ones_like(columns)
            result = compare(stored, weight, columns, rows_unknown, regressed)
            if linear.quantized and from_norm:
                columns, energy = estimated_columns(stored, weight, result.factors)
            if linear.quantized and expected is not None and expected.shape == columns.shape:
                yield from _factor_faults(f"{name} and {part.previous}", columns, expected, energy, stored.bits)
            factors[relative] = result.factors
            yield from _weight_faults(name, result, stored.bits)
            if result.slopes is not None and stored.scales is not None:
                columns_unknown = not from_norm and not is_known
                yield from slope_faults(name, result.slopes, stored.scales, rows_unknown, columns_unknown)
            if rows_unknown:
                yield from _check_bias(name, result.factors, folder, original, stored.bits)


def _expected_columns(
    previous: str, group: LinearGroup, folder: Folder, original: Checkpoint, factors: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return the column factors that cancel the scaling before the group, or None if they are unknown."""
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


def _check_float_reader(
    name: str, norm: str, factors: torch.Tensor | None, folder: Folder, original: Checkpoint
) -> Iterator[Finding]:
    """Check that the columns of a float Linear cancel the factors of the norm in front of it to the last bit."""
    before, after = original.tensors.get(f"{name}.weight"), folder.tensors.get(f"{name}.weight")
    if factors is None or before is None or after is None or before.shape != after.shape:
        return
    if before.shape[1:] != factors.shape or after.dtype not in FLOAT_DTYPES:
        return
    stored = load_tensor(after)
    expected = (load_tensor(before).to(torch.float32) * factors).to(stored.dtype)
    if torch.equal(stored, expected):
        return
    if bool((factors == 1).all()):
        yield make_finding("float_changed", f"{name}.weight", "differs from the source")
    else:
        columns = (stored != expected).any(dim=0).nonzero().flatten().tolist()
        what = f"{len(columns)} columns do not cancel the scaling of the norm, e.g. {columns[0]}"
        yield make_finding("scaling_inconsistent", f"{name} and {norm}", what)


# Of the slopes. Rounding moves a mean slope by 0.01, clipping by 0.05; a scale that is too large or small by more than
# a quarter is a fault.
_MAX_SLOPE = 1.25
# Rounding, clipping and outliers move this coefficient to -0.2; scales in a wrong order give -1.
_MIN_COEFFICIENT = -0.5
# Standard errors between the coefficient and the limit that make a fault certain.
_CERTAIN = 4.0


def slope_faults(
    name: str, slopes: torch.Tensor, scales: torch.Tensor, rows_unknown: bool, columns_unknown: bool
) -> Iterator[Finding]:
    """Check that the slopes of source on stored weights are near 1, whatever the scale of their row and group.

    With log b = c + k log s + noise over rows and groups (b: slope, s: scale), k is 0 for scales in their own order. In
    a wrong order b is the right scale over the stored one, so that k is -1, also where all scales are nearly alike.
    rows_unknown, columns_unknown: the factors of the rows, or of the columns, were estimated from the same weights;
    then only the variation inside the rows, or inside the columns of groups, is a sign.
    """
    good = torch.isfinite(slopes) & (slopes > 0) & (scales > 0)
    if not bool(good.any()):
        return
    middle = float(slopes[good].median())
    if not rows_unknown and not columns_unknown and not 1 / _MAX_SLOPE < middle < _MAX_SLOPE:
        yield make_finding("slope_wrong", name, f"the median slope of the source on the stored weights is {middle:.3g}")
        return
    b = torch.where(good, slopes, torch.ones_like(slopes)).log().to(torch.float64)
    s = torch.where(good, scales.to(slopes.dtype), torch.ones_like(slopes)).log().to(torch.float64)
    weights = good.to(torch.float64)
    lost = 1
    for axis, is_unknown in ((1, rows_unknown), (0, columns_unknown)):
        if is_unknown:
            b, s, lost = _centred(b, weights, axis), _centred(s, weights, axis), lost + b.shape[1 - axis]
    if not rows_unknown and not columns_unknown:
        b, s = (v - (v * weights).sum() / weights.sum() for v in (b, s))
    free, spread = float(weights.sum()) - lost - 1, float((s * s * weights).sum())
    if free < 1 or spread <= 0:
        return
    coefficient = float((b * s * weights).sum()) / spread
    error = (float(((b - coefficient * s).square() * weights).sum()) / free / spread) ** 0.5
    if coefficient + _CERTAIN * error < _MIN_COEFFICIENT:
        what = f"slopes fall with the scales by {coefficient:.2f} instead of 0 (standard error {error:.2g})"
        yield make_finding("scales_reordered", name, what)


def _centred(values: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    """Values minus their weighted mean along an axis."""
    total = weights.sum(dim=axis, keepdim=True).clamp_min(1.0)
    return values - (values * weights).sum(dim=axis, keepdim=True) / total


def _weight_faults(name: str, result: Comparison, bits: int) -> Iterator[Finding]:
    if not result.relative <= BOUND[bits]:  # also true for NaN
        yield make_finding(
            "weight_far",
            name,
            f"relative error {result.relative:.3g}; with {bits} bits it should be below {BOUND[bits]}",
        )
        return
    if bits < 16 and result.relative == 0:
        yield make_finding("weight_unchanged", name, "relative error 0")
    far = (result.rows > ROW_BOUND[bits]).nonzero().flatten().tolist()
    if far:
        yield make_finding(
            "rows_far", name, f"{len(far)} rows; row {far[0]} has a relative error of {result.rows[far[0]]:.3g}"
        )
    if abs(result.shift) > _MAX_SHIFT:
        yield make_finding("weight_shifted", name, f"is shifted by {result.shift:+.2f} steps on average")


def _check_bias(name: str, factors: torch.Tensor, folder: Folder, original: Checkpoint, bits: int) -> Iterator[Finding]:
    """Check that the bias is divided by the same factors as the rows."""
    before, after = original.tensors.get(f"{name}.bias"), folder.tensors.get(f"{name}.bias")
    if before is None or after is None or before.shape != factors.shape or after.shape != factors.shape:
        return
    old, new = load_tensor(before).to(torch.float32), load_tensor(after).to(torch.float32)
    yield from _factor_faults(f"{name}.bias", torch.where(old != 0, new / old, factors), factors, old.square(), bits)


def _factor_faults(
    where: str, actual: torch.Tensor, expected: torch.Tensor, energy: torch.Tensor, bits: int
) -> Iterator[Finding]:
    """Compare the factors of each channel with the expected ones, weighted by the energy of the channels."""
    error = (actual - expected).square() * energy
    deviation = relative_error(float(error.sum()), float((expected.square() * energy).sum()))
    if not deviation <= _FACTOR_BOUND[bits]:
        worst = int(error.argmax())
        example = f"channel {worst} has {float(actual[worst]):.3g}, not {float(expected[worst]):.3g}"
        yield make_finding(
            "scaling_inconsistent", where, f"factors differ by {deviation:.2g} on average, e.g. {example}"
        )
