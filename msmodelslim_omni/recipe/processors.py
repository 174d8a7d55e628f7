"""The blocks of a recipe's `spec.process`: what is done to the Linears, and with which number formats."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import QuantError
from ..files import parse_size


class Block(BaseModel):
    """The docstring of a field is its description in the JSON Schema, which editors show."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Names = Annotated[tuple[str, ...], Field(strict=False)]
NoExtension = Annotated[dict[str, Any], Field(max_length=0)]


class ActConfig(Block):
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


class WeightExt(Block):
    """Options of the weights.

    group_size: number of consecutive inputs of an output channel that share a scale; only for `per_group`.
    double_quant: also quantize these scales, to 8 bits; only for nf4.
    """

    group_size: GroupSize | None = None
    """Inputs that share a scale, for scope per_group. Default: 128; nf4: 64."""
    double_quant: bool = False
    """nf4: also quantize the scales, to 8 bits."""


class WeightConfig(Block):
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


class LinearQConfig(Block):
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


class _LinearSelection(Block):
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


class KeepConfig(Block):
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


class GroupConfig(Block):
    """Processors that share one pass over the layer and run in the given order."""

    type: Literal["group"]
    """Several processors in one pass."""
    configs: Annotated[
        tuple[Annotated[ProcessorConfig, Field(discriminator="type")], ...], Field(strict=False, min_length=1)
    ]
    """The processors, in order."""


ProcessItem = Annotated[ProcessorConfig | GroupConfig, Field(discriminator="type")]
