"""Measure time and memory of whole runs on full-width checkpoints: against `cp -r`, over layers and over samples.

    python benchmarks/scaling.py run {copy,cold,recipes,memory,layers,samples} --shape {3b,7b} --work WORK [--threads 2]
    python benchmarks/scaling.py draw --work WORK --pictures benchmarks/pictures

copy: data-free W8A8, `cp -r`, and `cp -r` with `sync` in turn, on the same checkpoint and disk, three times.
cold: the same, with the page cache dropped before each run (needs root), as for a checkpoint larger than memory.
recipes: W8A8 and NF4 without data, W8A8 and W4A16 on 16 samples of 512 tokens, once each, on all layers.
memory: the same on 2 layers.
layers: 2, 8 and all layers.
samples: 16, 64 and 256 samples on 2 layers.

Checkpoints are made when needed and kept in WORK. Outputs of a run are deleted after it. Each result is a line of
WORK/results.jsonl, and a run that is recorded there is not repeated. `draw` prints the tables and draws the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tool_runs import ROOT, run_process

LAYERS = {"3b": 36, "7b": 28}
MINMAX, NF4 = "qwen2_5_omni_w8a8_minmax", "qwen2_5_omni_nf4"
CP, CP_SYNC = "cp", "cp and sync"  # with sync the copy is on the disk at the end, as the outputs of this tool are
CURVE_TOKENS = {"w8a8": 32, "w4a16": 512}  # text tokens per sample of the curves; at 512, H reaches its bounds
_WORDS = ("time", "way", "year", "work", "day", "part", "place", "case", "point", "group", "company", "number", "world")
_WORDS_PER_TOKEN = 0.55  # approximate, for the tokenizer of these checkpoints


@dataclass(frozen=True)
class Task:
    """One run. recipe: a recipe of quant, or a copy; samples: 0 for a data-free run; tokens: per sample."""

    kind: str
    shape: str
    layers: int
    recipe: str
    samples: int = 0
    tokens: int = 0
    turn: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def tasks(kind: str, shape: str) -> list[Task]:
    """The runs of one kind, in order."""
    all_layers = LAYERS[shape]
    if kind in ("copy", "cold"):
        turns = [(recipe, turn) for turn in range(3) for recipe in (CP, CP_SYNC, MINMAX)]
        return [Task(kind, shape, all_layers, recipe, turn=turn) for recipe, turn in turns]
    if kind in ("recipes", "memory"):
        layers = all_layers if kind == "recipes" else 2
        data_free = [Task(kind, shape, layers, recipe) for recipe in (MINMAX, NF4)]
        return [*data_free, *(Task(kind, shape, layers, recipe, 16, 512) for recipe in ("w8a8", "w4a16"))]
    if kind == "layers":
        return [Task(kind, shape, layers, "w8a8", 16, CURVE_TOKENS["w8a8"]) for layers in (2, 8, all_layers)]
    lengths = CURVE_TOKENS.items()
    return [Task(kind, shape, 2, recipe, samples, tokens) for recipe, tokens in lengths for samples in (16, 64, 256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    run = verbs.add_parser("run")
    run.add_argument("kind", choices=["copy", "cold", "recipes", "memory", "layers", "samples"])
    run.add_argument("--shape", choices=list(LAYERS), required=True)
    run.add_argument("--work", type=Path, required=True)
    run.add_argument("--threads", type=int, default=2)
    run.set_defaults(verb=run_all)
    draw = verbs.add_parser("draw")
    draw.add_argument("--work", type=Path, required=True)
    draw.add_argument("--pictures", type=Path, required=True)
    draw.set_defaults(verb=draw_all)
    arguments = parser.parse_args()
    arguments.verb(arguments)


# ------------------------------------------------------------------------------------------ running


def run_all(arguments: argparse.Namespace) -> None:
    """Run the tasks that have no result yet, and append their results."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    done = {row["task"]["name"] for row in results(arguments.work)}
    for task in tasks(arguments.kind, arguments.shape):
        if task.name in done:
            continue
        row = run_task(task, arguments.work, arguments.threads)
        with (arguments.work / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(task.name, f"{row['seconds']:.1f} s", f"{row['peak_rss_bytes'] / 2**30:.2f} GiB", flush=True)


def run_task(task: Task, work: Path, threads: int) -> dict[str, Any]:
    """Run one task, delete its output and return its result."""
    source, out, log = checkpoint(task, work), work / "out", work / f"{task.name}.log"
    shutil.rmtree(out, ignore_errors=True)
    if task.recipe == CP:
        command = ["cp", "-r", str(source), str(out)]
    elif task.recipe == CP_SYNC:
        command = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)]
    else:
        recipe = "--config_path" if task.recipe in (MINMAX, NF4) else "--quant_type"
        command = [sys.executable, "-m", "msmodelslim_omni", "quant", "--model_path", str(source)]
        command += ["--save_path", str(out), "--device", "cpu", recipe, task.recipe]
        command += ["--dataset", str(dataset(task, work))] if task.samples else []
    if task.kind == "cold":
        drop_page_cache()
    seconds, peak = run_process(command, threads, log, PYTHONPATH=str(ROOT))
    report_file = out / "quant_report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    return {
        "task": {**asdict(task), "name": task.name},
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "output_bytes": size,
        "tokens": sum(report.get("tokens_by_modality", {}).values()),
        "seconds_by_phase": report.get("seconds_by_phase", {}),
    }


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def checkpoint(task: Task, work: Path) -> Path:
    """Folder of the task's checkpoint, which is made if it does not exist."""
    path = work / f"{task.shape}-{task.layers}"
    if not (path / "config.json").is_file():
        make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), task.shape, str(path)]
        run_process([*make, "--layers", str(task.layers)], 2, work / "make.log")
    return path


def dataset(task: Task, work: Path) -> Path:
    """Write sentences of random words; a larger number of samples starts with the same sentences."""
    path = work / f"text-{task.samples}-{task.tokens}" / "index.jsonl"
    path.parent.mkdir(exist_ok=True)
    random.seed(0)
    lines = (" ".join(random.choices(_WORDS, k=int(task.tokens * _WORDS_PER_TOKEN))) for _ in range(task.samples))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def results(work: Path) -> list[dict[str, Any]]:
    """The results in WORK/results.jsonl."""
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# ------------------------------------------------------------------------------------------ showing


def draw_all(arguments: argparse.Namespace) -> None:
    """Print the tables and draw the curves of all results."""
    rows = results(arguments.work)
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    for shape in LAYERS:
        of_shape = [row for row in rows if row["task"]["shape"] == shape]
        for kind in ("copy", "cold"):
            print_copies(f"{shape}, {kind}", [row for row in of_shape if row["task"]["kind"] == kind])
        print_runs([row for row in of_shape if row["task"]["kind"] not in ("copy", "cold")])
        for kind, label in (("layers", "decoder layers"), ("samples", "tokens of 16, 64 and 256 samples")):
            if points := [row for row in of_shape if row["task"]["kind"] == kind]:
                draw_curves(points, label, arguments.pictures / f"{shape}_{kind}.svg")


def print_copies(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the seconds of each command, and the median ratio of the data-free run to each copy."""
    seconds = {
        recipe: [row["seconds"] for row in rows if row["task"]["recipe"] == recipe] for recipe in (CP, CP_SYNC, MINMAX)
    }
    for recipe, times in seconds.items():
        if times:
            ratio = statistics.median(run / copy for run, copy in zip(seconds[MINMAX], times, strict=False))
            listed = ", ".join(f"{value:.1f}" for value in times)
            print(f"{title}: {recipe} {listed} s" + (f"; {MINMAX} {ratio:.2f}x" if recipe != MINMAX else ""))


def print_runs(rows: list[dict[str, Any]]) -> None:
    """Print a table of the runs, with the seconds of their phases below each."""
    print("| shape | layers | recipe | samples | tokens | s | peak RSS, GiB |\n|---|--:|---|--:|--:|--:|--:|")
    for row in rows:
        task, peak = row["task"], row["peak_rss_bytes"] / 2**30
        cells = (task["shape"], task["layers"], task["recipe"], task["samples"], row["tokens"])
        print("| " + " | ".join([*map(str, cells), f"{row['seconds']:.0f}", f"{peak:.2f}"]) + " |")
        print("  ", {phase: round(seconds, 1) for phase, seconds in row["seconds_by_phase"].items()})


def draw_curves(rows: list[dict[str, Any]], label: str, path: Path) -> None:
    """Draw seconds and peak memory over layers or tokens; the axes start at zero, so that linear growth is visible."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for recipe in dict.fromkeys(row["task"]["recipe"] for row in rows):
        points = [row for row in rows if row["task"]["recipe"] == recipe]
        x = [row["task"]["layers"] if row["task"]["kind"] == "layers" else row["tokens"] for row in points]
        curves = [row["seconds"] for row in points], [row["peak_rss_bytes"] / 2**30 for row in points]
        for axis, y in zip(axes, curves, strict=True):
            axis.plot(x, y, marker="o", label=recipe)
    for axis, unit in zip(axes, ("seconds", "peak RSS, GiB"), strict=True):
        axis.set(xlabel=label, ylabel=unit, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    plt.rcParams["svg.hashsalt"] = "scaling"
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
