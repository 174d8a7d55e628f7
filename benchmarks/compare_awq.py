"""Compare msmodelslim's 4-bit AWQ of the thinker with three peers: time, memory, and error on one model and its tokens.

    python benchmarks/compare_awq.py install --environments DIR
    python benchmarks/compare_awq.py run --environments DIR --work DIR [--layers 8] [--samples 16] [--tokens 256]
        [--tools msmodelslim,llmcompressor,autoawq,autoround,autoround-rtn] [--out results.json]

All tools quantize weights to asymmetric int4 in groups of 128, in float32 on the CPU. The model has random weights with
outlier channels (awq_setup.py). Every tool calibrates on the same token ids. awq_evaluate.py unpacks each result and
measures it on other tokens. Tools run one after another, each in its own process and environment, and nothing else
should run meanwhile. A tool whose record is already in the work folder is not run again.

This process does not import torch, because the memory of a parent process counts in the peak RSS of its child.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tool_runs import (
    ENVIRONMENTS,
    HERE,
    PEERS,
    THIS_TOOL,
    Run,
    ToolFailed,
    install,
    name_list,
    run_msmodelslim,
    run_once,
    run_peer,
    run_process,
)

ROUND_TO_NEAREST = "round to nearest"


def set_up(work: Path, args: argparse.Namespace) -> None:
    """Write model and tokens into the work folder unless they exist; exit if the folder has other settings."""
    settings = {"layers": args.layers, "samples": args.samples, "tokens": args.tokens, "seed": args.seed}
    file = work / "settings.json"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored != settings:
            sys.exit(f"{work} holds a comparison with {stored}; use another --work for {settings}")
        return
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        sys.exit(f"{work} is not empty and holds no complete model; use another --work or remove the folder")
    flags = [flag for name, value in settings.items() for flag in (f"--{name}", str(value))]
    run_process([sys.executable, str(HERE / "awq_setup.py"), str(work), *flags], args.threads, work / "setup.txt")
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _extra_recipes(args: argparse.Namespace) -> dict[str, str]:
    """Recipes of additional msmodelslim runs by row name: --recipe awq_only.yaml is msmodelslim-awq_only."""
    return {f"{THIS_TOOL}-{Path(recipe).stem}": recipe for recipe in args.recipe}


def run_tool(name: str, work: Path, args: argparse.Namespace) -> Run:
    """Run one tool, or read the record of an earlier run."""
    folder, model, calibration = work / "runs" / name, work / "model", work / "calibration"
    recipes = {THIS_TOOL: ["--quant_type", "w4a16"]}
    recipes |= {row: ["--config_path", recipe] for row, recipe in _extra_recipes(args).items()}
    if name in recipes:
        recipe = recipes[name] + (["--save_format", args.save_format] if args.save_format else [])
        index = calibration / "index.jsonl"
        return run_once(folder, lambda: run_msmodelslim(name, recipe, model, index, folder, args.threads))
    tokens = calibration / "tokens.safetensors"
    return run_once(folder, lambda: run_peer(name, args.environments, model, tokens, folder, args.threads))


# --------------------------------------------------------------------------------------------- result


def as_rows(runs: list[Run], errors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per tool: run, errors, and, if msmodelslim ran, its seconds and layer error relative to msmodelslim's."""
    rows = [{"tool": ROUND_TO_NEAREST, **errors[ROUND_TO_NEAREST]}]
    rows += [{**asdict(run), **errors[run.tool]} for run in runs]
    reference = next((row for row in rows if row["tool"] == THIS_TOOL), None)
    for row in rows:
        if reference is not None:
            row["layer_error_to_ours"] = row["layer"] / reference["layer"]
        if reference is not None and "seconds" in row:
            row["seconds_to_ours"] = row["seconds"] / reference["seconds"]
    return rows


_COLUMNS = (
    ("tool", "tool", "{}"),
    ("version", "version", "{}"),
    ("seconds", "quantize, s", "{:.1f}"),
    ("process_seconds", "process, s", "{:.1f}"),
    ("peak_rss_bytes", "peak RSS, GiB", "{:.2f}"),
    ("hidden", "final hidden error", "{:.4f}"),
    ("kl", "KL, nats", "{:.5f}"),
    ("layer", "layer error", "{:.4f}"),
    ("linears", "Linears", "{}"),
    ("seconds_to_ours", "time / this tool", "{:.2f}"),
    ("layer_error_to_ours", "layer error / this tool", "{:.3f}"),
)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown, followed by the tools' notes."""
    lines = [[title for _, title, _ in _COLUMNS], ["---"] * 2 + ["--:"] * (len(_COLUMNS) - 2)]
    for row in rows:
        values = {**row, "peak_rss_bytes": row["peak_rss_bytes"] / 2**30} if "peak_rss_bytes" in row else row
        lines.append([form.format(values[key]) if key in values else "-" for key, _, form in _COLUMNS])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "\n" + "".join(f"- {row['tool']}: {row['note']}\n" for row in rows if row.get("note"))


def run(args: argparse.Namespace) -> int:
    """Set up, run the tools, measure and print; return 1 if a tool failed."""
    work = args.work.resolve()
    set_up(work, args)
    runs, failures = [], {}
    for name in [*args.tools, *_extra_recipes(args)]:
        try:
            runs.append(run_tool(name, work, args))
        except ToolFailed as failure:
            failures[name] = str(failure)
            print(f"{name}: failed: {failure}", flush=True)
    results = [f"{run.tool}={run.weights}" for run in runs]
    tokens = str(work / "heldout" / "tokens.safetensors")
    command = [sys.executable, str(HERE / "awq_evaluate.py"), str(work / "model"), tokens, str(work / "errors.json")]
    run_process([*command, *results], args.threads, work / "evaluate.txt")
    rows = as_rows(runs, json.loads((work / "errors.json").read_text(encoding="utf-8")))
    settings = json.loads((work / "settings.json").read_text(encoding="utf-8"))
    machine = {"processors": os.cpu_count(), "threads": args.threads}
    out = args.out or work / "results.json"
    content = {"settings": settings, "machine": machine, "rows": rows, "failures": failures}
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    table = as_markdown(rows) + "".join(f"- {name} failed: {reason}\n" for name, reason in failures.items())
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{out}")
    return 1 if failures else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    installer = verbs.add_parser("install", help="create the peers' environments")
    runner = verbs.add_parser("run", help="set up, run the tools, measure, print the table")
    for verb in (installer, runner):
        verb.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    known = list(ENVIRONMENTS)
    installer.add_argument("--only", type=name_list(known), default=known, help=f"some of {','.join(known)}")
    runner.add_argument("--work", type=Path, required=True, help="folder for model, tokens, results and logs")
    runner.add_argument("--layers", type=int, default=8, help="decoder layers of the thinker")
    runner.add_argument("--samples", type=int, default=16, help="calibration samples")
    runner.add_argument("--tokens", type=int, default=256, help="tokens per sample")
    runner.add_argument("--seed", type=int, default=0)
    tools = [THIS_TOOL, *PEERS]
    runner.add_argument("--tools", type=name_list(tools), default=tools, help=f"some of {','.join(tools)}")
    runner.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every tool")
    runner.add_argument(
        "--recipe", action="append", default=[], help="also run msmodelslim with this recipe; may be repeated"
    )
    runner.add_argument("--save_format", help="output format of msmodelslim (default: the recipe's)")
    runner.add_argument("--out", type=Path, help="results.json to write, with a .md next to it (default: in --work)")
    args = parser.parse_args()
    if args.verb == "install":
        install(args.environments, args.only)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
