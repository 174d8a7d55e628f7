"""Unpack and load an awq checkpoint with AutoAWQ's own code and compare with a second, independent reading.

    python check_awq.py QUANTIZED_DIR --float_model DIR [--class full|thinker]

Runs inside a client environment: needs torch, transformers 4, autoawq and safetensors, and imports nothing of the
quantizer. Meant for tiny models on a CPU. Prints one JSON line; exit status 1 when a check fails.

1. AutoAWQ's `dequantize_gemm` gives exactly the weights that ../dequantizers.py reads: with float32 scales to the bit,
   with float16 ones those weights rounded once.
2. AutoAWQ's way of choosing Linears takes those that are quantized in the files.
3. `from_pretrained` builds AutoAWQ's WQLinear_GEMM for those and no other, and fills them from the files.
4. Its logits are those of the float model with the dequantized weights in the place of its own.

Two shims, neither of which touches names, loading or arithmetic: autoawq 0.2.9 imports a class that transformers 4.57
renamed, and transformers refuses AWQ without a GPU, though AutoAWQ has a plain PyTorch path.
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
from check_transformers import FAMILIES, CheckError, make_inputs, module_name, relative
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

# Largest relative difference of the logits. AutoAWQ multiplies in float16, as does the reference: the same products,
# summed alike.
TOLERANCE = 1e-2
# And to the model that was quantized: 4 bits cost the tiny random model 0.36, wrongly assigned weights 1 and more.
FLOAT_TOLERANCE = 0.6


def read_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def quantized_names(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def check_unpacking(tensors: Tensors, group_size: int) -> Tensors:
    """Weights [out, in] float32 by name on disk, where both readers agree to the bit."""
    weights = {}
    for name in quantized_names(tensors):
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in PARTS[:3])
        layout = [(t.dtype, t.shape[0], t.shape[1]) for t in (qweight, qzeros, scales)]
        inputs, words = qweight.shape
        groups = inputs // group_size
        wanted = [(torch.int32, inputs, words), (torch.int32, groups, words), (torch.float16, groups, 8 * words)]
        if layout != wanted:
            raise CheckError(f"{name}: {layout}, not {wanted}")
        weight = torch.from_numpy(dequantize_gemm(qweight.numpy(), qzeros.numpy(), scales.float().numpy()))
        theirs = autoawq_packing.dequantize_gemm(qweight, qzeros, scales.float(), 4, group_size).T
        if not torch.equal(theirs, weight):
            raise CheckError(f"{name}: AutoAWQ unpacks other weights")
        if not torch.equal(autoawq_packing.dequantize_gemm(qweight, qzeros, scales, 4, group_size).T, weight.half()):
            raise CheckError(f"{name}: AutoAWQ unpacks other weights in float16")
        weights[name] = weight
    return weights


def check_choice(config: Any, modules_to_not_convert: list[str], quantized: set[str]) -> None:
    """The Linears that AutoAWQ's own loader would replace, by its own functions."""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    chosen = set()
    for index, layer in enumerate(AutoAwqOmni.get_model_layers(model)):
        linears = autoawq_names.get_named_linears(layer)
        kept = autoawq_names.exclude_layers_to_not_quantize(linears, modules_to_not_convert)
        chosen |= {f"thinker.model.layers.{index}.{name}" for name in kept}
    if chosen != quantized:
        raise CheckError(f"AutoAWQ would choose otherwise: {sorted(chosen ^ quantized)[:5]}")


def check_tree(model: nn.Module, tensors: Tensors, quantized: set[str], prefix: str) -> dict[str, int]:
    modules = dict(model.named_modules())
    found = {name for name, module in modules.items() if isinstance(module, WQLinear_GEMM)}
    wanted = {module_name(name, set(modules), prefix): name for name in quantized}
    if found != set(wanted):
        raise CheckError(f"quantized otherwise than the files: {sorted(found ^ set(wanted), key=str)[:5]}")
    for inside, name in wanted.items():
        for part in PARTS:
            held, stored = getattr(modules[inside], part, None), tensors.get(f"{name}.{part}")
            if (held is None) != (stored is None) or (held is not None and not torch.equal(held, stored)):
                raise CheckError(f"{name}.{part}: not what the files hold")
    floats = sum(isinstance(module, nn.Linear) for module in modules.values())
    return {"quantized": len(found), "float_linears": floats}


def put_weights(thinker: nn.Module, weights: Tensors) -> nn.Module:
    """The float model computing with the dequantized weights."""
    modules = dict(thinker.named_modules())
    for name, weight in weights.items():
        linear = modules[module_name(name, set(modules), "thinker.") or ""]
        linear.weight.data = weight.to(linear.weight.dtype)
    return thinker


@torch.no_grad()
def logits(thinker: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = thinker(**copy.deepcopy(inputs)).logits
    if not torch.isfinite(found).all():
        raise CheckError("NaN or Inf in the logits")
    return found


def load(cls: Any, folder: Path) -> nn.Module:
    return cls.from_pretrained(folder, dtype=torch.float16).eval()


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    tensors = read_tensors(arguments.quantized)
    settings = json.loads((arguments.quantized / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    weights = check_unpacking(tensors, settings["group_size"])
    config = transformers.AutoConfig.from_pretrained(arguments.float_model)
    check_choice(config, settings["modules_to_not_convert"], set(weights))
    is_thinker = arguments.kind == "thinker"
    cls = FAMILIES["qwen2_5_omni"].answering_class() if is_thinker else transformers.Qwen2_5OmniForConditionalGeneration
    model = load(cls, arguments.quantized)
    result: dict[str, Any] = check_tree(model, tensors, set(weights), "thinker." if is_thinker else "")
    thinker = model if is_thinker else model.thinker
    original = load(FAMILIES["qwen2_5_omni"].answering_class(), arguments.float_model)
    inputs = make_inputs(config.thinker_config).values()
    mine, float_logits = [logits(thinker, one) for one in inputs], [logits(original, one) for one in inputs]
    reference = put_weights(original, weights)
    result["difference"] = max(relative(a, logits(reference, one)) for a, one in zip(mine, inputs, strict=True))
    result["to_float"] = max(relative(a, b) for a, b in zip(mine, float_logits, strict=True))
    if result["difference"] > TOLERANCE or result["to_float"] > FLOAT_TOLERANCE:
        raise CheckError(f"other logits: {json.dumps(result)}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument(
        "--float_model", type=Path, required=True, metavar="DIR", help="the checkpoint that was quantized"
    )
    parser.add_argument("--class", dest="kind", choices=("full", "thinker"), default="full")
    arguments = parser.parse_args()
    line: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "autoawq")},
        "class": arguments.kind,
    }
    try:
        line |= {"ok": True} | check(arguments)
    except Exception as error:  # whatever the client dies of is the result
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
