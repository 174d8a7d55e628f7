"""How well the damage of a unit foretells the KL of the model with this unit alone quantized.

    python benchmarks/damage.py MODEL CALIBRATION HELDOUT --recipes RECIPE,RECIPE [--layers 0,1,5] [--every 4]

MODEL: a float checkpoint that fits into memory. CALIBRATION, HELDOUT: datasets; every n-th held-out sample is used.
Every unit of the layers (q, k, v; o; gate, up; down) is quantized alone by the steps of each recipe. Printed are

- noise: the mean over text tokens of |e|² / |h|² behind the unit's layer, on the probe samples;
- damage: KL(float || changed) on the probe samples, as `analyze` and `keep` measure it (run/damage.py), here with all
  layers in memory;
- KL: the same on the held-out samples, which the calibration has not seen.

At the end, per recipe: the rank correlations of noise and of damage with KL over all units, the quartiles of
damage / KL, and the share of units whose damage is within a factor of 2 of their KL.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from msmodelslim_omni.analysis.mixed_recipe import DEFAULT_TEXT
from msmodelslim_omni.calibration import CalibrationStream, Stems, load_calib_set, prepare_stems
from msmodelslim_omni.calibration.layer_probe import _linears_replaced as linears_replaced
from msmodelslim_omni.models import LayerInput, derive_model_type
from msmodelslim_omni.plan import QuantPlan, make_plan
from msmodelslim_omni.processors import LayerWork
from msmodelslim_omni.recipe import resolve_recipe
from msmodelslim_omni.run.damage import quantized_modules
from msmodelslim_omni.runtime import Progress
from msmodelslim_omni.statistics import run_layer
from msmodelslim_omni.storage import open_checkpoint

CPU = torch.device("cpu")


class FloatModel:
    """All float layers in memory, with the hidden states of some samples before each of them."""

    def __init__(self, plan: QuantPlan, stems: Stems, chosen: Sequence[int], like: FloatModel | None = None) -> None:
        model, checkpoint = plan.model, plan.checkpoint

        def load(name: str) -> torch.Tensor:
            return checkpoint.load_finite(name).float()

        self.layers = like.layers if like else [
            model.family.build_layer(
                checkpoint.config, i, {r: load(model.layer_name(i, r)) for r in plan.layer_spec.shapes}
            )
            for i in range(len(plan.layers))
        ]  # fmt: skip
        self.norm = like.norm if like else model.family.build_norm(checkpoint.config, load(model.norm))
        self.head = like.head if like else load(model.lm_head_tensor(checkpoint.config))
        self.positions = [text_positions(stems.modalities[position]) for position in chosen]
        store = stems.store(1 << 30)
        self.arguments = [store.arguments(stems.numbers[position], CPU) for position in chosen]
        self.hidden = [[store.hidden(stems.numbers[position]) for position in chosen]]  # [layers + 1][samples]
        for layer in self.layers:
            self.hidden.append(self.run(layer, self.hidden[-1]))
        self.exact = [self.logits(h, p) for h, p in zip(self.hidden[-1], self.positions, strict=True)]

    def run(self, layer: torch.nn.Module, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [run_layer(layer, LayerInput(h, a)) for h, a in zip(hidden, self.arguments, strict=True)]

    def logits(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.norm(hidden)[0, positions] @ self.head.T, 1)

    def kl(self, index: int, linears: Mapping[str, torch.nn.Module]) -> float:
        """Mean KL of the scored positions with other modules in one layer."""
        with torch.inference_mode():
            with linears_replaced(self.layers[index], linears):
                states = self.run(self.layers[index], self.hidden[index])
            for layer in self.layers[index + 1 :]:
                states = self.run(layer, states)
            total = 0.0
            for p, changed, positions in zip(self.exact, states, self.positions, strict=True):
                q = self.logits(changed, positions)
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return total / sum(map(len, self.positions))


def text_positions(modality: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(modality[1:] == 0).flatten()


def ranks(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("heldout")
    parser.add_argument("--recipes", default="qwen2_5_omni_w4a16,qwen2_5_omni_w8a8")
    parser.add_argument("--layers", default="", help="numbers with commas; default: all")
    parser.add_argument("--calib", type=int, default=None, help="number of calibration samples")
    parser.add_argument("--every", type=int, default=4)
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    spec = derive_model_type(checkpoint.config)
    plans = {name: make_plan(resolve_recipe(name), spec, checkpoint, dataset=args.calibration)
             for name in args.recipes.split(",")}  # fmt: skip
    plan = max(plans.values(), key=lambda plan: ("", "inputs", "gram").index(plan.statistics))
    chosen = [int(n) for n in args.layers.split(",")] if args.layers else range(len(plan.layers))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("calib", "heldout"):
            (folder / part).mkdir()
        calib = load_calib_set(args.calibration, DEFAULT_TEXT, spec, max_samples=args.calib)
        stems = prepare_stems(plan, calib, folder / "calib", CPU, Progress())
        samples = load_calib_set(args.heldout, DEFAULT_TEXT, spec)
        samples = replace(samples, samples=samples.samples[:: args.every])
        heldout_stems = prepare_stems(plan, samples, folder / "heldout", CPU, Progress())
        heldout = FloatModel(plan, heldout_stems, range(len(heldout_stems)))
        stream = CalibrationStream(plan, stems, folder / "calib", CPU)
        probe = sorted(stream._roles.probe_samples)
        own = FloatModel(plan, stems, probe, heldout)
        print(f"probe samples {probe}, positions: {sum(map(len, own.positions))}, held-out"
              f" {sum(map(len, heldout.positions))}", flush=True)  # fmt: skip
        stream.start_at(0)
        rows: list[tuple[str, str, float, float, float]] = []
        for index, layer in enumerate(heldout.layers):
            if index > max(chosen):
                break
            if index not in chosen:
                stream.forward_float(index, layer)
                stream.advance_float()
                stream.forget(index)
                continue
            captured = stream.capture(index, layer, plan.layer_spec)
            weights = {r: t.detach() for r, t in layer.state_dict().items()}
            for unit in plan.layer_spec.units:
                for recipe, own_plan in plans.items():
                    of_layer = own_plan.layers[index]
                    work = LayerWork(
                        index, plan.layer_spec, of_layer.schemes, dict(weights), captured.stats, captured.importance,
                        probe=captured.probe,
                    )  # fmt: skip
                    modules = quantized_modules(work, of_layer, unit)
                    block = unit[0].block
                    is_last = block == plan.layer_spec.groups[-1].block
                    noise = captured.probe.noise(captured.probe.changes(block, modules, is_last=is_last))["text"]
                    row = (f"layer {index} {unit[0].name}", Path(recipe).stem, noise,
                           own.kl(index, modules), heldout.kl(index, modules))  # fmt: skip
                    rows.append(row)
                    print("{:18s} {} {:.3e} {:.3e} {:.3e}".format(*row), flush=True)
            stream.advance_float()
            stream.forget(index)
    for recipe in dict.fromkeys(row[1] for row in rows):
        _, _, noises, damages, measured = zip(*[row for row in rows if row[1] == recipe], strict=True)
        ratios = torch.tensor(damages) / torch.tensor(measured)
        quartiles = ", ".join(f"{q:.2f}" for q in ratios.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1])).tolist())
        within = float(((ratios > 0.5) & (ratios < 2)).float().mean())
        print(
            f"{recipe}: {len(noises)} units; rank correlation: noise {rank_correlation(noises, measured):.3f}, damage"
            f" {rank_correlation(damages, measured):.3f}; damage / KL {quartiles}; {within:.0%} within a factor of 2"
        )


if __name__ == "__main__":
    main()
