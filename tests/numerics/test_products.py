"""Products in bfloat16 on demand, and weights that are widened on demand."""

from __future__ import annotations

import torch

from msmodelslim_omni.numerics import make_reducible, reduced_products, widen_on_use

FINE = 1 + 2.0**-9  # bfloat16 has eight bits: this is rounded to 1


def layer(weight: float, *, is_bfloat16: bool) -> torch.nn.Module:
    """A module with one Linear of two inputs of this weight, and a bias of FINE."""
    linear = torch.nn.Linear(2, 1)
    linear.weight, linear.bias = (torch.nn.Parameter(torch.full(s, v)) for s, v in (((1, 2), weight), ((1,), FINE)))
    module = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up": linear})})
    names = (["mlp.up"], []) if is_bfloat16 else ([], ["mlp.up"])
    make_reducible(module, *names)
    return module


@torch.inference_mode()
def test_only_inside_are_inputs_and_weights_rounded() -> None:
    up = layer(FINE, is_bfloat16=False).get_submodule("mlp.up")
    x = torch.tensor([[1.0, FINE]])
    exact = FINE + FINE**2 + FINE
    assert up(x).tolist() == [[exact]]
    with reduced_products(up):
        assert up(x).tolist() == [[1 + 1 + FINE]]  # the bias is added in float32
    assert up(x).tolist() == [[exact]]
    assert up(x).dtype == torch.float32


@torch.inference_mode()
def test_a_weight_that_was_stored_in_bfloat16_takes_half_the_memory_and_stays_exact() -> None:
    up = layer(1.5, is_bfloat16=True).get_submodule("mlp.up")
    assert up.get_parameter("weight").dtype == torch.bfloat16
    x = torch.tensor([[FINE, 2.0]])
    assert up(x).tolist() == [[1.5 * FINE + 3.0 + FINE]]
    replaced = {"weight": torch.tensor([[FINE, 1.0]])}  # as the probe replaces weights, in float32
    assert torch.func.functional_call(up, replaced, (x,)).tolist() == [[FINE**2 + 2.0 + FINE]]


@torch.inference_mode()
def test_a_weight_that_is_widened_on_use_gives_the_same_bits() -> None:
    stored = torch.randn((48, 32), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide, narrow = (torch.nn.ModuleDict({"down": torch.nn.Linear(32, 48, bias=False)}) for _ in range(2))
    wide.load_state_dict({"down.weight": stored.to(torch.float32)}, assign=True)
    narrow.load_state_dict({"down.weight": stored}, assign=True)
    widen_on_use(narrow, ["down"])
    assert narrow.get_parameter("down.weight").data_ptr() == stored.data_ptr()  # no copy
    x = torch.randn((7, 32), generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrow["down"](x), wide["down"](x))
    with reduced_products(narrow):
        assert torch.equal(narrow["down"](x), wide["down"](x))
