"""Tuning of the whole model: the loss and its gradient, the fold of factors, whole runs, resume, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import files, int4_recipe, quant, stop_at, write_index
from make_tiny_omni import make_tiny_omni
from safetensors.torch import load_file, save_file
from tiny_layer import SPEC

from msmodelslim_omni import QuantError
from msmodelslim_omni.calibration import CalibrationStream, SampleEnds, prepare_stems
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.numerics import QuantizedLinear, QuantScheme, dequantize, quantize_weight
from msmodelslim_omni.plan import QuantPlan
from msmodelslim_omni.quantized import load_linear, open_source
from msmodelslim_omni.report.report import read_report
from msmodelslim_omni.run.manifest import Manifest, new_state
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.run.tuned import _file, _quantize_all, _read
from msmodelslim_omni.runtime import Clock, Progress
from msmodelslim_omni.tuning.distill import refuse_effort
from msmodelslim_omni.tuning.factors import Factors, SolvedLayer, fold_factors, neutral_factors
from msmodelslim_omni.tuning.head import Head
from msmodelslim_omni.tuning.walk import Chain

CPU = torch.device("cpu")
LAYERS = 2
W4 = QuantScheme(4, None, group_size=32, symmetric=False)
TUNED = {"layernorm.weight", "_proj.bias"}  # the float tensors that tuning changes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, whose lm_head is ten times as large as by chance, so that its probabilities are not all alike."""
    folder = make_tiny_omni(tmp_path_factory.mktemp("models") / "two", layers=LAYERS)
    shards = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    file = folder / shards["thinker.lm_head.weight"]
    tensors = load_file(file)
    tensors["thinker.lm_head.weight"] *= 10
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]
    texts = ({"text": " ".join(words[(n * k) % 10] for k in range(30))} for n in range(1, 13))
    return write_index(tmp_path_factory.mktemp("data"), *texts)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return int4_recipe(folder, method="minmax", scale=True, group_size=32, propagate_error=False)


# --- the arithmetic ------------------------------------------------------------------------------------------


def test_factors_are_folded_into_scales_norms_and_biases() -> None:
    """Row 0 times 2, row 1 unchanged; the norm's second channel times 1 / 4; 0.5 added to the second bias."""
    linear = quantize_weight(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), W4)
    norm = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    floats = {"norm.weight": norm, "other": norm, "mlp.up_proj.bias": norm}
    layer = SolvedLayer(0, {"mlp.up_proj": linear}, floats, frozenset({"other"}))
    factors = Factors(
        {"mlp.up_proj": torch.tensor([2.0, 1.0]).log()},
        {"norm": torch.tensor([1.0, 0.25]).log()},
        {"mlp.up_proj": torch.tensor([0.0, 0.5])},
    )
    folded = fold_factors(layer, factors)
    expected = dequantize(linear) * torch.tensor([[2.0], [1.0]])
    assert torch.equal(dequantize(folded.linears["mlp.up_proj"]), expected)
    assert torch.equal(folded.linears["mlp.up_proj"].qweight, linear.qweight)
    assert folded.floats["norm.weight"].tolist() == [1.0, 0.75] and folded.floats["norm.weight"].dtype == torch.bfloat16
    assert folded.floats["mlp.up_proj.bias"].tolist() == [1.0, 3.5]
    assert folded.changed == {"other", "norm.weight", "mlp.up_proj.bias"}
    assert torch.equal(folded.floats["other"], norm)


@dataclass
class Quantized:
    """The stored layers of a run, before tuning."""

    plan: QuantPlan
    ends: SampleEnds
    read: Callable[[int], SolvedLayer]


@pytest.fixture(scope="module")
def quantized(model: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("work")
    request = QuantRequest(model, device="cpu", config_path=str(recipe), dataset=str(index), effort="best")
    prepared = prepare(request)
    assert prepared.calib is not None
    stems = prepare_stems(prepared.plan, prepared.calib, folder, CPU, Progress())
    stream = CalibrationStream(prepared.plan, stems, folder, CPU)
    manifest = Manifest(folder / "manifest.json", new_state({}, [], {}))
    _quantize_all(prepared, stream, folder, manifest, Clock(), Progress())
    assert _file(folder, LAYERS - 1).is_file()
    return Quantized(prepared.plan, stream.ends(LAYERS), lambda index: _read(prepared.plan, folder, CPU, index))


def test_loss_and_its_gradient_at_the_logits(quantized: Quantized) -> None:
    """Against torch's own KL and its automatic gradient, through the library's norm and the whole lm_head."""
    plan, head = quantized.plan, Head(quantized.plan, CPU)
    tensors, width = plan.checkpoint.tensors, plan.layer_spec.hidden_size
    norm = plan.model.family.build_norm(plan.checkpoint.config, plan.checkpoint.load_finite(plan.model.norm).float())
    weight = plan.checkpoint.load_finite("thinker.lm_head.weight").float()
    assert "thinker.lm_head.weight" in tensors
    generator = torch.Generator().manual_seed(0)
    exact, measured = torch.randn(2, 300, width, generator=generator)
    leaf = measured.clone().requires_grad_()
    p, q = (F.linear(norm(x), weight).log_softmax(dim=1) for x in (exact, leaf))
    expected = F.kl_div(q, p.detach(), log_target=True, reduction="sum")
    expected.backward()
    loss, gradient = head.loss(exact, measured, gradient=True)
    assert loss == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-6)
    assert head.loss(exact, exact, gradient=False)[0] == pytest.approx(0.0, abs=1e-3)


def test_gradient_of_the_factors_is_the_slope_of_the_loss(quantized: Quantized) -> None:
    """Along the gradient and along a random direction, by differences of the loss."""
    plan, ends, head = quantized.plan, quantized.ends, Head(quantized.plan, CPU)
    chain, batch = Chain(plan, quantized.read, ends, CPU), [0, 1]
    factors = [neutral_factors(quantized.read(n), plan.layer_spec, CPU) for n in range(LAYERS)]
    leaves = [tensor.requires_grad_() for layer in factors for _, tensor in layer.named()]
    assert len(leaves) == LAYERS * (7 + 2 + 3)

    def losses(*, gradient: bool) -> tuple[float, list[torch.Tensor], list[list[torch.Tensor]]]:
        boundaries = chain.forward(batch, factors)
        found = [head.loss(ends.last(n)[0], boundaries[-1][i][0], gradient=gradient) for i, n in enumerate(batch)]
        return sum(loss for loss, _ in found), [grad[None] for _, grad in found], boundaries

    _, gradients, boundaries = losses(gradient=True)
    chain.backward(batch, boundaries, gradients, factors)
    slopes = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    assert len(slopes) == len(leaves)
    generator = torch.Generator().manual_seed(0)
    for direction in (slopes, [torch.randn(s.shape, generator=generator) * s.norm() for s in slopes]):
        length = float(sum(d.square().sum() for d in direction)) ** 0.5
        at = []
        for step in (0.02, -0.02):
            with torch.no_grad():
                for leaf, part in zip(leaves, direction, strict=True):
                    leaf.copy_(part, non_blocking=False).mul_(step / length)
            at.append(losses(gradient=False)[0])
        expected = float(sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))) / length
        assert (at[0] - at[1]) / 0.04 == pytest.approx(expected, rel=0.05, abs=1e-3)


# --- whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("runs") / "tuned"
    result = quant(model, save, "--config_path", recipe, "--dataset", index, "--effort", "best").done()
    assert "KL before and after tuning" in result.out
    return save


def test_tuning_lowers_kl_and_changes_scales_norms_and_biases_alone(
    model: Path, index: Path, recipe: Path, tuned: Path, tmp_path: Path
) -> None:
    report = read_report(tuned / "awq")
    assert report.tuning is not None
    assert report.tuning.kl[report.tuning.epoch] == min(report.tuning.kl) < report.tuning.kl[0]
    assert report.tuning.samples + report.tuning.held_out == 12 + report.own_texts > 12
    text = (tuned / "awq" / "quant_report.md").read_text(encoding="utf-8")
    assert f"epoch {report.tuning.epoch} was taken" in text and "All of it before tuning." in text
    assert f"{report.own_texts} of them texts that the float model wrote itself" in text
    given = f"12 samples of {report.dataset}"
    assert given in text and f" and {report.own_texts} texts of the model itself, " in text
    card = (tuned / "awq" / "README.md").read_text(encoding="utf-8")
    assert "12 samples of" in card and f" and {report.own_texts} texts of the model itself, " in card
    save = tmp_path / "stopped"
    stop_at("tuning, epoch 1 of 2", 0, model, save, index, config_path=str(recipe), effort="best")
    (work,) = save.iterdir()
    source, after = open_source(tuned / "awq"), load_file(tuned / "awq" / "model.safetensors")
    changed = set()
    for layer in range(LAYERS):
        before, prefix = load_file(work / f"untuned-{layer:04d}.safetensors"), f"thinker.model.layers.{layer}."
        for linear in (name.removeprefix("qweight.") for name in before if name.startswith("qweight.")):
            tuned_linear = load_linear(source.linears[prefix + linear])
            assert tuned_linear.zeros is not None
            assert torch.equal(tuned_linear.qweight, before[f"qweight.{linear}"])
            assert torch.equal(tuned_linear.zeros, before[f"zeros.{linear}"])
            changed |= {"scales"} if not torch.equal(tuned_linear.scales, before[f"scales.{linear}"]) else set()
        floats = (name.removeprefix("float.") for name in before if name.startswith("float."))
        different = {name for name in floats if not torch.equal(after[prefix + name], before[f"float.{name}"])}
        assert all(any(kind in name for kind in TUNED) for name in different), different
        changed |= {kind for kind in TUNED if any(kind in name for name in different)}
    assert changed == {"scales", *TUNED}


def test_doctor_knows_that_biases_were_tuned(model: Path, tuned: Path, tmp_path: Path) -> None:
    """Without the report, or with a bias of twice its length, a changed bias is a fault."""
    output = tmp_path / "awq"
    shutil.copytree(tuned / "awq", output)

    def changed() -> list[str]:
        return [f.where for f in examine(output, model).findings if f.code == "float_changed"]

    name = "thinker.model.layers.1.self_attn.q_proj.bias"
    assert changed() == []
    tensors = load_file(output / "model.safetensors")
    save_file(tensors | {name: tensors[name] * 2}, output / "model.safetensors", {"format": "pt"})
    assert changed() == [name]
    (output / "quant_report.json").unlink()
    assert name in changed() and len(changed()) > 1


def test_stopped_four_times_and_resumed_gives_the_same_bytes(
    model: Path, index: Path, recipe: Path, tuned: Path, tmp_path: Path
) -> None:
    save = tmp_path / "out"
    for phase, done in (("own texts", 20), ("layers", 1), ("tuning, epoch 2 of 2", 0), ("writing", 1)):
        stop_at(phase, done, model, save, index, config_path=str(recipe), effort="best")
        assert len(list(save.iterdir())) == 1, "partly written output"
    quant(model, save, "--config_path", recipe, "--dataset", index, "--effort", "best").done()
    assert files(save) == files(tuned)


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected, hint",
    [
        (("--quant_type", "w8a8"), "this recipe uses neither", "w8a8_gptq"),
        (("--quant_type", "nf4"), "data-free", "--quant_type w4a16"),
    ],
)
def test_recipe_that_cannot_be_improved(
    words: tuple[str, ...], expected: str, hint: str, model: Path, index: Path, tmp_path: Path
) -> None:
    fault = quant(model, tmp_path / "out", "--dataset", index, "--effort", "best", *words).fault()
    assert expected in fault and hint in fault and not (tmp_path / "out").exists()


def test_recipe_that_propagates_errors(model: Path, index: Path, tmp_path: Path) -> None:
    recipe = int4_recipe(tmp_path, propagate_error=True)
    fault = quant(model, tmp_path / "out", "--config_path", recipe, "--dataset", index, "--effort", "best").fault()
    assert "the recipe has propagate_error: True" in fault and "propagate_error: False" in fault


def test_rounded_activations_beside_4_bit_weights_are_not_tuned(quantized: Quantized) -> None:
    first, *others = quantized.plan.layers
    mixed = replace(first, schemes={**first.schemes, "mlp.down_proj": QuantScheme(8, 8)})
    assert quantized.plan.tunes and not replace(quantized.plan, layers=(mixed, *others)).tunes


def test_gptq_with_rounded_activations_gets_own_texts_alone(model: Path, index: Path, tmp_path: Path) -> None:
    words = ("--dataset", index, "--quant_type", "w8a8_gptq", "--effort", "best")
    result = quant(model, tmp_path / "out", *words).done()
    report = read_report(tmp_path / "out")
    assert report.tuning is None and report.samples == 12 + report.own_texts > 12
    assert f" and {report.own_texts} texts of the model itself, " in (tmp_path / "out/quant_report.md").read_text()
    assert "changes nothing" not in result.err


def test_warning_where_best_changes_nothing(model: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "One."})
    result = quant(model, tmp_path / "out", "--dataset", index, "--quant_type", "w8a8_gptq", "--effort", "best").done()
    assert "warning: --effort best changes nothing" in result.err and read_report(tmp_path / "out").own_texts == 0


def test_several_processes_cannot_tune(quantized: Quantized) -> None:
    with pytest.raises(QuantError, match="runs in one process"):
        refuse_effort(quantized.plan, 2)


def test_too_few_samples(model: Path, recipe: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "One."})
    save = tmp_path / "out"
    fault = quant(model, save, "--config_path", recipe, "--dataset", index, "--effort", "best").fault()
    assert "1 samples are too few" in fault or "1 sample is too few" in fault


def test_unknown_effort(model: Path, tmp_path: Path) -> None:
    result = quant(model, tmp_path / "out", "--effort", "better")
    assert result.code == 2 and all(word in result.err for word in ("'better'", "'fast'", "'best'"))


def test_only_4_bit_integers_are_tunable() -> None:
    weight = torch.ones(2, 64)
    floats = {"input_layernorm.weight": torch.ones(64)}
    for scheme, expected in ((W4, True), (QuantScheme(8, None), False)):
        linear: QuantizedLinear = quantize_weight(weight, scheme)
        factors = neutral_factors(SolvedLayer(0, {"self_attn.q_proj": linear}, floats, frozenset()), SPEC, CPU)
        assert (set(factors.rows) == {"self_attn.q_proj"}) == expected
        assert (set(factors.norms) == {"input_layernorm"}) == expected
        assert not factors.biases
