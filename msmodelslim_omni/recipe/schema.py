"""The schema of recipes, and the choice of a shipped recipe by model type and quant type.

The format is msModelSlim's (`apiversion: multimodal_vlm_modelslim_v1`) plus an optional `spec.calibration` block.
Every error names file:line, the key and the allowed values. This module does not import torch, so `--help` is fast.
Checks that need the checkpoint (patterns match, the model type supports the processor) are in plan.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from ..errors import QuantError, nearest
from ..files import parse_size, read_regular, shipped_folder
from .validation_errors import FaultFormatter
from .yaml_lines import (
    Location,
    build,
    check_duplicates_and_size,
    compose,
    drop_anchor_holders,
    node_at,
)

MAX_RECIPE_BYTES = 1 << 20

# Other names for a quant type that users know from other tools.
QUANT_TYPE_ALIASES = {
    "awq": "w4a16",
    "gptq": "w4a16",
    "int4": "w4a16",
    "int8": "w8a8",
    "w8a8_dynamic": "w8a8",
    "bnb": "nf4",
    "bitsandbytes": "nf4",
    "fp8_dynamic": "fp8",
    "w8a8_fp8": "fp8",
}
# Other names for a saver.
SAVER_ALIASES = {"ascendv1": "ascendv1_saver", "ascend": "ascendv1_saver", "autoawq": "awq", "bnb": "bitsandbytes"}

# Quant types that the dtype of the weights names; the others follow from the bits in metadata.label.
_QUANT_TYPE_OF_DTYPE = {"nf4": "nf4", "nvfp4": "nvfp4a16"}  # without `act`


class _Block(BaseModel):
    """The docstring of a field is its description in the JSON Schema, which editors show."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Names = Annotated[tuple[str, ...], Field(strict=False)]
NoExtension = Annotated[dict[str, Any], Field(max_length=0)]


class ActConfig(_Block):
    """Activations: int8 or fp8_e4m3 with one symmetric scale per token, computed at run time.

    scope `per_group`: one scale per 128 consecutive inputs of a token (fp8_e4m3 with weights `per_block`), or per 16
    (nvfp4), relative to a global scale that is calibrated.
    """

    scope: Literal["per_token", "per_group"] = "per_token"
    """What shares a scale: a token, or consecutive inputs of a token, 128 (fp8_e4m3 with weights per_block) or 16
    (nvfp4)."""
    dtype: Literal["int8", "fp8_e4m3", "nvfp4"] = "int8"
    """Number format of the rounded activations."""
    symmetric: Literal[True] = True
    """Scales without zero points, the only value."""
    method: Literal["minmax"] = "minmax"
    """The scale covers the largest value of the token, the only value."""
    ext: NoExtension = {}
    """Options of msModelSlim's methods; must be empty."""

    @field_validator("scope", mode="before")
    @classmethod
    def _refuse_static(cls, scope: Any) -> Any:
        if scope == "per_tensor":
            raise ValueError(
                "static activations per_tensor are not offered, because they are worse than per_token in every"
                " measurement (docs/schemes.md); use 'per_token'"
            )
        return scope


GroupSize = Literal[32, 64, 128]
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)
FP8_BLOCK = 128  # channels and inputs of a block, the only size that readers support


class WeightExt(_Block):
    """Options of the weights.

    group_size: number of consecutive inputs of an output channel that share a scale; only for `per_group`.
    double_quant: also quantize these scales, to 8 bits; only for nf4.
    """

    group_size: GroupSize | None = None
    """Inputs that share a scale, for scope per_group. Default: 128; nf4: 64."""
    double_quant: bool = False
    """nf4: also quantize the scales, to 8 bits."""


class WeightConfig(_Block):
    """Weights: int8 with one symmetric scale per output channel, int4 with one scale per group of inputs, nf4
    (bitsandbytes' table of 16 levels) with one absmax per group, or fp8_e4m3 (8-bit floats) with one scale per output
    channel or, `per_block`, per 128 channels by 128 inputs, or nvfp4 (4-bit floats) with an FP8 scale per 16 inputs.

    method: `minmax` covers the full range; `mse` searches a clipped range per channel, group or block; `gptq` (int8 and
    int4) also compensates the rounding error of each weight in the weights that are rounded after it.
    """

    scope: Literal["per_channel", "per_group", "per_block"] = "per_channel"
    """What shares a scale: an output channel (int8, fp8_e4m3), a group of inputs (int4, nf4, nvfp4), or a block of 128
    channels by 128 inputs (fp8_e4m3)."""
    dtype: Literal["int8", "int4", "nf4", "fp8_e4m3", "nvfp4"] = "int8"
    """Number format of the stored weights."""
    symmetric: bool = True
    """False stores zero points, for int4 only."""
    method: Literal["minmax", "mse", "gptq"] = "minmax"
    """minmax covers the full range; mse searches a clipped range; gptq (int8, int4) compensates rounding errors."""
    ext: WeightExt = WeightExt()
    """Group size and double quantization."""

    @property
    def group_size(self) -> int | None:
        if self.dtype == "nvfp4":
            return 16
        if self.scope == "per_block":
            return FP8_BLOCK
        default = 64 if self.dtype == "nf4" else 128
        return (self.ext.group_size or default) if self.scope == "per_group" else None

    @property
    def block_rows(self) -> int | None:
        return FP8_BLOCK if self.scope == "per_block" else None

    @model_validator(mode="after")
    def _check_supported(self) -> WeightConfig:
        if self.dtype == "fp8_e4m3":
            return self._check_fp8()
        if self.dtype == "nvfp4":
            return self._check_nvfp4()
        if self.scope == "per_block":
            raise ValueError("scope per_block requires dtype fp8_e4m3")
        if self.dtype == "int4" and self.scope == "per_channel":
            if self.method == "gptq" or not self.symmetric or self.ext != WeightExt():
                raise ValueError("int4 per_channel requires method minmax or mse, symmetric: true, and no ext")
            return self
        if (self.scope == "per_channel") != (self.dtype == "int8"):
            raise ValueError("int8 requires scope per_channel; nf4 requires scope per_group")
        if self.dtype == "nf4" and (self.method != "minmax" or not self.symmetric):
            raise ValueError("nf4 requires method minmax and symmetric: true; its levels are fixed")
        if self.dtype != "nf4" and self.ext.double_quant:
            raise ValueError("ext.double_quant requires dtype nf4")
        if self.dtype == "int8" and not self.symmetric:
            raise ValueError("int8 weights are symmetric; asymmetric weights require int4 per_group")
        if self.dtype == "int8" and self.ext.group_size is not None:
            raise ValueError("ext.group_size requires scope per_group")
        return self

    def _check_nvfp4(self) -> WeightConfig:
        if self.scope != "per_group" or self.method == "gptq" or not self.symmetric or self.ext != WeightExt():
            raise ValueError("nvfp4 requires scope per_group, method minmax or mse, symmetric: true, and no ext")
        return self

    def _check_fp8(self) -> WeightConfig:
        if self.scope == "per_group":
            raise ValueError("fp8_e4m3 requires scope per_channel or per_block")
        if self.method == "gptq" or not self.symmetric:
            raise ValueError("fp8_e4m3 requires method minmax or mse, and symmetric: true")
        if self.ext != WeightExt():
            raise ValueError("fp8_e4m3 has no ext options")
        return self


class LinearQConfig(_Block):
    """int8 weights take int8 activations or, without `act`, float activations; nvfp4 weights take nvfp4 activations or
    float ones; fp8_e4m3 weights require fp8_e4m3 activations; int4 and nf4 weights per_group require float activations,
    int4 per_channel (experts in ascendv1_saver) int8 activations.
    """

    act: ActConfig | None = None
    """Activations. Without it they stay float; `{}` rounds them to int8 per token."""
    weight: WeightConfig
    """Weights."""

    @property
    def stores_input_scale(self) -> bool:
        """Whether a scale of the inputs is calibrated and stored."""
        return self.act is not None and self.act.dtype == "nvfp4"

    @model_validator(mode="after")
    def _check_supported(self) -> LinearQConfig:
        if self.weight.dtype == "fp8_e4m3":
            scope = "per_group" if self.weight.scope == "per_block" else "per_token"
            if self.act is None or (self.act.dtype, self.act.scope) != ("fp8_e4m3", scope):
                raise ValueError(
                    f"fp8_e4m3 weights {self.weight.scope} require `act: {{dtype: fp8_e4m3, scope: {scope}}}`"
                )
            return self
        if self.weight.dtype == "nvfp4":
            if self.act is not None and (self.act.dtype, self.act.scope) != ("nvfp4", "per_group"):
                raise ValueError(
                    "nvfp4 weights take `act: {dtype: nvfp4, scope: per_group}`, or float activations without `act`"
                )
            return self
        if self.weight.dtype == "int4" and self.weight.scope == "per_channel":
            if self.act is None or (self.act.dtype, self.act.scope) != ("int8", "per_token"):
                raise ValueError("int4 weights per_channel require int8 activations per_token, `act: {}`")
            return self
        if self.weight.dtype != "int8" and self.act is not None:
            raise ValueError(f"{self.weight.dtype} weights require float activations; remove `act`")
        if self.act is not None and (self.act.dtype, self.act.scope) != ("int8", "per_token"):
            raise ValueError("int8 weights require int8 activations per_token")
        return self


class _LinearSelection(_Block):
    """include / exclude: shell patterns for the Linear's checkpoint name; exclude takes precedence."""

    include: Names = ("*",)
    """Shell patterns, with {a,b}, for checkpoint names of Linears of the decoder layers."""
    exclude: Names = ()
    """Patterns of Linears to leave out; takes precedence over include."""

    @field_validator("include")
    @classmethod
    def _check_not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not patterns:
            raise ValueError("must list at least one pattern; ['*'] selects every Linear of the decoder layers")
        return patterns


KeepForm = Literal["w8a16", "float"]


class KeepConfig(_Block):
    """Leave the few selected Linears that cost most accuracy in a better precision, chosen by measured damage.

    The Linears that runtimes fuse (q, k, v; gate, up; all experts of a layer) stay together. msModelSlim has no such
    block.
    """

    max_extra_bytes: str | int
    """By how much the output may grow: a share of its size, 3%, or a size, 200MB."""
    as_: KeepForm | None = Field(default=None, alias="as")
    """Precision of the kept Linears: w8a16 (int8 weights, float activations) or float. Default: w8a16 if the format and
    every runtime known to read it take that beside the scheme of this linear_quant; else float."""
    max_share: str = "10%"
    """The largest share of the selected weights that may be kept, for Linears that cost no bytes: their activations are
    float, so a runtime multiplies them slower."""

    @field_validator("max_extra_bytes", mode="before")
    @classmethod
    def _check_extra(cls, given: Any) -> Any:
        if isinstance(given, str) and given.strip().endswith("%"):
            _parse_share(given)
            return given
        try:
            if isinstance(given, bool) or not isinstance(given, str | int):
                raise QuantError("not a size")
            parse_size(str(given))
        except QuantError as error:
            raise ValueError("must be a share of the output, e.g. 3%, or a size above zero, e.g. 200MB") from error
        return given

    @field_validator("max_share")
    @classmethod
    def _check_share(cls, given: str) -> str:
        _parse_share(given)
        return given

    def extra_bytes(self, output_bytes: int) -> int:
        """The bytes that an output of this size may grow by."""
        if isinstance(self.max_extra_bytes, str) and self.max_extra_bytes.strip().endswith("%"):
            return int(_parse_share(self.max_extra_bytes) * output_bytes)
        return parse_size(str(self.max_extra_bytes))

    @property
    def share(self) -> float:
        """max_share from 0 to 1."""
        return _parse_share(self.max_share)


def _parse_share(text: str) -> float:
    """`3%` -> 0.03. Raises ValueError unless it is above 0% and at most 100%."""
    number = text.strip().removesuffix("%").strip()
    if text.strip().endswith("%") and re.fullmatch(r"\d{1,3}(\.\d{1,6})?", number) and 0 < float(number) <= 100:
        return float(number) / 100
    raise ValueError("must be a share above 0% and at most 100%, e.g. 3%")


class LinearQuantConfig(_LinearSelection):
    """Quantize the selected Linears."""

    type: Literal["linear_quant"]
    """Quantize the selected Linears."""
    qconfig: LinearQConfig
    """Number format, scope and method of weights and activations."""
    keep: KeepConfig | None = None
    """Leave the Linears that cost most accuracy in a better precision. Without it, all are quantized alike."""


Alpha = Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"]
Subgraph = Literal["norm-linear", "linear-linear", "ov", "up-down"]


class SmoothQuantConfig(_LinearSelection):
    """SmoothQuant, for norm -> linear only. `alpha: auto` searches a grid that includes no smoothing."""

    type: Literal["smooth_quant"]
    """SmoothQuant, for norm -> linear only."""
    alpha: Alpha = 0.5
    """Share of the outliers that moves into the weights, 0 to 1; auto searches a grid that includes no smoothing."""
    symmetric: Literal[True] = True
    """The only value."""


class IterSmoothConfig(_LinearSelection):
    """Smoothing of several kinds of subgraphs, with msModelSlim's defaults."""

    type: Literal["iter_smooth"]
    """Smoothing of several kinds of subgraphs."""
    alpha: Alpha = 0.9
    """Share of the outliers that moves into the weights, 0 to 1; auto searches a grid that includes no smoothing."""
    scale_min: Annotated[float, Field(gt=0.0)] = 1e-5
    """Smallest factor of a channel."""
    symmetric: Literal[True] = True
    """The only value."""
    enable_subgraph_type: Annotated[tuple[Subgraph, ...], Field(strict=False)] = (
        "norm-linear",
        "linear-linear",
        "ov",
        "up-down",
    )
    """Places to smooth: norm to q, k, v and to gate, up; v to o; up to down."""


AwqSubgraph = Literal["norm-linear", "ov", "up-down"]


class AwqConfig(_LinearSelection):
    """AWQ: scale the input channels of a Linear to reduce the rounding error of the most important channels.

    weight_qconfig: the weight scheme to search for; optional, must match linear_quant. n_grid: number of exponents
    that the search tries.
    """

    type: Literal["awq"]
    """AWQ: scale important input channels up before rounding."""
    weight_qconfig: WeightConfig | None = None
    """The weight scheme to search for. Default: that of linear_quant, with which it must agree."""
    n_grid: Annotated[int, Field(ge=1, le=100)] = 20
    """Number of exponents that the search tries."""
    enable_subgraph_type: Annotated[tuple[AwqSubgraph, ...], Field(strict=False)] = ("norm-linear", "ov", "up-down")
    """Places to scale: norm to q, k, v and to gate, up; v to o; up to down."""

    @field_validator("weight_qconfig")
    @classmethod
    def _check_grouped(cls, weight: WeightConfig | None) -> WeightConfig | None:
        if weight is not None and weight.scope != "per_group":
            raise ValueError("awq requires scope per_group")
        return weight


ProcessorConfig = LinearQuantConfig | SmoothQuantConfig | IterSmoothConfig | AwqConfig


class GroupConfig(_Block):
    """Processors that share one pass over the layer and run in the given order."""

    type: Literal["group"]
    """Several processors in one pass."""
    configs: Annotated[
        tuple[Annotated[ProcessorConfig, Field(discriminator="type")], ...], Field(strict=False, min_length=1)
    ]
    """The processors, in order."""


ProcessItem = Annotated[ProcessorConfig | GroupConfig, Field(discriminator="type")]


class _SaverConfig(_Block):
    part_file_size: Annotated[int, Field(ge=0)] = 4
    """Size of a shard in GB; 0: one file."""
    ext: dict[str, Any] = {}
    """Options of msModelSlim's savers; not used."""


class AscendSaverConfig(_SaverConfig):
    """quant_model_weights-*.safetensors and quant_model_description.json, for vLLM-Ascend."""

    type: Literal["ascendv1_saver"]
    """For vLLM-Ascend."""


class CompressedTensorsConfig(_SaverConfig):
    """compressed-tensors, for vLLM and transformers: int-quantized for W8A8, pack-quantized for W4A16 and W8A16,
    float-quantized for FP8, nvfp4-pack-quantized for NVFP4, and mixed-precision for a model with several of them.
    """

    type: Literal["compressed_tensors"]
    """For vLLM, and transformers with compressed-tensors."""


class AwqSaverConfig(_SaverConfig):
    """AutoAWQ's GEMM layout, for vLLM (awq, awq_marlin) and transformers."""

    type: Literal["awq"]
    """AutoAWQ's layout, for vLLM."""


class BitsandbytesConfig(_SaverConfig):
    """bitsandbytes' NF4 layout, for transformers with bitsandbytes installed."""

    type: Literal["bitsandbytes"]
    """NF4, for transformers with bitsandbytes."""


SaverConfig = AscendSaverConfig | CompressedTensorsConfig | AwqSaverConfig | BitsandbytesConfig
SAVER_CONFIGS: dict[str, type[SaverConfig]] = {
    "ascendv1_saver": AscendSaverConfig,
    "compressed_tensors": CompressedTensorsConfig,
    "awq": AwqSaverConfig,
    "bitsandbytes": BitsandbytesConfig,
}


Modality = Literal["text", "image", "audio", "video"]
ModalityWeight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class CalibrationConfig(_Block):
    """How the calibration data is used. msModelSlim has no such block.

    modality_weights: weights for awq, gptq and clip search. `balanced`: equal weight per modality in the data;
    `tokens`: equal weight per token; a mapping: weight by modality, 0 if not listed. propagate_error: the next layer
    receives the outputs of the quantized layer instead of the float layer.
    """

    max_samples: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many samples, selected with --seed. Default: all."""
    max_tokens: Annotated[int, Field(gt=0)] = 8192
    """Maximum tokens of one sample, including media."""
    max_pixels: Annotated[int, Field(ge=4 * 28 * 28)] | None = None
    """Scale images and frames down to this many pixels. Default: the limit of the model's processor."""
    video_fps: Annotated[float, Field(gt=0.0, le=30.0)] = 2.0
    """Frames per second that are read from a video."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """Fail on a sample that cannot be used, or skip it."""
    modality_weights: Literal["balanced", "tokens"] | dict[Modality, ModalityWeight] = "tokens"
    """Weights for awq, gptq and the clip search: balanced (each modality counts the same), tokens (each token counts
    the same), or a weight by modality, 0 if not listed."""
    propagate_error: bool = False
    """The next layer receives the outputs of the quantized layer instead of the float layer."""
    effort: Literal["fast", "best"] = "fast"
    """best: after rounding, tune scales, norms and biases of the whole model on the samples; 4-bit integers only."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the products in the float model's forwards. auto: bfloat16 where the device is faster at it."""


class KvCacheConfig(_Block):
    """Round the keys and values that a runtime caches. Their scales are calibrated on the samples and stored.

    fp8: one scale per layer for the keys, one for the values, for vLLM (compressed_tensors). int8: one per channel, for
    vLLM-Ascend (ascendv1_saver, C8). msModelSlim has no such block.
    """

    dtype: Literal["int8", "fp8"]
    """Number format of the cached keys and values."""


class Label(_Block):
    """Names the quant type of the recipe, e.g. w8a8; decides nothing."""

    w_bit: Annotated[int, Field(ge=1, le=16)]
    """Bits of the weights."""
    a_bit: Annotated[int, Field(ge=1, le=16)]
    """Bits of the activations; 16 for float."""
    is_sparse: bool = False
    """msModelSlim's; not used."""
    kv_cache: bool = False
    """msModelSlim's; not used."""
    fa_bit: int | None = None
    """msModelSlim's; not used."""
    fa_quant: bool | None = None
    """msModelSlim's; not used."""


class Metadata(_Block):
    """What a recipe is called and which models it is made for."""

    config_id: str = ""
    """Name of the recipe."""
    score: Annotated[float, Field(ge=0.0)] = 100.0
    """Of several shipped recipes of a quant type, the one with the highest score is used."""
    label: Label | None = None
    """Names the quant type; decides nothing."""
    verified_model_types: Names = ()
    """Models that the recipe is made for. Others of the same generation are a warning, the rest an error."""
    verified_tags: dict[str, Any] = {}
    """msModelSlim's; not used."""


class Spec(_Block):
    """What to do with the model."""

    runner: Literal["auto", "layer_wise"] = "layer_wise"
    """msModelSlim's; both values mean layer by layer."""
    process: Annotated[tuple[ProcessItem, ...], Field(strict=False, min_length=1)]
    """The processors, in order; smoothing and scaling come before linear_quant."""
    save: Annotated[tuple[Annotated[SaverConfig, Field(discriminator="type")], ...], Field(strict=False, min_length=1)]
    """The output formats, each at most once."""
    dataset: Annotated[str, Field(min_length=1)] = "calibVideos"
    """Calibration samples: an index.jsonl, its folder, a .txt file, or a name under lab_calib/."""
    default_text: Annotated[str, Field(min_length=1)] = "Describe this image in detail."
    """Question of media samples without a text."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How the samples are used."""
    kv_cache: KvCacheConfig | None = None
    """Rounds the KV cache. Without it the runtime decides."""

    @field_validator("save")
    @classmethod
    def _check_savers_unique(cls, savers: tuple[SaverConfig, ...]) -> tuple[SaverConfig, ...]:
        names = [saver.type for saver in savers]
        if len(set(names)) != len(names):
            raise ValueError("lists the same saver twice")
        return savers


class Recipe(_Block):
    """A recipe: how to quantize a model, which data to calibrate on, and which formats to save."""

    apiversion: Literal["multimodal_vlm_modelslim_v1"]
    """Format of the recipe, the only value."""
    metadata: Metadata = Metadata()
    """Name, score and models of the recipe."""
    spec: Spec
    """Processors, formats and samples."""

    _path: Path = PrivateAttr(default=Path("recipe"))
    _text: str = PrivateAttr(default="")
    _root: Any = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        """The file that the recipe was read from."""
        return self._path

    @property
    def text(self) -> str:
        """The text of that file, unchanged, for the copy in the output."""
        return self._text

    @property
    def quant_type(self) -> str:
        """`nf4`, `fp8`, `fp8_block`, `nvfp4`, `nvfp4a16`, or e.g. `w8a8` from metadata.label; empty without a label."""
        label = self.metadata.label
        configs = [config for _, config in self.processors() if isinstance(config, LinearQuantConfig)]
        for config in configs:
            weight = config.qconfig.weight
            if weight.dtype == "fp8_e4m3":
                return "fp8_block" if weight.scope == "per_block" else "fp8"
            if config.qconfig.stores_input_scale:
                return "nvfp4"
            if weight.dtype in _QUANT_TYPE_OF_DTYPE:
                return _QUANT_TYPE_OF_DTYPE[weight.dtype]
        return f"w{label.w_bit}a{label.a_bit}" if label else ""

    def where(self, location: Location = ()) -> str:
        """Return `file:line` of a key, for errors of a valid recipe that does not fit the model."""
        line = node_at(self._root, location).start_mark.line + 1 if self._root is not None else 1
        return f"{self._path}:{line}"

    def processors(self) -> Iterator[tuple[Location, ProcessorConfig]]:
        """Yield the processors in order, each with its location in the file. Groups are flattened."""
        for i, item in enumerate(self.spec.process):
            location: Location = ("spec", "process", i)
            if isinstance(item, GroupConfig):
                for j, inner in enumerate(item.configs):
                    yield (*location, "configs", j), inner
            else:
                yield location, item


# Names of union branches that pydantic inserts into error locations.
_UNION_TAGS = frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq", "group", *SAVER_CONFIGS})


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe: the path of a YAML file, or the name of a shipped recipe.

    Raises QuantError with file:line, key, value and the allowed values.
    """
    return resolve_recipe(str(path))


def _load_file(path: Path) -> Recipe:
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8")  # keeps line endings, for the copy in the output
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: cannot read the recipe: {error}", "give a YAML file in UTF-8 encoding") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path = Path("recipe")) -> Recipe:
    """Validate the text of a recipe. `path` is only used in error messages."""
    root, anchored = compose(text, path)
    check_duplicates_and_size(root, path)
    data = build(root, path)
    data = drop_anchor_holders(data, root, anchored, Recipe.model_fields)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise QuantError(
            "\n".join(FaultFormatter(Recipe, _UNION_TAGS, root, path).describe(error)),
            "see `msmodelslim recipes show` for a working recipe and `msmodelslim recipes schema` for all keys",
        ) from error
    recipe._path, recipe._text, recipe._root = path, text, root
    _check_order(recipe)
    _check_keep(recipe)
    return recipe


def _check_order(recipe: Recipe) -> None:
    """Raise QuantError for a processor that would change weights after they are rounded."""
    after_linear_quant = False
    for location, config in recipe.processors():
        if isinstance(config, LinearQuantConfig):
            after_linear_quant = True
        elif after_linear_quant:
            raise QuantError(
                f"{recipe.where(location)}: {config.type} comes after linear_quant and would smooth rounded weights",
                "move it before linear_quant",
            )


def _check_keep(recipe: Recipe) -> None:
    """Raise QuantError for `keep` in a data-free recipe, which has no samples to measure damage on."""
    for location, config in recipe.processors():
        if isinstance(config, LinearQuantConfig) and config.keep is not None and not needs_samples(recipe):
            raise QuantError(
                f"{recipe.where((*location, 'keep'))}: keep measures damage on samples, and this recipe is data-free",
                "add iter_smooth or awq before linear_quant, use method: gptq, or remove keep and exclude Linears",
            )


@functools.cache
def _load_shipped(path: Path, modified: int) -> Recipe:
    """A shipped recipe, parsed once. modified: the time of its last change."""
    return _load_file(path)


def shipped_recipes() -> list[Recipe]:
    """Load all recipes in configs/, highest score first."""
    paths = sorted(shipped_folder("configs").glob("*.yaml"))
    recipes = [_load_shipped(path, path.stat().st_mtime_ns) for path in paths]
    return sorted(recipes, key=lambda recipe: (-recipe.metadata.score, recipe.metadata.config_id))


def summary(recipe: Recipe) -> str:
    """The first sentence of the comment at the top of the file; empty if there is none."""
    lines = list(takewhile(lambda line: line.startswith("#"), recipe.text.splitlines()))
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"[.;] ", text)[0].removesuffix(".")


def needs_samples(recipe: Recipe) -> bool:
    """Whether the recipe is calibrated: whether a processor looks at activations."""
    return any(
        not isinstance(config, LinearQuantConfig)
        or config.qconfig.weight.method == "gptq"
        or config.qconfig.stores_input_scale
        for _, config in recipe.processors()
    ) or (recipe.spec.kv_cache is not None)


def find_recipe(model_type: str, quant_type: str) -> Recipe:
    """Find the shipped recipe with the highest score for a model type and a quant type (e.g. `w8a8`).

    A name with a variant, such as `w8a8_minmax` or `w4a16_sym`, is the end of the recipe's name. Raises QuantError that
    lists the available quant types.
    """
    candidates = [recipe for recipe in shipped_recipes() if model_type in recipe.metadata.verified_model_types]
    if found := _of_type(candidates, quant_type):
        return found
    available = sorted({recipe.quant_type for recipe in candidates})
    raise QuantError(
        f"no recipe for quant_type {quant_type!r} and model_type {model_type!r}."
        f" Quant types with a recipe: {', '.join(available) or 'none'}.{_nearest_type(quant_type, available)}",
        "choose one of them, or write a recipe and pass it with --config_path",
    )


def check_quant_type(quant_type: str) -> None:
    """Raise QuantError if no shipped recipe of any model has this quant type."""
    recipes = shipped_recipes()
    if _of_type(recipes, quant_type) is None:
        available = sorted({recipe.quant_type for recipe in recipes})
        raise QuantError(
            f"no recipe has the quant_type {quant_type!r}. Quant types with a recipe: {', '.join(available)}."
            f"{_nearest_type(quant_type, available)}",
            "choose one of them, or write a recipe and pass it with --config_path",
        )


def quant_type_names() -> dict[str, str]:
    """What --quant_type takes: types and variants with what their recipe does, then other tools' names for them."""
    names: dict[str, str] = {}
    for recipe in shipped_recipes():
        names.setdefault(recipe.quant_type, summary(recipe))
    for recipe in shipped_recipes():
        variant = re.search(rf"_({re.escape(recipe.quant_type)}_\w+)$", recipe.metadata.config_id)
        if variant:
            names.setdefault(variant[1], summary(recipe))
    return dict(sorted(names.items())) | {alias: f"same as {name}" for alias, name in QUANT_TYPE_ALIASES.items()}


def _of_type(recipes: list[Recipe], quant_type: str) -> Recipe | None:
    """The first recipe of a quant type, or the first whose name ends with it."""
    canonical = QUANT_TYPE_ALIASES.get(quant_type.lower(), quant_type.lower())
    of_type = [recipe for recipe in recipes if recipe.quant_type == canonical]
    named = [recipe for recipe in recipes if recipe.metadata.config_id.endswith(f"_{canonical}")]
    return next(iter(of_type + named), None)


def _nearest_type(quant_type: str, available: list[str]) -> str:
    """` Did you mean 'w4a16'?`, also for an alias that is almost right.

    One letter in four is too much: `int5` is no slip for `int8`, nor `w4a8` for `w8a8`.
    """
    guess = nearest(quant_type.lower(), [*available, *QUANT_TYPE_ALIASES], cutoff=0.76)
    for alias, canonical in QUANT_TYPE_ALIASES.items():
        guess = guess.replace(f"'{alias}'", f"'{canonical}'")
    return guess


def resolve_recipe(config_path: str) -> Recipe:
    """Load a recipe by its path, or by the config_id of a shipped recipe."""
    if Path(config_path).exists():
        return _load_file(Path(config_path))
    shipped = {recipe.metadata.config_id: recipe for recipe in shipped_recipes()}
    stem = Path(config_path).stem
    if stem in shipped and config_path in (stem, f"{stem}.yaml"):
        return shipped[stem]
    raise QuantError(
        f"recipe {config_path!r} does not exist. Shipped recipes: {', '.join(shipped)}.{nearest(stem, shipped)}",
        "give the path of a YAML file or the name of a shipped recipe",
    )


def saver_names(given: Iterable[str]) -> list[str]:
    """Names of savers as a user writes them: with hyphens, several joined by commas, or by another tool's name.

    Raises QuantError for an unknown name.
    """
    names = []
    for word in ",".join(given).split(","):
        spelled = word.strip().lower().replace("-", "_")
        name = SAVER_ALIASES.get(spelled, spelled)
        if name not in SAVER_CONFIGS:
            raise QuantError(
                f"unknown save_format {word!r}. Known: {', '.join(SAVER_CONFIGS)}.{nearest(name, SAVER_CONFIGS)}",
                "choose one of them; for several, repeat the flag or join them with commas",
            )
        names.append(name)
    return names
