"""A quantized checkpoint on disk: its format, its quantized Linears and its float tensors, loaded one at a time.

Read are the formats of FORMATS, also where another tool wrote them, as far as a format says all that is needed.
`read_quantized` names every fault of the Linears and goes on; `open_quantized` refuses a checkpoint that has any.
What lies in the weights (NaN, constant codes, a wrong order) is not looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantError
from ..formats import DESCRIPTION_FILE, FORMATS, OutLinear, PartFault, StoredLinear
from ..models import ModelSpec, derive_model_type
from ..numerics import QuantizedLinear, QuantScheme
from ..plan import quantization_of
from ..storage import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    config_block,
    follow_index,
    load_json_object,
    load_tensor,
    read_header,
)

_SAVER_OF_METHOD = {fmt.quant_method: saver for saver, fmt in FORMATS.items() if fmt.quant_method}
_READ = f"formats that can be read: {', '.join(FORMATS)}"
_STEMS = tuple(dict.fromkeys(["model", *(fmt.weights_stem for fmt in FORMATS.values())]))
_LISTED_FAULTS = 5


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What the headers say; nothing is loaded yet.

    checkpoint: path, config, and every tensor on disk by name; `other_files` lists what else is there.
    saver: the format, a key of FORMATS. settings: its quantization_config, or the description of ascendv1_saver.
    linears: the quantized Linears by checkpoint name (without `.weight`), in the order of the files; `.linear` has
        scheme, shape (out, in) and float dtype, `.parts` the tensors on disk.
    floats: every other tensor by name, biases of quantized Linears among them.
    faults: what is wrong with single Linears; none in a checkpoint that open_quantized returned.
    """

    checkpoint: Checkpoint
    model: ModelSpec
    saver: str
    settings: dict[str, Any]
    linears: dict[str, StoredLinear]
    floats: dict[str, TensorInfo]
    faults: tuple[PartFault, ...]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def schemes(self) -> frozenset[QuantScheme]:
        return frozenset(stored.linear.scheme for stored in self.linears.values())

    def load_linear(self, name: str) -> QuantizedLinear:
        """The integers [out, in], scales and zeros [out, groups] of one Linear, on the CPU."""
        return load_linear(self.linears[name].linear)

    def load_float(self, name: str) -> torch.Tensor:
        """One float tensor in its stored dtype, on the CPU."""
        return load_tensor(self.floats[name])


def load_linear(linear: OutLinear) -> QuantizedLinear:
    """Everything of one lazily loaded Linear, in memory of its int8 weight and the packed form of it.

    Raises QuantError where its scales hold NaN or Inf.
    """
    zeros = None if linear.zeros is None else linear.zeros()
    nested = None if linear.nested is None else linear.nested()
    return QuantizedLinear(linear.qweight(), finite_scales(linear), linear.scheme, zeros, nested)


def finite_scales(linear: OutLinear) -> torch.Tensor:
    """The scales of a Linear. Raises QuantError where they hold NaN or Inf."""
    scales = linear.scales()
    if not bool(torch.isfinite(scales).all()):
        raise QuantError(f"{linear.name}: its scales hold NaN or Inf", "write or fetch the checkpoint again")
    return scales


def is_quantized(path: Path, config: dict[str, Any]) -> bool:
    """Whether a folder says that it is quantized, by any tool."""
    return quantization_of(config) is not None or (path / DESCRIPTION_FILE).is_file()


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json without any quantization_config; the order of the keys is kept."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def open_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Read config, headers and description. Raises QuantError for what is no whole quantized checkpoint of a format
    that is read; tensors that are missing are named.
    """
    found = read_quantized(path)
    if found.faults:
        listed = [f"{fault.linear}: {fault.message}" for fault in found.faults[:_LISTED_FAULTS]]
        more = len(found.faults) - len(listed)
        listed += [f"... and {more} more"] * (more > 0)
        raise QuantError(f"{found.path} is not whole:\n" + "\n".join(listed), "write or fetch the checkpoint again")
    return found


def read_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Like open_quantized, with the faults of single Linears listed instead of raised."""
    path = Path(path)
    if not path.exists():
        raise QuantError(f"{str(path)!r} does not exist", "give the folder of a quantized checkpoint")
    if not (path / "config.json").is_file():
        raise QuantError(f"{str(path)!r} is not a checkpoint: it holds no config.json", "give the folder that holds it")
    config = load_json_object(path / "config.json")
    model = derive_model_type(config)
    saver, settings = identify(path, config)
    tensors, shards = read_shards(path)
    dtypes = _layer_dtypes(tensors, config, model)
    found = FORMATS[saver].read_linears(settings, tensors, lambda name: dtypes.get(_layer_of(name), dtypes[""]))
    parts = {info.name for stored in found.linears.values() for info in stored.parts.values()}
    floats = {name: info for name, info in tensors.items() if name not in parts}
    missing = _missing_of_layers(model, config, found.linears, floats, {fault.linear for fault in found.faults})
    faults = (*found.faults, *missing)
    if not found.linears and not faults:
        raise QuantError(f"{path} holds no quantized Linear, though it says {saver}", "write or fetch it again")
    return QuantizedCheckpoint(
        Checkpoint(path, config, tensors, shards), model, saver, settings, found.linears, floats, faults
    )


def identify(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The saver whose format a checkpoint has, and its settings. Raises QuantError for a float or foreign one."""
    quantization = quantization_of(config)
    if quantization is not None:
        method = str(quantization.get("quant_method"))
        if method not in _SAVER_OF_METHOD:
            raise QuantError(f"{path} is quantized as {method[:80]!r}, a format that is not read", _READ)
        return _SAVER_OF_METHOD[method], quantization
    if (path / DESCRIPTION_FILE).is_file():
        return "ascendv1_saver", load_json_object(path / DESCRIPTION_FILE)
    raise QuantError(f"{path} is a float checkpoint, or of a format that is not read", _READ)


def read_shards(path: Path) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    """All headers, by the index or of the single file, whichever stem the weights have."""
    for stem in _STEMS:
        index, single = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
        if index.is_file():
            return follow_index(path, index)
        if single.is_file():
            return read_header(single), (single,)
    expected = ", ".join(f"{stem}.safetensors" for stem in _STEMS)
    raise QuantError(f"{path}: holds no weights ({expected}, or an index of shards)", "fetch the checkpoint again")


# --- the rest of the layers ----------------------------------------------------------------------------------


def _layer_of(name: str) -> str:
    """`thinker.model.layers.3.` of a name inside a layer, else an empty string."""
    match = re.match(r".*\.layers\.\d+\.", name)
    return match[0] if match else ""


def _layer_dtypes(tensors: Mapping[str, TensorInfo], config: dict[str, Any], model: ModelSpec) -> dict[str, str]:
    """The float dtype of each layer, as its norms have it; under "" that of the whole, as config.json says.

    Norms, since every format keeps them as they were, while it may store scales and biases in a dtype of its own.
    """
    said = next(
        (
            str(value)
            for path in model.config_paths
            for key in ("dtype", "torch_dtype")
            if (value := config_block(config, path).get(key)) is not None
        ),
        "bfloat16",
    )
    by_name = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items()}
    dtypes = {"": by_name.get(said, "BF16")}
    for name, info in tensors.items():
        if name.endswith("norm.weight") and info.dtype in FLOAT_DTYPES:
            dtypes.setdefault(_layer_of(name), info.dtype)
    return dtypes


def _missing_of_layers(
    model: ModelSpec,
    config: dict[str, Any],
    linears: Mapping[str, StoredLinear],
    floats: Mapping[str, TensorInfo],
    faulty: set[str],
) -> list[PartFault]:
    """Tensors of decoder layers that are not there, or of another shape than config.json implies."""
    faults = []
    for index in range(model.family.num_layers(config)):
        for relative, shape in model.family.layer_spec(config).shapes.items():
            name = model.layer_name(index, relative)
            linear, _, ending = name.rpartition(".")
            if ending == "weight" and linear in faulty:
                continue
            if ending == "weight" and linear in linears:
                found: tuple[int, ...] = linears[linear].linear.shape
            elif name in floats:
                found = floats[name].shape
            else:
                faults.append(PartFault(linear, f"{ending} is missing"))
                continue
            if found != shape:
                faults.append(PartFault(linear, f"{ending} stands for shape {list(found)}, not {list(shape)}"))
    return faults
