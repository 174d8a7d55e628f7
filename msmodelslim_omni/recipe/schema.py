"""The schema of recipes.

The format is msModelSlim's (`apiversion: multimodal_vlm_modelslim_v1`) plus optional blocks `spec.calibration` and
`spec.kv_cache`. Checks that need the checkpoint (patterns match, the model type supports the processor) are in the plan
package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from .processors import Block, GroupConfig, LinearQuantConfig, Names, ProcessItem, ProcessorConfig
from .yaml_lines import Location, node_at

# Quant types that the dtype of the weights names; the others follow from the bits in metadata.label.
_QUANT_TYPE_OF_DTYPE = {"nf4": "nf4", "nvfp4": "nvfp4a16"}  # without `act`


class _SaverConfig(Block):
    part_file_size: Annotated[int, Field(ge=0)] = 4
    """Size of a shard in GB; 0: one file."""
    ext: dict[str, Any] = Field(default={})
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


class CalibrationConfig(Block):
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
    """best: let the model write texts of its own where samples are few and, with 4-bit weights and float activations,
    tune scales, norms and biases of the whole model after rounding. For recipes with awq or gptq."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the products in the float model's forwards. auto: bfloat16 where the device is faster at it."""


class KvCacheConfig(Block):
    """Round the keys and values that a runtime caches. Their scales are calibrated on the samples and stored.

    fp8: one scale per layer for the keys, one for the values, for vLLM (compressed_tensors). int8: one per channel, for
    vLLM-Ascend (ascendv1_saver, C8). msModelSlim has no such block.
    """

    dtype: Literal["int8", "fp8"]
    """Number format of the cached keys and values."""


class Label(Block):
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


class Metadata(Block):
    """What a recipe is called and which models it is made for."""

    config_id: str = ""
    """Name of the recipe."""
    score: Annotated[float, Field(ge=0.0)] = 100.0
    """Of several shipped recipes of a quant type, the one with the highest score is used."""
    label: Label | None = None
    """Names the quant type; decides nothing."""
    verified_model_types: Names = ()
    """Models that the recipe is made for. Others of the same generation are a warning, the rest an error."""
    verified_tags: dict[str, Any] = Field(default={})
    """msModelSlim's; not used."""


class Spec(Block):
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


class Recipe(Block):
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
