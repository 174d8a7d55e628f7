"""The damage of a unit: copies of the float model on their way through the layers, compared with whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import write_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.calibration import CalibrationStream, load_calib_set, prepare_stems
from msmodelslim_omni.models import LayerInput, derive_model_type
from msmodelslim_omni.plan.plan import QuantPlan, make_plan
from msmodelslim_omni.recipe.loading import load_recipe
from msmodelslim_omni.run.damage import ChangedModels
from msmodelslim_omni.runtime import Progress
from msmodelslim_omni.statistics import run_layer
from msmodelslim_omni.storage.checkpoint import open_checkpoint

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> QuantPlan:
    checkpoint = open_checkpoint(make_tiny_omni(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS))
    return make_plan(load_recipe("qwen2_5_omni_w8a8"), derive_model_type(checkpoint.config), checkpoint)


def opened(plan: QuantPlan, folder: Path) -> CalibrationStream:
    index = write_index(folder / "data", *({"text": f"Count {'very ' * n}far."} for n in (5, 9, 40)))
    calib = load_calib_set(str(index), "Describe.", plan.model)
    (folder / "work").mkdir(exist_ok=True)
    return CalibrationStream(plan, prepare_stems(plan, calib, folder / "work", CPU, Progress()), folder / "work", CPU)


def layer(plan: QuantPlan, index: int) -> torch.nn.Module:
    name = plan.model.layer_name
    weights = {r: plan.checkpoint.load_finite(name(index, r)).float() for r in plan.layer_spec.shapes}
    return plan.model.family.build_layer(plan.checkpoint.config, index, weights)


def whole_kl(plan: QuantPlan, stream: CalibrationStream, first: int, factor: float) -> float:
    """The mean KL if the output of one layer is multiplied by a factor, with all logits at once."""
    ends = stream.ends(LAYERS)
    norm = plan.model.family.build_norm(plan.checkpoint.config, plan.checkpoint.load_finite(plan.model.norm).float())
    head = plan.checkpoint.load_finite(plan.model.lm_head_tensor(plan.checkpoint.config)).float()
    total, count = 0.0, 0
    for position in ends.probe:
        arguments = ends.layer_input(position, 0, ends.first(position), CPU).arguments
        logits = []
        for scale in (1.0, factor):
            hidden = ends.first(position)
            for index in range(LAYERS):
                hidden = run_layer(layer(plan, index), LayerInput(hidden, arguments))
                hidden = hidden * (scale if index == first else 1.0)
            logits.append(F.log_softmax(norm(hidden)[0, :-1].double() @ head.double().T, 1))  # text only
        total += float((logits[0].exp() * (logits[0] - logits[1])).sum())
        count += len(logits[0])
    return total / count


def test_divergences_are_those_of_whole_models_also_after_a_stop(plan: QuantPlan, tmp_path: Path) -> None:
    """Copies that begin in layers 0 and 2; a second object goes on behind layer 1."""
    stream = opened(plan, tmp_path)
    stream.start_at(0)
    copies = ChangedModels(plan, stream, tmp_path / "work", CPU)
    with torch.inference_mode():
        for index in range(LAYERS):
            module = layer(plan, index)
            captured = stream.capture(index, module, plan.layer_spec, watch_blocks=True)
            outputs = captured.probe.changed_outputs(captured.probe.changes("mlp", {}, is_last=True))
            if index == 2:
                again = ChangedModels(plan, stream, tmp_path / "work", CPU)
                assert again.can_start_at(2, 2) and not again.can_start_at(1, 2)
                again.start_at(2)
                copies = again
            new = {0: [1.0, 1.05], 2: [1.2]}.get(index, [])
            copies.advance(index, module, [[states * factor for states in outputs] for factor in new])
            stream.advance_float()
            copies.forget(index)
        unchanged, first, last = copies.divergences()
        assert unchanged == pytest.approx(0, abs=1e-9)
        assert first == pytest.approx(whole_kl(plan, stream, 0, 1.05), rel=1e-3)
        # The final norm removes the factor: what is left is the float32 rounding of log_softmax.
        assert last == pytest.approx(whole_kl(plan, stream, 2, 1.2), rel=1e-3, abs=1e-7)
        assert first > 1e-7
