"""Checks of layers with experts: routers are float, and all experts of a layer are there and stored alike.

Runtimes build the experts of a layer as one module, whose scheme they take from expert 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..models import ModelSpec
from .findings import Finding, make_finding, shorten_list
from .linears import StoredLinear

_LISTED = 8


def check_experts(model: ModelSpec, config: dict[str, Any], linears: Mapping[str, StoredLinear]) -> Iterator[Finding]:
    """config: must be one from which the model can be built. Yields nothing for models without experts."""
    spec = model.family.layer_spec(config)
    if spec.experts is None:
        return
    routed = [linear for group in spec.groups if group.expert is not None for linear in group.linears]
    leaves = {name.rpartition(".")[2] for name in routed}
    for index in range(model.family.num_layers(config)):
        prefix = model.layer_name(index, spec.experts.prefix)
        incomplete = [e for e in range(spec.experts.count) if not _is_stored(linears, prefix.format(expert=e), leaves)]
        if incomplete:
            listed = ", ".join(map(str, incomplete[:_LISTED])) + (", ..." if len(incomplete) > _LISTED else "")
            what = f"{len(incomplete)} of {spec.experts.count} experts are missing or incomplete: {listed}"
            yield make_finding("experts_incomplete", prefix.partition("{")[0], what)
        router = linears.get(model.layer_name(index, spec.experts.router))
        if router is not None and router.quantized:
            yield make_finding("router_quantized", router.name, f"is stored as {router.form}")
        stored = [linears[name] for linear in routed if (name := model.layer_name(index, linear)) in linears]
        if not stored:
            continue
        first = describe(stored[0])
        if others := {linear.name for linear in stored if describe(linear) != first}:
            what = f"{len(others)} Linears of experts are not {first}, as {stored[0].name}"
            yield make_finding("experts_differ", shorten_list(others), what)


def describe_parallel(model: ModelSpec, config: dict[str, Any], linears: Mapping[str, StoredLinear]) -> str:
    """On how many cards tensor parallelism can share the experts as they are stored; empty if they are float."""
    spec = model.family.layer_spec(config)
    down = next(group.linears[0] for group in spec.groups if group.expert is not None and group.subgraph == "up-down")
    stored = linears.get(model.layer_name(0, down))
    if stored is None or not stored.quantized or not stored.sound or stored.shape is None:
        return ""
    cards = spec.parallel_sizes(stored.shape[1] // stored.groups if stored.groups > 1 else None)
    return f"; experts can be shared by {', '.join(map(str, cards))} cards"


def _is_stored(linears: Mapping[str, StoredLinear], expert: str, leaves: set[str]) -> bool:
    """Whether every Linear of an expert is there with all its tensors. expert: prefix of its Linears."""
    return all((linear := linears.get(expert + leaf)) is not None and linear.sound for leaf in leaves)


def describe(linear: StoredLinear) -> str:
    """The form of a Linear, with the size of its groups where it has any."""
    if not linear.sound or linear.shape is None or linear.groups < 2:
        return linear.form
    return f"{linear.form} in groups of {linear.shape[1] // linear.groups}"
