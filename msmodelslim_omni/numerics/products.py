"""Linears with float32 at input and output: one multiplies in bfloat16 on demand, one holds a narrower weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F


class ReducibleLinear(torch.nn.Module):
    """A Linear with float32 inputs and outputs, exact unless it runs inside `reduced_products`.

    Then inputs and weights are rounded to bfloat16 and the product is summed in float32: a relative error of about
    2^-9 for each output, far below that of int8 activations.
    weight: [out, in], in bfloat16 if that is how it was stored, so that it takes half the memory.
    """

    def __init__(self, linear: torch.nn.Linear, *, is_bfloat16: bool) -> None:
        """is_bfloat16: whether bfloat16 represents the weight exactly."""
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.nn.Parameter(weight.to(torch.bfloat16) if is_bfloat16 else weight, requires_grad=False)
        self.bias = linear.bias
        self.is_reduced = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_reduced:
            return F.linear(x, self.weight.to(torch.float32), self.bias)
        out = F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).to(torch.float32)
        return out if self.bias is None else out.add_(self.bias)


class WidenedLinear(torch.nn.Module):
    """A Linear that holds its weight [out, in] as it was stored, and widens it to float32 in each product.

    The same bits as with a float32 weight, in half the memory.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(torch.float32), self.bias)


def make_reducible(module: torch.nn.Module, bfloat16_linears: Iterable[str], other_linears: Iterable[str]) -> None:
    """Replace Linears of a float32 module, given by relative name. bfloat16_linears: see ReducibleLinear."""
    for names, is_bfloat16 in ((bfloat16_linears, True), (other_linears, False)):
        _replace(module, names, partial(ReducibleLinear, is_bfloat16=is_bfloat16))


def widen_on_use(module: torch.nn.Module, linears: Iterable[str]) -> None:
    """Replace Linears of a float32 module, given by relative name, whose weights have another dtype."""
    _replace(module, linears, WidenedLinear)


def _replace(
    module: torch.nn.Module, linears: Iterable[str], make: Callable[[torch.nn.Linear], torch.nn.Module]
) -> None:
    for name in linears:
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, child, make(getattr(owner, child)))


@contextmanager
def reduced_products(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the reducible Linears of the module multiply in bfloat16."""
    linears = [part for part in module.modules() if isinstance(part, ReducibleLinear)]
    for linear in linears:
        linear.is_reduced = True
    try:
        yield
    finally:
        for linear in linears:
            linear.is_reduced = False
