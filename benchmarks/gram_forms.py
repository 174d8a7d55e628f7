"""KL of W4A16 on the trained tiny Omni for each form in which H of down_proj can be collected.

    python benchmarks/gram_forms.py --work WORK

The budget of H is set so that down_proj gets the form that a wider model gets: one matrix per modality, one weighted
matrix, or a weighted matrix on disk of which a share is in memory. Each result is evaluated on every 4th held-out
sample.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from msmodelslim_omni.evaluation import evaluate
from msmodelslim_omni.run import QuantRequest, prepare, run_prepared
from msmodelslim_omni.runtime import Budget, Progress

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny_omni"
HIDDEN, WIDTH, MODALITIES = 256, 768, 4  # inputs of q, k, v, o, gate, up; inputs of down; modalities of the samples
MATRIX = 4 * WIDTH**2  # bytes
EVERY = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="empty or new folder")
    work = parser.parse_args().work
    questions = write_questions(work)
    prepared = prepare(
        QuantRequest(TINY / "model", device="cpu", quant_type="w4a16", dataset=str(TINY / "calib")), Progress()
    )
    print("| H of down_proj | KL | 95 % interval | hidden error |\n|---|--:|--:|--:|")
    for name, budget in budgets(prepared.plan.budget).items():
        output = work / name.replace(" ", "-").replace(",", "")
        variant = replace(prepared, plan=replace(prepared.plan, budget=budget))
        run_prepared(variant, output, overwrite=False, progress=Progress())
        found = evaluate(TINY / "model", output, str(questions), device="cpu", save_path=output / "eval").overall
        kl, hidden = found.kl_mean, found.hidden_error
        print(f"| {name} | {kl.value:.4f} | {kl.low:.4f} to {kl.high:.4f} | {hidden:.4f} |", flush=True)


def budgets(default: Budget) -> dict[str, Budget]:
    """Budgets by the form of H of down_proj that follows from them; the other inputs always have exact matrices."""
    others = 4 * HIDDEN**2 * MODALITIES
    return {
        "one matrix per modality": default,
        "one weighted matrix": replace(default, matrix=MATRIX),
        **{
            f"on disk, {share} of it in memory": replace(default, matrix=others, factor=int(share * MATRIX))
            for share in (0.5, 0.35, 0.2, 0.1)
        },
    }


def write_questions(work: Path) -> Path:
    """An index of every EVERY-th held-out sample."""
    lines = (TINY / "heldout" / "index.jsonl").read_text(encoding="utf-8").splitlines()[::EVERY]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        for kind in ("image", "audio", "video"):
            if kind in entry:
                entry[kind] = str(TINY / "heldout" / entry[kind])
    index = work / "questions" / "index.jsonl"
    index.parent.mkdir(parents=True)
    index.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return index


if __name__ == "__main__":
    main()
