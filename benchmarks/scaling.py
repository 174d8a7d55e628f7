"""Time and memory of whole runs on checkpoints of the true shape: beside `cp -r`, over layers and over samples.

    python benchmarks/scaling.py run {copy,cold,recipes,memory,layers,samples} --shape {3b,7b} --work WORK [--threads 2]
    python benchmarks/scaling.py draw --work WORK --pictures benchmarks/pictures

copy: data-free W8A8 in turn with `cp -r`, and with `cp -r` and `sync`, of the same checkpoint, each onto the same
disk, three times; cold: the same, and before each the page cache is dropped (which root alone may), as if the
checkpoint had lain on the disk since long or were larger than memory. recipes: each shipped recipe once, calibrated
ones on 16 samples of 512 tokens; memory: the same on 2 layers. layers: 2, 8 and all layers, samples: 16, 64 and 256
samples on 2 layers. Checkpoints are made as they are needed and kept in WORK; what a run writes is deleted behind it.
Results are lines of WORK/results.jsonl, a run that is there is not repeated; `draw` makes the tables and pictures.
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
CP, CP_SYNC = "cp", "cp and sync"  # the second until the copy is on the disk, as our outputs are
CURVE_TOKENS = {"w8a8": 32, "w4a16": 512}  # of each sample's text, where the curves are drawn: H is at its bounds then
_WORDS = ("time", "way", "year", "work", "day", "part", "place", "case", "point", "group", "company", "number", "world")
_WORDS_PER_TOKEN = 0.55  # of the tokenizer that the checkpoints bring, about


@dataclass(frozen=True)
class Task:
    """One run. recipe: of quant, or a copy; samples of so many tokens each, 0 for a data-free run."""

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
    everything = LAYERS[shape]
    if kind in ("copy", "cold"):
        turns = [(recipe, turn) for turn in range(3) for recipe in (CP, CP_SYNC, MINMAX)]
        return [Task(kind, shape, everything, recipe, turn=turn) for recipe, turn in turns]
    if kind in ("recipes", "memory"):
        layers = everything if kind == "recipes" else 2
        free = [Task(kind, shape, layers, recipe) for recipe in (MINMAX, NF4)]
        return [*free, *(Task(kind, shape, layers, recipe, 16, 512) for recipe in ("w8a8", "w4a16"))]
    if kind == "layers":
        return [Task(kind, shape, layers, "w8a8", 16, CURVE_TOKENS["w8a8"]) for layers in (2, 8, everything)]
    lengths = CURVE_TOKENS.items()
    return [Task(kind, shape, 2, recipe, samples, each) for recipe, each in lengths for samples in (16, 64, 256)]


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
    report = out / "quant_report.json"
    phases = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    return {
        "task": {**asdict(task), "name": task.name},
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "output_bytes": size,
        "tokens": sum(phases.get("tokens_by_modality", {}).values()),
        "seconds_by_phase": phases.get("seconds_by_phase", {}),
    }


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def checkpoint(task: Task, work: Path) -> Path:
    path = work / f"{task.shape}-{task.layers}"
    if not (path / "config.json").is_file():
        make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), task.shape, str(path)]
        run_process([*make, "--layers", str(task.layers)], 2, work / "make.log")
    return path


def dataset(task: Task, work: Path) -> Path:
    """Sentences of random words, the same for each number of samples as far as they go."""
    path = work / f"text-{task.samples}-{task.tokens}" / "index.jsonl"
    path.parent.mkdir(exist_ok=True)
    random.seed(0)
    lines = (" ".join(random.choices(_WORDS, k=int(task.tokens * _WORDS_PER_TOKEN))) for _ in range(task.samples))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def results(work: Path) -> list[dict[str, Any]]:
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# ------------------------------------------------------------------------------------------ showing


def draw_all(arguments: argparse.Namespace) -> None:
    rows = results(arguments.work)
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    for shape in LAYERS:
        mine = [row for row in rows if row["task"]["shape"] == shape]
        for kind in ("copy", "cold"):
            print_copies(f"{shape}, {kind}", [row for row in mine if row["task"]["kind"] == kind])
        print_runs([row for row in mine if row["task"]["kind"] not in ("copy", "cold")])
        for kind, label in (("layers", "decoder layers"), ("samples", "tokens of 16, 64 and 256 samples")):
            if points := [row for row in mine if row["task"]["kind"] == kind]:
                draw_curves(points, label, arguments.pictures / f"{shape}_{kind}.svg")


def print_copies(what: str, rows: list[dict[str, Any]]) -> None:
    seconds = {
        recipe: [row["seconds"] for row in rows if row["task"]["recipe"] == recipe] for recipe in (CP, CP_SYNC, MINMAX)
    }
    for recipe, times in seconds.items():
        if times:
            ratio = statistics.median(mine / copy for mine, copy in zip(seconds[MINMAX], times, strict=False))
            shown = ", ".join(f"{value:.1f}" for value in times)
            print(f"{what}: {recipe} {shown} s" + (f"; ours {ratio:.2f}x" if recipe != MINMAX else ""))


def print_runs(rows: list[dict[str, Any]]) -> None:
    print("| shape | layers | recipe | samples | tokens | s | peak RSS, GiB |\n|---|--:|---|--:|--:|--:|--:|")
    for row in rows:
        task, peak = row["task"], row["peak_rss_bytes"] / 2**30
        cells = (task["shape"], task["layers"], task["recipe"], task["samples"], row["tokens"])
        print("| " + " | ".join([*map(str, cells), f"{row['seconds']:.0f}", f"{peak:.2f}"]) + " |")
        print("  ", {phase: round(seconds, 1) for phase, seconds in row["seconds_by_phase"].items()})


def draw_curves(rows: list[dict[str, Any]], label: str, path: Path) -> None:
    """Seconds and peak memory over layers or tokens, from zero, so that a straight line is seen to be one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for recipe in dict.fromkeys(row["task"]["recipe"] for row in rows):
        mine = [row for row in rows if row["task"]["recipe"] == recipe]
        x = [row["task"]["layers"] if row["task"]["kind"] == "layers" else row["tokens"] for row in mine]
        for axis, y in zip(
            axes, ([r["seconds"] for r in mine], [r["peak_rss_bytes"] / 2**30 for r in mine]), strict=True
        ):
            axis.plot(x, y, marker="o", label=recipe)
    for axis, unit in zip(axes, ("seconds", "peak RSS, GiB"), strict=True):
        axis.set(xlabel=label, ylabel=unit, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    plt.rcParams["svg.hashsalt"] = "scaling"
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
