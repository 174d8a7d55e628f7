"""Load a compressed_tensors checkpoint, W8A8, W4A16 or both, in real transformers and compare with plain PyTorch.

    python check_transformers.py QUANTIZED_DIR [--run_compressed true|false|default] [--class full|thinker]
                                 [--dtype float32|bfloat16] [--activations int8|float|any] [--float_model DIR]

Runs inside a client environment: needs torch, transformers, compressed-tensors and safetensors, and imports
nothing of the quantizer, so that an error of ours cannot cancel itself. Meant for tiny models: three copies are in
memory. Prints one JSON line; exit status 1 when a check fails.

The reference is the float class of the same transformers, filled from the safetensors files by name, with each
quantized Linear replaced by one of two emulations:

- `int8`: activations rounded per token, exact integer product, times the two scales;
- `float`: the weight dequantized, activations left alone (what transformers 5 computes with `run_compressed=False`).

W4A16 has no activations to round. There `float` dequantizes in the dtype of the file's scale, `exact` without rounding:
clients that load into float32 do the one or the other. A checkpoint of both has all four pairs.

The client must agree with one of them; `--activations` says with which. With `--float_model` its logits must also be
near those of the checkpoint that was quantized.

Rounding is chaotic: noise of 1e-7 in the embedding of a tiny random model turns a few activations to the next integer,
layer after layer more, and moves the logits by 2e-2, as much as quantization itself. Logits of two runs left alone
therefore prove little. So the reference runs in lockstep: each of its Linears is handed what the client's Linear got,
after its own input was compared with that; then outputs are compared, and at the end the logits. By induction over the
Linears both compute the same function, and a tolerance of one Linear's rounding is enough.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.quantization_config import CompressedTensorsConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dequantizers import dequantize_packed, plain_codes

Tensors = dict[str, Tensor]
Inputs = dict[str, dict[str, Tensor]]

LINEARS_PER_LAYER = 7  # q, k, v, o, gate, up, down
LINEAR_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
TOWERS = ("visual", "audio_tower", "talker", "token2wav", "lm_head")

# Largest |client - reference| / |reference| of a Linear's input or output, or of the logits, in lockstep.
# float32: the same numbers in another order of summation, 1e-6; the two emulations are 7e-3 apart.
# bfloat16: the client also rounds dequantized weights, activations and outputs to 8 bits of mantissa (2^-9 = 2e-3
# each), and again what it adds up in the residual stream: 6e-3 in the logits; the emulations' outputs are 2e-2 apart.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# And of the logits to those of the model that was quantized, where it is given. Activation outliers of the tiny random
# model cost 0.23 without smoothing (0.03 with it); weights of another model, or wrongly assigned, give 1 and more.
FLOAT_TOLERANCE = 0.5


class CheckError(Exception):
    """The client loaded something else, or computes something else, than the files hold."""


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder by their name on disk, and the config without quantization."""

    folder: Path
    tensors: Tensors
    config: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    @property
    def answering_config(self) -> Any:
        return self.family.config_of(self.config)

    @property
    def quantized(self) -> list[str]:
        """Names on disk of the quantized Linears."""
        return sorted(name.removesuffix(".weight_scale") for name in self.tensors if name.endswith(".weight_scale"))

    def is_packed(self, name: str) -> bool:
        """Whether a Linear's integers are 4-bit, eight to a word."""
        return f"{name}.weight_packed" in self.tensors

    @property
    def float_names(self) -> list[str]:
        parts = {f"{name}.{part}" for name in self.quantized for part in LINEAR_PARTS}
        return [name for name in self.tensors if name not in parts]

    def dense(self, name: str) -> Tensor:
        """The weight that a quantized Linear's integers stand for, [out, in] float32 and not rounded."""
        scale = self.tensors[f"{name}.weight_scale"].float()
        if not self.is_packed(name):
            return self.tensors[f"{name}.weight"].float() * scale
        packed, shape = self.tensors[f"{name}.weight_packed"], self.tensors[f"{name}.weight_shape"]
        zero_point = self.tensors.get(f"{name}.weight_zero_point")
        zeros = None if zero_point is None else zero_point.numpy()
        return torch.from_numpy(dequantize_packed(packed.numpy(), scale.numpy(), shape.numpy(), zeros))


@dataclass(frozen=True)
class Family:
    """What differs between the models that are checked.

    full: the class of the whole model. answering: that of the part which makes text of text and media, a part of the
    full class's called `inner`, with a prefix to its names on disk; where the whole model is that, all are empty.
    """

    full: str
    answering: str
    inner: str = ""

    @property
    def prefix(self) -> str:
        return f"{self.inner}." if self.inner else ""

    def answering_class(self) -> Any:
        return getattr(transformers, self.answering)

    def config_of(self, config: Any) -> Any:
        """The part's config within that of the whole."""
        return getattr(config, f"{self.inner}_config") if self.inner else config


FAMILIES = {
    "qwen2_5_omni": Family(
        "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration", "thinker"
    ),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
}


def read_checkpoint(folder: Path) -> Checkpoint:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    inner = FAMILIES[config.model_type].config_of(config)
    for block in (config, inner, inner.text_config):  # of a flat config.json the last has all that stands in it
        vars(block).pop("quantization_config", None)
    return Checkpoint(folder, tensors, config)


# --- names ---


def module_name(disk_name: str, known: set[str], prefix: str = "") -> str | None:
    """The name in a model of what a file calls `disk_name`, or None where the model has no such thing.

    transformers 5 moved decoder and towers below `thinker.model`, and has those of VL below `model`, as 4.57 has; the
    thinker class has no leading `thinker.`, which `prefix` takes away.
    """
    moved = re.sub(r"^(thinker\.)?model\.", r"\1model.language_model.", disk_name)
    towers = re.sub(r"^(thinker\.)?(visual|audio_tower)\.", r"\1model.\2.", disk_name)
    candidates = (name.removeprefix(prefix) for name in (disk_name, moved, towers))
    return next((name for name in candidates if name in known), None)


def named_tensors(model: nn.Module) -> Tensors:
    return dict(model.named_parameters()) | dict(model.named_buffers())


# --- the reference ---


class Int8ActLinear(nn.Module):
    """y = (q_x @ q_w^T) * s_x * s_w + b with q_x rounded per token; the integer product is exact in float64.

    compressed-tensors uses the whole range of int8, s_x = absmax / 127.5 and q_x in [-128, 127], and divides in the
    model's dtype. (Kernels of runtimes use absmax / 127.)
    """

    def __init__(self, checkpoint: Checkpoint, name: str, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale = checkpoint.tensors[f"{name}.weight"], checkpoint.tensors[f"{name}.weight_scale"]
        self._codes, self._scale, self._bias = codes.double(), scale.float().flatten(), bias

    def forward(self, x: Tensor) -> Tensor:
        s_x = (x.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)  # x: [..., in]
        q_x = torch.clamp(torch.round(x / s_x), -128, 127)
        y = (q_x.double() @ self._codes.T).float() * s_x.float() * self._scale
        return (y if self._bias is None else y + self._bias.float()).to(x.dtype)


class FloatActLinear(nn.Module):
    """y = x @ Ŵ^T + b. transformers 5 dequantizes in the dtype that the scale has in the file."""

    def __init__(self, checkpoint: Checkpoint, name: str, bias: Tensor | None) -> None:
        super().__init__()
        dtype = checkpoint.tensors[f"{name}.weight_scale"].dtype
        self._weight, self._bias = self._rounded(checkpoint.dense(name), dtype), bias

    @staticmethod
    def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).float()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        return F.linear(x.float(), self._weight, bias).to(x.dtype)


class ExactFloatActLinear(FloatActLinear):
    """The same with the weight dequantized in float32."""

    @staticmethod
    def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight


REFERENCES: dict[str, type[nn.Module]] = {"int8": Int8ActLinear, "float": FloatActLinear}
PACKED_REFERENCES: dict[str, type[nn.Module]] = {"float": FloatActLinear, "exact": ExactFloatActLinear}


def references(checkpoint: Checkpoint) -> dict[str, Callable[[str], type[nn.Module]]]:
    """What each quantized Linear, by its name on disk, may be emulated by."""
    packed = {checkpoint.is_packed(name) for name in checkpoint.quantized}
    if packed == {True}:
        return {word: lambda _, it=it: it for word, it in PACKED_REFERENCES.items()}
    if packed == {False}:
        return {word: lambda _, it=it: it for word, it in REFERENCES.items()}
    pairs = [(*one, *other) for one in REFERENCES.items() for other in PACKED_REFERENCES.items()]
    return {
        f"{int8}, int4 {int4}": lambda name, a=a, b=b: b if checkpoint.is_packed(name) else a
        for int8, a, int4, b in pairs
    }


def reference(checkpoint: Checkpoint, dtype: torch.dtype, emulation: Callable[[str], type[nn.Module]]) -> nn.Module:
    """The float class with the files' float weights and emulated Linears."""
    family = checkpoint.family
    model = family.answering_class()(copy.deepcopy(checkpoint.answering_config)).eval()
    for parameter in model.parameters():  # not model.to(): rotary tables stay float32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    for name in checkpoint.quantized:
        _replace_linear(model, name, checkpoint, emulation(name))
    known = set(named_tensors(model))
    state = {}
    for name in checkpoint.float_names:
        if name.startswith(family.prefix):
            inside = module_name(name, known, family.prefix)
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


def _replace_linear(model: nn.Module, name: str, checkpoint: Checkpoint, emulation: type[nn.Module]) -> None:
    inside = module_name(name, set(dict(model.named_modules())), checkpoint.family.prefix)
    if inside is None:
        raise CheckError(f"the float class has no {name}")
    old, bias = model.get_submodule(inside), checkpoint.tensors.get(f"{name}.bias")
    _check_layout(name, checkpoint.tensors, old.weight.shape)
    if (bias is None) != (old.bias is None):
        raise CheckError(f"{name}: bias {'missing' if bias is None else 'too much'}")
    parent, _, child = inside.rpartition(".")
    setattr(model.get_submodule(parent), child, emulation(checkpoint, name, bias))


def _check_layout(name: str, tensors: Tensors, shape: torch.Size) -> None:
    """dtypes and shapes of the files, given the Linear's [out, in]."""
    found = {part: tensors[key] for part in LINEAR_PARTS if (key := f"{name}.{part}") in tensors}
    layout = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in found.items()}
    groups = found["weight_scale"].shape[1]
    wanted = {"weight_scale": (found["weight_scale"].dtype, (shape[0], groups))}
    if "weight_packed" in found:
        wanted["weight_packed"] = (torch.int32, (shape[0], shape[1] // 8))
        wanted["weight_shape"] = (torch.int64, (2,))
        if "weight_zero_point" in found:
            wanted["weight_zero_point"] = (torch.int32, (shape[0] // 8, groups))
    else:
        wanted["weight"] = (torch.int8, tuple(shape))
    if layout != wanted or ("weight" in found and groups != 1):
        raise CheckError(f"{name}: {layout}, not {wanted}")


# --- the client ---


def load_client(checkpoint: Checkpoint, kind: str, run_compressed: str, dtype: torch.dtype) -> nn.Module:
    """from_pretrained as a user calls it."""
    family = checkpoint.family
    cls = getattr(transformers, family.answering if kind == "thinker" else family.full)
    options: dict[str, Any] = {}
    if run_compressed != "default":
        options["quantization_config"] = CompressedTensorsConfig(run_compressed=run_compressed == "true")
    return cls.from_pretrained(checkpoint.folder, dtype=dtype, **options).eval()


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
    layers = checkpoint.answering_config.text_config.num_hidden_layers
    if len(wanted) != LINEARS_PER_LAYER * layers:
        raise CheckError(f"{len(wanted)} Linears are quantized in the files, not {LINEARS_PER_LAYER} x {layers}")
    with_scheme = {name for name, module in modules.items() if getattr(module, "quantization_scheme", None)}
    if with_scheme and with_scheme != set(wanted):
        raise CheckError(f"quantized otherwise than the files: {sorted(with_scheme ^ set(wanted))[:5]}")
    for name, module in modules.items():
        is_int = any(not p.is_floating_point() for p in module.parameters(recurse=False))
        if (is_int or name in with_scheme) and set(name.split(".")) & set(TOWERS):
            raise CheckError(f"quantized by mistake: {name}")
    as_integers = sum(_check_weight(modules[inside], name, checkpoint) for inside, name in wanted.items())
    floats = sum(isinstance(module, nn.Linear) for module in modules.values()) - len(wanted)
    return {
        "quantized": len(wanted),
        "with_scheme": len(with_scheme),
        "held_as_integers": as_integers,
        "float_linears": floats,
    }


def _check_weight(module: Any, name: str, checkpoint: Checkpoint) -> bool:
    """Whether the module holds integers; raises unless they are the files', or the weight what those stand for."""
    tensors = checkpoint.tensors
    scale, held_scale = tensors[f"{name}.weight_scale"], getattr(module, "weight_scale", None)
    if held_scale is not None and not torch.equal(held_scale, scale.to(held_scale.dtype)):
        raise CheckError(f"{name}: another weight_scale than in the files")
    held = {part: tensor for part in LINEAR_PARTS if (tensor := getattr(module, part, None)) is not None}
    weight = held.get("weight")
    if weight is None or weight.dtype == torch.int8:
        for part in set(held) - {"weight_scale", "weight_shape"}:
            if not torch.equal(held[part], tensors[f"{name}.{part}"]):
                raise CheckError(f"{name}: another {part} than in the files")
        if held_scale is None or set(held) < {part for part in LINEAR_PARTS if f"{name}.{part}" in tensors}:
            raise CheckError(f"{name}: integers without all that belongs to them: {sorted(held)}")
        return True
    # In bfloat16 (of the model, or of the scale as transformers 5 does it) scale and product are rounded: 2^-8 in all.
    rounded = torch.bfloat16 in (weight.dtype, scale.dtype)
    dense = checkpoint.dense(name)
    error = (weight.detach().float() - dense).abs() - dense.abs() * (2**-7 if rounded else 1e-6)
    if error.max() > 0:
        raise CheckError(f"{name}: the dequantized weight is not what the integers stand for")
    return False


def check_words(checkpoint: Checkpoint) -> int:
    """compressed-tensors' own packing agrees with the files' words, and ours with it; returns how many Linears."""
    try:
        library = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    except ModuleNotFoundError:  # before 0.14
        library = import_module("compressed_tensors.compressors.quantized_compressors.pack_quantized")
    tensors, names = checkpoint.tensors, [name for name in checkpoint.quantized if checkpoint.is_packed(name)]
    for name in names:
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        groups = tensors[f"{name}.weight_scale"].shape[1]
        for part, size, axis in (("weight_packed", shape, 1), ("weight_zero_point", (shape[0], groups), 0)):
            words = tensors.get(f"{name}.{part}")
            if words is None:
                continue
            codes = library.unpack_from_int32(words, 4, torch.Size(size), packed_dim=axis)
            along = words.numpy() if axis == 1 else words.numpy().T.copy()
            mine = torch.from_numpy(plain_codes(along, size[axis]))
            if not torch.equal(codes.int() if axis == 1 else codes.int().T, mine):
                raise CheckError(f"{name}.{part}: the library unpacks other integers")
            if not torch.equal(library.pack_to_int32(codes, 4, packed_dim=axis), words):
                raise CheckError(f"{name}.{part}: the library packs these integers otherwise")
    return len(names)


def check_floats(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> int:
    """Every float tensor of the files that belongs to the class is in the model, unchanged; returns how many.

    And the other way round: no parameter of the model but those of quantized Linears came from elsewhere.
    """
    loaded = named_tensors(model)
    compared = set()
    for name in checkpoint.float_names:
        if prefix and not name.startswith(prefix):
            continue
        inside = module_name(name, set(loaded), prefix)
        if inside is None:
            raise CheckError(f"the client has no {name}")
        if not torch.equal(loaded[inside].detach(), checkpoint.tensors[name].to(loaded[inside].dtype)):
            raise CheckError(f"{name}: another value than in the files")
        compared.add(inside)
    modules = set(dict(model.named_modules()))
    inside_linears = {module_name(name, modules, prefix) for name in checkpoint.quantized}
    others = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in inside_linears}
    if others - compared:
        raise CheckError(f"not from the files: {sorted(others - compared)[:3]}")
    return len(compared)


# --- inputs and comparison ---


def make_inputs(config: Any, seed: int = 0) -> Inputs:
    """Text only, and text around an image made of noise; `config` is that of the answering class."""
    generator = torch.Generator().manual_seed(seed)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    image = getattr(config, "image_token_index", None) or config.image_token_id
    special = (f"{kind}_token_{ending}" for kind in ("audio", "video") for ending in ("index", "id"))
    ids = [getattr(config, name, None) for name in (*special, "bos_token_id", "pad_token_id")]
    ordinary = min(image, start, end, *(i for i in ids if isinstance(i, int)))

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


def relative(mine: Tensor, other: Tensor) -> float:
    return float((mine.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))


# --- lockstep ---


@dataclass
class Call:
    """What one quantized Linear of the client got and gave in one forward."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Run:
    """One forward of the client: calls by name on disk, and the logits."""

    calls: dict[str, Call]
    logits: Tensor


@torch.no_grad()
def record(thinker: nn.Module, linears: dict[str, nn.Module], inputs: dict[str, Tensor]) -> Run:
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            calls[name] = Call(args[0].clone(), y.clone())

        return keep

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    logits = thinker(**copy.deepcopy(inputs)).logits
    for handle in handles:
        handle.remove()
    if not torch.isfinite(logits).all():
        raise CheckError("NaN or Inf in the logits")
    return Run(calls, logits)


@dataclass
class Lockstep:
    """Largest relative differences of a reference that is handed the client's input at every quantized Linear."""

    inputs: float = 0.0
    outputs: float = 0.0
    logits: float = 0.0

    @property
    def worst(self) -> float:
        return max(self.inputs, self.outputs, self.logits)

    @torch.no_grad()
    def follow(self, model: nn.Module, linears: dict[str, nn.Module], inputs: dict[str, Tensor], run: Run) -> None:
        """Run the reference along one run of the client."""
        handles = [handle for name, linear in linears.items() for handle in self._attach(linear, run.calls[name])]
        logits = model(**copy.deepcopy(inputs)).logits
        for handle in handles:
            handle.remove()
        self.logits = max(self.logits, relative(run.logits, logits))

    def _attach(self, linear: nn.Module, call: Call) -> list[Any]:
        def take_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            self.inputs = max(self.inputs, relative(call.x, args[0]))
            return (call.x,)

        def compare_output(_: nn.Module, __: Any, y: Tensor) -> None:
            self.outputs = max(self.outputs, relative(call.y, y))

        return [linear.register_forward_pre_hook(take_input), linear.register_forward_hook(compare_output)]


def quantized_linears(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The quantized Linears of a thinker by their name on disk."""
    modules = dict(model.named_modules())
    found = {name: module_name(name, set(modules), checkpoint.family.prefix) for name in checkpoint.quantized}
    return {name: modules[inside] for name, inside in found.items() if inside is not None}


@torch.no_grad()
def left_alone(mine: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Largest relative difference of the logits of two models that run by themselves."""
    pairs = ((mine(**copy.deepcopy(one)).logits, other(**copy.deepcopy(one)).logits) for one in inputs.values())
    return max(relative(a, b) for a, b in pairs)


def compare(
    thinker: nn.Module, checkpoint: Checkpoint, inputs: Inputs, dtype: torch.dtype, activations: str
) -> dict[str, Any]:
    """The client against both references, in lockstep; and, for information, left alone."""
    linears = quantized_linears(thinker, checkpoint)
    # Twice: some versions decompress in the first forward and treat the weights otherwise from then on.
    runs = [(one, record(thinker, linears, one)) for _ in range(2) for one in inputs.values()]
    steps, alone = {}, {}
    for name, emulation in references(checkpoint).items():
        model = reference(checkpoint, dtype, emulation)
        emulated = quantized_linears(model, checkpoint)
        steps[name] = Lockstep()
        for one, run in runs:
            steps[name].follow(model, emulated, one, run)
        alone[name] = left_alone(thinker, model, inputs)
    closest = min(steps, key=lambda name: steps[name].outputs)
    named = [name for name in steps if name.partition(",")[0] == activations]
    wanted = min(named or steps, key=lambda name: steps[name].outputs)
    return {
        "activations": closest,
        "difference": steps[wanted].worst,
        "differences": asdict(steps[wanted]),
        "tolerance": TOLERANCE[dtype],
        "other_emulation": max(step.outputs for name, step in steps.items() if name != wanted),
        "logits_left_alone": alone,
    }


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, arguments.dtype)
    checkpoint = read_checkpoint(arguments.quantized)
    model = load_client(checkpoint, arguments.kind, arguments.run_compressed, dtype)
    family = checkpoint.family
    prefix = family.prefix if arguments.kind == "thinker" else ""
    counts = check_tree(model, checkpoint, prefix) | {"float_tensors": check_floats(model, checkpoint, prefix)}
    counts["packed_alike"] = check_words(checkpoint)
    thinker = getattr(model, family.inner) if family.inner and arguments.kind == "full" else model
    inputs = make_inputs(checkpoint.answering_config)
    result = counts | compare(thinker, checkpoint, inputs, dtype, arguments.activations)
    if arguments.float_model:
        original = family.answering_class().from_pretrained(arguments.float_model, dtype=dtype).eval()
        result["to_float"] = left_alone(thinker, original, inputs)
        if result["to_float"] > FLOAT_TOLERANCE:
            raise CheckError(f"difference to the float model {result['to_float']:.2e}: {json.dumps(result)}")
    if result["difference"] > TOLERANCE[dtype]:
        raise CheckError(f"difference {result['difference']:.2e} above {TOLERANCE[dtype]:.0e}: {json.dumps(result)}")
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument("--run_compressed", choices=("true", "false", "default"), default="default")
    parser.add_argument("--class", dest="kind", choices=("full", "thinker"), default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--activations", choices=("int8", "float", "any"), default="any")
    parser.add_argument("--float_model", type=Path, metavar="DIR", help="the checkpoint that was quantized")
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
