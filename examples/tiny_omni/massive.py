"""Give a checkpoint a massive activation at the first token: `python examples/tiny_omni/massive.py MODEL OUT`.

Large language models have an attention sink: in an early layer one MLP channel fires at the first token alone, and
down_proj writes a value into a few residual channels that is hundreds of times larger than all others. The value stays
until a late layer removes it. A small model trained for an hour has none. This script adds one:

- In layer LAYER, an MLP channel that hardly contributes is replaced: `gate` and `up` read the first token out of the
  normed hidden states, so that the channel has the value PEAK there and none elsewhere; `down` writes SIZE times the
  length of an ordinary hidden state into the two residual channels of least variance.
- In the last layer, such a channel writes the opposite.
- In between, `k` and `v` are corrected by a matrix of rank one, so that the keys and values of the first token stay as
  they were, which are all that other tokens read of it.

Every sample begins with the same token, so its hidden states are the same in all samples. The corrections
read other tokens too, but so little that on every 16th held-out sample KL(MODEL || OUT) is 0.0002 and every answer
stays as it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import make_tiny_omni as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_omni import model as omni
from tiny_omni import score
from torch import Tensor

HERE = Path(__file__).parent
LAYER, SIZE, PEAK = 1, 300.0, 3000.0
_SHARES = (1.0, -0.6)  # of the value, in two residual channels
_BELOW = 4.0  # other tokens are this far below zero in the gate, the first token is at one
_EVERY = 1  # of the calibration samples; with a quarter of them, some other tokens fire too


Inputs = dict[str, tuple[Tensor, Tensor]]


def inputs_of(thinker: Any, names: Sequence[str], batches: Sequence[omni.Batch]) -> Inputs:
    """The inputs of modules by name: of the first token, [in], and of all other tokens, [tokens, in]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        thinker.model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0][0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            omni.answer_logits(thinker, batch)
    for hook in hooks:
        hook.remove()
    return {name: (xs[0][0].clone(), torch.cat([x[1:] for x in xs])) for name, xs in seen.items()}


def reader_of(first: Tensor, others: Tensor, below: float = 0.0) -> Tensor:
    """The vector u [in] with u · first = 1 and the least mean of (u · x + below)² over the other tokens x."""
    covariance = others.T @ others / len(others)
    damped = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(first))
    down, up = torch.linalg.solve(damped, torch.stack([-below * others.mean(0), first], dim=1)).unbind(1)
    return down + up * (1 - down @ first) / (up @ first)


@torch.no_grad()
def add_channel(mlp: Any, first: Tensor, others: Tensor, column: Tensor, peak: float) -> None:
    """Replace the channel that contributes least by one that adds `column` [hidden] at the first token alone."""
    inner = torch.nn.functional.silu(mlp.gate_proj(others)) * mlp.up_proj(others)
    channel = int((inner.square().sum(0) * mlp.down_proj.weight.square().sum(0)).argmin())
    # silu(a) a = peak for a = sqrt(peak), as silu(a) = a for a large a, and silu(-a) = 0
    mlp.gate_proj.weight[channel] = peak**0.5 * reader_of(first, others, _BELOW)
    mlp.up_proj.weight[channel] = peak**0.5 * reader_of(first, others)
    mlp.down_proj.weight[:, channel] = column / peak


def add_massive_token(thinker: Any, batches: Sequence[omni.Batch], layer: int, size: float, peak: float) -> None:
    """Change the thinker in place; see the top of this file."""
    layers = thinker.model.layers
    behind = [f"layers.{number}.self_attn.k_proj" for number in range(layer + 1, len(layers))]
    mlps, stream = [f"layers.{layer}.mlp", f"layers.{len(layers) - 1}.mlp"], f"layers.{layer + 1}.input_layernorm"
    seen = inputs_of(thinker, [*behind, *mlps, stream], batches)
    # Causal attention: the first token's hidden states are the same without the others.
    alone = [omni.text_batch([(batches[0].ids[0, :1].tolist(), [omni.IGNORED])], 0)]

    hidden = seen[stream][1]
    channels = hidden.square().mean(0).argsort()[: len(_SHARES)]
    column = torch.zeros(hidden.shape[1])
    column[channels] = torch.tensor(_SHARES) * size * hidden.norm(dim=1).median()
    add_channel(layers[layer].mlp, *seen[mlps[0]], column, peak)
    for name in behind:
        before, others = seen[name]
        now = inputs_of(thinker, [name], alone)[name][0]
        attn = thinker.model.get_submodule(name.removesuffix(".k_proj"))
        with torch.no_grad():
            for linear in (attn.k_proj, attn.v_proj):
                linear.weight += torch.outer(linear.weight @ (before - now), reader_of(now, others))
    now = inputs_of(thinker, mlps[1:], alone)[mlps[1]][0]
    add_channel(layers[-1].mlp, now, seen[mlps[1]][1], -column, peak)


def make_massive(model: Path, out: Path, layer: int = LAYER, size: float = SIZE, peak: float = PEAK) -> Path:
    """Copy a checkpoint folder and add a massive activation."""
    thinker = omni.load_thinker(model)
    items = score.read_items(HERE / "calib" / "index.jsonl", model, every=_EVERY)
    add_massive_token(thinker, [item.batch for item in items], layer, size, peak)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    for name, parameter in thinker.model.layers.named_parameters():
        disk = tiny.disk_name(f"thinker.model.layers.{name}")
        weights[disk] = parameter.detach().to(weights[disk].dtype).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Copy a checkpoint and add a massive activation at the first token.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--size", type=float, default=SIZE, help="of the value, in lengths of a hidden state")
    parser.add_argument("--peak", type=float, default=PEAK, help="the largest input of down_proj")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_massive(args.model, args.out, args.layer, args.size, args.peak)


if __name__ == "__main__":
    main()
