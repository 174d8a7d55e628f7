"""Measure the error of 4-bit checkpoints of the thinker against the float model, on tokens not used for calibration.

    python benchmarks/awq_evaluate.py MODEL TOKENS OUT NAME=WEIGHTS [NAME=WEIGHTS ...]

WEIGHTS is a safetensors file or a folder of them: AWQ GEMM, compressed-tensors pack-quantized, or plain float. They are
unpacked here, without the quantizer's code, and loaded into the float32 model of the installed transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from make_tiny_omni import shim_torchvision

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a packed column holds channel AWQ_ORDER[i] of the eight
ROUND_TO_NEAREST = "round to nearest"


# ------------------------------------------------------------------------------------------ unpacking


def nibbles(packed: Tensor) -> Tensor:
    """Split int32 [..., n] into int32 [..., n, 8] with values 0..15, lowest bits first."""
    return (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 0xF


def unpack_awq(packed: Tensor) -> Tensor:
    """Unpack AWQ GEMM: int32 [rows, out/8] -> [rows, out]."""
    channels = torch.empty(*packed.shape, 8, dtype=torch.int32)
    channels[..., list(AWQ_ORDER)] = nibbles(packed)
    return channels.flatten(1)


def dequantize_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """w = (q - z) * s from int32 [in, out/8], int32 [in/g, out/8] and float [in/g, out] -> float32 [out, in]."""
    q, zeros = unpack_awq(qweight), unpack_awq(qzeros)  # [in, out], [in/g, out]
    group = q.shape[0] // zeros.shape[0]
    zeros, scales = zeros.repeat_interleave(group, 0), scales.float().repeat_interleave(group, 0)
    return ((q - zeros) * scales).t().contiguous()


def dequantize_packed(packed: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Tensor) -> Tensor:
    """w = (q - z) * s from compressed-tensors' pack-quantized int4 -> float32 [out, in].

    packed: int32 [out, in/8], value + 8. scale: [out, in/g]. zero_point: int32 [out/8, in/g], packed along dim 0,
    value + 8; None for symmetric weights.
    """
    rows, columns = shape.tolist()
    q = nibbles(packed).flatten(1)[:, :columns]
    if zero_point is None:
        zeros = torch.full(scale.shape, 8, dtype=torch.int32)
    else:
        zeros = nibbles(zero_point.t().contiguous()).flatten(1)[:, :rows].t()  # [out, in/g]
    group = columns // scale.shape[1]
    return (q - zeros.repeat_interleave(group, 1)) * scale.float().repeat_interleave(group, 1)


def round_to_nearest(weight: Tensor) -> Tensor:
    """Round [out, in] to asymmetric 4-bit per group and dequantize; the range of every group includes 0."""
    groups = weight.unflatten(1, (-1, GROUP))  # [out, in/g, g]
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / 15
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).flatten(1)


def _text_model_prefix(names: list[str]) -> str:
    """Prefix of the thinker's text model in a checkpoint's tensor names."""
    for prefix in ("thinker.model.language_model.", "thinker.model.", "model."):
        if any(name.startswith(prefix) for name in names):
            return prefix
    return ""


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the text model's tensors of a checkpoint as float32, by their names in the model; unpack quantized ones."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    handles: dict[str, Any] = {}  # of the file that holds each tensor
    for file in files:
        handle = safe_open(file, "pt")
        handles.update(dict.fromkeys(handle.keys(), handle))
    prefix = _text_model_prefix(list(handles))

    def read(name: str) -> Tensor:
        return handles[prefix + name].get_tensor(prefix + name)

    names = {name.removeprefix(prefix) for name in handles if name.startswith(prefix)}
    weights = {}
    for name in sorted(names):
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            weights[f"{stem}.weight"] = dequantize_awq(*(read(f"{stem}.{x}") for x in ("qweight", "qzeros", "scales")))
        elif leaf == "weight_packed":
            zero = f"{stem}.weight_zero_point"
            weights[f"{stem}.weight"] = dequantize_packed(
                read(name),
                read(f"{stem}.weight_scale"),
                read(zero) if zero in names else None,
                read(f"{stem}.weight_shape"),
            )
        elif leaf in ("weight", "bias"):
            weights[name] = read(name).float()
    return weights


# ---------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Errors:
    """Errors of a quantized text model.

    hidden: |h - h'| / |h| of the final hidden states. kl: mean KL(float || quantized) of the next token, in nats.
    layer: mean over the layers of |y - y'| / |y|, each layer fed with the float model's input. linears: number of
    Linears whose values differ from the float model's; all of them, if a tool quantized everything.
    """

    hidden: float
    kl: float
    layer: float
    linears: int


def relative_error(measured: Tensor, exact: Tensor) -> float:
    return float((measured - exact).norm() / exact.norm())


class Reference:
    """The float model with its results on the tokens: final states, next-token log-probabilities, layer inputs."""

    def __init__(self, model_path: Path, tokens: Tensor) -> None:
        shim_torchvision()
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
        self.text: nn.Module = getattr(thinker.model, "language_model", thinker.model)
        self.lm_head: nn.Linear = thinker.lm_head
        self.tokens = tokens
        self.weights = {name: value.clone() for name, value in self.text.state_dict().items()}
        self.calls: list[tuple[Any, Any]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True)
            for layer in self.text.layers
        ]
        self.hidden, self.log_probs = self._forward()
        for hook in hooks:
            hook.remove()
        self.layer_outputs = self._layer_outputs()

    def _forward(self) -> tuple[Tensor, Tensor]:
        hidden = self.text(input_ids=self.tokens, use_cache=False).last_hidden_state
        return hidden, self.lm_head(hidden).log_softmax(-1)

    def _layer_outputs(self) -> list[Tensor]:
        outputs = (layer(*args, **kw) for layer, (args, kw) in zip(self.text.layers, self.calls, strict=True))
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    def errors_of(self, weights: dict[str, Tensor]) -> Errors:
        """Errors of the text model with these weights."""
        self.text.load_state_dict(weights)  # strict: a missing or unknown tensor is an error
        hidden, log_probs = self._forward()
        kl = (self.log_probs.exp() * (self.log_probs - log_probs)).sum(-1).mean()
        layers = [relative_error(y, exact) for y, exact in zip(self._layer_outputs(), self.layer_outputs, strict=True)]
        hidden_error = relative_error(hidden, self.hidden)
        return Errors(hidden_error, float(kl), sum(layers) / len(layers), self._count_changed_linears())

    def _count_changed_linears(self) -> int:
        """Number of Linears whose values differ from the float model's."""
        state = self.text.state_dict()
        return sum(
            not torch.equal(state[f"{name}.weight"], self.weights[f"{name}.weight"])
            for name, module in self.text.named_modules()
            if isinstance(module, nn.Linear)
        )

    def rounded_to_nearest(self) -> dict[str, Tensor]:
        """The float weights, with the Linears of the layers rounded to nearest."""
        return {
            name: round_to_nearest(value) if name.endswith("_proj.weight") else value
            for name, value in self.weights.items()
        }


@torch.no_grad()
def evaluate(model: Path, tokens: Tensor, results: dict[str, Path]) -> dict[str, Errors]:
    """Measure the errors of plain rounding and of every result."""
    reference = Reference(model, tokens)
    sources: dict[str, Callable[[], dict[str, Tensor]]] = {ROUND_TO_NEAREST: reference.rounded_to_nearest}
    for name, path in results.items():
        sources[name] = lambda path=path: load_weights(path)
    return {name: reference.errors_of(weights()) for name, weights in sources.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with input_ids [samples, length]")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("results", nargs="*", metavar="NAME=WEIGHTS")
    args = parser.parse_args()
    results = {name: Path(path) for name, _, path in (result.partition("=") for result in args.results)}
    errors = evaluate(args.model, load_file(args.tokens)["input_ids"], results)
    args.out.write_text(json.dumps({name: asdict(e) for name, e in errors.items()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
