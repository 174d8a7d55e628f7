"""Load a freshly quantized tiny model in real transformers + compressed-tensors, one environment per client.

    python tests/clients/run.py [--cache DIR] [--client NAME ...] [--dtype float32 ...]

Needs what quantizing needs and a package index for pip; the environments (1.5 GB each) are built once and kept in
the cache folder. Prints one line per client, class, run_compressed and dtype; exit status 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# torch is installed first and alone, so that nothing else chooses its version. No torchvision: the check needs no
# processor, and one built for other hardware than torch keeps the model classes from being imported.
TORCH = "torch==2.13.0"
# transformers 4 loads no compressed-tensors checkpoint without it.
ACCELERATE = "accelerate==1.15.0"
CLIENTS = {
    "transformers-4.57.3-ct-0.12.2": [
        "transformers==4.57.3",
        "compressed-tensors==0.12.2",
        ACCELERATE,
        "safetensors",
    ],
    "transformers-4.57.3-ct-0.20.0": [
        "transformers==4.57.3",
        "compressed-tensors==0.20.0",
        ACCELERATE,
        "safetensors",
    ],
    "transformers-5.23.0-ct-0.20.0": ["transformers==5.23.0", "compressed-tensors==0.20.0", "safetensors"],
}
RECIPE = "qwen2_5_omni_w8a8_minmax"
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Combination:
    """A way of loading that must work; activations: what the client makes of them, see check_transformers.py.

    compressed-tensors 0.20 decompresses when the top module's forward runs. The full class has none, so it is only
    listed with run_compressed=false there.
    """

    client: str
    kind: str
    run_compressed: str
    activations: str = "int8"


COMBINATIONS = (
    Combination("transformers-4.57.3-ct-0.12.2", "full", "default"),
    Combination("transformers-4.57.3-ct-0.12.2", "full", "false"),
    Combination("transformers-4.57.3-ct-0.12.2", "thinker", "default"),
    Combination("transformers-4.57.3-ct-0.20.0", "full", "false"),
    Combination("transformers-4.57.3-ct-0.20.0", "thinker", "default"),
    Combination("transformers-4.57.3-ct-0.20.0", "thinker", "false"),
    # transformers 5 takes run_compressed=False for "dequantize": float weights, activations no longer rounded.
    Combination("transformers-5.23.0-ct-0.20.0", "full", "false", "float"),
    Combination("transformers-5.23.0-ct-0.20.0", "thinker", "default"),
    Combination("transformers-5.23.0-ct-0.20.0", "thinker", "false", "float"),
)


def environment(name: str, cache: Path) -> Path:
    """The Python of a client's environment, built where it is missing, unfinished or of another requirement list."""
    folder = cache / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = json.dumps([TORCH, *CLIENTS[name]])
    stamp = folder / "requirements.json"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"building {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for requirements in ([TORCH], CLIENTS[name]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    stamp.write_text(wanted)
    return python


def quantized_model(folder: Path) -> tuple[Path, Path]:
    """A tiny random model and its compressed_tensors output."""
    model, out = folder / "tiny", folder / "quantized"
    with_package = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, ROOT / "examples" / "make_tiny_omni.py", model], check=True, env=with_package)
    program = (
        "import sys; from msmodelslim_omni.pipeline import quantize; "
        "quantize(sys.argv[1], sys.argv[2], config_path=sys.argv[3], save_format=['compressed_tensors'])"
    )
    subprocess.run([sys.executable, "-c", program, model, out, RECIPE], check=True, env=with_package)
    return model, next(out.rglob("config.json")).parent


def check(python: Path, combination: Combination, dtype: str, model: Path, quantized: Path) -> dict[str, Any]:
    """The JSON line of check_transformers.py, or the reason why there is none."""
    options = {
        "--class": combination.kind,
        "--run_compressed": combination.run_compressed,
        "--activations": combination.activations,
        "--dtype": dtype,
        "--float_model": str(model),
    }
    command = [
        python,
        HERE / "check_transformers.py",
        quantized,
        *(word for pair in options.items() for word in pair),
    ]
    # The client must see nothing of this interpreter's packages.
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=LIMIT_SECONDS)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"ok": False, "reason": f"not done after {LIMIT_SECONDS} s"}
    except (IndexError, json.JSONDecodeError):
        return {"ok": False, "reason": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def table_row(combination: Combination, dtype: str, result: dict[str, Any]) -> str:
    versions = result.get("versions", {})
    columns = [
        f"torch {versions.get('torch', '?')}",
        f"transformers {versions.get('transformers', '?')}",
        f"compressed-tensors {versions.get('compressed-tensors', '?')}",
        f"{combination.kind:8}{combination.run_compressed:8}{combination.activations:6}{dtype:9}",
    ]
    if result["ok"]:
        columns.append(f"ok  lockstep {result['difference']:.1e}  to float {result['to_float']:.1e}")
    else:
        columns.append(f"FAILED ({result['reason'][:300]})")
    return "  ".join(columns)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".clients", help="folder of the environments")
    parser.add_argument("--client", choices=CLIENTS, nargs="+", default=list(CLIENTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args(argv)
    cache = arguments.cache.resolve()
    pythons = {name: environment(name, cache) for name in arguments.client}
    failures = 0
    print("versions, class, run_compressed, activations, dtype, result")
    with tempfile.TemporaryDirectory() as scratch:
        model, quantized = quantized_model(Path(scratch))
        for combination in COMBINATIONS:
            if combination.client not in pythons:
                continue
            for dtype in arguments.dtype:
                result = check(pythons[combination.client], combination, dtype, model, quantized)
                failures += not result["ok"]
                print(table_row(combination, dtype, result), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
