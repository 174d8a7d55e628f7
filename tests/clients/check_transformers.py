"""Load a compressed_tensors checkpoint in transformers, and compare with plain PyTorch: W8A8, W4A16, both, or others.

    python check_transformers.py QUANTIZED_DIR [--run_compressed true|false|default|dequantize] [--class full|thinker]
                                 [--dtype float32|bfloat16] [--activations int8|float|any] [--float_model DIR]

Runs inside a client environment: needs torch, transformers, compressed-tensors and safetensors. Imports nothing from
the quantizer, so that its bugs cannot cancel out. Meant for tiny models, because three copies are in memory. Prints one
JSON line; the exit status is 1 if a check fails.

The reference is the float class of the same transformers, filled from the safetensors files by name. Each quantized
Linear is replaced by one of two emulations:

- `int8`: activations rounded per token, exact integer product, multiplied by the two scales;
- `float`: dequantized weight, float activations (as transformers 5 computes with `run_compressed=False`).

W4A16 and W8A16 do not round activations, and the clients do not round those of NVFP4. The emulations of these are
`float`, which dequantizes in the dtype of the stored scale, and `exact`, which dequantizes in float32. Clients that
load into float32 do one or the other. FP8 has a third one, `float8`, which rounds activations too. A checkpoint with
both int8 and packed Linears has four pairs of emulations.

The client must agree with one emulation; `--activations` selects it. With `--float_model`, the logits must also be
close to those of the float checkpoint.

Rounding is chaotic: noise of 1e-7 in the embedding of a tiny random model moves a few activations to the next integer,
more in every layer, and changes the logits by 2e-2, as much as quantization itself. The logits of two independent runs
therefore prove little. Instead, the reference runs in lockstep: at every quantized Linear, its input is compared with
the client's input and then replaced by it, and the outputs are compared; at the end, the logits are compared. By
induction over the Linears both compute the same function, with a tolerance of one Linear's rounding.
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
from dequantizers import (
    dequantize_float8,
    dequantize_nvfp4,
    dequantize_packed,
    dequantize_packed_bytes,
    plain_codes,
)

Tensors = dict[str, Tensor]
Inputs = dict[str, dict[str, Tensor]]

GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")
LINEAR_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", *GLOBAL_SCALES)
TOWERS = ("visual", "audio_tower", "talker", "token2wav", "lm_head")

# Largest |client - reference| / |reference| of a Linear's input or output, or of the logits, in lockstep.
# float32: only the order of summation differs, 1e-6. The two emulations differ by 7e-3.
# bfloat16: the client also rounds dequantized weights, activations, outputs and the residual stream to 8 bits of
# mantissa (2^-9 = 2e-3 each), 6e-3 in the logits. The outputs of the emulations differ by 2e-2.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Largest relative difference of the logits to the float model. Activation outliers of the tiny random model cost 0.23
# without smoothing and 0.03 with it; plain rounding to 4 bits costs the tiny VL up to 0.60. Weights of another model,
# or wrongly assigned weights, give at least 1.
FLOAT_TOLERANCE = 0.75


class CheckError(Exception):
    """The client has loaded or computed something that differs from the files."""


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder by name on disk, and the config without its quantization block."""

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

    @property
    def expected_linears(self) -> int:
        """Number of Linears of the decoder: attention, and one MLP or several experts."""
        text = self.answering_config.text_config
        return text.num_hidden_layers * (4 + 3 * getattr(text, "num_experts", 1))

    def is_packed(self, name: str) -> bool:
        """Whether the Linear is stored as packed integers, eight or four to a word."""
        return f"{name}.weight_packed" in self.tensors and not self.is_nvfp4(name)

    def is_nvfp4(self, name: str) -> bool:
        return f"{name}.weight_global_scale" in self.tensors

    def is_float8(self, name: str) -> bool:
        stored = self.tensors.get(f"{name}.weight")
        return stored is not None and stored.dtype == torch.float8_e4m3fn

    def bits(self, name: str) -> int:
        """Bits of a packed integer."""
        columns = int(self.tensors[f"{name}.weight_shape"][1])
        return 32 * self.tensors[f"{name}.weight_packed"].shape[1] // columns

    @property
    def float_names(self) -> list[str]:
        parts = {f"{name}.{part}" for name in self.quantized for part in LINEAR_PARTS}
        return [name for name in self.tensors if name not in parts]

    def dense(self, name: str) -> Tensor:
        """The dequantized weight of a quantized Linear, float32 [out, in], not rounded."""
        scale = self.tensors[f"{name}.weight_scale"].float()
        if self.is_float8(name):
            codes = self.tensors[f"{name}.weight"].view(torch.uint8)
            return torch.from_numpy(dequantize_float8(codes.numpy(), scale.numpy()))
        if self.is_nvfp4(name):
            packed, scales = self.tensors[f"{name}.weight_packed"], self.tensors[f"{name}.weight_scale"]
            divisor = float(self.tensors[f"{name}.weight_global_scale"])
            return torch.from_numpy(dequantize_nvfp4(packed.numpy(), scales.view(torch.uint8).numpy(), divisor))
        if not self.is_packed(name):
            return self.tensors[f"{name}.weight"].float() * scale
        packed, shape = self.tensors[f"{name}.weight_packed"], self.tensors[f"{name}.weight_shape"]
        if self.bits(name) == 8:
            return torch.from_numpy(dequantize_packed_bytes(packed.numpy(), scale.numpy(), shape.numpy()))
        zero_point = self.tensors.get(f"{name}.weight_zero_point")
        zeros = None if zero_point is None else zero_point.numpy()
        return torch.from_numpy(dequantize_packed(packed.numpy(), scale.numpy(), shape.numpy(), zeros))


@dataclass(frozen=True)
class Family:
    """Differences between the checked models.

    full: class of the full model. answering: class of the part that generates text. inner: the attribute of the full
    model that holds this part, and the prefix of its names on disk; empty if the full model is the answering class.
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
        """The config of the answering class."""
        return getattr(config, f"{self.inner}_config") if self.inner else config


FAMILIES = {
    "qwen2_5_omni": Family(
        "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration", "thinker"
    ),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration", "thinker"
    ),
}


def read_checkpoint(folder: Path) -> Checkpoint:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    inner = FAMILIES[config.model_type].config_of(config)
    for block in (config, inner, inner.text_config):  # the last one has all fields of a flat config.json
        vars(block).pop("quantization_config", None)
    return Checkpoint(folder, tensors, config)


# --- names ---


def module_name(disk_name: str, known: set[str], prefix: str = "") -> str | None:
    """The name in the model of a name on disk, or None if the model has no such module or tensor.

    transformers 5 moved the decoder and towers of Omni below `thinker.model`; those of VL are below `model` in 5 and in
    4.57. prefix: removed from the start, because names in the thinker class have no leading `thinker.`.
    """
    moved = re.sub(r"^(thinker\.)?model\.", r"\1model.language_model.", disk_name)
    towers = re.sub(r"^(thinker\.)?(visual|audio_tower)\.", r"\1model.\2.", disk_name)
    candidates = (name.removeprefix(prefix) for name in (disk_name, moved, towers))
    return next((name for name in candidates if name in known), None)


def named_tensors(model: nn.Module) -> Tensors:
    return dict(model.named_parameters()) | dict(model.named_buffers())


# --- the reference ---


class Int8ActLinear(nn.Module):
    """y = (q_x @ q_w^T) * s_x * s_w + b with q_x rounded per token. The integer product is exact in float64.

    compressed-tensors uses the full range of int8, s_x = absmax / 127.5 and q_x in [-128, 127], and divides in the
    model's dtype. (The kernels of runtimes use absmax / 127.)
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
    """y = x @ Ŵ^T + b. transformers 5 dequantizes in the dtype of the stored scale."""

    def __init__(self, checkpoint: Checkpoint, name: str, bias: Tensor | None) -> None:
        super().__init__()
        dtype = checkpoint.tensors[f"{name}.weight_scale"].dtype
        dtype = torch.bfloat16 if checkpoint.is_nvfp4(name) else dtype  # that scale is an 8-bit float
        self._weight, self._bias = self._rounded(checkpoint.dense(name), dtype), bias

    @staticmethod
    def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).float()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias.float()
        return F.linear(x.float(), self._weight, bias).to(x.dtype)


class ExactFloatActLinear(FloatActLinear):
    """y = x @ Ŵ^T + b, with the weight dequantized in float32."""

    @staticmethod
    def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight


class Float8ActLinear(ExactFloatActLinear):
    """y = x̂ @ Ŵ^T + b with x̂ rounded to e4m3, per token, or per token and 128 inputs for FP8 in blocks."""

    def __init__(self, checkpoint: Checkpoint, name: str, bias: Tensor | None) -> None:
        super().__init__(checkpoint, name, bias)
        self._group = 128 if checkpoint.tensors[f"{name}.weight_scale"].shape[1] > 1 else self._weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (-1, self._group))  # [..., groups, group]
        scale = (grouped.abs().amax(-1, keepdim=True) / 448).clamp_min(torch.finfo(x.dtype).eps)
        rounded = (grouped / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return super().forward(rounded.flatten(-2))


REFERENCES: dict[str, type[nn.Module]] = {"int8": Int8ActLinear, "float": FloatActLinear}
PACKED_REFERENCES: dict[str, type[nn.Module]] = {"float": FloatActLinear, "exact": ExactFloatActLinear}
FLOAT8_REFERENCES: dict[str, type[nn.Module]] = {**PACKED_REFERENCES, "float8": Float8ActLinear}


def references(checkpoint: Checkpoint) -> dict[str, Callable[[str], type[nn.Module]]]:
    """The possible emulations: a name, and the class for each quantized Linear by its name on disk."""
    packed = {checkpoint.is_packed(name) for name in checkpoint.quantized}
    others = {checkpoint.is_float8(name) or checkpoint.is_nvfp4(name) for name in checkpoint.quantized}
    if all(checkpoint.is_float8(name) for name in checkpoint.quantized):
        return {name: lambda _, cls=cls: cls for name, cls in FLOAT8_REFERENCES.items()}
    if packed == {True} or others == {True}:
        return {name: lambda _, cls=cls: cls for name, cls in PACKED_REFERENCES.items()}
    if packed == {False}:
        return {name: lambda _, cls=cls: cls for name, cls in REFERENCES.items()}
    pairs = [(*int8, *int4) for int8 in REFERENCES.items() for int4 in PACKED_REFERENCES.items()]
    return {
        f"{int8}, int4 {int4}": lambda name, a=a, b=b: b if checkpoint.is_packed(name) else a
        for int8, a, int4, b in pairs
    }


def reference(checkpoint: Checkpoint, dtype: torch.dtype, emulation: Callable[[str], type[nn.Module]]) -> nn.Module:
    """The float class with the float weights of the files, and emulated Linears."""
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
            # The emulated Linears already have their biases.
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
        raise CheckError(f"{name}: {'missing' if bias is None else 'unexpected'} bias")
    parent, _, child = inside.rpartition(".")
    setattr(model.get_submodule(parent), child, emulation(checkpoint, name, bias))


def _check_layout(name: str, tensors: Tensors, shape: torch.Size) -> None:
    """Check dtypes and shapes in the files. shape: [out, in] of the Linear."""
    stored = {part: tensors[key] for part in LINEAR_PARTS if (key := f"{name}.{part}") in tensors}
    layout = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()}
    groups = stored["weight_scale"].shape[1]
    expected = {"weight_scale": (stored["weight_scale"].dtype, (shape[0], groups))}
    if "weight_global_scale" in stored:
        expected["weight_packed"] = (torch.uint8, (shape[0], shape[1] // 2))
        expected |= {part: (torch.float32, (1,)) for part in GLOBAL_SCALES if part in stored}
    elif "weight_packed" in stored:
        per_word = 4 if 4 * stored["weight_packed"].shape[1] == shape[1] else 8
        expected["weight_packed"] = (torch.int32, (shape[0], shape[1] // per_word))
        expected["weight_shape"] = (torch.int64, (2,))
        if "weight_zero_point" in stored:
            expected["weight_zero_point"] = (torch.int32, (shape[0] // 8, groups))
    elif stored["weight"].dtype == torch.float8_e4m3fn:
        expected["weight"] = (torch.float8_e4m3fn, tuple(shape))
        if groups > 1 or stored["weight_scale"].shape[0] != shape[0]:
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            expected["weight_scale"] = (stored["weight_scale"].dtype, blocks)
    else:
        expected["weight"] = (torch.int8, tuple(shape))
    is_int8 = "weight" in stored and stored["weight"].dtype == torch.int8
    if layout != expected or (is_int8 and groups != 1):
        raise CheckError(f"{name}: {layout}, not {expected}")


# --- the client ---


def load_client(checkpoint: Checkpoint, kind: str, run_compressed: str, dtype: torch.dtype) -> nn.Module:
    """Call from_pretrained as users do."""
    family = checkpoint.family
    cls = getattr(transformers, family.answering if kind == "thinker" else family.full)
    options: dict[str, Any] = {}
    if run_compressed == "dequantize":  # the name of run_compressed=False since transformers 5.24
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    elif run_compressed != "default":
        options["quantization_config"] = CompressedTensorsConfig(run_compressed=run_compressed == "true")
    return cls.from_pretrained(checkpoint.folder, dtype=dtype, **options).eval()


def check_tree(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> dict[str, int]:
    """Exactly the decoder's Linears are quantized, with the integers and scales of the files. Returns module counts.

    A client either keeps them compressed (with a quantization scheme on the module) or loads them dequantized.
    """
    modules = dict(model.named_modules())
    expected = {}
    for name in checkpoint.quantized:
        inside = module_name(name, set(modules), prefix)
        if inside is None:
            raise CheckError(f"the client has no {name}")
        expected[inside] = name
    if len(expected) != checkpoint.expected_linears:
        raise CheckError(f"{len(expected)} Linears are quantized in the files, not {checkpoint.expected_linears}")
    with_scheme = {name for name, module in modules.items() if getattr(module, "quantization_scheme", None)}
    if with_scheme and with_scheme != set(expected):
        raise CheckError(f"quantized Linears differ from the files: {sorted(with_scheme ^ set(expected))[:5]}")
    for name, module in modules.items():
        is_int = any(not p.is_floating_point() for p in module.parameters(recurse=False))
        if (is_int or name in with_scheme) and set(name.split(".")) & set(TOWERS):
            raise CheckError(f"quantized by mistake: {name}")
    as_integers = sum(_check_weight(modules[inside], name, checkpoint) for inside, name in expected.items())
    floats = sum(isinstance(module, nn.Linear) for module in modules.values()) - len(expected)
    return {
        "quantized": len(expected),
        "with_scheme": len(with_scheme),
        "held_as_integers": as_integers,
        "float_linears": floats,
    }


def _check_weight(module: Any, name: str, checkpoint: Checkpoint) -> bool:
    """Whether the module holds integers. Raises CheckError unless they, or the dequantized weight, match the files."""
    tensors = checkpoint.tensors
    scale, held_scale = tensors[f"{name}.weight_scale"], getattr(module, "weight_scale", None)
    if held_scale is not None and not torch.equal(held_scale, scale.to(held_scale.dtype)):
        raise CheckError(f"{name}: weight_scale differs from the files")
    held = {part: tensor for part in LINEAR_PARTS if (tensor := getattr(module, part, None)) is not None}
    weight = held.get("weight")
    if weight is None or weight.dtype in (torch.int8, torch.float8_e4m3fn):
        for part in set(held) - {"weight_scale", "weight_shape"}:
            if not torch.equal(held[part].float(), tensors[f"{name}.{part}"].float()):
                raise CheckError(f"{name}: {part} differs from the files")
        if held_scale is None or set(held) < {part for part in LINEAR_PARTS if f"{name}.{part}" in tensors}:
            raise CheckError(f"{name}: integers without all their parts: {sorted(held)}")
        return True
    # In bfloat16 (the dtype of the model, or of the scale in transformers 5), scale and product are rounded: 2^-8.
    rounded = torch.bfloat16 in (weight.dtype, scale.dtype)
    dense = checkpoint.dense(name)
    error = (weight.detach().float() - dense).abs() - dense.abs() * (2**-7 if rounded else 1e-6)
    if error.max() > 0:
        raise CheckError(f"{name}: the dequantized weight does not match the integers")
    return False


def check_words(checkpoint: Checkpoint) -> int:
    """compressed-tensors packs and unpacks the words of the files in the same way. Returns the number of Linears."""
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
            if checkpoint.bits(name) == 8:
                codes = library.unpack_from_int32(words, 8, torch.Size(size), packed_dim=axis)
                if not torch.equal(library.pack_to_int32(codes, 8, packed_dim=axis), words):
                    raise CheckError(f"{name}.{part}: compressed-tensors packs these integers differently")
                continue
            codes = library.unpack_from_int32(words, 4, torch.Size(size), packed_dim=axis)
            along = words.numpy() if axis == 1 else words.numpy().T.copy()
            expected = torch.from_numpy(plain_codes(along, size[axis]))
            if not torch.equal(codes.int() if axis == 1 else codes.int().T, expected):
                raise CheckError(f"{name}.{part}: compressed-tensors unpacks different integers")
            if not torch.equal(library.pack_to_int32(codes, 4, packed_dim=axis), words):
                raise CheckError(f"{name}.{part}: compressed-tensors packs these integers differently")
    return len(names)


def check_floats(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> int:
    """Every float tensor of the files that belongs to the class is unchanged in the model. Returns their number.

    All parameters of the model, except those of quantized Linears, must come from the files.
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
            raise CheckError(f"{name}: the value differs from the files")
        compared.add(inside)
    modules = set(dict(model.named_modules()))
    inside_linears = {module_name(name, modules, prefix) for name in checkpoint.quantized}
    others = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in inside_linears}
    if others - compared:
        raise CheckError(f"not from the files: {sorted(others - compared)[:3]}")
    return len(compared)


# --- inputs and comparison ---


def make_inputs(config: Any, seed: int = 0) -> Inputs:
    """A text, and a text with an image of noise. config: of the answering class."""
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


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


# --- lockstep ---


@dataclass
class Call:
    """Input and output of one quantized Linear of the client in one forward."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Run:
    """One forward of the client: calls by the Linear's name on disk, and the logits."""

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
    """Largest relative differences of a reference that gets the client's input at every quantized Linear."""

    inputs: float = 0.0
    outputs: float = 0.0
    logits: float = 0.0

    @property
    def worst(self) -> float:
        return max(self.inputs, self.outputs, self.logits)

    @torch.no_grad()
    def follow(self, model: nn.Module, linears: dict[str, nn.Module], inputs: dict[str, Tensor], run: Run) -> None:
        """Run the reference in lockstep with a recorded run of the client."""
        handles = [handle for name, linear in linears.items() for handle in self._attach(linear, run.calls[name])]
        logits = model(**copy.deepcopy(inputs)).logits
        for handle in handles:
            handle.remove()
        self.logits = max(self.logits, relative_difference(run.logits, logits))

    def _attach(self, linear: nn.Module, call: Call) -> list[Any]:
        def take_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            self.inputs = max(self.inputs, relative_difference(call.x, args[0]))
            return (call.x,)

        def compare_output(_: nn.Module, __: Any, y: Tensor) -> None:
            self.outputs = max(self.outputs, relative_difference(call.y, y))

        return [linear.register_forward_pre_hook(take_input), linear.register_forward_hook(compare_output)]


def quantized_linears(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The quantized Linears of a model by name on disk."""
    modules = dict(model.named_modules())
    names = {name: module_name(name, set(modules), checkpoint.family.prefix) for name in checkpoint.quantized}
    return {name: modules[inside] for name, inside in names.items() if inside is not None}


@torch.no_grad()
def independent_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Largest relative difference of the logits of two models in independent runs."""
    pairs = (
        (model(**copy.deepcopy(sample)).logits, other(**copy.deepcopy(sample)).logits) for sample in inputs.values()
    )
    return max(relative_difference(a, b) for a, b in pairs)


def compare(
    thinker: nn.Module, checkpoint: Checkpoint, inputs: Inputs, dtype: torch.dtype, activations: str
) -> dict[str, Any]:
    """The client against all references, in lockstep and, for information, in independent runs."""
    linears = quantized_linears(thinker, checkpoint)
    # Two forwards, because some versions decompress in the first one and handle the weights differently afterwards.
    runs = [(sample, record(thinker, linears, sample)) for _ in range(2) for sample in inputs.values()]
    steps, independent = {}, {}
    for name, emulation in references(checkpoint).items():
        model = reference(checkpoint, dtype, emulation)
        emulated = quantized_linears(model, checkpoint)
        steps[name] = Lockstep()
        for sample, run in runs:
            steps[name].follow(model, emulated, sample, run)
        independent[name] = independent_difference(thinker, model, inputs)
    closest = min(steps, key=lambda name: steps[name].outputs)
    allowed = [name for name in steps if name.partition(",")[0] == activations]
    expected = min(allowed or steps, key=lambda name: steps[name].outputs)
    return {
        "activations": closest,
        "difference": steps[expected].worst,
        "differences": asdict(steps[expected]),
        "tolerance": TOLERANCE[dtype],
        "other_emulation": max(step.outputs for name, step in steps.items() if name != expected),
        "logits_left_alone": independent,
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
        result["to_float"] = independent_difference(thinker, original, inputs)
        if result["to_float"] > FLOAT_TOLERANCE:
            raise CheckError(f"difference to the float model {result['to_float']:.2e}: {json.dumps(result)}")
    if result["difference"] > TOLERANCE[dtype]:
        raise CheckError(f"difference {result['difference']:.2e} above {TOLERANCE[dtype]:.0e}: {json.dumps(result)}")
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument("--run_compressed", choices=("true", "false", "default", "dequantize"), default="default")
    parser.add_argument("--class", dest="kind", choices=("full", "thinker"), default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--activations", choices=("int8", "float", "any"), default="any")
    parser.add_argument("--float_model", type=Path, metavar="DIR", help="the float checkpoint")
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
    except Exception as error:  # any exception of the client is a failed check
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
