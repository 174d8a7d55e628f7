"""Load a compressed_tensors W8A8 checkpoint in real transformers and compare its logits with plain PyTorch.

    python check_transformers.py QUANTIZED_DIR [--run_compressed true|false|default] [--class full|thinker]
                                 [--dtype float32|bfloat16] [--activations int8|float|any]

Runs inside a client environment: needs torch, transformers, compressed-tensors and safetensors, and imports
nothing of the quantizer, so that an error of ours cannot cancel itself. Meant for tiny models: three copies of the
thinker are in memory. Prints one JSON line; exit status 1 when a check fails.

The reference is the float class of the same transformers, filled from the safetensors files by name, with each
quantized Linear replaced by one of two emulations:

- `int8`: activations rounded per token, exact integer product, times the two scales;
- `float`: the weight dequantized, activations left alone (what transformers 5 computes with `run_compressed=False`).

The client must agree with one of them; `--activations` says with which.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.quantization_config import CompressedTensorsConfig

Tensors = dict[str, Tensor]

LINEARS_PER_LAYER = 7  # q, k, v, o, gate, up, down
TOWERS = ("visual", "audio_tower", "talker", "token2wav", "lm_head")

# Relative difference |client - reference| / |reference| of all logits.
# float32: the same numbers in another order of summation; now and then that turns one activation's rounding, which
# alone is worth about 1e-4. The two emulations are 1e-2 apart, so this still tells them from each other.
# bfloat16: the client rounds activation scales, activations and dequantized weights to 8 bits of mantissa (2^-9 each)
# in every Linear where the reference keeps float32; the tests of values are those of float32.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


class CheckError(Exception):
    """The client loaded something else, or computes something else, than the files hold."""


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder by their name on disk, and the config without quantization."""

    folder: Path
    tensors: Tensors
    config: Any

    @property
    def quantized(self) -> list[str]:
        """Names on disk of the quantized Linears."""
        return sorted(name.removesuffix(".weight_scale") for name in self.tensors if name.endswith(".weight_scale"))

    @property
    def float_names(self) -> list[str]:
        linears = set(self.quantized)
        return [
            name
            for name in self.tensors
            if not name.endswith(".weight_scale") and name.removesuffix(".weight") not in linears
        ]


def read_checkpoint(folder: Path) -> Checkpoint:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    for block in (config, config.thinker_config):
        if hasattr(block, "quantization_config"):
            del block.quantization_config
    return Checkpoint(folder, tensors, config)


# --- names ---


def module_name(disk_name: str, known: set[str], prefix: str = "") -> str | None:
    """The name in a model of what a file calls `disk_name`, or None where the model has no such thing.

    transformers 5 moved decoder and towers below `thinker.model`; the thinker class has no leading `thinker.`, which
    `prefix` takes away.
    """
    moved = disk_name.replace("thinker.model.", "thinker.model.language_model.")
    towers = disk_name.replace("thinker.visual.", "thinker.model.visual.")
    towers = towers.replace("thinker.audio_tower.", "thinker.model.audio_tower.")
    candidates = (name.removeprefix(prefix) for name in (disk_name, moved, towers))
    return next((name for name in candidates if name in known), None)


def named_tensors(model: nn.Module) -> Tensors:
    return dict(model.named_parameters()) | dict(model.named_buffers())


# --- the reference ---


class Int8ActLinear(nn.Module):
    """y = (q_x @ q_w^T) * s_x * s_w + b with q_x rounded per token; the integer product is exact in float64.

    compressed-tensors uses the whole range of int8: s_x = absmax / 127.5, q_x in [-128, 127].
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._codes, self._scale, self._bias = codes.double(), scale.float().flatten(), bias

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # [..., in]
        s_x = (wide.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
        q_x = torch.clamp(torch.round(wide / s_x), -128, 127)
        y = (q_x.double() @ self._codes.T).float() * s_x * self._scale
        return (y if self._bias is None else y + self._bias.float()).to(x.dtype)


class FloatActLinear(nn.Module):
    """y = x @ (q_w * s_w)^T + b."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = codes.float() * scale.float(), bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        return F.linear(x.float(), self._weight, bias).to(x.dtype)


REFERENCES: dict[str, type[nn.Module]] = {"int8": Int8ActLinear, "float": FloatActLinear}


def thinker_class() -> Any:
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration


def reference(checkpoint: Checkpoint, dtype: torch.dtype, emulation: type[nn.Module]) -> nn.Module:
    """The float thinker with the files' float weights and emulated Linears."""
    model = thinker_class()(copy.deepcopy(checkpoint.config.thinker_config)).eval()
    for parameter in model.parameters():  # not model.to(): rotary tables stay float32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    for name in checkpoint.quantized:
        _replace_linear(model, name, checkpoint.tensors, emulation)
    known = set(named_tensors(model))
    state = {}
    for name in checkpoint.float_names:
        if name.startswith("thinker."):
            inside = module_name(name, known, "thinker.")
            # Biases of quantized Linears already sit in their emulation.
            if inside is None and name.removesuffix(".bias") not in checkpoint.quantized:
                raise CheckError(f"the float class has no {name}")
            if inside is not None:
                state[inside] = checkpoint.tensors[name]
    unfilled = set(dict(model.named_parameters())) - set(state)
    if unfilled:
        raise CheckError(f"not in the files: {sorted(unfilled)[:3]}")
    model.load_state_dict(state, strict=False)
    return model


def _replace_linear(model: nn.Module, name: str, tensors: Tensors, emulation: type[nn.Module]) -> None:
    inside = module_name(name, set(dict(model.named_modules())), "thinker.")
    if inside is None:
        raise CheckError(f"the float class has no {name}")
    old = model.get_submodule(inside)
    codes, scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tensors.get(f"{name}.bias")
    if codes.dtype != torch.int8 or codes.shape != old.weight.shape or scale.shape != (codes.shape[0], 1):
        raise CheckError(f"{name}: {codes.dtype} {tuple(codes.shape)}, scale {tuple(scale.shape)}")
    if (bias is None) != (old.bias is None):
        raise CheckError(f"{name}: bias {'missing' if bias is None else 'too much'}")
    parent, _, child = inside.rpartition(".")
    setattr(model.get_submodule(parent), child, emulation(codes, scale, bias))


# --- the client ---


def load_client(folder: Path, kind: str, run_compressed: str, dtype: torch.dtype) -> nn.Module:
    """from_pretrained as a user calls it."""
    cls = thinker_class() if kind == "thinker" else transformers.Qwen2_5OmniForConditionalGeneration
    options: dict[str, Any] = {}
    if run_compressed != "default":
        options["quantization_config"] = CompressedTensorsConfig(run_compressed=run_compressed == "true")
    model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    for key in ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if info.get(key):
            raise CheckError(f"{key}: {str(sorted(info[key], key=str)[:3])}")
    unexpected = [name for name in info["unexpected_keys"] if not _left_out(name, kind)]
    if unexpected:
        raise CheckError(f"unexpected_keys: {sorted(unexpected)[:3]}")
    return model.eval()


def _left_out(name: str, kind: str) -> bool:
    """Whether the class is right to leave a tensor alone: speech outside the thinker, and 4.57's rotary table."""
    return (kind == "thinker" and name.startswith(("talker.", "token2wav."))) or name.endswith("inv_freq")


def check_tree(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> dict[str, int]:
    """Exactly the decoder's Linears are quantized, and they hold the files' integers and scales.

    A client either keeps them compressed (a quantization scheme on the module) or loads them dequantized.
    """
    modules = dict(model.named_modules())
    wanted = {}
    for name in checkpoint.quantized:
        inside = module_name(name, set(modules), prefix)
        if inside is None:
            raise CheckError(f"the client has no {name}")
        wanted[inside] = name
    layers = checkpoint.config.thinker_config.text_config.num_hidden_layers
    if len(wanted) != LINEARS_PER_LAYER * layers:
        raise CheckError(f"{len(wanted)} Linears are quantized in the files, not {LINEARS_PER_LAYER} x {layers}")
    with_scheme = {name for name, module in modules.items() if getattr(module, "quantization_scheme", None)}
    if with_scheme and with_scheme != set(wanted):
        raise CheckError(f"quantized otherwise than the files: {sorted(with_scheme ^ set(wanted))[:5]}")
    for name, module in modules.items():
        is_int = any(not p.is_floating_point() for p in module.parameters(recurse=False))
        if (is_int or name in with_scheme) and set(name.split(".")) & set(TOWERS):
            raise CheckError(f"quantized by mistake: {name}")
    as_int8 = sum(_check_weight(modules[inside], name, checkpoint.tensors) for inside, name in wanted.items())
    floats = sum(isinstance(module, nn.Linear) for module in modules.values()) - len(wanted)
    return {"quantized": len(wanted), "with_scheme": len(with_scheme), "int8": as_int8, "float_linears": floats}


def _check_weight(module: Any, name: str, tensors: Tensors) -> bool:
    """Whether the weight is int8; raises unless codes and scale are the files', or the weight is their product."""
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    held = getattr(module, "weight_scale", None)
    if held is not None and not torch.equal(held, scale.to(held.dtype)):
        raise CheckError(f"{name}: another weight_scale than in the files")
    weight = module.weight.detach()
    if weight.dtype == torch.int8:
        if held is None or not torch.equal(weight, codes):
            raise CheckError(f"{name}: other integers than in the files")
        return True
    dense = codes.float() * scale.float()
    # Dequantizing in bfloat16 rounds the scale and the product: 2^-8 in all.
    error = (weight.float() - dense).abs() - dense.abs() * (2**-7 if weight.dtype == torch.bfloat16 else 1e-6)
    if error.max() > 0:
        raise CheckError(f"{name}: the dequantized weight is not codes * scale")
    return False


def check_floats(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> int:
    """Every float tensor of the files that belongs to the class is in the model, unchanged; returns how many."""
    loaded = named_tensors(model)
    compared = 0
    for name in checkpoint.float_names:
        if prefix and not name.startswith(prefix):
            continue
        inside = module_name(name, set(loaded), prefix)
        if inside is None:
            raise CheckError(f"the client has no {name}")
        if not torch.equal(loaded[inside].detach(), checkpoint.tensors[name].to(loaded[inside].dtype)):
            raise CheckError(f"{name}: another value than in the files")
        compared += 1
    return compared


# --- inputs and comparison ---


def make_inputs(config: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Text only, and text around an image made of noise; `config` is the thinker's."""
    generator = torch.Generator().manual_seed(seed)
    image, start = config.image_token_index, config.vision_start_token_id
    end = config.vision_end_token_id
    ordinary = min(image, start, end, config.audio_token_index, config.video_token_index, config.pad_token_id)

    def text(length: int) -> list[int]:
        return torch.randint(0, ordinary, (length,), generator=generator).tolist()

    vision = config.vision_config
    grid = torch.tensor([[1, 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size]])
    patches = int(grid.prod())
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches, width, generator=generator)
    media = [image] * (patches // vision.spatial_merge_size**2)
    return {
        "text": _with_mask(text(48)),
        "image": _with_mask([*text(9), start, *media, end, *text(12)])
        | {"pixel_values": pixels, "image_grid_thw": grid},
    }


def _with_mask(ids: Iterable[int]) -> dict[str, Tensor]:
    input_ids = torch.tensor([list(ids)])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@torch.no_grad()
def all_logits(thinker: Callable[..., Any], inputs: dict[str, dict[str, Tensor]]) -> Tensors:
    return {name: thinker(**copy.deepcopy(one)).logits.float() for name, one in inputs.items()}


def relative_difference(mine: Tensors, theirs: Tensors) -> float:
    """The largest |a - b| / |b| over the inputs."""
    return max(float((mine[name] - other).norm() / other.norm()) for name, other in theirs.items())


def largest_difference(mine: Tensors, theirs: Tensors) -> float:
    return max(float((mine[name] - other).abs().max()) for name, other in theirs.items())


def compare(thinker: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, activations: str) -> dict[str, Any]:
    """Logits of the client against both references."""
    inputs = make_inputs(checkpoint.config.thinker_config)
    client = all_logits(thinker, inputs)
    # Some versions decompress in the first forward: the second must not compute something else.
    again = relative_difference(all_logits(thinker, inputs), client)
    if not all(torch.isfinite(logits).all() for logits in client.values()):
        raise CheckError("NaN or Inf in the logits")
    references = {name: all_logits(reference(checkpoint, dtype, cls), inputs) for name, cls in REFERENCES.items()}
    relative = {name: relative_difference(client, logits) for name, logits in references.items()}
    closest = min(relative, key=lambda name: relative[name])
    wanted = closest if activations == "any" else activations
    return {
        "activations": closest,
        "relative_difference": relative[wanted],
        "max_difference": largest_difference(client, references[wanted]),
        "logits_std": float(references[wanted]["text"].std()),
        "difference_int8": relative["int8"],
        "difference_float": relative["float"],
        "int8_to_float": relative_difference(references["int8"], references["float"]),
        "second_forward": again,
        "tolerance": TOLERANCE[dtype],
    }


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, arguments.dtype)
    checkpoint = read_checkpoint(arguments.quantized)
    model = load_client(arguments.quantized, arguments.kind, arguments.run_compressed, dtype)
    prefix = "thinker." if arguments.kind == "thinker" else ""
    counts = check_tree(model, checkpoint, prefix) | {"float_tensors": check_floats(model, checkpoint, prefix)}
    thinker = model if arguments.kind == "thinker" else model.thinker
    result = counts | compare(thinker, checkpoint, dtype, arguments.activations)
    for key in ("relative_difference", "second_forward"):
        if result[key] > TOLERANCE[dtype]:
            raise CheckError(f"{key} {result[key]:.2e} is above {TOLERANCE[dtype]:.0e}: {json.dumps(result)}")
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument("--run_compressed", choices=("true", "false", "default"), default="default")
    parser.add_argument("--class", dest="kind", choices=("full", "thinker"), default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--activations", choices=("int8", "float", "any"), default="any")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_arguments()
    torch.manual_seed(0)
    line: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "compressed-tensors")},
        "class": arguments.kind,
        "run_compressed": arguments.run_compressed,
        "dtype": arguments.dtype,
    }
    try:
        line |= {"ok": True} | check(arguments)
    except Exception as error:  # whatever the client dies of is the result
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
