"""Run this tool and its peers, each in its own process and environment, and record the runs.

This file does not import torch, because the memory of a parent process counts in the peak RSS of its child.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# torch is installed first and then pinned, so that no other package chooses its version or build.
TORCH = "torch==2.13.0"
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "llmcompressor": [["llmcompressor==0.14.0.1"]],
    # --no-deps: autoawq would install triton, which a CPU does not need. Its last release supports transformers 4.52.
    "autoawq": [["transformers==4.52.4", "accelerate", "datasets", "safetensors"], ["--no-deps", "autoawq==0.2.9"]],
    "autoround": [["auto-round==0.16.1"]],
}

THIS_TOOL = "msmodelslim"


@dataclass(frozen=True)
class Peer:
    """A driver in peers/, the environment that it runs in, and its additional arguments."""

    environment: str
    driver: str
    arguments: tuple[str, ...] = ()


PEERS = {
    "llmcompressor": Peer("llmcompressor", "run_llmcompressor.py"),
    "llmcompressor-gptq": Peer("llmcompressor", "run_llmcompressor.py", ("--method", "gptq")),
    "autoawq": Peer("autoawq", "run_autoawq.py"),
    "autoround": Peer("autoround", "run_autoround.py", ("--iters", "200")),
    "autoround-rtn": Peer("autoround", "run_autoround.py", ("--iters", "0")),
}
# Only their time is compared: what they write is not int4.
TIMED_PEERS = {"llmcompressor-smoothquant": Peer("llmcompressor", "run_llmcompressor.py", ("--method", "smoothquant"))}


@dataclass(frozen=True)
class Run:
    """Record of one tool's run.

    seconds: quantizing only, as far as the tool reports it. process_seconds: from start to exit of the process, with
    imports, loading and saving. weights: path of the result.
    """

    tool: str
    version: str
    seconds: float
    process_seconds: float
    peak_rss_bytes: int
    weights: str
    note: str


class ToolFailed(Exception):
    """A process ended with an error; the message has the exit status, the log file and the end of the log."""


def install(environments: Path, names: list[str]) -> None:
    """Create the peers' environments, about 1.5 GB each; complete ones are kept."""
    for name in names:
        folder = environments / name
        record = folder / "installed.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == [TORCH, *ENVIRONMENTS[name]]:
            continue
        venv.create(folder, clear=True, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(TORCH + "\n", encoding="utf-8")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for requirements in ([TORCH], *ENVIRONMENTS[name]):
            print(f"{name}: pip install {' '.join(requirements)}", flush=True)
            subprocess.run([*pip, "--constraint", str(constraints), *requirements], check=True)
        record.write_text(json.dumps([TORCH, *ENVIRONMENTS[name]]) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ processes


def run_process(command: list[str], threads: int, log: Path, **variables: str) -> tuple[float, int]:
    """Run a command to its end and return (wall seconds, peak resident bytes). Its output goes to ``log``.

    Raises ToolFailed if the exit status is not 0.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = {**inherited, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **variables}
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ToolFailed(f"exit status {process.returncode}, see {log}: " + " | ".join(tail))
    return seconds, usage.ru_maxrss * 1024  # kilobytes on Linux


def run_msmodelslim(name: str, recipe: list[str], model: Path, dataset: Path, folder: Path, threads: int) -> Run:
    """Run this repository's msmodelslim in the environment of this script. recipe: the flags that select the recipe."""
    out = folder / "weights"
    command = [sys.executable, "-m", "msmodelslim_omni", "quant", "--model_path", str(model), "--save_path", str(out)]
    command += ["--device", "cpu", "--dataset", str(dataset), *recipe]
    seconds, peak = run_process(command, threads, folder / "log.txt", PYTHONPATH=str(ROOT))
    report = json.loads(next(out.rglob("quant_report.json")).read_text(encoding="utf-8"))
    version = next((v for name, v in report["versions"].items() if name.startswith("msmodelslim")), "")
    note = f"recipe {report['recipe']}; seconds: the report's total, with loading and saving"
    return Run(name, version, report["seconds"], seconds, peak, str(out), note)


def run_peer(
    name: str, environments: Path, model: Path, tokens: Path, folder: Path, threads: int, group_size: int = 128
) -> Run:
    """Run a peer's driver. tokens: a safetensors file with input_ids [samples, length]."""
    peer = {**PEERS, **TIMED_PEERS}[name]
    python = environments / peer.environment / "bin" / "python"
    if not python.is_file():
        raise ToolFailed(f"{python} does not exist; create the environment with `install`")
    command = [str(python), str(HERE / "peers" / peer.driver), "--model", str(model)]
    command += ["--tokens", str(tokens), "--out", str(folder), "--group_size", str(group_size), *peer.arguments]
    seconds, peak = run_process(command, threads, folder / "log.txt")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    weights = str(folder / record["weights"])
    return Run(name, record["version"], record["seconds"], seconds, peak, weights, record["note"])


def run_once(folder: Path, run: Callable[[], Run]) -> Run:
    """Run one tool in an empty folder, or read the record of an earlier run. Renames the folder of a failed run."""
    record, name = folder / "record.json", folder.name
    if record.is_file():
        print(f"{name}: already run, see {record}", flush=True)
        return Run(**json.loads(record.read_text(encoding="utf-8")))
    if folder.exists():
        folder.rename(folder.with_name(f"{name}.failed-{time.time_ns()}"))
    folder.mkdir(parents=True)
    print(f"{name}: running, output in {folder / 'log.txt'}", flush=True)
    result = run()
    record.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def index_path(given: str) -> Path:
    """The path of an index.jsonl, or that of its folder."""
    path = Path(given)
    return path / "index.jsonl" if path.is_dir() else path


def name_list(known: list[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse
