"""keep: which Linears a recipe allows to be left in a better precision, and in which one.

The choice needs samples and is made when the run starts; see run/keep.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..compatibility import loads_in
from ..errors import QuantError
from ..formats import FORMATS
from ..models import LayerSpec, ModelSpec
from ..numerics import QuantScheme
from ..recipe import KeepConfig, LinearQConfig, LinearQuantConfig, Location, ProcessorConfig, Recipe, SaverConfig
from .schemes import scheme_of

Selections = Sequence[tuple[Location, ProcessorConfig, frozenset[str]]]


@dataclass(frozen=True)
class Keep:
    """A linear_quant with `keep`.

    where: file:line of `keep`. config: the linear_quant. names: full names of the Linears that it quantizes. better:
    the linear_quant of those that are kept; None leaves them float.
    """

    where: str
    config: LinearQuantConfig
    names: frozenset[str]
    better: LinearQuantConfig | None

    @property
    def limits(self) -> KeepConfig:
        assert self.config.keep is not None
        return self.config.keep

    @property
    def scheme(self) -> QuantScheme | None:
        """Scheme of the kept Linears; None: float."""
        return None if self.better is None else scheme_of(self.better.qconfig.weight, self.better.qconfig.act)

    @property
    def is_free(self) -> bool:
        """Whether a kept weight takes no more bits than the recipe's."""
        return self.scheme is not None and self.scheme.weight_bits <= scheme_of(self.config.qconfig.weight).weight_bits

    @property
    def scheme_name(self) -> str:
        return "FLOAT" if self.scheme is None else self.scheme.name


def plan_keep(
    recipe: Recipe, model: ModelSpec, spec: LayerSpec, savers: Sequence[SaverConfig], selections: Selections
) -> tuple[Keep, ...]:
    """What each linear_quant of the recipe may keep. Raises QuantError, with file:line, for what cannot be stored."""
    every = {
        scheme_of(config.qconfig.weight, config.qconfig.act)
        for _, config, names in selections
        if isinstance(config, LinearQuantConfig) and names
    }
    return tuple(
        _plan_one(recipe, (*location, "keep"), config, names, model, spec, savers, every)
        for location, config, names in selections
        if isinstance(config, LinearQuantConfig) and config.keep is not None and names
    )


def _plan_one(
    recipe: Recipe,
    location: Location,
    config: LinearQuantConfig,
    names: frozenset[str],
    model: ModelSpec,
    spec: LayerSpec,
    savers: Sequence[SaverConfig],
    every: Collection[QuantScheme],
) -> Keep:
    """every: all schemes of the recipe."""
    assert config.keep is not None
    where = recipe.where(location)
    weights = config.qconfig.weight
    method = weights.method if weights.dtype in ("int8", "int4") else "minmax"
    better = config.model_copy(
        update={
            "keep": None,
            "qconfig": LinearQConfig.model_validate(
                {"weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": method}}
            ),
        }
    )
    own = scheme_of(weights, config.qconfig.act)
    as_w8a16 = scheme_of(better.qconfig.weight)
    why = _why_not(as_w8a16, own, names, model, spec, savers, every)
    if config.keep.as_ == "w8a16" and why:
        raise QuantError(f"{where}: as: w8a16: {why}", "use as: float, or another --save_format")
    readers_take_it = all(_readers_take(as_w8a16, saver, model, every) for saver in savers)
    as_float = config.keep.as_ == "float" or (config.keep.as_ is None and (bool(why) or not readers_take_it))
    return Keep(where, config, names, None if as_float else better)


def _why_not(
    scheme: QuantScheme,
    own: QuantScheme,
    names: frozenset[str],
    model: ModelSpec,
    spec: LayerSpec,
    savers: Sequence[SaverConfig],
    every: Collection[QuantScheme],
) -> str:
    """Why W8A16 cannot be kept; empty if it can."""
    if own.name == scheme.name:
        return "this linear_quant writes W8A16 anyway"
    for saver in savers:
        if refusal := FORMATS[saver.type].refusal(frozenset({*every, scheme})):
            return f"{saver.type} cannot store it beside {own.name}: {refusal}"
        experts = [g.linears[0] for g in spec.groups if g.expert is not None]
        if saver.type == "ascendv1_saver" and any(name.endswith(f".{experts[0]}") for name in names if experts):
            return "vLLM-Ascend has W8A16 for dense Linears only, and this linear_quant quantizes experts"
    return ""


def _readers_take(scheme: QuantScheme, saver: SaverConfig, model: ModelSpec, every: Iterable[QuantScheme]) -> bool:
    """Whether all runtimes that are known to read the recipe's output also read it with this scheme in it."""
    names = {each.name for each in every}
    before = loads_in(model.hf_model_type, saver.type, names)
    after = loads_in(model.hf_model_type, saver.type, {*names, scheme.name})
    readers = [runtime for runtime, loads in before.items() if loads.verdict == "yes"]
    return bool(readers) and all(after[runtime].verdict == "yes" for runtime in readers)
