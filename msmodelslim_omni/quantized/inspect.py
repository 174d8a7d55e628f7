"""Contents of a float or quantized checkpoint, read from its headers only: parts, dtypes, bytes, scheme."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantError
from ..files import find_model_folder
from ..formats import BYTES_PER_WORD, FORMATS
from ..models import ModelSpec, derive_model_type
from ..plan import declared_scheme
from ..report import RunMemory, run_memory
from ..storage import TensorInfo, load_json_object, read_header


@dataclass(frozen=True)
class PartContent:
    name: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]  # bytes by dtype
    scheme: str

    @property
    def nbytes(self) -> int:
        return sum(self.dtypes.values())

    @property
    def float_bytes(self) -> int:
        """Bytes of the part in float: its stored bytes, or 16 bits per parameter if it is quantized."""
        return self.nbytes if self.scheme == "float" else 2 * self.parameters


@dataclass(frozen=True)
class Inspection:
    """`scheme` is `float` or the declared quantization. `parts` are in the model's order."""

    path: str
    model_type: str
    scheme: str
    files: int
    parts: tuple[PartContent, ...]
    run_memory: RunMemory

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Inspect a checkpoint folder, float or in any supported format. Raises QuantError if it is not a checkpoint."""
    path = find_model_folder(path)
    config = load_json_object(path / "config.json")
    model = derive_model_type(config)
    tensors, files = _all_tensors(path)
    scheme = declared_scheme(path, config)
    parts: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        parts.setdefault(model.part_of(name).name, []).append(info)
    contents = tuple(_part_content(part.name, parts[part.name], scheme) for part in model.parts if part.name in parts)
    memory = run_memory(model, config, ((part.name, part.float_bytes, part.nbytes) for part in contents))
    return Inspection(str(path), _model_name(model, config), scheme, files, contents, memory)


def _all_tensors(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """All tensors by name, and the number of files with the standard stem or a format's stem."""
    stems = {"model", *(fmt.weights_stem for fmt in FORMATS.values())}
    files = sorted(file for stem in stems for file in path.glob(f"{stem}*.safetensors"))
    if not files:
        raise QuantError(f"{str(path)!r} holds no safetensors files", "give the folder of the complete checkpoint")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors, len(files)


def _part_content(name: str, infos: list[TensorInfo], scheme: str) -> PartContent:
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    quantized = scheme != "float" and bool(dtypes.keys() & _WEIGHTS_PER_ELEMENT.keys())
    scales = {info.name: info for info in infos if info.name.endswith(".weight_scale")}
    parameters = sum(_count_parameters(info, scales) for info in infos)
    return PartContent(name, len(infos), parameters, dtypes, scheme if quantized else "float")


# Weights per element of a quantized Linear's main tensor, by dtype.
_WEIGHTS_PER_ELEMENT = {"I8": 1, "F8_E4M3": 1, "I32": 8, "U8": 2}
# Name endings of tensors that hold quantization parameters instead of weights.
_QUANT_PARAMETER_ENDINGS = (
    "_scale", "_offset", "_zero_point", "_shape", "_g_idx", ".qzeros", ".scales", "absmax", "quant_map", "__nf4",
)  # fmt: skip


def _count_parameters(info: TensorInfo, scales: dict[str, TensorInfo]) -> int:
    """scales: the tensors `weight_scale` by name. Packed integers with one scale per channel have 8 bits here."""
    scale = scales.get(f"{info.name.removesuffix('.weight_packed')}.weight_scale")
    if info.name.endswith(".weight_packed") and scale is not None and scale.shape[1:] == (1,):
        return info.numel * BYTES_PER_WORD
    return 0 if info.name.endswith(_QUANT_PARAMETER_ENDINGS) else info.numel * _WEIGHTS_PER_ELEMENT.get(info.dtype, 1)


def _model_name(model: ModelSpec, config: dict[str, Any]) -> str:
    return model.family.published_model_type(config) or f"{model.hf_model_type} (custom shape)"
