"""Run `--effort best` on a simulated card and on the CPU; print what differs.

PYTHONPATH=.:tests:examples python -m simulated_card.tuned FOLDER KIND

A process of its own, see run_all.py. Adam adds in another order on a card, so last bits of what was tuned may differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from command import int4_recipe, write_index
from make_tiny_omni import make_tiny_omni
from safetensors.torch import load_file

from msmodelslim_omni import quantize
from simulated_card.card import Kind, simulated_card


def main(folder: Path, kind: Kind) -> None:
    """Print as JSON: the KL of each epoch, the tensors of integers that differ, and the largest share of others."""
    model = make_tiny_omni(folder / "model", layers=2)
    index = write_index(folder / "data", *({"text": f"Sentence {'very ' * n}long."} for n in range(0, 100, 10)))
    recipe = str(int4_recipe(folder, method="minmax", group_size=32))
    with simulated_card(kind):
        on_card = quantize(model, folder / kind, config_path=recipe, dataset=str(index), effort="best", device=kind)
    on_cpu = quantize(model, folder / "cpu", config_path=recipe, dataset=str(index), effort="best", device="cpu")
    found, expected = (load_file(folder / name / "awq" / "model.safetensors") for name in (kind, "cpu"))
    integers = [n for n, t in expected.items() if t.dtype == torch.int32 and not torch.equal(t, found[n])]
    shares = [float((t != found[n]).float().mean()) for n, t in expected.items() if t.is_floating_point()]
    kls = [report.tuning.kl for report in (on_card, on_cpu) if report.tuning is not None]
    print(json.dumps({"kl": kls, "integers": integers, "share": max(shares)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "npu" if sys.argv[2] == "npu" else "cuda")
