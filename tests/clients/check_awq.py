"""Unpack and load an awq checkpoint with AutoAWQ's own code, and compare with an independent reader.

    python check_awq.py QUANTIZED_DIR --float_model DIR [--class full|thinker]

Runs inside a client environment: needs torch, transformers 4, autoawq and safetensors, and imports nothing from the
quantizer. Meant for tiny models on a CPU. Prints one JSON line; the exit status is 1 if a check fails.

1. AutoAWQ's `dequantize_gemm` returns the weights that ../dequantizers.py reads: bitwise equal with float32 scales,
   rounded once with float16 scales.
2. AutoAWQ's own rules select exactly the Linears that are quantized in the files.
3. `from_pretrained` builds AutoAWQ's WQLinear_GEMM for exactly these Linears and fills them from the files.
4. Its logits equal those of the float model with the dequantized weights.

Two shims are needed. Neither changes names, loading or arithmetic: autoawq 0.2.9 imports a class that transformers 4.57
renamed, and transformers refuses AWQ without a GPU, although AutoAWQ has a plain PyTorch path.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.activations
from check_transformers import FAMILIES, CheckError, make_inputs, module_name, relative_difference
from dequantizers import dequantize_gemm
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers.quantizer_awq import AwqQuantizer

transformers.activations.PytorchGELUTanh = transformers.activations.GELUTanh
AwqQuantizer.validate_environment = lambda self, *args, **kwargs: None

from awq.models.qwen2_5_omni import Qwen2_5_OmniAWQForConditionalGeneration as AutoAwqOmni  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils import module as autoawq_names  # noqa: E402
from awq.utils import packing_utils as autoawq_packing  # noqa: E402

Tensors = dict[str, Tensor]
PARTS = ("qweight", "qzeros", "scales", "bias")

# Largest relative difference of the logits. AutoAWQ and the reference sum the same float16 products in the same way.
TOLERANCE = 1e-2
# Largest difference to the float model. 4 bits cost the tiny random model 0.36, wrongly assigned weights at least 1.
FLOAT_TOLERANCE = 0.6


def read_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def quantized_names(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def check_unpacking(tensors: Tensors, group_size: int) -> Tensors:
    """The weights by name on disk, float32 [out, in]. Raises CheckError unless both readers agree bitwise."""
    weights = {}
    for name in quantized_names(tensors):
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in PARTS[:3])
        layout = [(t.dtype, t.shape[0], t.shape[1]) for t in (qweight, qzeros, scales)]
        inputs, words = qweight.shape
        groups = inputs // group_size
        expected = [(torch.int32, inputs, words), (torch.int32, groups, words), (torch.float16, groups, 8 * words)]
        if layout != expected:
            raise CheckError(f"{name}: {layout}, not {expected}")
        weight = torch.from_numpy(dequantize_gemm(qweight.numpy(), qzeros.numpy(), scales.float().numpy()))
        unpacked = autoawq_packing.dequantize_gemm(qweight, qzeros, scales.float(), 4, group_size).T
        if not torch.equal(unpacked, weight):
            raise CheckError(f"{name}: AutoAWQ unpacks different weights")
        if not torch.equal(autoawq_packing.dequantize_gemm(qweight, qzeros, scales, 4, group_size).T, weight.half()):
            raise CheckError(f"{name}: AutoAWQ unpacks different weights in float16")
        weights[name] = weight
    return weights


def check_selection(config: Any, modules_to_not_convert: list[str], quantized: set[str]) -> None:
    """The Linears that AutoAWQ's loader would replace, by its own functions, are the quantized ones."""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    selected = set()
    for index, layer in enumerate(AutoAwqOmni.get_model_layers(model)):
        linears = autoawq_names.get_named_linears(layer)
        kept = autoawq_names.exclude_layers_to_not_quantize(linears, modules_to_not_convert)
        selected |= {f"thinker.model.layers.{index}.{name}" for name in kept}
    if selected != quantized:
        raise CheckError(f"AutoAWQ would select other Linears: {sorted(selected ^ quantized)[:5]}")


def check_tree(model: nn.Module, tensors: Tensors, quantized: set[str], prefix: str) -> dict[str, int]:
    """Exactly the quantized Linears are WQLinear_GEMM modules with the tensors of the files. Returns module counts."""
    modules = dict(model.named_modules())
    loaded = {name for name, module in modules.items() if isinstance(module, WQLinear_GEMM)}
    expected = {module_name(name, set(modules), prefix): name for name in quantized}
    if loaded != set(expected):
        raise CheckError(f"quantized Linears differ from the files: {sorted(loaded ^ set(expected), key=str)[:5]}")
    for module, name in expected.items():
        for part in PARTS:
            held, stored = getattr(modules[module], part, None), tensors.get(f"{name}.{part}")
            if (held is None) != (stored is None) or (held is not None and not torch.equal(held, stored)):
                raise CheckError(f"{name}.{part}: differs from the files")
    floats = sum(isinstance(module, nn.Linear) for module in modules.values())
    return {"quantized": len(loaded), "float_linears": floats}


def put_weights(thinker: nn.Module, weights: Tensors) -> nn.Module:
    """Replace weights of the float model by the dequantized weights."""
    modules = dict(thinker.named_modules())
    for name, weight in weights.items():
        linear = modules[module_name(name, set(modules), "thinker.") or ""]
        linear.weight.data = weight.to(linear.weight.dtype)
    return thinker


@torch.no_grad()
def logits(thinker: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = thinker(**copy.deepcopy(inputs)).logits
    if not torch.isfinite(result).all():
        raise CheckError("NaN or Inf in the logits")
    return result


def load(cls: Any, folder: Path) -> nn.Module:
    return cls.from_pretrained(folder, dtype=torch.float16).eval()


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    tensors = read_tensors(arguments.quantized)
    settings = json.loads((arguments.quantized / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    weights = check_unpacking(tensors, settings["group_size"])
    config = transformers.AutoConfig.from_pretrained(arguments.float_model)
    check_selection(config, settings["modules_to_not_convert"], set(weights))
    is_thinker = arguments.kind == "thinker"
    cls = FAMILIES["qwen2_5_omni"].answering_class() if is_thinker else transformers.Qwen2_5OmniForConditionalGeneration
    model = load(cls, arguments.quantized)
    result: dict[str, Any] = check_tree(model, tensors, set(weights), "thinker." if is_thinker else "")
    thinker = model if is_thinker else model.thinker
    original = load(FAMILIES["qwen2_5_omni"].answering_class(), arguments.float_model)
    inputs = make_inputs(config.thinker_config).values()
    quantized_logits = [logits(thinker, sample) for sample in inputs]
    float_logits = [logits(original, sample) for sample in inputs]
    reference = put_weights(original, weights)
    pairs = zip(quantized_logits, inputs, strict=True)
    result["difference"] = max(relative_difference(a, logits(reference, sample)) for a, sample in pairs)
    pairs = zip(quantized_logits, float_logits, strict=True)
    result["to_float"] = max(relative_difference(a, b) for a, b in pairs)
    if result["difference"] > TOLERANCE or result["to_float"] > FLOAT_TOLERANCE:
        raise CheckError(f"different logits: {json.dumps(result)}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument("--float_model", type=Path, required=True, metavar="DIR", help="the float checkpoint")
    parser.add_argument("--class", dest="kind", choices=("full", "thinker"), default="full")
    arguments = parser.parse_args()
    line: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "autoawq")},
        "class": arguments.kind,
    }
    try:
        line |= {"ok": True} | check(arguments)
    except Exception as error:  # any exception of the client is a failed check
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
