"""Shared parts of the peers' drivers: arguments, calibration tokens, and the record of a run.

A driver runs in the peer's own environment, so this file needs torch and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Job:
    """Input of a driver: the float checkpoint, the tokens [samples, length], and an empty output folder."""

    model: Path
    tokens: torch.Tensor
    out: Path
    options: argparse.Namespace


def read_job(**options: Any) -> Job:
    """Parse the command line; ``options`` are additional flags with their default values."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group_size", type=int, default=128)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return Job(args.model, load_file(args.tokens)["input_ids"], args.out, args)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Call ``work`` and return its result and its wall seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def record(job: Job, package: str, seconds: float, weights: str, note: str) -> None:
    """Write run.json. ``weights`` is the file or folder in ``out`` that holds the quantized tensors."""
    versions = {name: version(name) for name in (package, "torch", "transformers")}
    run = {"version": versions[package], "versions": versions, "seconds": seconds, "weights": weights, "note": note}
    (job.out / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
