"""The last lines of a run: which runtimes read the output, and the commands to go on with."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..compatibility import RUNTIMES, describe_readers, loads_in, serve_commands
from ..models import find_model_type
from .report import LEFT_OUT, Report

# Stands for samples of the user's own.
_DATASET = "DATASET"


def next_steps(report: Report, saver: str) -> list[str]:
    """Lines for one output of a run: who reads it, who does not, and how to serve, evaluate and check it.

    There is a command for each server that the table of compatibility says reads the output, with what it runs on and
    needs. After a run on a CPU, the server for CPUs comes first.
    """
    model = find_model_type(report.model_type)
    schemes = {linear.scheme for layer in report.layers for linear in layer.linears} or {report.quant_type}
    speech = {part.name for part in model.parts if part.prefix in model.speech_prefixes}
    is_silent = any(part.name in speech and part.scheme == LEFT_OUT for part in report.parts)
    loads = loads_in(model.hf_model_type, saver, schemes, without_speech=is_silent)
    readers, others = describe_readers(loads)
    folder, source = report.savers[saver], report.model_path
    quoted, quoted_source = shlex.quote(folder), shlex.quote(source)
    first = "vllm_cpu" if report.device.startswith("cpu") else "vllm"
    servers = sorted(serve_commands(loads, folder).items(), key=lambda server: server[0] != first)
    serving = [
        line
        for runtime, command in servers
        for line in (f"serve in {RUNTIMES[runtime]} ({loads[runtime].how}):", f"  {command}")
    ]
    return [
        f"{saver} in {Path(folder)} is read by {readers}",
        *([f"others: {others}"] if others else []),
        *serving,
        "compare with the float model, and check:",
        f"  msmodelslim eval {quoted} --float {quoted_source} --dataset {_DATASET}",
        f"  msmodelslim doctor {quoted} --source {quoted_source}",
    ]
