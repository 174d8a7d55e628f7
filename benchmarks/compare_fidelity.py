"""Measure the accuracy loss of W8A8, W4A16 and NF4 on a multimodal model: this tool and its peers, on held-out samples.

    python benchmarks/compare_fidelity.py install --environments DIR
    python benchmarks/compare_fidelity.py run --environments DIR --work DIR --model MODEL --calibration INDEX
        --heldout INDEX [--tools msmodelslim-w8a8,...] [--text_only] [--out results.json]

Every tool calibrates on the same samples. This tool reads the media; the peers take token ids only, and read media
tokens through an enlarged embedding (fidelity_setup.py). With --text_only all tools calibrate on the samples without
media. Peers work in float32 on the CPU, in asymmetric int4 in groups of 128, each at its defaults; --group_size 64 is
for the real decoder (real_language.py). Then
`msmodelslim eval` compares each result with the float model, per modality; awq_evaluate.py unpacks the peers' results.

This process does not import torch, because the memory of a parent process counts in the peak RSS of its child.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tool_runs import (
    ENVIRONMENTS,
    HERE,
    PEERS,
    ROOT,
    THIS_TOOL,
    Run,
    ToolFailed,
    index_path,
    install,
    name_list,
    run_msmodelslim,
    run_once,
    run_peer,
    run_process,
)

RECIPES = {
    f"{THIS_TOOL}-w8a8": ["--quant_type", "w8a8", "--save_format", "compressed_tensors"],
    "round to nearest": ["--config_path", str(HERE / "recipes" / "w4a16_rounded.yaml")],
    f"{THIS_TOOL}-w4a16": ["--quant_type", "w4a16"],
    f"{THIS_TOOL}-w4a16-best": ["--quant_type", "w4a16", "--effort", "best"],
    f"{THIS_TOOL}-w8a16": ["--quant_type", "w8a16", "--save_format", "compressed_tensors"],
    f"{THIS_TOOL}-fp8": ["--quant_type", "fp8"],
    f"{THIS_TOOL}-fp8-block": ["--quant_type", "fp8_block"],
    f"{THIS_TOOL}-nvfp4a16": ["--quant_type", "nvfp4a16"],
    f"{THIS_TOOL}-w8a8-c8": ["--quant_type", "w8a8_c8"],
    f"{THIS_TOOL}-fp8-smoothed": ["--quant_type", "fp8_smoothed"],
    f"{THIS_TOOL}-fp8-kv": ["--quant_type", "fp8_kv"],
    f"{THIS_TOOL}-nvfp4": ["--quant_type", "nvfp4"],
    f"{THIS_TOOL}-nvfp4-smoothed": ["--config_path", str(HERE / "recipes" / "nvfp4_smoothed.yaml")],
    f"{THIS_TOOL}-nf4": ["--quant_type", "nf4"],
    f"{THIS_TOOL}-nf4-awq": ["--config_path", "qwen2_5_omni_nf4_awq"],
}
GROUPS_OF_64 = {
    "round to nearest": ["--config_path", str(HERE / "recipes" / "w4a16_g64_rounded.yaml")],
    f"{THIS_TOOL}-w4a16": ["--config_path", str(HERE / "recipes" / "w4a16_g64.yaml")],
    f"{THIS_TOOL}-w4a16-best": ["--config_path", str(HERE / "recipes" / "w4a16_g64.yaml"), "--effort", "best"],
}
TOOLS = [*RECIPES, *PEERS]
MEDIA = ("image", "audio", "video")


def calibration_index(index: Path, text_only: bool, work: Path) -> Path:
    """The index that all tools calibrate on; with text_only, an index in the work folder that omits media samples."""
    if not text_only:
        return index
    lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = [line for line in lines if not any(kind in json.loads(line) for kind in MEDIA)]
    if not chosen:
        sys.exit(f"{index} has no sample without media; omit --text_only")
    out = work / "text" / "index.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return out


def make_twin(index: Path, work: Path, args: argparse.Namespace) -> Path:
    """Write the peers' model and tokens unless they exist, and return their folder."""
    out = work / "twin"
    if not (out / "tokens.safetensors").is_file():
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(HERE / "fidelity_setup.py"), "twin", str(args.model), str(index), str(out)]
        run_process([*command, "--length", str(args.length)], args.threads, work / "twin.txt")
    return out


def run_tool(name: str, index: Path, work: Path, args: argparse.Namespace) -> Run:
    folder = work / "runs" / name
    if name in RECIPES:
        recipe = GROUPS_OF_64.get(name, RECIPES[name]) if args.group_size == 64 else RECIPES[name]
        return run_once(folder, lambda: run_msmodelslim(name, recipe, args.model, index, folder, args.threads))
    twin = make_twin(index, work, args)
    tokens = twin / "tokens.safetensors"
    model, group_size = twin / "model", args.group_size
    return run_once(folder, lambda: run_peer(name, args.environments, model, tokens, folder, args.threads, group_size))


def evaluate(run: Run, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a tool's result and return its eval_report.json. A peer's weights are first put into the full model."""
    folder = work / "eval" / run.tool
    report = folder / "eval_report.json"
    if not report.is_file():
        quantized = Path(run.weights)
        if run.tool not in RECIPES:
            quantized = work / "assembled" / run.tool
            shutil.rmtree(quantized, ignore_errors=True)
            setup = [sys.executable, str(HERE / "fidelity_setup.py"), "assemble", str(args.model), run.weights]
            run_process([*setup, str(quantized)], args.threads, work / f"assemble-{run.tool}.txt")
        command = [sys.executable, "-m", "msmodelslim_omni", "eval", "--float", str(args.model)]
        command += ["--quant", str(quantized), "--dataset", str(args.heldout), "--save_path", str(folder)]
        command += ["--device", "cpu"]
        run_process(command, args.threads, work / f"eval-{run.tool}.txt", PYTHONPATH=str(ROOT))
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


# --------------------------------------------------------------------------------------------- result


def as_row(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """One row of the table: KL and accuracy overall and by modality, and the worst modality relative to their mean."""
    groups = {"all": report["overall"], **report["by_modality"]}
    row: dict[str, Any] = {"tool": run.tool, "version": run.version, "seconds": run.process_seconds, "note": run.note}
    for group, fidelity in groups.items():
        row[f"kl {group}"] = fidelity["kl_mean"]["value"]
        if fidelity["exact_change"] is not None:
            row[f"accuracy {group}"] = fidelity["exact_quant"]["value"]
            row[f"float {group}"] = fidelity["exact_float"]["value"]
    kls = [fidelity["kl_mean"]["value"] for fidelity in report["by_modality"].values()]
    row["worst / mean"] = max(kls) / (sum(kls) / len(kls)) if max(kls) > 0 else 1.0
    row["top-1"] = report["overall"]["top1"]["value"]
    row["perplexity"] = report["overall"]["perplexity_quant"]["value"]
    row["hidden error"] = report["overall"]["hidden_error"]
    return row


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown: KL in thousandths of a nat, accuracy in percent with the float model's in parentheses."""
    groups = [key.removeprefix("kl ") for key in rows[0] if key.startswith("kl ")]
    head = ["tool", "version", "s", *(f"KL {g}, 1e-3" for g in groups), "worst / mean", "top-1", "perplexity"]
    head += ["hidden error", *(f"exact {g}" for g in groups if f"accuracy {g}" in rows[0])]
    lines = [head, ["---"] * 2 + ["--:"] * (len(head) - 2)]
    for row in rows:
        cells = [row["tool"], row["version"], f"{row['seconds']:.0f}"]
        cells += [f"{1000 * row[f'kl {g}']:.2f}" for g in groups]
        cells += [f"{row['worst / mean']:.2f}", f"{row['top-1']:.4f}", f"{row['perplexity']:.3f}"]
        cells += [f"{row['hidden error']:.4f}"]
        cells += [f"{row[f'accuracy {g}']:.1%} ({row[f'float {g}']:.1%})" for g in groups if f"accuracy {g}" in row]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(args: argparse.Namespace) -> int:
    """Run the tools, measure and print; return 1 if a tool failed."""
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = {"model": str(args.model), "calibration": str(args.calibration), "text_only": args.text_only}
    settings |= {"heldout": str(args.heldout), "length": args.length, "group_size": args.group_size}
    settings["weights"] = [digest(file) for file in sorted(args.model.glob("*.safetensors"))]
    settings_file = work / "settings.json"
    if settings_file.is_file() and json.loads(settings_file.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{work} holds a comparison with other settings; use another --work")
    settings_file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    index = calibration_index(args.calibration, args.text_only, work)
    rows, failures = [], {}
    for name in args.tools:
        try:
            tool_run = run_tool(name, index, work, args)
            rows.append(as_row(tool_run, evaluate(tool_run, work, args)))
        except ToolFailed as failure:
            failures[name] = str(failure)
            print(f"{name}: failed: {failure}", flush=True)
    machine = {"processors": os.cpu_count(), "threads": args.threads}
    content = {"settings": settings, "machine": machine, "rows": rows, "failures": failures}
    out = args.out or work / "results.json"
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = as_markdown(rows) if rows else ""
    table += "".join(f"- {name} failed: {reason}\n" for name, reason in failures.items())
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{out}")
    return 1 if failures else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    installer = verbs.add_parser("install", help="create the peers' environments")
    runner = verbs.add_parser("run", help="run the tools, measure, print the table")
    for verb in (installer, runner):
        verb.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    runner.add_argument("--work", type=Path, required=True, help="folder for results and logs")
    runner.add_argument("--model", type=Path, required=True, help="the float checkpoint")
    runner.add_argument("--calibration", type=index_path, required=True, help="index.jsonl to calibrate on")
    runner.add_argument("--heldout", type=index_path, required=True, help="index.jsonl to measure on, with answers")
    runner.add_argument("--tools", type=name_list(TOOLS), default=TOOLS, help=f"some of {','.join(TOOLS)}")
    runner.add_argument("--text_only", action="store_true", help="calibrate on the samples without media")
    runner.add_argument("--length", type=int, default=256, help="tokens per block of the peers' data")
    runner.add_argument("--group_size", type=int, choices=(64, 128), default=128, help="of the 4-bit weights")
    runner.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every tool")
    runner.add_argument("--out", type=Path, help="results.json to write, with a .md next to it (default: in --work)")
    args = parser.parse_args()
    if args.verb == "install":
        install(args.environments, list(ENVIRONMENTS))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
