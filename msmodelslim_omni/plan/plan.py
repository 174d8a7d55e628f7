"""Make a QuantPlan from a recipe, a model type and checkpoint headers. All names are checked; no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import QuantError
from ..formats import FORMATS
from ..models import MODEL_TYPES, LayerSpec, ModelSpec, Part
from ..numerics import CacheDtype, QuantScheme, require_bitsandbytes
from ..processors import PROCESSORS
from ..recipe import (
    GROUP_SIZES,
    SAVER_CONFIGS,
    AwqConfig,
    CalibrationConfig,
    LinearQuantConfig,
    Location,
    ProcessorConfig,
    Recipe,
    SaverConfig,
    find_recipe,
    matches,
    saver_names,
    shipped_recipes,
)
from ..runtime import DEFAULT_BUDGET, Budget, ComputeDtype
from ..storage import Checkpoint
from .admission import check_all_tensors, check_layers, check_type, refuse_quantized
from .keep import Keep, plan_keep
from .schemes import scheme_of

# A layer with experts takes a minute and more, and reading it a second or two, for which another layer's memory is too
# much. A data-free run reads one Linear ahead.
_BUDGET_OF_EXPERTS = replace(DEFAULT_BUDGET, read_ahead=False)


@dataclass(frozen=True)
class LinearPlan:
    """The decision for one Linear of a decoder layer: its scheme, or the reason why it stays float."""

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme | None
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """One processor applied to one layer. linears: relative names of the Linears that the recipe selects."""

    processor: str
    config: ProcessorConfig
    linears: frozenset[str]


@dataclass(frozen=True)
class LayerPlan:
    index: int
    schemes: dict[str, QuantScheme]  # by relative name; other Linears stay float
    steps: tuple[Step, ...]

    def keeping(self, kept: frozenset[str], keep: Keep) -> LayerPlan:
        """The plan with some Linears, by relative name, in the better precision of `keep`.

        They are not scaled by awq, whose factors are for 4 bits, and are not smoothed either if they stay float.
        """
        steps: list[Step] = []
        for step in self.steps:
            own = step.linears & kept
            if isinstance(step.config, LinearQuantConfig):
                if own and keep.better is not None:
                    steps.append(Step(step.processor, keep.better, own))
            elif keep.better is not None and not isinstance(step.config, AwqConfig):
                own = frozenset()
            if rest := step.linears - own:
                steps.append(replace(step, linears=rest))
        schemes = {linear: scheme for linear, scheme in self.schemes.items() if linear not in kept}
        if keep.scheme is not None:
            schemes |= dict.fromkeys(sorted(kept), keep.scheme)
        return replace(self, schemes=schemes, steps=tuple(steps))

    def for_linear(self, linear: str) -> LayerPlan:
        """Return the plan restricted to the steps of one Linear."""
        return replace(self, steps=tuple(replace(step, linears=step.linears & {linear}) for step in self.steps))


@dataclass(frozen=True)
class QuantPlan:
    """All decisions of a run.

    dataset: None for a data-free recipe, which reads no samples and runs no towers. statistics: required statistics of
    the Linears' inputs, see processors.Processor.needs. checked: whether check_all_tensors has passed. kv_cache: number
    format of the keys and values that the runtime caches, if the recipe rounds them.
    """

    model: ModelSpec
    recipe: Recipe
    checkpoint: Checkpoint
    layer_spec: LayerSpec
    layers: tuple[LayerPlan, ...]
    linears: tuple[LinearPlan, ...]
    savers: tuple[SaverConfig, ...]
    dataset: str | None
    calibration: CalibrationConfig
    statistics: str
    seed: int
    trust_remote_code: bool
    warnings: tuple[str, ...]
    checked: bool
    budget: Budget = DEFAULT_BUDGET
    kv_cache: CacheDtype | None = None
    keep: tuple[Keep, ...] = ()

    @property
    def tunes(self) -> bool:
        """Whether `--effort best` tunes the model after rounding: 4-bit weights, and no rounded activations."""
        schemes = [scheme for layer in self.layers for scheme in layer.schemes.values()]
        has_int4 = any(scheme.is_int4 for scheme in schemes)
        return self.calibration.effort == "best" and has_int4 and all(scheme.act_bits is None for scheme in schemes)

    def keeping(self, names: frozenset[str], keep: Keep) -> QuantPlan:
        """The plan with some Linears, by full name and in complete groups, in the better precision of `keep`."""
        relative = {
            layer.index: frozenset(n for n in layer.schemes if self.model.layer_name(layer.index, n) in names)
            for layer in self.layers
        }
        reason = "" if keep.better is not None else "kept float: it costs most accuracy for its bytes"
        return replace(
            self,
            layers=tuple(layer.keeping(relative[layer.index], keep) for layer in self.layers),
            linears=tuple(
                replace(linear, scheme=keep.scheme, reason=reason) if linear.name in names else linear
                for linear in self.linears
            ),
        )

    def kept_parts(self) -> list[tuple[Part, int]]:
        """Return the parts of the checkpoint outside the decoder layers, with their sizes in bytes."""
        parts: dict[str, Part] = {}
        sizes: dict[str, int] = {}
        for name, info in self.checkpoint.tensors.items():
            part = self.model.part_of(name)
            parts[part.name] = part
            sizes[part.name] = sizes.get(part.name, 0) + info.nbytes
        layers = self.model.part_of(self.linears[0].name)
        return [(parts[name], size) for name, size in sizes.items() if name != layers.name]


def make_plan(
    recipe: Recipe,
    model: ModelSpec,
    checkpoint: Checkpoint,
    *,
    save_formats: Sequence[str] = (),
    dataset: str | None = None,
    max_samples: int | None = None,
    on_bad_sample: Literal["fail", "skip"] | None = None,
    effort: Literal["fast", "best"] | None = None,
    compute_dtype: ComputeDtype | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    check_later: bool = False,
) -> QuantPlan:
    """Make the plan of a run. Keyword arguments override the recipe if given.

    check_later: if the recipe is data-free, the caller must run check_all_tensors.

    Raises QuantError if the recipe, the model and the checkpoint do not fit; with file:line if the recipe is the cause.
    """
    refuse_quantized(checkpoint.path)
    check_type(model, checkpoint)
    check_layers(model, checkpoint)
    warnings: list[str] = []
    verified = recipe.metadata.verified_model_types
    if verified and model.model_type not in verified:
        made_for = f"{recipe.path.name} is made for {', '.join(verified)}, not for {model.model_type}"
        generations = {MODEL_TYPES[name].generation for name in verified if name in MODEL_TYPES}
        if generations and model.generation not in generations:
            raise QuantError(made_for, _own_recipe(recipe, model))
        warnings.append(made_for)
    selections = _selections(recipe, model, checkpoint, warnings)
    layer_spec = model.family.layer_spec(checkpoint.config)
    layers = tuple(
        _plan_layer(model, layer_spec, index, selections) for index in range(model.family.num_layers(checkpoint.config))
    )
    _check_groups_not_split(layer_spec, layers, recipe)
    _check_group_sizes(model, checkpoint, layers, selections, recipe)
    _check_awq(model, layers, selections, recipe)
    if any(scheme.codebook for layer in layers for scheme in layer.schemes.values()):
        require_bitsandbytes()
    if not any(layer.schemes for layer in layers):
        raise QuantError(f"{recipe.where(('spec', 'process'))}: the recipe quantizes nothing", "widen an include")
    linears = tuple(_linear_plan(model, checkpoint, layer, name) for layer in layers for name in layer_spec.linears)
    needs = {PROCESSORS[config.type].needs(config) for _, config, _ in selections}
    kv_cache = recipe.spec.kv_cache.dtype if recipe.spec.kv_cache else None
    needs |= {"inputs"} if kv_cache else set()
    statistics = max(needs, key=("", "inputs", "gram").index)
    data_free = statistics == ""
    if data_free and dataset is not None:
        warnings.append(f"the recipe is data-free; dataset {dataset!r} is not read")
    calibration = recipe.spec.calibration
    given = {
        "max_samples": max_samples,
        "on_bad_sample": on_bad_sample,
        "effort": effort,
        "compute_dtype": compute_dtype,
    }
    calibration = calibration.model_copy(update={key: value for key, value in given.items() if value is not None})
    savers = _savers(recipe, save_formats)
    _check_formats(savers, recipe, linears)
    keep = plan_keep(recipe, model, layer_spec, savers, selections)
    _check_ascend(savers, layer_spec, layers, model, recipe)
    _check_cache(savers, kv_cache, recipe)
    checked = not (check_later and data_free)
    return QuantPlan(
        model=model,
        recipe=recipe,
        checkpoint=checkpoint,
        layer_spec=layer_spec,
        layers=layers,
        linears=linears,
        savers=savers,
        dataset=None if data_free else dataset or recipe.spec.dataset,
        calibration=calibration,
        statistics=statistics,
        seed=seed,
        trust_remote_code=trust_remote_code,
        warnings=(*(check_all_tensors(model, checkpoint) if checked else ()), *warnings),
        checked=checked,
        budget=DEFAULT_BUDGET if data_free or layer_spec.experts is None else _BUDGET_OF_EXPERTS,
        kv_cache=kv_cache,
        keep=keep,
    )


def _own_recipe(recipe: Recipe, model: ModelSpec) -> str:
    """A hint that names the recipe of this model for the same quant type."""
    try:
        own = find_recipe(model.model_type, recipe.quant_type)
    except QuantError as error:
        return f"{error.message} Or remove metadata.verified_model_types from a copy of the recipe"
    return f"use --quant_type {recipe.quant_type}, which takes {own.path.stem}"


# --- the recipe's selections ---------------------------------------------------------------------------------

Selection = tuple[Location, ProcessorConfig, frozenset[str]]  # location in the file, processor, full Linear names


def _selections(recipe: Recipe, model: ModelSpec, checkpoint: Checkpoint, warnings: list[str]) -> list[Selection]:
    """Return the decoder Linears of each processor. A Linear belongs to the first linear_quant that selects it."""
    spec = model.family.layer_spec(checkpoint.config)
    in_layer, router = frozenset(spec.linears), None if spec.experts is None else spec.experts.router
    tied = model.family.tied_tensors(checkpoint.config)
    matrices = [*(n for n, info in checkpoint.tensors.items() if len(info.shape) == 2), *tied]
    linear_like = [name.removesuffix(".weight") for name in dict.fromkeys(matrices)]
    prefix = model.layers_prefix
    decoder = {n for n in linear_like if n.startswith(prefix) and n.removeprefix(prefix).partition(".")[2] in in_layer}
    selections: list[Selection] = []
    taken: set[str] = set()
    for location, config in recipe.processors():
        if config.type not in model.processors:
            supported = ", ".join(sorted(model.processors))
            raise QuantError(
                f"{recipe.where((*location, 'type'))}: {model.model_type} does not support the processor"
                f" {config.type!r}; supported: {supported}"
            )
        _check_patterns(recipe, location, config, model, decoder, linear_like, tied, router, warnings)
        selected = {n for n in decoder if matches(n, config.include) and not matches(n, config.exclude)}
        if isinstance(config, LinearQuantConfig):
            selected -= taken
            taken |= selected
        selections.append((location, config, frozenset(selected)))
    return selections


def _check_patterns(
    recipe: Recipe,
    location: Location,
    config: ProcessorConfig,
    model: ModelSpec,
    decoder: set[str],
    linear_like: list[str],
    tied: dict[str, str],
    router: str | None,
    warnings: list[str],
) -> None:
    """Warn about a pattern that matches nothing. Raise QuantError if an include only matches parts that stay float."""
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for number, pattern in enumerate(patterns):
            where = recipe.where((*location, key, number))
            matched = [name for name in linear_like if matches(name, [pattern])]
            if not matched:
                warnings.append(f"{where}: {key} pattern {pattern!r} matches no Linear; names look like {min(decoder)}")
            elif key == "include" and not decoder.intersection(matched):
                weight = f"{matched[0]}.weight"
                part = model.part_of(weight)
                why = f"it is tied to {tied[weight]} and not stored itself" if weight in tied else part.why_float
                if router is not None and matched[0].endswith(f".{router}"):
                    why = "it is a router, which selects the experts of each token"
                raise QuantError(
                    f"{where}: include pattern {pattern!r} selects {matched[0]} ({part.name}),"
                    f" which {model.model_type} keeps float: {why}",
                    f"only Linears of decoder layers are quantized, e.g. {min(decoder)}",
                )


def _plan_layer(model: ModelSpec, spec: LayerSpec, index: int, selections: list[Selection]) -> LayerPlan:
    schemes: dict[str, QuantScheme] = {}
    steps = []
    for _, config, names in selections:
        selected = frozenset(linear for linear in spec.linears if model.layer_name(index, linear) in names)
        if isinstance(config, LinearQuantConfig):
            schemes.update(dict.fromkeys(selected, scheme_of(config.qconfig.weight, config.qconfig.act)))
        if selected:
            steps.append(Step(config.type, config, selected))
    return LayerPlan(index, schemes, tuple(steps))


def _check_groups_not_split(spec: LayerSpec, layers: tuple[LayerPlan, ...], recipe: Recipe) -> None:
    """Raise QuantError for a group (q/k/v, gate/up) with several schemes: runtimes fuse it and require one scheme."""
    for layer in layers:
        for group in spec.groups:
            schemes = {(s.name if (s := layer.schemes.get(linear)) else "FLOAT") for linear in group.linears}
            if len(schemes) > 1:
                names = ", ".join(group.linears)
                raise QuantError(
                    f"{recipe.where(('spec', 'process'))}: in layer {layer.index} {names} would be"
                    f" {' and '.join(sorted(schemes))}; runtimes fuse them and require one scheme",
                    "include or exclude all of them together",
                )
        _check_experts_alike(spec, layer, recipe)


def _check_experts_alike(spec: LayerSpec, layer: LayerPlan, recipe: Recipe) -> None:
    """Raise QuantError if the experts of a layer have several schemes: runtimes take that of expert 0 for all."""
    if spec.experts is None:
        return
    routed = [linear for group in spec.groups if group.expert is not None for linear in group.linears]
    names = {linear: scheme.name if (scheme := layer.schemes.get(linear)) else "FLOAT" for linear in routed}
    first = names[routed[0]]
    if other := next((linear for linear, name in names.items() if name != first), None):
        raise QuantError(
            f"{recipe.where(('spec', 'process'))}: in layer {layer.index} {routed[0]} would be {first} and"
            f" {other} {names[other]}; runtimes require one scheme for all experts of a layer",
            "include or exclude all of them together, e.g. *mlp.experts*",
        )


def _check_group_sizes(
    model: ModelSpec,
    checkpoint: Checkpoint,
    layers: tuple[LayerPlan, ...],
    selections: list[Selection],
    recipe: Recipe,
) -> None:
    for layer in layers:
        for linear, scheme in sorted(layer.schemes.items(), key=lambda item: item[0]):
            name = model.layer_name(layer.index, linear)
            in_features = checkpoint.tensors[f"{name}.weight"].shape[1]
            if scheme.group_size is None or in_features % scheme.group_size == 0:
                continue
            location = next(
                location
                for location, config, names in selections
                if isinstance(config, LinearQuantConfig) and name in names
            )
            if scheme.number != "int":
                raise QuantError(
                    f"{recipe.where((*location, 'qconfig', 'weight'))}: blocks of {scheme.group_size} inputs do not"
                    f" divide in_features {in_features} of {name}",
                    "use another dtype or scope, or exclude this Linear",
                )
            divisors = [str(size) for size in GROUP_SIZES if in_features % size == 0]
            raise QuantError(
                f"{recipe.where((*location, 'qconfig', 'weight'))}: weight.ext.group_size {scheme.group_size} does not"
                f" divide in_features {in_features} of {name}",
                f"use {' or '.join(divisors)}" if divisors else "no group size divides it; exclude this Linear",
            )


def _check_awq(model: ModelSpec, layers: tuple[LayerPlan, ...], selections: list[Selection], recipe: Recipe) -> None:
    """Raise QuantError unless the Linears of awq get per_group, weight-only schemes that match its weight_qconfig."""
    for location, config, names in selections:
        if not isinstance(config, AwqConfig):
            continue
        schemes: dict[QuantScheme, str] = {}  # each with its first Linear
        for layer in layers:
            for linear, scheme in sorted(layer.schemes.items()):
                if (name := model.layer_name(layer.index, linear)) in names:
                    schemes.setdefault(scheme, name)
        if per_channel := [scheme for scheme in schemes if scheme.group_size is None or scheme.number != "int"]:
            raise QuantError(
                f"{recipe.where(location)}: awq requires per_group weights, but linear_quant quantizes"
                f" {schemes[per_channel[0]]} to {per_channel[0].name}",
                "exclude such Linears from awq; use iter_smooth or smooth_quant with W8A8",
            )
        if config.weight_qconfig is None:
            continue
        for scheme in schemes:
            if scheme_of(config.weight_qconfig).name != scheme.name:
                raise QuantError(
                    f"{recipe.where((*location, 'weight_qconfig'))}: weight_qconfig differs from the scheme of"
                    f" linear_quant, {scheme.name}",
                    "make them equal, or remove weight_qconfig",
                )


def _linear_plan(model: ModelSpec, checkpoint: Checkpoint, layer: LayerPlan, relative: str) -> LinearPlan:
    name = model.layer_name(layer.index, relative)
    out_features, in_features = checkpoint.tensors[f"{name}.weight"].shape
    scheme = layer.schemes.get(relative)
    return LinearPlan(name, (out_features, in_features), scheme, "" if scheme else "not selected by the recipe")


# --- savers --------------------------------------------------------------------------------------------------


def _savers(recipe: Recipe, names: Sequence[str]) -> tuple[SaverConfig, ...]:
    """Return the recipe's savers, or the given formats with the recipe's settings for those that it lists."""
    if not names:
        return recipe.spec.save
    in_recipe: dict[str, SaverConfig] = {saver.type: saver for saver in recipe.spec.save}
    savers: dict[str, SaverConfig] = {}
    for name in saver_names(names):
        savers[name] = in_recipe.get(name) or SAVER_CONFIGS[name].model_validate({"type": name})
    return tuple(savers.values())


def _check_formats(savers: tuple[SaverConfig, ...], recipe: Recipe, linears: tuple[LinearPlan, ...]) -> None:
    schemes = frozenset(linear.scheme for linear in linears if linear.scheme is not None)
    for saver in savers:
        if why := FORMATS[saver.type].refusal(schemes):
            raise QuantError(
                f"{recipe.where(('spec', 'save'))}: {saver.type} cannot store this recipe's result: {why}",
                _recipe_for(saver.type, recipe),
            )


def _check_ascend(
    savers: tuple[SaverConfig, ...],
    spec: LayerSpec,
    layers: tuple[LayerPlan, ...],
    model: ModelSpec,
    recipe: Recipe,
) -> None:
    """Raise QuantError for schemes that vLLM-Ascend has for experts only, or for all other Linears only."""
    if "ascendv1_saver" not in [saver.type for saver in savers]:
        return
    experts = {linear for group in spec.groups if group.expert is not None for linear in group.linears}
    for layer in layers:
        for linear, scheme in layer.schemes.items():
            only = {"W4A8_DYNAMIC": True, "W8A16": False}.get(scheme.name)
            if only is not None and only != (linear in experts):
                name, where = model.layer_name(layer.index, linear), recipe.where(("spec", "process"))
                kind = "the experts of mixture models only" if only else "dense Linears only"
                raise QuantError(
                    f"{where}: ascendv1_saver: {name} would be {scheme.name}, which vLLM-Ascend has for {kind}",
                    "quantize experts to int4 and the other Linears to int8 (qwen3_omni_w4a8), or all to W8A8"
                    if only
                    else "use --save_format compressed_tensors, or W8A8",
                )


def _check_cache(savers: tuple[SaverConfig, ...], kv_cache: CacheDtype | None, recipe: Recipe) -> None:
    """Raise QuantError for a format whose readers do not round the KV cache to this number format."""
    for saver in savers:
        fmt = FORMATS[saver.type]
        if kv_cache is not None and fmt.kv_cache != kv_cache:
            known = "; ".join(
                f"{name} stores {other.kv_cache}" for name, other in FORMATS.items() if other.kv_cache is not None
            )
            raise QuantError(
                f"{recipe.where(('spec', 'kv_cache'))}: {saver.type} cannot store the scales of a KV cache in"
                f" {kv_cache}: {fmt.kv_cache_reason}",
                f"remove kv_cache or use another --save_format ({known})",
            )


def _recipe_for(saver: str, recipe: Recipe) -> str:
    """A hint that names the quant type whose recipes write this format."""
    types = sorted({r.quant_type for r in shipped_recipes() if saver in [listed.type for listed in r.spec.save]})
    others = [name for name in types if name != recipe.quant_type]
    return f"use --quant_type {others[0]}, or another --save_format" if others else "use another --save_format"
