"""Quantize the trained tiny Omni to W8A8 and to W4A16, and ask the float model and both what they still know.

    python examples/demo.py OUT [--max_samples N]

Runs the commands that a user would type, shows them, and ends with a table of exact answers by modality.
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
# Name in the table -> flags of `quant`.
RUNS = {
    "W8A8": ("--quant_type", "w8a8", "--save_format", "compressed_tensors"),
    "W4A16": ("--quant_type", "w4a16"),
}


def msmodelslim(*words: object) -> None:
    """Show a command and run it; its output is the user's."""
    print(f"\n$ msmodelslim {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "msmodelslim_omni", *map(str, words)], check=True)


def evaluate(output: Path, max_samples: int | None) -> dict[str, Any]:
    """`msmodelslim eval` of an output on the held-out questions: what eval_report.json holds."""
    words = ["--float", TINY / "model", "--quant", output, "--dataset", TINY / "heldout", "--device", "cpu"]
    words += ["--max_samples", max_samples] if max_samples else []
    msmodelslim("eval", *words)
    return dict(json.loads((output / "eval" / "eval_report.json").read_text(encoding="utf-8")))


def results(reports: dict[str, dict[str, Any]]) -> Table:
    """Exact answers of the float model and of each output, by modality, with KL beside them."""
    table = Table(title="Held-out questions answered exactly, and KL(float || quantized) a token", title_justify="left")
    table.add_column("modality")
    table.add_column("questions", justify="right")
    table.add_column("float", justify="right")
    for name in reports:
        table.add_column(name, justify="right")
        table.add_column("KL", justify="right")
    first = next(iter(reports.values()))
    for modality, of_float in first["by_modality"].items():
        figures = [report["by_modality"][modality] for report in reports.values()]
        cells = [cell for f in figures for cell in (_share(f["exact_quant"]), f"{f['kl_mean']['value']:.2g}")]
        table.add_row(modality, str(of_float["answered"]), _share(of_float["exact_float"]), *cells)
    return table


def _share(interval: dict[str, float] | None) -> str:
    return "" if interval is None else f"{interval['value']:.1%}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Quantize the trained tiny Omni and ask what it still knows.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the outputs; must not exist")
    parser.add_argument("--max_samples", type=int, help="held-out samples to ask (default: all)")
    args = parser.parse_args()
    reports = {}
    for name, flags in RUNS.items():
        output = args.out / f"Tiny-Omni-{name}"
        words = ["--model_path", TINY / "model", "--save_path", output, "--dataset", TINY / "calib", "--device", "cpu"]
        msmodelslim("quant", *words, *flags)
        reports[name] = evaluate(output, args.max_samples)
    print()
    Console().print(results(reports))


if __name__ == "__main__":
    main()
