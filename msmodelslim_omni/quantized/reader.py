"""A quantized checkpoint on disk: its format, its quantized Linears and its float tensors, loaded one at a time.

The formats in FORMATS can be read, including files from other tools if their settings describe the layout completely.
`read_quantized` lists the faults of single Linears; `open_quantized` refuses a checkpoint that has any.
Weight values (NaN, constant codes, a wrong order) are not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..formats import (
    CACHE_SCALES,
    DESCRIPTION_FILE,
    FORMATS,
    OutLinear,
    PartFault,
    StoredLinear,
    cache_shapes,
    declared_cache,
    stored_scales,
)
from ..models import ModelSpec, derive_model_type
from ..numerics import CacheDtype, CacheScales, QuantizedLinear, QuantScheme
from ..plan import quantization_of
from ..storage import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    config_block,
    load_json_object,
    load_tensor,
    read_header,
    read_indexed_shards,
)

_SAVER_OF_METHOD = {fmt.quant_method: saver for saver, fmt in FORMATS.items() if fmt.quant_method}
_SUPPORTED = f"supported formats: {', '.join(FORMATS)}"
_STEMS = tuple(dict.fromkeys(["model", *(fmt.weights_stem for fmt in FORMATS.values())]))
_MAX_LISTED_FAULTS = 5


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The contents of a quantized checkpoint according to its headers. No tensor is loaded yet.

    checkpoint: path, config, and every tensor on disk by name; `other_files` lists the remaining files.
    saver: the format, a key of FORMATS. settings: its quantization_config, or the description of ascendv1_saver.
    linears: the quantized Linears by checkpoint name (without `.weight`), in file order. `.linear` has scheme,
        shape (out, in) and float dtype; `.parts` has the tensors on disk.
    floats: every other tensor by name, including the biases of quantized Linears.
    faults: faults of single Linears; empty in a checkpoint that open_quantized returned.
    kv_cache: number format of the rounded KV cache, if the settings declare one; its scales are among `floats`.
    """

    checkpoint: Checkpoint
    model: ModelSpec
    saver: str
    settings: dict[str, Any]
    linears: dict[str, StoredLinear]
    floats: dict[str, TensorInfo]
    faults: tuple[PartFault, ...]
    kv_cache: CacheDtype | None = None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def schemes(self) -> frozenset[QuantScheme]:
        return frozenset(stored.linear.scheme for stored in self.linears.values())

    def load_linear(self, name: str) -> QuantizedLinear:
        """Load the integers [out, in], scales and zeros [out, groups] of one Linear to the CPU."""
        return load_linear(self.linears[name].linear)

    def load_float(self, name: str) -> torch.Tensor:
        """Load one float tensor in its stored dtype to the CPU."""
        return load_tensor(self.floats[name])


def load_linear(linear: OutLinear) -> QuantizedLinear:
    """Load all tensors of one Linear. The peak memory is the int8 weight plus its packed form.

    Raises QuantError if the scales hold NaN or Inf, or FP8 codes NaN, or a global scale of the input is not positive.
    """
    zeros = None if linear.zeros is None else linear.zeros()
    nested = None if linear.nested is None else linear.nested()
    qweight = linear.qweight()
    if qweight.dtype == torch.float8_e4m3fn and bool((qweight.view(torch.uint8) & 0x7F).eq(0x7F).any()):
        raise QuantError(f"{linear.name}: its weight holds NaN", "write or fetch the checkpoint again")
    input_global = None if linear.input_global is None else linear.input_global()
    if input_global is not None and not 0 < float(input_global) < float("inf"):
        raise QuantError(
            f"{linear.name}: input_global_scale is {float(input_global):g}; it must be positive and finite",
            "write or fetch the checkpoint again",
        )
    return QuantizedLinear(qweight, finite_scales(linear), linear.scheme, zeros, nested, input_global=input_global)


def finite_scales(linear: OutLinear) -> torch.Tensor:
    """Load the scales of a Linear. Raises QuantError if they hold NaN or Inf."""
    scales = linear.scales()
    if not bool(torch.isfinite(scales).all()):
        raise QuantError(f"{linear.name}: its scales hold NaN or Inf", "write or fetch the checkpoint again")
    return scales


def is_quantized(path: Path, config: dict[str, Any]) -> bool:
    """Whether a checkpoint folder is declared as quantized, by any tool."""
    return quantization_of(config) is not None or (path / DESCRIPTION_FILE).is_file()


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json without any quantization_config, at any depth. The key order is kept."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def open_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Read config, headers and description.

    Raises QuantError if the folder is not a complete quantized checkpoint in a supported format. The error names
    missing tensors.
    """
    quantized = read_quantized(path)
    if quantized.faults:
        lines = [f"{fault.linear}: {fault.message}" for fault in quantized.faults[:_MAX_LISTED_FAULTS]]
        remaining = len(quantized.faults) - len(lines)
        lines += [f"... and {remaining} more"] * (remaining > 0)
        raise QuantError(
            f"{quantized.path} is incomplete or damaged:\n" + "\n".join(lines), "write or fetch the checkpoint again"
        )
    return quantized


def read_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Like open_quantized, but list the faults of single Linears instead of raising them."""
    path = Path(path)
    if not path.exists():
        raise QuantError(f"{str(path)!r} does not exist", "give the folder of a quantized checkpoint")
    if not (path / "config.json").is_file():
        raise QuantError(
            f"{str(path)!r} is not a checkpoint: it has no config.json", "give the folder that contains config.json"
        )
    config = load_json_object(path / "config.json")
    model = derive_model_type(config)
    saver, settings = identify(path, config)
    tensors, shards = read_shards(path)
    dtypes = _layer_dtypes(tensors, config, model)
    result = FORMATS[saver].read_linears(settings, tensors, lambda name: dtypes.get(_layer_prefix(name), dtypes[""]))
    parts = {info.name for stored in result.linears.values() for info in stored.parts.values()}
    floats = {name: info for name, info in tensors.items() if name not in parts}
    faulty = {fault.linear for fault in result.faults}
    faults = (*result.faults, *_layer_faults(model, config, result.linears, floats, faulty))
    if not result.linears and not faults:
        raise QuantError(
            f"{path} declares {saver} but holds no quantized Linear", "write or fetch the checkpoint again"
        )
    kv_cache = declared_cache(settings)
    return QuantizedCheckpoint(
        Checkpoint(path, config, tensors, shards),
        model,
        saver,
        settings,
        result.linears,
        floats,
        (*faults, *_cache_faults(model, config, kv_cache, floats)),
        kv_cache,
    )


def load_cache(model: ModelSpec, kv_cache: CacheDtype, floats: Mapping[str, TensorInfo], layer: int) -> CacheScales:
    """The scales of a layer's KV cache. Raises QuantError unless all are positive and finite."""
    names = {relative: model.layer_name(layer, relative) for relative in CACHE_SCALES[kv_cache]}
    scales = stored_scales(kv_cache, {relative: load_tensor(floats[name]) for relative, name in names.items()})
    for name, values in zip(names.values(), (scales.key, scales.value), strict=True):
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise QuantError(f"{name}: a scale is not positive and finite", "write or fetch the checkpoint again")
    return scales


def _cache_faults(
    model: ModelSpec, config: dict[str, Any], kv_cache: CacheDtype | None, floats: Mapping[str, TensorInfo]
) -> list[PartFault]:
    """Faults for scales of the KV cache that are missing or have the wrong shape."""
    faults = []
    shapes = cache_shapes(kv_cache, model.family.layer_spec(config).key_width)
    for index in range(model.family.num_layers(config)):
        for relative, shape in shapes.items():
            attention, _, ending = model.layer_name(index, relative).rpartition(".")
            info = floats.get(f"{attention}.{ending}")
            if info is None:
                faults.append(PartFault(attention, f"{ending} of the KV cache is missing"))
            elif info.shape != shape or info.dtype not in FLOAT_DTYPES:
                what = f"{info.dtype} {list(info.shape)}, not a float of shape {list(shape)}"
                faults.append(PartFault(attention, f"{ending} of the KV cache is {what}"))
    return faults


def identify(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The saver of a checkpoint's format, and its settings.

    Raises QuantError for a float checkpoint and for an unsupported format.
    """
    quantization = quantization_of(config)
    if quantization is not None:
        method = str(quantization.get("quant_method"))
        if method not in _SAVER_OF_METHOD:
            raise QuantError(f"{path} is quantized as {method[:80]!r}, an unsupported format", _SUPPORTED)
        return _SAVER_OF_METHOD[method], quantization
    if (path / DESCRIPTION_FILE).is_file():
        return "ascendv1_saver", load_json_object(path / DESCRIPTION_FILE)
    raise QuantError(f"{path} is a float checkpoint or has an unsupported format", _SUPPORTED)


def read_shards(path: Path) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    """All tensors by name, and the weight files: those of the index, or the single file. Any known stem is accepted."""
    for stem in _STEMS:
        index, single = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
        if index.is_file():
            return read_indexed_shards(path, index)
        if single.is_file():
            return read_header(single), (single,)
    expected = ", ".join(f"{stem}.safetensors" for stem in _STEMS)
    raise QuantError(f"{path} holds no weights ({expected}, or an index of shards)", "fetch the checkpoint again")


# --- decoder layers ------------------------------------------------------------------------------------------


def _layer_prefix(name: str) -> str:
    """The prefix `thinker.model.layers.3.` of a tensor name; empty outside the layers."""
    match = re.match(r".*\.layers\.\d+\.", name)
    return match[0] if match else ""


def _layer_dtypes(tensors: Mapping[str, TensorInfo], config: dict[str, Any], model: ModelSpec) -> dict[str, str]:
    """The float dtype of each layer by its prefix, taken from the norms; key "" has the dtype in config.json.

    Every format keeps norms unchanged. Scales and biases may be stored in another dtype.
    """
    declared = next(
        (
            str(value)
            for path in model.config_paths
            for key in ("dtype", "torch_dtype")
            if (value := config_block(config, path).get(key)) is not None
        ),
        "bfloat16",
    )
    by_name = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items()}
    dtypes = {"": by_name.get(declared, "BF16")}
    for name, info in tensors.items():
        if name.endswith("norm.weight") and info.dtype in FLOAT_DTYPES:
            dtypes.setdefault(_layer_prefix(name), info.dtype)
    return dtypes


def _layer_faults(
    model: ModelSpec,
    config: dict[str, Any],
    linears: Mapping[str, StoredLinear],
    floats: Mapping[str, TensorInfo],
    faulty: set[str],
) -> list[PartFault]:
    """Faults for layer tensors that are missing or whose shape differs from config.json. `faulty` is skipped."""
    faults = []
    for index in range(model.family.num_layers(config)):
        for relative, shape in model.family.layer_spec(config).shapes.items():
            name = model.layer_name(index, relative)
            linear, _, ending = name.rpartition(".")
            if ending == "weight" and linear in faulty:
                continue
            if ending == "weight" and linear in linears:
                actual: tuple[int, ...] = linears[linear].linear.shape
            elif name in floats:
                actual = floats[name].shape
            else:
                faults.append(PartFault(linear, f"{ending} is missing"))
                continue
            if actual != shape:
                faults.append(
                    PartFault(linear, f"{ending} has shape {list(actual)}, config.json implies {list(shape)}")
                )
    return faults
