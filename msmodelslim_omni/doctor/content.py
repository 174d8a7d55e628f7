"""Checks of integers, scales, zero points and floats.

One Linear is in memory at a time, packed and unpacked to int8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..formats import (
    nf4_linear,
    nvfp4_stored_scales,
    scale_bias,
    unpack_bytes,
    unpack_e2m1,
    unpack_gemm,
    unpack_plain,
    unpack_row_pairs,
)
from ..numerics import NF4_LEVELS, NVFP4_GROUP, QuantizedLinear, QuantScheme, row_blocks
from ..storage import (
    FLOAT_DTYPES,
    TORCH_DTYPES,
    TensorInfo,
    byte_view,
    is_finite,
    load_tensor,
    read_bytes,
)
from .findings import Finding, make_finding
from .linears import FLOAT8_BLOCK, StoredLinear

# Float tensors are read in pieces of this many elements.
PIECE = 4 << 20

# Maximum share of integers at the ends of the range. Clipping for the least error puts about 1/7 of 4-bit integers and
# less than 1/100 of 8-bit integers there.
_MAX_SATURATED = {4: 0.35, 8: 0.05}
# Maximum mean of integers minus zero points, in steps. Real weights have less than 0.1; zero points that are off by one
# give 1. Without zero points, the limit is a share of the spread of the integers.
_MAX_SHIFT_STEPS, _MAX_SHIFT_SHARE = 0.5, 0.5
# Minimum correlation of a group's mean integer and its zero point: 0.9 and more in the right order, near 0 in a wrong
# one. Fewer groups or a smaller variance of the zero points do not give a reliable correlation.
_MIN_CORRELATION, _MIN_GROUPS, _MIN_VARIANCE = 0.3, 64, 0.05
_LISTED_ROWS = 5


def is_readable(linear: StoredLinear) -> bool:
    """Whether `load_integers` supports the Linear: complete, of known shape, per channel or in consecutive groups."""
    return linear.sound and linear.quantized and "weight_g_idx" not in linear.tensors and _has_whole_groups(linear)


def _has_whole_groups(linear: StoredLinear) -> bool:
    """Whether the weight has elements; with scales per block, also whether the last block of inputs is complete."""
    group_size = {"float8_block": FLOAT8_BLOCK, "nvfp4": NVFP4_GROUP, "nvfp4_act": NVFP4_GROUP}.get(linear.form, 1)
    return linear.shape is not None and min(linear.shape) > 0 and linear.shape[1] % group_size == 0


def load_integers(linear: StoredLinear) -> QuantizedLinear:
    """Load qweight [out, in], scales [out, groups] and zeros of a readable Linear."""
    if linear.form == "nf4":
        stored = nf4_linear(linear.name, linear.tensors, "F32")
        return QuantizedLinear(stored.qweight(), stored.scales(), stored.scheme)
    tensors = {suffix: load_tensor(info) for suffix, info in linear.tensors.items() if suffix in _LOADED_SUFFIXES}
    assert linear.shape is not None
    rows, columns = linear.shape
    if linear.form == "gemm":
        scheme = QuantScheme(4, None, group_size=columns // linear.groups, symmetric=False)
        scales, zeros = tensors["scales"].t().to(torch.float32).contiguous(), unpack_gemm(tensors["qzeros"])
        return QuantizedLinear(unpack_gemm(tensors["qweight"])[:rows], scales, scheme, zeros[:rows])
    if linear.form == "packed":
        has_zeros = "weight_zero_point" in tensors
        scheme = QuantScheme(4, None, group_size=columns // linear.groups, symmetric=not has_zeros)
        packed_zeros = unpack_plain(tensors["weight_zero_point"], axis=0, size=rows) if has_zeros else None
        integers = unpack_plain(tensors["weight_packed"], axis=1, size=columns)
        return QuantizedLinear(integers, tensors["weight_scale"].to(torch.float32), scheme, packed_zeros)
    if linear.form in ("nvfp4", "nvfp4_act"):
        integers, scales = unpack_e2m1(tensors["weight_packed"]), nvfp4_stored_scales(linear.tensors)
        return QuantizedLinear(integers, scales, QuantScheme(4, None, group_size=NVFP4_GROUP, number="e2m1"))
    if linear.form == "packed8":
        integers = unpack_bytes(tensors["weight_packed"], columns)
        return QuantizedLinear(integers, tensors["weight_scale"].to(torch.float32), QuantScheme(8, None))
    if linear.form == "ascend_int4":
        return QuantizedLinear(unpack_row_pairs(tensors["weight"]), tensors["weight_scale"], QuantScheme(4, 8))
    scale = tensors.get("weight_scale")
    scale = torch.ones(rows, 1) if scale is None else scale.to(torch.float32)
    if linear.form == "float8":
        return QuantizedLinear(tensors["weight"], scale, QuantScheme(8, 8, number="e4m3"))
    if linear.form == "float8_block":
        scale = scale.repeat_interleave(FLOAT8_BLOCK, dim=0)[:rows]
        scheme = QuantScheme(8, 8, group_size=FLOAT8_BLOCK, number="e4m3", block_rows=FLOAT8_BLOCK)
        return QuantizedLinear(tensors["weight"], scale, scheme)
    return QuantizedLinear(tensors["weight"], scale, QuantScheme(8, 8), tensors.get("weight_zero_point"))


_LOADED_SUFFIXES = {
    "qweight", "qzeros", "scales", "weight", "weight_packed", "weight_scale", "weight_zero_point",
}  # fmt: skip


# --- scales --------------------------------------------------------------------------------------------------


def check_scales(linears: Iterable[StoredLinear]) -> Iterator[Finding]:
    """Report NaN, Inf, zero, negative and denormal scales, nonzero offsets, and wrong values in weight_shape."""
    for linear in linears:
        if not linear.quantized:
            continue
        for suffix in ("scales", "weight_scale", "deq_scale", "input_scale", "weight.absmax", "weight.nested_absmax",
                       "weight_global_scale", "input_global_scale"):  # fmt: skip
            info = linear.tensors.get(suffix)
            if info is not None and info.dtype in (*FLOAT_DTYPES, "F8_E4M3"):
                yield from _scale_faults(info, allow_zero=suffix.endswith("absmax"))
        if linear.form == "ascend_int4" and is_readable(linear):
            yield from _check_scale_bias(linear)
        offset, shape = linear.tensors.get("weight_offset"), linear.tensors.get("weight_shape")
        if offset is not None and (nonzero := int(load_tensor(offset).ne(0).sum())):
            yield make_finding("offset_not_zero", offset.name, f"{nonzero} of {offset.numel} are not zero")
        if shape is not None and shape.shape == (2,) and linear.shape is not None:
            declared = [int(n) for n in load_tensor(shape)]
            if declared != list(linear.shape):
                yield make_finding(
                    "weight_shape_wrong", shape.name, f"is {declared}; the weight has shape {list(linear.shape)}"
                )


def _check_scale_bias(linear: StoredLinear) -> Iterator[Finding]:
    """Check that scale_bias is 8 times the sums of the dequantized rows, whatever the number of its columns."""
    info, loaded = linear.tensors["scale_bias"], load_integers(linear)
    stored = load_tensor(info).to(torch.float32)
    columns = stored.shape[1] if stored.dim() == 2 else 0
    if not columns or len(stored) != len(loaded.qweight) or loaded.qweight.shape[1] % columns:
        yield make_finding("tensor_shape", info.name, f"is {list(info.shape)}, not [{len(loaded.qweight)}, 1 or 16]")
        return
    expected = scale_bias(loaded.qweight, loaded.scales, columns)
    wrong = ~torch.isclose(stored, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)
    if count := int(wrong.sum()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        what = f"{count} of {info.numel} differ, the first: {float(stored[row, column]):g} for "
        yield make_finding("scale_bias_wrong", info.name, what + f"{float(expected[row, column]):g}")


def _scale_faults(info: TensorInfo, allow_zero: bool) -> Iterator[Finding]:
    """allow_zero: whether a scale may be zero, like the absmax of a block of zeros."""
    scales = load_tensor(info)
    scales = scales.to(torch.float32) if info.dtype == "F8_E4M3" else scales  # all its values are normal in float32
    tiny = torch.finfo(scales.dtype).tiny
    if scales.numel():
        smallest, largest = (value.item() for value in torch.aminmax(scales))  # NaN if any scale is
        if smallest >= tiny and largest < math.inf:
            return
    magnitude = scales.to(torch.float32).abs()
    denormal = "scale_subnormal" if info.dtype == "F16" else "scale_denormal"
    kinds = {
        "scale_nan": torch.isnan(magnitude),
        "scale_inf": torch.isinf(magnitude),
        "scale_zero": (scales == 0) & (not allow_zero),
        "scale_negative": scales < 0,
        denormal: (scales != 0) & (magnitude < tiny),
    }
    for code, mask in kinds.items():
        if count := int(mask.sum()):
            place = [int(i) for i in mask.nonzero()[0]]
            value = float(scales[tuple(place)])
            yield make_finding(code, info.name, f"{count} of {info.numel} scales; the first is {value:g} at {place}")


# --- integers ------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over the row blocks of one Linear. zero: the code of the value zero, subtracted from all integers."""

    zero: int
    count: int = 0
    at_ends: int = 0
    total: float = 0.0  # of q - z
    squares: float = 0.0
    low: int = 127
    high: int = -128
    zero_rows: tuple[int, ...] = ()
    constant_rows: tuple[int, ...] = ()
    groups: int = 0
    moments: torch.Tensor | None = None  # sums of m, z, mm, zz, mz over groups; m: mean integer


def check_integers(linears: Iterable[StoredLinear]) -> Iterator[Finding]:
    """Report constant and zero weights and rows, saturation, and zero points that do not match their integers."""
    for linear in linears:
        if is_readable(linear):
            yield from _integer_faults(linear.name, load_integers(linear))


def _integer_faults(name: str, linear: QuantizedLinear) -> Iterator[Finding]:
    if linear.scheme.number == "e4m3" and (count := _nan_codes(linear.qweight)):
        yield make_finding("code_nan", name, f"{count} of {linear.qweight.numel()} codes are NaN")
        return
    zero = 0 if linear.scheme.codebook is None else NF4_LEVELS.index(0.0)
    tally, bits, blocks = _Tally(zero), linear.scheme.weight_bits, row_blocks(linear.qweight)
    # All blocks share this buffer: a new allocation for each block takes longer than the arithmetic.
    floats = torch.empty(linear.qweight[blocks[0]].shape)
    for rows in blocks:
        _add_rows(tally, linear, rows, floats[: linear.qweight[rows].shape[0]])
    if tally.low == tally.high:
        code = "integers_all_zero" if abs(tally.squares) < 0.5 else "integers_constant"
        yield make_finding(code, name, f"every integer is {tally.low}")
        return
    for code, numbers in (("row_constant", tally.constant_rows), ("row_zero", tally.zero_rows)):
        if numbers:
            listed = ", ".join(str(n) for n in numbers[:_LISTED_ROWS])
            yield make_finding(code, name, f"{len(numbers)} of {linear.qweight.shape[0]} rows; first rows: {listed}")
    # With few inputs, one or two integers at the ends are already a large share.
    allowed = max(_MAX_SATURATED[bits], 4 / (linear.scheme.group_size or linear.qweight.shape[1]))
    if (share := tally.at_ends / tally.count) > allowed:
        yield make_finding(
            "saturated", name, f"{share:.0%} of the integers are at the ends; more than {allowed:.0%} is unusual"
        )
    mean, spread = tally.total / tally.count, math.sqrt(max(0.0, tally.squares) / tally.count)
    limit = _MAX_SHIFT_SHARE * spread if linear.zeros is None else _MAX_SHIFT_STEPS
    if abs(mean) > limit:
        yield make_finding(
            "zero_point_shifted", name, f"is shifted by {mean:+.2f} steps on average over {tally.count} integers"
        )
    elif (correlation := _zero_point_correlation(tally)) is not None and correlation < _MIN_CORRELATION:
        what = f"correlation with the integers is {correlation:.2f} over {tally.groups} groups; it should be near 1"
        yield make_finding("zero_point_unrelated", name, what)


def _nan_codes(codes: torch.Tensor) -> int:
    """The number of NaN codes of float8_e4m3fn: 0x7F and 0xFF."""
    return int((codes.view(torch.uint8) & 0x7F).eq(0x7F).sum())


def _add_rows(tally: _Tally, linear: QuantizedLinear, rows: slice, q: torch.Tensor) -> None:
    """Add a block of rows. q: a float32 buffer with the shape of the block; its content is overwritten."""
    integers = linear.qweight[rows] - tally.zero if tally.zero else linear.qweight[rows]
    integers = q.copy_(integers) if linear.scheme.number == "e4m3" else integers
    q.copy_(integers)
    low, high = integers.amin(dim=1), integers.amax(dim=1)
    tally.low, tally.high = min(tally.low, int(low.min())), max(tally.high, int(high.max()))
    bottom, top = (end - tally.zero for end in linear.scheme.weight_range)
    tally.count += q.numel()
    values = integers.numpy()  # numpy counts ten times faster than torch
    tally.at_ends += int(np.count_nonzero(values >= top)) + int(np.count_nonzero(values <= bottom))
    sums = q.view(q.shape[0], linear.scales.shape[1], -1).sum(dim=2)  # [rows, groups]; sums of integers are exact
    size = q.shape[1] // linear.scales.shape[1]
    total = float(sums.sum(dtype=torch.float64))
    squares = float(torch.linalg.vector_norm(q, dim=1).to(torch.float64).square().sum())
    zero_rows = low == high
    if linear.zeros is not None:
        z = linear.zeros[rows].to(torch.float64)
        m = sums.to(torch.float64) / size
        moments = torch.stack([m.sum(), z.sum(), (m * m).sum(), (z * z).sum(), (m * z).sum()])
        tally.moments = moments if tally.moments is None else tally.moments + moments
        tally.groups += m.numel()
        total -= size * float(moments[1])  # of q - z
        squares += size * float(moments[3] - 2 * moments[4])
        zero_rows = zero_rows & (z == low[:, None]).all(dim=1)
    else:
        zero_rows = zero_rows & (low == 0)
    tally.total += total
    tally.squares += squares
    tally.constant_rows += tuple(rows.start + int(i) for i in ((low == high) & ~zero_rows).nonzero().flatten())
    tally.zero_rows += tuple(rows.start + int(i) for i in zero_rows.nonzero().flatten())


def _zero_point_correlation(tally: _Tally) -> float | None:
    """Return the correlation of mean integers and zero points, or None if the zero points are few or hardly vary."""
    if tally.moments is None or tally.groups < _MIN_GROUPS:
        return None
    m, z, mm, zz, mz = (float(value) / tally.groups for value in tally.moments)
    variance_m, variance_z = mm - m * m, zz - z * z
    if variance_z < _MIN_VARIANCE:
        return None
    return (mz - m * z) / math.sqrt(max(variance_m, 1e-9) * variance_z)


# --- floats --------------------------------------------------------------------------------------------------


def check_floats(tensors: Iterable[TensorInfo]) -> Iterator[Finding]:
    """Report float tensors that contain NaN or Inf. Tensors are read in pieces."""
    for info in tensors:
        if info.dtype in FLOAT_DTYPES and not all(is_finite(piece) for piece in read_pieces(info)):
            yield make_finding("float_not_finite", info.name, "contains NaN or Inf")


def read_pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
    """Yield a tensor as flat pieces of at most PIECE elements. Each piece overwrites the buffer of the previous one."""
    if not info.nbytes:
        return
    size = TORCH_DTYPES[info.dtype].itemsize
    buffer = torch.empty(min(PIECE, info.numel) * size, dtype=torch.uint8)
    view = byte_view(buffer)
    for first in range(0, info.nbytes, PIECE * size):
        length = min(PIECE * size, info.nbytes - first)
        read_bytes(info, first, view[:length])
        yield buffer[:length].view(TORCH_DTYPES[info.dtype])
