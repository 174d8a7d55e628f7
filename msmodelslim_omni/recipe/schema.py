"""A YAML recipe -> a frozen, checked Recipe; and the choice of a shipped recipe by model type and quant type.

The format is msModelSlim's (`apiversion: multimodal_vlm_modelslim_v1`) with an optional `spec.calibration` block
of ours. Every fault carries file:line, the key, and what is allowed there. No torch here: `--help` stays instant.
What needs the checkpoint (do the patterns match, does the model type admit the processor) is plan.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from ..errors import QuantError, nearest
from ..files import read_regular, shipped_folder
from .validation_errors import FaultsInWords
from .yaml_lines import (
    Location,
    build,
    compose,
    node_at,
    refuse_duplicates_and_bombs,
    without_anchor_holders,
)

MAX_RECIPE_BYTES = 1 << 20

# Other names under which users know a quant type.
QUANT_TYPE_ALIASES = {"awq": "w4a16", "bnb": "nf4", "bitsandbytes": "nf4"}


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Names = Annotated[tuple[str, ...], Field(strict=False)]
NoExtension = Annotated[dict[str, Any], Field(max_length=0, description="msModelSlim's method options; none here")]


class ActConfig(_Block):
    """Activations: int8, one symmetric scale per token, computed at run time."""

    scope: Literal["per_token"] = "per_token"
    dtype: Literal["int8"] = "int8"
    symmetric: Literal[True] = True
    method: Literal["minmax"] = "minmax"
    ext: NoExtension = {}


GroupSize = Literal[32, 64, 128]
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)


class WeightExt(_Block):
    """group_size: consecutive inputs of an output channel that share a scale; for `per_group` only.

    double_quant: nf4 keeps these scales in eight bits, too.
    """

    group_size: GroupSize | None = None
    double_quant: bool = False


class WeightConfig(_Block):
    """Weights: int8 with one symmetric scale per output channel, int4 with one scale per group of its inputs, or nf4,
    bitsandbytes' table of sixteen levels with one absmax per group.

    method: `minmax` rounds within the whole range; `mse` searches a clip per channel or group; `gptq` (int4) also
    rounds each weight so that it makes up for the errors of those rounded before it.
    """

    scope: Literal["per_channel", "per_group"] = "per_channel"
    dtype: Literal["int8", "int4", "nf4"] = "int8"
    symmetric: bool = True
    method: Literal["minmax", "mse", "gptq"] = "minmax"
    ext: WeightExt = WeightExt()

    @property
    def group_size(self) -> int | None:
        usual = 64 if self.dtype == "nf4" else 128
        return (self.ext.group_size or usual) if self.scope == "per_group" else None

    @model_validator(mode="after")
    def _served(self) -> WeightConfig:
        if (self.scope == "per_channel") != (self.dtype == "int8"):
            raise ValueError("int8 goes with scope per_channel, int4 and nf4 with scope per_group")
        if self.dtype == "nf4" and (self.method != "minmax" or not self.symmetric):
            raise ValueError("nf4 takes method minmax and symmetric: true; its levels are a table's")
        if self.dtype != "nf4" and self.ext.double_quant:
            raise ValueError("ext.double_quant is for nf4")
        if self.dtype == "int8" and not self.symmetric:
            raise ValueError("int8 weights are symmetric; asymmetric ones are int4 per_group")
        if self.dtype == "int8" and self.method == "gptq":
            raise ValueError("method gptq is for int4 per_group; int8 takes minmax or mse")
        if self.dtype == "int8" and self.ext.group_size is not None:
            raise ValueError("ext.group_size is for scope per_group")
        return self


class LinearQConfig(_Block):
    """int8 weights go with int8 activations, int4 and nf4 weights with float ones (no `act`)."""

    act: ActConfig | None = None
    weight: WeightConfig

    @model_validator(mode="after")
    def _served(self) -> LinearQConfig:
        if self.weight.dtype != "int8" and self.act is not None:
            raise ValueError(f"{self.weight.dtype} weights go with float activations; leave `act` out")
        if self.weight.dtype == "int8" and self.act is None:
            raise ValueError("int8 weights go with int8 activations; give `act`, e.g. `act: {}`")
        return self


class _Selecting(_Block):
    """include / exclude: shell patterns on the Linear's checkpoint name; exclude wins."""

    include: Names = ("*",)
    exclude: Names = ()

    @field_validator("include")
    @classmethod
    def _not_empty(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if not patterns:
            raise ValueError("must name at least one pattern; ['*'] means every Linear of the decoder layers")
        return patterns


class LinearQuantConfig(_Selecting):
    """Quantize the matching Linears."""

    type: Literal["linear_quant"]
    qconfig: LinearQConfig


Alpha = Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"]
Subgraph = Literal["norm-linear", "linear-linear", "ov", "up-down"]


class SmoothQuantConfig(_Selecting):
    """SmoothQuant: norm -> linear only. `alpha: auto` searches a grid that holds 'no smoothing'."""

    type: Literal["smooth_quant"]
    alpha: Alpha = 0.5
    symmetric: Literal[True] = True


class IterSmoothConfig(_Selecting):
    """Smoothing of several kinds of subgraph, with msModelSlim's defaults."""

    type: Literal["iter_smooth"]
    alpha: Alpha = 0.9
    scale_min: Annotated[float, Field(gt=0.0)] = 1e-5
    symmetric: Literal[True] = True
    enable_subgraph_type: Annotated[tuple[Subgraph, ...], Field(strict=False)] = (
        "norm-linear",
        "linear-linear",
        "ov",
        "up-down",
    )


AwqSubgraph = Literal["norm-linear", "ov", "up-down"]


class AwqConfig(_Selecting):
    """AWQ: scale channels of a Linear's input so that those that matter lose less to rounding.

    weight_qconfig: the form that follows; where it stands, linear_quant must say the same. n_grid: points of the
    search over the exponent.
    """

    type: Literal["awq"]
    weight_qconfig: WeightConfig | None = None
    n_grid: Annotated[int, Field(ge=1, le=100)] = 20
    enable_subgraph_type: Annotated[tuple[AwqSubgraph, ...], Field(strict=False)] = ("norm-linear", "ov", "up-down")


ProcessorConfig = LinearQuantConfig | SmoothQuantConfig | IterSmoothConfig | AwqConfig


class GroupConfig(_Block):
    """Processors that share one pass over the layer; the order inside is kept."""

    type: Literal["group"]
    configs: Annotated[
        tuple[Annotated[ProcessorConfig, Field(discriminator="type")], ...], Field(strict=False, min_length=1)
    ]


ProcessItem = Annotated[ProcessorConfig | GroupConfig, Field(discriminator="type")]


class _SaverConfig(_Block):
    part_file_size: Annotated[int, Field(ge=0, description="GB per shard; 0 = one file")] = 4
    ext: dict[str, Any] = {}


class AscendSaverConfig(_SaverConfig):
    """quant_model_weights-*.safetensors and quant_model_description.json, as vLLM-Ascend reads them."""

    type: Literal["ascendv1_saver"]


class CompressedTensorsConfig(_SaverConfig):
    """compressed-tensors as vLLM and transformers read it: int-quantized for W8A8, pack-quantized for W4A16, and
    mixed-precision for both beside each other.
    """

    type: Literal["compressed_tensors"]


class AwqSaverConfig(_SaverConfig):
    """AutoAWQ's GEMM layout, as vLLM (awq, awq_marlin) and transformers read it."""

    type: Literal["awq"]


class BitsandbytesConfig(_SaverConfig):
    """bitsandbytes' NF4, as transformers reads it with bitsandbytes installed."""

    type: Literal["bitsandbytes"]


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
    """How the calibration data is used (ours; msModelSlim has no such block).

    modality_weights: for awq, gptq and clip search; `balanced` gives each modality in the data the same say, `tokens`
    each token, a mapping each modality what it says (0 if not named). propagate_error: the next layer sees the
    quantized layer's outputs, else the float layer's.
    """

    max_samples: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0, description="tokens of one sample, media included")] = 8192
    max_pixels: Annotated[int, Field(ge=4 * 28 * 28, description="per image or video frame")] | None = None
    video_fps: Annotated[float, Field(gt=0.0, le=30.0)] = 2.0
    on_bad_sample: Literal["fail", "skip"] = "fail"
    modality_weights: Literal["balanced", "tokens"] | dict[Modality, ModalityWeight] = "tokens"
    propagate_error: bool = True


class Label(_Block):
    w_bit: Annotated[int, Field(ge=1, le=16)]
    a_bit: Annotated[int, Field(ge=1, le=16)]
    is_sparse: bool = False
    kv_cache: bool = False
    fa_bit: int | None = None
    fa_quant: bool | None = None


class Metadata(_Block):
    config_id: str = ""
    score: Annotated[float, Field(ge=0.0)] = 100.0
    label: Label | None = None
    verified_model_types: Names = ()
    verified_tags: dict[str, Any] = {}


class Spec(_Block):
    runner: Literal["auto", "layer_wise"] = "layer_wise"
    process: Annotated[tuple[ProcessItem, ...], Field(strict=False, min_length=1)]
    save: Annotated[tuple[Annotated[SaverConfig, Field(discriminator="type")], ...], Field(strict=False, min_length=1)]
    dataset: Annotated[str, Field(min_length=1)] = "calibVideos"
    default_text: Annotated[str, Field(min_length=1)] = "Describe this image in detail."
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("save")
    @classmethod
    def _each_saver_once(cls, savers: tuple[SaverConfig, ...]) -> tuple[SaverConfig, ...]:
        names = [saver.type for saver in savers]
        if len(set(names)) != len(names):
            raise ValueError("names the same saver twice")
        return savers


class Recipe(_Block):
    """One recipe. `path` and `text` are the file it came from, byte for byte, for the copy in the output."""

    apiversion: Literal["multimodal_vlm_modelslim_v1"]
    metadata: Metadata = Metadata()
    spec: Spec

    _path: Path = PrivateAttr(default=Path("recipe"))
    _text: str = PrivateAttr(default="")
    _root: Any = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def text(self) -> str:
        return self._text

    @property
    def quant_type(self) -> str:
        """`nf4` for a recipe that makes it, else `w8a8` and the like, from metadata.label; empty without a label."""
        label = self.metadata.label
        configs = [config for _, config in self.processors() if isinstance(config, LinearQuantConfig)]
        if any(config.qconfig.weight.dtype == "nf4" for config in configs):
            return "nf4"
        return f"w{label.w_bit}a{label.a_bit}" if label else ""

    def where(self, location: Location = ()) -> str:
        """`file:line` of a key, for messages about a recipe that is well-formed but does not fit the model."""
        line = node_at(self._root, location).start_mark.line + 1 if self._root is not None else 1
        return f"{self._path}:{line}"

    def processors(self) -> Iterator[tuple[Location, ProcessorConfig]]:
        """The processors in order with their place in the file; groups are flattened."""
        for i, item in enumerate(self.spec.process):
            here: Location = ("spec", "process", i)
            if isinstance(item, GroupConfig):
                for j, inner in enumerate(item.configs):
                    yield (*here, "configs", j), inner
            else:
                yield here, item


# Names by which pydantic tells the branches of a union apart.
_UNION_TAGS = frozenset({"linear_quant", "smooth_quant", "iter_smooth", "awq", "group", *SAVER_CONFIGS})


def load_recipe(path: str | Path) -> Recipe:
    """Read and check one recipe file. Raises QuantError naming file:line, key, value and what is allowed."""
    path = Path(path)
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8")  # line ends as they are, for the copy in the output
    except (OSError, ValueError) as error:
        raise QuantError(f"{path}: cannot read the recipe: {error}", "give a YAML file in UTF-8") from error
    return parse_recipe(text, path)


def parse_recipe(text: str, path: Path = Path("recipe")) -> Recipe:
    """Check the text of a recipe; `path` only serves the messages."""
    root, anchored = compose(text, path)
    refuse_duplicates_and_bombs(root, path)
    data = build(root, path)
    data = without_anchor_holders(data, root, anchored, Recipe.model_fields)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise QuantError(
            "\n".join(FaultsInWords(Recipe, _UNION_TAGS, root, path).all(error)),
            "see `msmodelslim recipes show` for a recipe that works and `msmodelslim recipes schema` for all keys",
        ) from error
    recipe._path, recipe._text, recipe._root = path, text, root
    return recipe


def shipped_recipes() -> list[Recipe]:
    """All recipes in configs/, best score first."""
    recipes = [load_recipe(path) for path in sorted(shipped_folder("configs").glob("*.yaml"))]
    return sorted(recipes, key=lambda recipe: (-recipe.metadata.score, recipe.metadata.config_id))


def find_recipe(model_type: str, quant_type: str) -> Recipe:
    """The best shipped recipe for a model type and a quant type (`w8a8`). Raises QuantError listing what exists."""
    wanted = QUANT_TYPE_ALIASES.get(quant_type.lower(), quant_type.lower())
    fitting = [recipe for recipe in shipped_recipes() if model_type in recipe.metadata.verified_model_types]
    for recipe in fitting:
        if recipe.quant_type == wanted:
            return recipe
    exists = sorted({recipe.quant_type for recipe in fitting})
    raise QuantError(
        f"no recipe for quant_type {quant_type!r} and model_type {model_type!r}."
        f" Quant types with a recipe: {', '.join(exists) or 'none'}.{nearest(wanted, exists)}",
        "choose one of these, or write a recipe and pass it with --config_path",
    )


def resolve_recipe(config_path: str) -> Recipe:
    """A recipe by path, or by the config_id of a shipped one."""
    if Path(config_path).exists():
        return load_recipe(config_path)
    shipped = {recipe.metadata.config_id: recipe for recipe in shipped_recipes()}
    stem = Path(config_path).stem
    if stem in shipped and config_path in (stem, f"{stem}.yaml"):
        return shipped[stem]
    raise QuantError(
        f"recipe {config_path!r} does not exist. Shipped recipes: {', '.join(shipped)}.{nearest(stem, shipped)}",
        "give the path of a YAML file or the name of a shipped recipe",
    )


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors. Unknown top-level keys stay allowed: they may hold YAML anchors."""
    schema = Recipe.model_json_schema()
    schema["additionalProperties"] = True
    return schema
