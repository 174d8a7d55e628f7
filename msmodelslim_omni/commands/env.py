"""`env`: versions and hardware, for a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .shell import Debug, Json, print_json, quiet_libraries, results, run_verb

# Packages whose versions decide results or loading, in the order of the output.
_PACKAGES = (
    "torch", "torchvision", "transformers", "safetensors", "compressed-tensors", "accelerate", "bitsandbytes",
    "qwen_omni_utils", "av", "soxr", "pillow", "numpy", "pydantic", "pyyaml", "typer", "rich", "matplotlib", "jinja2",
    "vllm", "huggingface_hub",
)  # fmt: skip


def env(as_json: Json = False, debug: Debug = False) -> None:
    """Print versions, devices and memory, to paste into a bug report."""

    def work() -> None:
        with_devices = _facts()
        if as_json:
            print_json(with_devices)
            return
        width = max(map(len, with_devices))
        for name, value in with_devices.items():
            results.print(f"{name:{width}}  {value}", soft_wrap=True, markup=False)

    quiet_libraries()
    run_verb(work, debug, as_json=as_json)


def _facts() -> dict[str, str]:
    import torch

    from ..errors import QuantError
    from ..runtime import resolve_device
    from ..version import __version__

    try:
        device = resolve_device("auto")
        devices = f"{device.name} ({device.reason})"
    except (QuantError, RuntimeError) as error:
        devices = f"cannot be resolved: {error}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(Path.cwd()).free
    return {
        "msmodelslim_omni": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{package: found for package in _PACKAGES if (found := _version(package))},
        "device": devices,
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "memory": f"{memory / 2**30:.1f} GiB",
        "free disk here": f"{free / 2**30:.1f} GiB",
        "terminal": f"{results.width} columns, {'UTF-8' if sys.stdout.encoding == 'utf-8' else sys.stdout.encoding}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
