"""Quantize the trained tiny Omni to W8A8 and W4A16, and evaluate all three models on held-out questions.

    python examples/demo.py OUT [--max_samples N]

Prints and runs the commands that a user would type, and ends with a table of exact answers by modality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TINY = Path(__file__).resolve().parent / "tiny_omni"
# Column name in the table -> flags of `quant`.
RUNS = {
    "W8A8": ("--quant_type", "w8a8", "--save_format", "compressed_tensors"),
    "W4A16": ("--quant_type", "w4a16"),
}


def msmodelslim(*words: object) -> None:
    """Print a command and run it, with its output on the terminal."""
    print(f"\n$ msmodelslim {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "msmodelslim_omni", *map(str, words)], check=True)


def evaluate(output: Path, max_samples: int | None) -> dict[str, Any]:
    """Run `msmodelslim eval` on the held-out questions and return eval_report.json."""
    words = ["--float", TINY / "model", "--quant", output, "--dataset", TINY / "heldout", "--device", "cpu"]
    words += ["--update_card", "--overwrite"]
    words += ["--max_samples", max_samples] if max_samples else []
    msmodelslim("eval", *words)
    return dict(json.loads((output / "eval" / "eval_report.json").read_text(encoding="utf-8")))


def results_table(reports: dict[str, dict[str, Any]]) -> Table:
    """Exact answers of the float model and of each output by modality, and the KL of each output."""
    table = Table(
        title="Held-out questions answered exactly, and KL(float || quantized) per token", title_justify="left"
    )
    table.add_column("modality")
    table.add_column("questions", justify="right")
    table.add_column("float", justify="right")
    for name in reports:
        table.add_column(name, justify="right")
        table.add_column("KL", justify="right")
    first = next(iter(reports.values()))
    for modality, float_figures in first["by_modality"].items():
        figures = [report["by_modality"][modality] for report in reports.values()]
        cells = [cell for f in figures for cell in (_percent(f["exact_quant"]), f"{f['kl_mean']['value']:.2g}")]
        table.add_row(modality, str(float_figures["answered"]), _percent(float_figures["exact_float"]), *cells)
    return table


def _percent(interval: dict[str, float] | None) -> str:
    return "" if interval is None else f"{interval['value']:.1%}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Quantize the trained tiny Omni and evaluate all three models.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the outputs; must not exist")
    parser.add_argument("--max_samples", type=int, help="number of held-out samples (default: all)")
    args = parser.parse_args()
    reports = {}
    for name, flags in RUNS.items():
        output = args.out / f"Tiny-Omni-{name}"
        words = ["--model_path", TINY / "model", "--save_path", output, "--dataset", TINY / "calib", "--device", "cpu"]
        msmodelslim("quant", *words, *flags)
        reports[name] = evaluate(output, args.max_samples)
    print()
    Console().print(results_table(reports))


if __name__ == "__main__":
    main()
