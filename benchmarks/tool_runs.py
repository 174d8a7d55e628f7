"""Running this tool and its peers, each as a process of its own in an environment of its own, and their records.

No torch here: what a process weighs before it starts its child counts as memory of the child.
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

# torch is installed first and alone, and then held, so that nothing else chooses its version or its build.
TORCH = "torch==2.13.0"
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "llmcompressor": [["llmcompressor==0.14.0.1"]],
    # It would bring triton, which a CPU has no use for; its last release knows transformers up to 4.52.
    "autoawq": [["transformers==4.52.4", "accelerate", "datasets", "safetensors"], ["--no-deps", "autoawq==0.2.9"]],
    "autoround": [["auto-round==0.15.1"]],
}

OURS = "msmodelslim"


@dataclass(frozen=True)
class Peer:
    """A driver in peers/, the environment it runs in, and its own arguments."""

    environment: str
    driver: str
    arguments: tuple[str, ...] = ()


PEERS = {
    "llmcompressor": Peer("llmcompressor", "run_llmcompressor.py"),
    "autoawq": Peer("autoawq", "run_autoawq.py"),
    "autoround": Peer("autoround", "run_autoround.py", ("--iters", "200")),
    "autoround-rtn": Peer("autoround", "run_autoround.py", ("--iters", "0")),
}


@dataclass(frozen=True)
class Run:
    """One tool's run. seconds: quantizing alone, as far as the tool lets it be told; process_seconds: from start to
    exit of its process, imports, loading and saving included; weights: where the result lies.
    """

    tool: str
    version: str
    seconds: float
    process_seconds: float
    peak_rss_bytes: int
    weights: str
    note: str


class ToolFailed(Exception):
    """A process ended with an error; the message says which and where its output is."""


def install(environments: Path, names: list[str]) -> None:
    """Make the peers' environments, about 1.5 GB each; one that is complete is left as it is."""
    for name in names:
        folder = environments / name
        done = folder / "installed.json"
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == [TORCH, *ENVIRONMENTS[name]]:
            continue
        venv.create(folder, clear=True, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(TORCH + "\n", encoding="utf-8")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for requirements in ([TORCH], *ENVIRONMENTS[name]):
            print(f"{name}: pip install {' '.join(requirements)}", flush=True)
            subprocess.run([*pip, "--constraint", str(constraints), *requirements], check=True)
        done.write_text(json.dumps([TORCH, *ENVIRONMENTS[name]]) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ processes


def run_process(command: list[str], threads: int, log: Path, **variables: str) -> tuple[float, int]:
    """Run to the end: (wall seconds, peak resident bytes). Its output goes to ``log``."""
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


def run_ours(name: str, recipe: list[str], model: Path, dataset: Path, folder: Path, threads: int) -> Run:
    """The msmodelslim command of this repository, in the environment of this script. recipe: flags that name it."""
    out = folder / "weights"
    command = [sys.executable, "-m", "msmodelslim_omni", "quant", "--model_path", str(model), "--save_path", str(out)]
    command += ["--device", "cpu", "--dataset", str(dataset), *recipe]
    seconds, peak = run_process(command, threads, folder / "log.txt", PYTHONPATH=str(ROOT))
    report = json.loads(next(out.rglob("quant_report.json")).read_text(encoding="utf-8"))
    version = next((v for name, v in report["versions"].items() if name.startswith("msmodelslim")), "")
    note = f"recipe {report['recipe']}; seconds: the report's total, loading and saving included"
    return Run(name, version, report["seconds"], seconds, peak, str(out), note)


def run_peer(name: str, environments: Path, model: Path, tokens: Path, folder: Path, threads: int) -> Run:
    """A peer's driver. tokens: a safetensors file with input_ids [samples, length]."""
    peer = PEERS[name]
    python = environments / peer.environment / "bin" / "python"
    if not python.is_file():
        raise ToolFailed(f"{python} does not exist; make it with `install`")
    command = [str(python), str(HERE / "peers" / peer.driver), "--model", str(model)]
    command += ["--tokens", str(tokens), "--out", str(folder), *peer.arguments]
    seconds, peak = run_process(command, threads, folder / "log.txt")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    weights = str(folder / record["weights"])
    return Run(name, record["version"], record["seconds"], seconds, peak, weights, record["note"])


def recorded(folder: Path, run: Callable[[], Run]) -> Run:
    """Run one tool in an empty folder, or read the record of its earlier run; a failed run's folder is put aside."""
    record, name = folder / "record.json", folder.name
    if record.is_file():
        print(f"{name}: already run, see {record}", flush=True)
        return Run(**json.loads(record.read_text(encoding="utf-8")))
    if folder.exists():
        folder.rename(folder.with_name(f"{name}.failed-{time.time_ns()}"))
    folder.mkdir(parents=True)
    print(f"{name}: running, output in {folder / 'log.txt'}", flush=True)
    done = run()
    record.write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
    return done


def names_of(known: list[str]) -> Callable[[str], list[str]]:
    """A type for argparse: some of the known names, with commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse
