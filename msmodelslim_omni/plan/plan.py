"""Recipe x ModelSpec x checkpoint headers -> QuantPlan: every Linear decided, every name checked, no weight read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import QuantError
from ..formats import FORMATS
from ..models import LayerSpec, ModelSpec, Part
from ..numerics import QuantScheme, require_bitsandbytes
from ..processors import PROCESSORS
from ..recipe import (
    GROUP_SIZES,
    SAVER_CONFIGS,
    ActConfig,
    AwqConfig,
    CalibrationConfig,
    LinearQuantConfig,
    Location,
    ProcessorConfig,
    Recipe,
    SaverConfig,
    WeightConfig,
    matches,
)
from ..runtime import DEFAULT_BUDGET, Budget
from ..storage import Checkpoint
from .admission import (
    check_layers,
    check_type,
    check_whole,
    refuse_quantized,
)


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one Linear of a decoder layer: its scheme, or why it stays float."""

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme | None
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """One processor on one layer, with the Linears (relative names) that the recipe gives to it there."""

    processor: str
    config: ProcessorConfig
    linears: frozenset[str]


@dataclass(frozen=True)
class LayerPlan:
    index: int
    schemes: dict[str, QuantScheme]  # by relative name; a Linear that is not here stays float
    steps: tuple[Step, ...]

    def of(self, linear: str) -> LayerPlan:
        """What is planned for one Linear of the layer."""
        return replace(self, steps=tuple(replace(step, linears=step.linears & {linear}) for step in self.steps))


@dataclass(frozen=True)
class QuantPlan:
    """All decisions of a run. `dataset` is None for a data-free recipe: no sample is read, no tower is run.

    statistics: what must be known of the Linears' inputs; see processors.Processor.needs. checked: whether check_whole
    has passed.
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

    def kept_parts(self) -> list[tuple[Part, int]]:
        """The parts of the checkpoint that no Linear of a decoder layer belongs to, with their bytes."""
        sizes: dict[Part, int] = {}
        for name, info in self.checkpoint.tensors.items():
            part = self.model.part_of(name)
            sizes[part] = sizes.get(part, 0) + info.nbytes
        layers = self.model.part_of(self.linears[0].name)
        return [(part, size) for part, size in sizes.items() if part != layers]


def make_plan(
    recipe: Recipe,
    model: ModelSpec,
    checkpoint: Checkpoint,
    *,
    save_formats: Sequence[str] = (),
    dataset: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    check_later: bool = False,
) -> QuantPlan:
    """Decide everything. Arguments other than the first three override the recipe where given.

    check_later: leave check_whole to the caller where the recipe is data-free.

    Raises QuantError for what cannot be done, with the recipe's file:line where the recipe says so.
    """
    refuse_quantized(checkpoint.path)
    check_type(model, checkpoint)
    check_layers(model, checkpoint)
    warnings: list[str] = []
    selections = _selections(recipe, model, checkpoint, warnings)
    layer_spec = model.family.layer_spec(checkpoint.config)
    layers = tuple(
        _plan_layer(model, layer_spec, index, selections) for index in range(model.family.num_layers(checkpoint.config))
    )
    _refuse_split_groups(model, layer_spec, layers, recipe)
    _check_group_sizes(model, checkpoint, layers, selections, recipe)
    _check_awq(model, layers, selections, recipe)
    if any(scheme.codebook for layer in layers for scheme in layer.schemes.values()):
        require_bitsandbytes()
    if not any(layer.schemes for layer in layers):
        raise QuantError(f"{recipe.where(('spec', 'process'))}: the recipe quantizes nothing", "widen an include")
    linears = tuple(_linear_plan(model, checkpoint, layer, name) for layer in layers for name in layer_spec.linears)
    needs = {PROCESSORS[config.type].needs(config) for _, config, _ in selections}
    statistics = max(needs, key=("", "inputs", "gram").index)
    data_free = statistics == ""
    if data_free and dataset is not None:
        warnings.append(f"the recipe is data-free; dataset {dataset!r} is not read")
    calibration = recipe.spec.calibration
    if max_samples is not None:
        calibration = calibration.model_copy(update={"max_samples": max_samples})
    savers = _savers(recipe, save_formats)
    _check_formats(savers, recipe, linears)
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
        warnings=(*(check_whole(model, checkpoint) if checked else ()), *warnings),
        checked=checked,
    )


# --- the recipe's selections ---------------------------------------------------------------------------------

Selection = tuple[Location, ProcessorConfig, frozenset[str]]  # place in the file, processor, full Linear names


def _selections(recipe: Recipe, model: ModelSpec, checkpoint: Checkpoint, warnings: list[str]) -> list[Selection]:
    """For each processor the decoder Linears it selects; the first linear_quant that selects a Linear has it."""
    relatives = {f".{name}" for name in model.family.layer_spec(checkpoint.config).linears}
    tied = model.family.tied_tensors(checkpoint.config)
    matrices = [*(n for n, info in checkpoint.tensors.items() if len(info.shape) == 2), *tied]
    linear_like = [name.removesuffix(".weight") for name in dict.fromkeys(matrices)]
    decoder = {n for n in linear_like if n.startswith(model.layers_prefix) and any(map(n.endswith, relatives))}
    selections: list[Selection] = []
    taken: set[str] = set()
    quantized_before = False
    for place, config in recipe.processors():
        if config.type not in model.processors:
            admitted = ", ".join(sorted(model.processors))
            raise QuantError(
                f"{recipe.where((*place, 'type'))}: {model.model_type} does not admit the processor {config.type!r};"
                f" it admits: {admitted}"
            )
        _check_patterns(recipe, place, config, model, decoder, linear_like, tied, warnings)
        chosen = {n for n in decoder if matches(n, config.include) and not matches(n, config.exclude)}
        if isinstance(config, LinearQuantConfig):
            chosen -= taken
            taken |= chosen
            quantized_before = True
        elif quantized_before:
            raise QuantError(
                f"{recipe.where(place)}: {config.type} stands after linear_quant and would smooth rounded weights",
                "put it before linear_quant",
            )
        selections.append((place, config, frozenset(chosen)))
    return selections


def _check_patterns(
    recipe: Recipe,
    place: Location,
    config: ProcessorConfig,
    model: ModelSpec,
    decoder: set[str],
    linear_like: list[str],
    tied: dict[str, str],
    warnings: list[str],
) -> None:
    """A pattern that matches nothing is a warning; an include that asks for what stays float is an error."""
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for number, pattern in enumerate(patterns):
            where = recipe.where((*place, key, number))
            hits = [name for name in linear_like if matches(name, [pattern])]
            if not hits:
                warnings.append(f"{where}: {key} pattern {pattern!r} matches no Linear; names look like {min(decoder)}")
            elif key == "include" and not decoder.intersection(hits):
                weight = f"{hits[0]}.weight"
                part = model.part_of(weight)
                why = f"it is tied to {tied[weight]}, and stored as that alone" if weight in tied else part.why_float
                raise QuantError(
                    f"{where}: include pattern {pattern!r} asks for {hits[0]} ({part.name}),"
                    f" which {model.model_type} keeps float: {why}",
                    f"only Linears of decoder layers are quantized, e.g. {min(decoder)}",
                )


def _plan_layer(model: ModelSpec, spec: LayerSpec, index: int, selections: list[Selection]) -> LayerPlan:
    schemes: dict[str, QuantScheme] = {}
    steps = []
    for _, config, names in selections:
        chosen = frozenset(linear for linear in spec.linears if model.layer_name(index, linear) in names)
        if isinstance(config, LinearQuantConfig):
            schemes.update(dict.fromkeys(chosen, _scheme(config.qconfig.weight, config.qconfig.act)))
        if chosen:
            steps.append(Step(config.type, config, chosen))
    return LayerPlan(index, schemes, tuple(steps))


def _scheme(weight: WeightConfig, act: ActConfig | None = None) -> QuantScheme:
    bits = {"int8": 8, "int4": 4, "nf4": 4}
    return QuantScheme(
        bits[weight.dtype],
        bits[act.dtype] if act else None,
        weight.method,
        weight.group_size,
        weight.symmetric,
        "nf4" if weight.dtype == "nf4" else None,
        weight.ext.double_quant,
    )


def _refuse_split_groups(model: ModelSpec, spec: LayerSpec, layers: tuple[LayerPlan, ...], recipe: Recipe) -> None:
    """Runtimes fuse the Linears that read one input (q/k/v, gate/up) and ask one stored form of all of them."""
    for layer in layers:
        for group in spec.groups:
            forms = {(s.name if (s := layer.schemes.get(linear)) else "FLOAT") for linear in group.linears}
            if len(forms) > 1:
                names = ", ".join(group.linears)
                raise QuantError(
                    f"{recipe.where(('spec', 'process'))}: in layer {layer.index} {names} would be"
                    f" {' and '.join(sorted(forms))}; runtimes fuse them and need one form",
                    "include or exclude all of them together",
                )


def _check_group_sizes(
    model: ModelSpec,
    checkpoint: Checkpoint,
    layers: tuple[LayerPlan, ...],
    selections: list[Selection],
    recipe: Recipe,
) -> None:
    for layer in layers:
        for linear, scheme in layer.schemes.items():
            name = model.layer_name(layer.index, linear)
            in_features = checkpoint.tensors[f"{name}.weight"].shape[1]
            if scheme.group_size is None or in_features % scheme.group_size == 0:
                continue
            place = next(place for place, config, names in selections if _quantizes(config) and name in names)
            fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0]
            raise QuantError(
                f"{recipe.where((*place, 'qconfig', 'weight'))}: weight.ext.group_size {scheme.group_size} does not"
                f" divide in_features {in_features} of {name}",
                f"use {' or '.join(fitting)}" if fitting else "no group size does; exclude this Linear",
            )


def _quantizes(config: ProcessorConfig) -> bool:
    return isinstance(config, LinearQuantConfig)


def _check_awq(model: ModelSpec, layers: tuple[LayerPlan, ...], selections: list[Selection], recipe: Recipe) -> None:
    """awq scales for grouped, weight-only rounding, and searches for the very form that linear_quant then writes."""
    for place, config, names in selections:
        if not isinstance(config, AwqConfig):
            continue
        schemes: dict[QuantScheme, str] = {}  # with the first Linear of each
        for layer in layers:
            for linear, scheme in sorted(layer.schemes.items()):
                if (name := model.layer_name(layer.index, linear)) in names:
                    schemes.setdefault(scheme, name)
        if odd := [scheme for scheme in schemes if scheme.group_size is None]:
            raise QuantError(
                f"{recipe.where(place)}: awq is for weights per_group; linear_quant makes {odd[0].name} of"
                f" {schemes[odd[0]]}",
                "exclude such Linears from awq; use iter_smooth or smooth_quant with W8A8",
            )
        said = config.weight_qconfig
        for scheme in schemes if said is not None else ():
            assert said is not None
            if _scheme(said).name != scheme.name:
                raise QuantError(
                    f"{recipe.where((*place, 'weight_qconfig'))}: weight_qconfig is not the form that linear_quant"
                    f" writes, {scheme.name}",
                    "make them the same, or leave weight_qconfig out",
                )


def _linear_plan(model: ModelSpec, checkpoint: Checkpoint, layer: LayerPlan, relative: str) -> LinearPlan:
    name = model.layer_name(layer.index, relative)
    out_features, in_features = checkpoint.tensors[f"{name}.weight"].shape
    scheme = layer.schemes.get(relative)
    return LinearPlan(name, (out_features, in_features), scheme, "" if scheme else "not selected by the recipe")


# --- savers --------------------------------------------------------------------------------------------------


def _savers(recipe: Recipe, names: Sequence[str]) -> tuple[SaverConfig, ...]:
    """The recipe's savers, or the named ones with the recipe's settings where it has them."""
    if not names:
        return recipe.spec.save
    in_recipe: dict[str, SaverConfig] = {saver.type: saver for saver in recipe.spec.save}
    chosen: dict[str, SaverConfig] = {}
    for name in names:
        if name not in SAVER_CONFIGS:
            raise QuantError(f"unknown save_format {name!r}. Known: {', '.join(SAVER_CONFIGS)}")
        chosen[name] = in_recipe.get(name) or SAVER_CONFIGS[name].model_validate({"type": name})
    return tuple(chosen.values())


def _check_formats(savers: tuple[SaverConfig, ...], recipe: Recipe, linears: tuple[LinearPlan, ...]) -> None:
    schemes = frozenset(linear.scheme for linear in linears if linear.scheme is not None)
    for saver in savers:
        if why := FORMATS[saver.type].refusal(schemes):
            raise QuantError(f"{recipe.where(('spec', 'save'))}: {saver.type} cannot hold this recipe's result: {why}")
