"""Samples on their way through the layers: statistics, output errors, hidden states and bad activations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import change_recipe, int4_recipe, write_index
from omni_layers import difference, float_layer, float_weights, open_stream
from safetensors.torch import load_file
from ties import assert_rounded

from msmodelslim_omni.calibration.batches import join_batches
from msmodelslim_omni.calibration.layer_probe import zero_errors
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.models.inputs import LayerInput
from msmodelslim_omni.numerics.arithmetic import quantize_weight
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.run.emulation import emulate
from msmodelslim_omni.run.preparation import Prepared, prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.statistics.capture import run_layer


@pytest.fixture
def prepared(tiny: Path, dataset: Path, tmp_path: Path) -> Prepared:
    """W8A8 with error propagation."""
    recipe = change_recipe(tmp_path, "max_pixels: 200704 ", "propagate_error: True\n    max_pixels: 200704 ")
    return prepare(QuantRequest(tiny, device="cpu", dataset=str(dataset), config_path=str(recipe)))


def test_unquantized_layer_has_no_error(prepared: Prepared, tmp_path: Path) -> None:
    stream = open_stream(prepared, tmp_path / "work")
    checkpoint = prepared.plan.checkpoint
    for index in range(2):
        module = omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))
        captured = stream.capture(index, module, prepared.plan.layer_spec)
        assert sum(stream.stems.tokens_by_modality().values()) == int(captured.stats["qkv"].count.sum())
        assert captured.stats["qkv"].grams == {}  # no processor of this recipe needs them
        error = stream.advance(index, partial(float_layer, prepared, index), captured.probe.errors(module))
        assert error.overall == 0.0
        assert error.by_modality == dict.fromkeys(("text", "image", "audio", "video"), 0.0)


def test_next_layer_gets_the_quantized_layers_output(prepared: Prepared, tmp_path: Path) -> None:
    """The stored output equals that of a layer in plain torch that rounds its activations to the same integers.

    The integers are those nearest to the plain layer's own activations, except at ties.
    """
    plan = prepared.plan
    work = tmp_path / "work"
    stream = open_stream(prepared, work)
    weights = float_weights(plan.checkpoint, 0)
    module = omni.build_layer(plan.checkpoint.config, 0, weights)
    captured = stream.capture(0, module, plan.layer_spec)
    quantized = {
        name: quantize_weight(weights[f"{name}.weight"], QuantScheme(8, 8)) for name in plan.layer_spec.linears
    }
    emulate(module, quantized, weights)
    activations: dict[str, list[torch.Tensor]] = {name: [] for name in plan.layer_spec.linears}
    for name, inputs in activations.items():
        module.get_submodule(name).register_forward_pre_hook(partial(append_input, inputs))
    probe_errors = captured.probe.errors(module)
    for inputs in activations.values():
        inputs.clear()  # the probe's
    error = stream.advance(0, lambda: module, probe_errors)
    stored = load_file(work / "hidden-0001.safetensors")

    plain = omni.build_layer(plan.checkpoint.config, 0, rounded_per_channel(weights))
    integers: dict[str, torch.Tensor] = {}
    for name in plan.layer_spec.linears:
        plain.get_submodule(name).register_forward_pre_hook(partial(round_as, integers, name))
    exact = omni.build_layer(plan.checkpoint.config, 0, weights)
    squared_error = signal = 0.0
    for number, hidden in enumerate(stored.values()):
        inputs = stem_inputs(work / "stem" / f"{number:06d}.safetensors")
        integers.update({name: in_steps(inputs[number]).round() for name, inputs in activations.items()})
        expected = run_layer(plain, inputs)
        assert difference(hidden, expected) < 1e-5
        float_output = run_layer(exact, inputs)
        squared_error += float((expected - float_output).double().square().sum())
        signal += float((float_output - inputs.hidden).double().square().sum())
    assert error.overall == pytest.approx((squared_error / signal) ** 0.5, rel=1e-3)
    assert error.overall > 1e-3


def rounded_per_channel(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer's weights rounded to int8 with one scale per output channel, absmax / 127 in bfloat16."""
    rounded = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2:
            step = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16).float()
            rounded[name] = (weight / step).round() * step
    return rounded


def append_input(inputs: list[torch.Tensor], _module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
    inputs.append(arguments[0])


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """Activations in units of their token's int8 step."""
    return x / (x.abs().amax(-1, keepdim=True) / 127)


def round_as(
    integers: dict[str, torch.Tensor], name: str, _module: torch.nn.Module, arguments: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    """A forward pre-hook that rounds a Linear's input to the given integers, which must be nearest except at ties."""
    (x,) = arguments
    assert_rounded(integers[name], in_steps(x))
    return (integers[name] * (x.abs().amax(-1, keepdim=True) / 127),)


def stem_inputs(path: Path) -> LayerInput:
    """The stored input of the first layer for one sample."""
    tensors = load_file(path)
    arguments: dict[str, Any] = {}
    for name in sorted(tensors):
        if name.startswith("argument."):
            _, key, *place = name.split(".")
            arguments[key] = (*arguments.get(key, ()), tensors[name]) if place else tensors[name]
    return LayerInput(tensors["hidden"], arguments)


# --- the float layer's forward -------------------------------------------------------------------------------


@pytest.fixture
def text_run(tiny: Path, tmp_path: Path) -> Prepared:
    """Text samples only, so that no tower runs, with a recipe that needs all statistics."""
    index = write_index(tmp_path / "data", *({"text": f"Sentence {n}."} for n in range(4)))
    recipe = int4_recipe(tmp_path, propagate_error=True)
    return prepare(QuantRequest(tiny, device="cpu", config_path=str(recipe), dataset=str(index)))


def test_second_moments_are_collected_if_the_recipe_needs_them(text_run: Prepared, tmp_path: Path) -> None:
    stream, module = open_stream(text_run, tmp_path / "work"), float_layer(text_run)
    captured = stream.capture(0, module, text_run.plan.layer_spec)
    tokens = sum(stream.stems.tokens_by_modality().values())
    assert set(captured.stats) == {"qkv", "o", "gate_up", "down"}
    for stats in captured.stats.values():
        (gram,) = stats.grams.values()
        # The shortest sample is the probe sample. The others have enough tokens, so it is held out of H.
        assert tokens / 2 < gram.tokens < tokens == int(stats.count.sum())
        assert gram.factor is None or len(gram.factor) == gram.tokens
    assert sum(captured.importance.values()) * gram.tokens == pytest.approx(1.0)
    assert captured.probe.weighted_error(captured.probe.errors(module)) == 0.0


def test_joined_samples_give_what_they_give_alone(
    text_run: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, statistics, kept rows and H, with the rows of both in the same order."""
    captured, hidden = {}, {}
    for name, most in (("joined", 1024), ("alone", 0)):
        monkeypatch.setattr("msmodelslim_omni.calibration.batches.JOINED_TOKENS", most)
        stream = open_stream(text_run, tmp_path / name)
        assert max(map(len, stream._batches)) == (2 if most else 1)
        captured[name] = stream.capture(0, float_layer(text_run), text_run.plan.layer_spec).stats
        stream.advance(0, partial(float_layer, text_run), zero_errors())
        hidden[name] = load_file(tmp_path / name / "hidden-0001.safetensors")
    torch.testing.assert_close(hidden["joined"], hidden["alone"])
    for group, alone in captured["alone"].items():
        joined = captured["joined"][group]
        for field in ("absmax", "abssum", "count", "rows", "row_modality"):
            torch.testing.assert_close(getattr(joined, field), getattr(alone, field))
        (one,), (other,) = joined.grams.values(), alone.grams.values()
        torch.testing.assert_close(one.diagonal(), other.diagonal())
        assert one.tokens == other.tokens and one.kind == other.kind


def test_batches_are_consecutive_samples_up_to_a_limit() -> None:
    lengths = [500, 500, 24, 1, 2000, 3, 4, 5, 1024, 6]
    batches = [range(3), range(3, 4), range(4, 5), range(5, 6), range(6, 7), range(7, 8), range(8, 9), range(9, 10)]
    assert join_batches(lengths, alone={6}) == batches
    assert join_batches([1024, 1, 1023, 1], alone=()) == [range(1), range(1, 3), range(3, 4)]


def test_error_on_nan_names_layer_linear_and_sample(text_run: Prepared, tmp_path: Path) -> None:
    stream = open_stream(text_run, tmp_path / "work")
    stored = load_file(tmp_path / "work" / "hidden-0000.safetensors")
    stored["000001"][0, 7, 3] = torch.nan
    stream._hidden.write(stored.values())
    stream.start_at(0)
    with pytest.raises(QuantError) as caught:
        stream.capture(0, float_layer(text_run), text_run.plan.layer_spec)
    assert caught.value.message.startswith("layer 0, self_attn.q_proj: NaN or Inf in the input activations")
    assert caught.value.message.endswith(f"with sample {text_run.calib.samples[1].where}")
    assert "index.jsonl:2" in caught.value.message
    assert "remove the sample" in caught.value.hint


def test_error_on_inf_inside_a_layer_names_the_linear(text_run: Prepared, tmp_path: Path) -> None:
    stream, weights = open_stream(text_run, tmp_path / "work"), float_weights(text_run.plan.checkpoint, 0)
    weights["mlp.up_proj.weight"][5] = 3e38
    module = omni.build_layer(text_run.plan.checkpoint.config, 2, weights)
    with pytest.raises(QuantError) as caught:
        stream.capture(2, module, text_run.plan.layer_spec)
    assert caught.value.message.startswith("layer 2, mlp.down_proj: NaN or Inf in the input activations")
    assert text_run.calib.samples[0].where in caught.value.message


def test_error_on_a_linear_without_tokens(text_run: Prepared, tmp_path: Path) -> None:
    """The MLP of this layer calls none of its Linears."""
    stream, module = open_stream(text_run, tmp_path / "work"), float_layer(text_run)
    module.mlp.forward = lambda x: x
    with pytest.raises(QuantError, match=r"layer 3: mlp\.gate_proj received no token") as caught:
        stream.capture(3, module, text_run.plan.layer_spec)
    assert "exclude" in caught.value.hint


@pytest.mark.parametrize("propagate", [True, False])
def test_propagate_error_selects_the_next_layers_input(tiny: Path, tmp_path: Path, propagate: bool) -> None:
    """The next layer gets the changed layer's output, or with `propagate_error: false` the float layer's."""
    index = write_index(tmp_path / "data", {"text": "One sentence."}, {"text": f"Another {'very ' * 30}long one."})
    recipe = int4_recipe(tmp_path, propagate_error=propagate)
    prepared = prepare(QuantRequest(tiny, device="cpu", config_path=str(recipe), dataset=str(index)))
    work = tmp_path / "work"
    stream, module = open_stream(prepared, work), float_layer(prepared)
    captured = stream.capture(0, module, prepared.plan.layer_spec)
    weights = float_weights(prepared.plan.checkpoint, 0)
    changed = omni.build_layer(
        prepared.plan.checkpoint.config, 0, {**weights, "mlp.down_proj.weight": 0.9 * weights["mlp.down_proj.weight"]}
    )
    error = stream.advance(0, lambda: changed, captured.probe.errors(changed))
    assert 0.001 < error.overall < 0.2 and set(error.by_modality) == {"text"}
    stored = load_file(work / "hidden-0001.safetensors")
    assert {file.name for file in work.glob("*.safetensors")} == {"hidden-0000.safetensors", "hidden-0001.safetensors"}
    for number, hidden in enumerate(stored.values()):
        inputs = stem_inputs(work / "stem" / f"{number:06d}.safetensors")
        assert difference(hidden, run_layer(changed if propagate else module, inputs)) < 1e-6
        assert difference(hidden, run_layer(module if propagate else changed, inputs)) > 1e-4
    second = stream.capture(1, float_layer(prepared, 1), prepared.plan.layer_spec)
    assert int(second.stats["qkv"].count.sum()) == sum(stream.stems.tokens_by_modality().values())
