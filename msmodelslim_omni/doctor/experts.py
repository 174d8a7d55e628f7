"""Checks of layers with experts: routers are float, and all experts of a layer are stored alike.

Runtimes build the experts of a layer as one module, whose scheme they take from expert 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..models import ModelSpec
from .findings import Finding, make_finding, shorten_list
from .linears import StoredLinear


def check_experts(model: ModelSpec, config: dict[str, Any], linears: Mapping[str, StoredLinear]) -> Iterator[Finding]:
    """config: must be one from which the model can be built. Yields nothing for models without experts."""
    spec = model.family.layer_spec(config)
    if spec.experts is None:
        return
    routed = [linear for group in spec.groups if group.expert is not None for linear in group.linears]
    for index in range(model.family.num_layers(config)):
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


def describe(linear: StoredLinear) -> str:
    """The form of a Linear, with the size of its groups where it has any."""
    if not linear.sound or linear.shape is None or linear.groups < 2:
        return linear.form
    return f"{linear.form} in groups of {linear.shape[1] // linear.groups}"
