"""The form in which each Linear is stored, and checks that its tensors are present with the right dtypes and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from ..errors import QuantError
from ..formats import BYTES_PER_WORD, NF4_NESTED, NF4_PARTS, NF4_STATE, nf4_layout
from ..numerics import NVFP4_GROUP
from ..storage import FLOAT_DTYPES, TensorInfo
from .findings import Finding, make_finding, shorten_list
from .headers import Folder
from .methods import METHODS
from .quantization import Declared

Shapes = dict[str, tuple[int, ...]]

# Form -> suffixes of its tensors; the first holds the weight. `?` marks an optional tensor.
FORMS: dict[str, tuple[str, ...]] = {
    "gemm": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point?", "weight_g_idx?"),
    "packed8": ("weight_packed", "weight_scale", "weight_shape"),
    "int8": ("weight", "weight_scale", "weight_zero_point?"),
    "float8": ("weight", "weight_scale"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "nvfp4_act": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    "float8_block": ("weight", "weight_scale"),
    "ascend": ("weight", "weight_scale", "weight_offset"),
    "ascend_int4": ("weight", "weight_scale", "weight_offset", "scale_bias"),
    "ascend_static": ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias", "weight_scale?",
                      "weight_offset?"),
    "nf4": ("weight", *NF4_PARTS[1:], *(f"{suffix}?" for suffix in NF4_NESTED)),
    "float": ("weight",),
}  # fmt: skip

# Format -> the forms of its quantized Linears. Float Linears have the form `float` in every format.
FORMS_OF_FORMAT = {
    **{name: method.forms for name, method in METHODS.items()},
    "ascend": ("ascend", "ascend_static", "ascend_int4"),
}

_BITS_OF_FORM = {
    "gemm": 4, "packed": 4, "packed8": 8, "int8": 8, "float8": 8, "float8_block": 8, "ascend": 8, "ascend_static": 8,
    "nf4": 4, "nvfp4": 4, "nvfp4_act": 4, "ascend_int4": 4,
}  # fmt: skip

_PER_WORD = 8
FLOAT8_BLOCK = 128  # channels and inputs that share a scale in the form float8_block
_SUFFIXES = {suffix.rstrip("?") for suffixes in FORMS.values() for suffix in suffixes}

# Two-dimensional weights of embeddings, which are not Linears.
_EMBEDDINGS = ("embed_tokens", "codec_embed", "bos_eos_token")


@dataclass(frozen=True)
class StoredLinear:
    """A Linear as stored. shape: (out, in) if known. sound: all tensors exist and have the right dtypes and shapes."""

    name: str
    form: str
    tensors: dict[str, TensorInfo]  # by suffix
    shape: tuple[int, int] | None
    sound: bool

    @property
    def quantized(self) -> bool:
        return self.form != "float"

    @property
    def groups(self) -> int:
        """Number of input groups with a scale each: 1 for per-channel scales, 0 if unknown."""
        if self.form == "nf4":
            return self.tensors["weight.absmax"].numel // self.shape[0] if self.sound and self.shape else 0
        scales = self.tensors.get("scales") or self.tensors.get("weight_scale")
        if scales is None or len(scales.shape) != 2:
            return 1 if self.form == "ascend_static" else 0
        return scales.shape[0 if self.form == "gemm" else 1]


def split_tensor_name(tensor: str) -> tuple[str, str]:
    """Split a tensor's name into Linear and suffix: (`x.q_proj`, `weight_scale`) or (`x.q_proj`, `weight.absmax`)."""
    name, inside, suffix = tensor.rpartition(".weight.")
    if inside:
        return name, f"weight.{suffix}"
    name, _, suffix = tensor.rpartition(".")
    return name, suffix


def expected_linears(expected: Shapes) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) by name of the Linears among the tensors that config.json implies."""
    return {
        name: (shape[0], shape[1])
        for tensor, shape in expected.items()
        for name, suffix in [split_tensor_name(tensor)]
        if suffix == "weight" and len(shape) == 2 and not name.endswith(_EMBEDDINGS)
    }


def stored_linears(folder: Folder, expected: Shapes, declared: Declared) -> dict[str, StoredLinear]:
    """Return by name every Linear with at least one stored tensor."""
    shapes = expected_linears(expected)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for tensor, info in folder.tensors.items():
        name, suffix = split_tensor_name(tensor)
        if suffix in _SUFFIXES:
            parts.setdefault(name, {})[suffix] = info
    linears = {}
    for name, tensors in parts.items():
        form = _form(tensors, declared.format, shapes.get(name))
        is_linear = form != "float" or name in shapes or (not shapes and _looks_like_linear(name, tensors["weight"]))
        if is_linear:
            shape = shapes.get(name) or _shape_from_tensors(form, tensors)
            missing = _missing(form, tensors, declared)
            sound = not missing and shape is not None and not list(_misfits(name, form, tensors, shape))
            linears[name] = StoredLinear(name, form, tensors, shape, sound)
    return linears


def _form(tensors: dict[str, TensorInfo], declared: str, shape: tuple[int, int] | None) -> str:
    """shape: (out, in) that config.json implies, which tells packed int8 from packed int4."""
    if "qweight" in tensors or "qzeros" in tensors:
        return "gemm"
    if "input_global_scale" in tensors:
        return "nvfp4_act"
    if "weight_global_scale" in tensors or ("weight_packed" in tensors and tensors["weight_packed"].dtype == "U8"):
        return "nvfp4"
    if "weight_packed" in tensors or "weight_shape" in tensors:
        packed = tensors.get("weight_packed")
        has_bytes = packed is not None and shape is not None and packed.shape[1:] == (-(-shape[1] // BYTES_PER_WORD),)
        return "packed8" if has_bytes else "packed"
    if "deq_scale" in tensors or "quant_bias" in tensors:
        return "ascend_static"
    if "scale_bias" in tensors:
        return "ascend_int4"
    if any(suffix.startswith("weight.") for suffix in tensors):
        return "nf4"
    weight = tensors.get("weight")
    if weight is None and "scales" in tensors:
        return "gemm"
    if weight is not None and weight.dtype == "F8_E4M3":
        scale = tensors.get("weight_scale")
        is_block = scale is not None and len(scale.shape) == 2 and scale.shape[0] < weight.shape[0]
        return "float8_block" if is_block else "float8"
    quantized = weight is None or weight.dtype in ("I8", "U8", "I32") or "weight_scale" in tensors
    if not quantized:
        return "float"
    return "ascend" if declared == "ascend" or "weight_offset" in tensors else "int8"


def _looks_like_linear(name: str, weight: TensorInfo) -> bool:
    return len(weight.shape) == 2 and not name.endswith(_EMBEDDINGS)


def _shape_from_tensors(form: str, tensors: dict[str, TensorInfo]) -> tuple[int, int] | None:
    """Infer (out, in) from the tensors, for a Linear that config.json does not imply; None if impossible."""
    if form == "nf4":
        with suppress(QuantError):
            return nf4_layout(tensors)[0]
        return None
    weight = tensors.get(FORMS[form][0])
    if weight is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    if form == "ascend_int4":
        return 2 * rows, columns
    if form == "gemm":
        return columns * _PER_WORD, rows
    return rows, columns * {"packed": _PER_WORD, "packed8": BYTES_PER_WORD, "nvfp4": 2, "nvfp4_act": 2}.get(form, 1)


def _missing(form: str, tensors: dict[str, TensorInfo], declared: Declared) -> list[str]:
    required = [suffix for suffix in FORMS[form] if not suffix.endswith("?")]
    if form == "packed" and declared.format == "compressed-tensors" and declared.symmetric is False:
        required.append("weight_zero_point")
    return [suffix for suffix in required if suffix not in tensors]


def _expected_tensors(
    form: str, shape: tuple[int, int], groups: int
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the allowed dtypes and the shape of each tensor, by suffix. shape: (out, in) of the Linear."""
    rows, columns = shape
    floats = tuple(sorted(FLOAT_DTYPES - {"F64"}))
    packed = -(-columns // _PER_WORD)
    match form:
        case "gemm":
            words = -(-rows // _PER_WORD)
            return {
                "qweight": (("I32",), (columns, words)),
                "qzeros": (("I32",), (groups, words)),
                "scales": (("F16", "BF16"), (groups, rows)),
            }
        case "packed":
            return {
                "weight_packed": (("I32",), (rows, packed)),
                "weight_scale": (floats, (rows, groups)),
                "weight_shape": (("I64", "I32"), (2,)),
                "weight_zero_point": (("I32",), (-(-rows // _PER_WORD), groups)),
                "weight_g_idx": (("I32",), (columns,)),
            }
        case "nvfp4" | "nvfp4_act":
            return {
                "weight_packed": (("U8",), (rows, columns // 2)),
                "weight_scale": (("F8_E4M3",), (rows, columns // NVFP4_GROUP)),
                "weight_global_scale": (("F32",), (1,)),
                "input_global_scale": (("F32",), (1,)),
            }
        case "packed8":
            return {
                "weight_packed": (("I32",), (rows, -(-columns // BYTES_PER_WORD))),
                "weight_scale": (floats, (rows, 1)),
                "weight_shape": (("I64", "I32"), (2,)),
            }
        case "int8":
            return {
                "weight": (("I8",), (rows, columns)),
                "weight_scale": (floats, (rows, 1)),
                "weight_zero_point": (("I8",), (rows, 1)),
            }
        case "float8" | "float8_block":
            blocks = (-(-rows // FLOAT8_BLOCK), -(-columns // FLOAT8_BLOCK))
            return {
                "weight": (("F8_E4M3",), (rows, columns)),
                "weight_scale": (floats, blocks if form == "float8_block" else (rows, 1)),
            }
        case "ascend":
            return {
                "weight": (("I8",), (rows, columns)),
                "weight_scale": (("F32",), (rows, 1)),
                "weight_offset": (("F32",), (rows, 1)),
            }
        case "ascend_int4":
            return {
                "weight": (("I8",), (rows // 2, columns)),
                "weight_scale": (("F32",), (rows, 1)),
                "weight_offset": (("F32",), (rows, 1)),
            }
        case "ascend_static":
            return {
                "weight": (("I8",), (rows, columns)),
                "input_scale": (floats, (1,)),
                "input_offset": ((*floats, "I8"), (1,)),
                "deq_scale": (("F32", "I64"), (rows,)),
                "quant_bias": (("I32",), (rows,)),
            }
        case _:
            return {"weight": (floats, (rows, columns))}


def _misfits(name: str, form: str, tensors: dict[str, TensorInfo], shape: tuple[int, int]) -> Iterator[Finding]:
    if form == "nf4":
        yield from _nf4_misfits(name, tensors, shape)
        return
    groups = _group_count(form, tensors, shape)
    for suffix, (dtypes, size) in _expected_tensors(form, shape, groups).items():
        info = tensors.get(suffix)
        if info is None:
            continue
        if info.dtype not in dtypes:
            yield make_finding("tensor_dtype", info.name, f"is {info.dtype}, not {' or '.join(dtypes)}")
        if info.shape != size:
            yield make_finding(
                "tensor_shape",
                info.name,
                f"is {list(info.shape)}, not {list(size)}, for a Linear of shape {list(shape)}",
            )


def _nf4_misfits(name: str, tensors: dict[str, TensorInfo], shape: tuple[int, int]) -> Iterator[Finding]:
    """Check tensors and shape against the quant_state. check_linears reports missing tensors."""
    if any(suffix not in tensors for suffix in NF4_PARTS):
        return
    try:
        stored_shape = nf4_layout(tensors)[0]
    except QuantError as error:
        yield make_finding("nf4_state_wrong", name, error.message)
        return
    if stored_shape != shape:
        yield make_finding("tensor_shape", f"{name}.{NF4_STATE}", f"has shape {list(stored_shape)}, not {list(shape)}")


def _group_count(form: str, tensors: dict[str, TensorInfo], shape: tuple[int, int]) -> int:
    """Return the number of groups of the scales, or 1 if it is impossible; 1 then fails the shape check."""
    info = tensors.get("scales" if form == "gemm" else "weight_scale")
    if form not in ("gemm", "packed") or info is None or len(info.shape) != 2:
        return 1
    groups = info.shape[0 if form == "gemm" else 1]
    return groups if groups and shape[1] % groups == 0 else 1


# --- checks --------------------------------------------------------------------------------------------------


def check_linears(linears: dict[str, StoredLinear], declared: Declared) -> Iterator[Finding]:
    """Check forms, completeness, dtypes and shapes, and the declared bits, group size and zero points."""
    quantized = [linear for linear in linears.values() if linear.quantized]
    if not quantized:
        yield make_finding("not_quantized", "all Linears", "no Linear is quantized")
    for linear in linears.values():
        if (
            linear.quantized
            and declared.format
            and linear.form not in FORMS_OF_FORMAT.get(declared.format, (linear.form,))
        ):
            yield make_finding(
                "form_foreign", linear.name, f"has {shorten_list(linear.tensors)}, which is not {declared.format}"
            )
        elif _is_undeclared(linear.form, declared):
            what = f"is stored as {linear.form}; no config group declares this"
            yield make_finding("form_foreign", linear.name, what)
        for suffix in _missing(linear.form, linear.tensors, declared):
            yield make_finding(
                "linear_incomplete", f"{linear.name}.{suffix}", f"is missing; stored are {shorten_list(linear.tensors)}"
            )
        if linear.shape is None:
            yield make_finding("tensor_shape", linear.name, "its tensors do not determine the shape of the weight")
        else:
            yield from _misfits(linear.name, linear.form, linear.tensors, linear.shape)
    yield from _check_declared(quantized, declared)


def _is_undeclared(form: str, declared: Declared) -> bool:
    """Whether config groups declare the bits of the form, but not the form. Wrong bits are another finding."""
    forms = {group.form for group in declared.groups if group.bits == _BITS_OF_FORM.get(form)}
    return form in FORMS_OF_FORMAT["compressed-tensors"] and bool(forms) and not forms & {form, None}


def _check_declared(quantized: list[StoredLinear], declared: Declared) -> Iterator[Finding]:
    """Compare config.json with the majority of Linears, then report Linears that differ from the majority."""
    key = f"config.json: {declared.where}"
    forms = Counter(linear.form for linear in quantized)
    if declared.bits is not None and forms and declared.bits != _BITS_OF_FORM[forms.most_common(1)[0][0]]:
        form = forms.most_common(1)[0][0]
        yield make_finding(
            "bits_wrong",
            f"{key}.{declared.bits_key}",
            f"is {declared.bits}; the integers have {_BITS_OF_FORM[form]} bits",
        )
    nested = {linear.name for linear in quantized if NF4_NESTED[0] in linear.tensors}
    if declared.nested is not None and (declared.nested != bool(nested) or len(nested) not in (0, len(quantized))):
        what = f"is {declared.nested}; {len(nested)} of {len(quantized)} Linears have nested scales"
        yield make_finding("nested_wrong", f"{key}.bnb_4bit_use_double_quant", what)
    grouped = [linear for linear in quantized if linear.form in ("gemm", "packed") and linear.shape and linear.sound]
    if not grouped:
        return
    sizes = {linear.name: linear.shape[1] // linear.groups for linear in grouped if linear.shape and linear.groups}
    usual_size = Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    if declared.grouped and usual_size is not None and declared.group_size != usual_size:
        yield make_finding(
            "group_size_wrong", f"{key}.group_size", f"is {declared.group_size}; {usual_size} inputs share a scale"
        )
    for name, size in sizes.items():
        if size != usual_size:
            yield make_finding(
                "tensor_shape", f"{name}.scales", f"has groups of {size} inputs; most Linears have {usual_size}"
            )
    with_zeros = {linear.name for linear in grouped if linear.form == "gemm" or "weight_zero_point" in linear.tensors}
    if declared.symmetric is True and with_zeros:
        yield make_finding(
            "symmetric_wrong",
            f"{key}.{declared.symmetric_key}",
            f"contradicts the stored zero points: {shorten_list(with_zeros)}",
        )
