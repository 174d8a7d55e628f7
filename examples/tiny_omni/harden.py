"""Add outlier channels to a checkpoint without changing its function: `python examples/tiny_omni/harden.py MODEL OUT`.

Large models have a few activation channels that are many times larger than the rest; a small model trained for an hour
has none. In every decoder layer, this script multiplies some channels by 16 or 32, and divides the weights that read
them by the same factor:

- outputs of both norms: norm weights are multiplied, columns of q, k, v or of gate, up are divided; in a layer with
  experts, those of all experts and of the router
- values of the attention: rows and bias of v are multiplied, columns of o are divided
- inner activation of the MLP, or of every expert: rows of up are multiplied, columns of down are divided

The factors are powers of two, so every weight stays exact in bfloat16 and the logits stay the same to the last bit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from make_tiny_omni import outlier_gains
from safetensors.torch import load_file, save_file
from torch import Tensor


def harden(weights: dict[str, Tensor], heads: int, kv_heads: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with outlier channels added to every decoder layer of the thinker."""
    result = dict(weights)

    def scale(name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        value = result[name].float()
        if rows is not None:
            value = value * rows.reshape(-1, *[1] * (value.ndim - 1))
        if columns is not None:
            value = value / columns
        result[name] = value.to(weights[name].dtype)

    layers = sorted({match[0] for name in weights if (match := re.match(r"thinker\.model\.layers\.\d+\.", name))})
    for layer in layers:
        attn, mlp = f"{layer}self_attn.", f"{layer}mlp."
        hidden = weights[f"{layer}input_layernorm.weight"].shape[0]
        values = weights[f"{attn}v_proj.weight"].shape[0]
        ups = [name for name in weights if name.startswith(mlp) and name.endswith("up_proj.weight")]
        gates = [name.replace("up_proj", "gate_proj") for name in ups]
        routers = [name for name in (f"{mlp}gate.weight",) if name in weights]
        for norm, readers in (
            ("input_layernorm", [f"{attn}{name}_proj.weight" for name in "qkv"]),
            ("post_attention_layernorm", [*routers, *gates, *ups]),
        ):
            gains = outlier_gains(f"{layer}{norm}", hidden, seed)
            scale(f"{layer}{norm}.weight", rows=gains)
            for reader in readers:
                scale(reader, columns=gains)
        gains = outlier_gains(f"{layer}values", values, seed)
        scale(f"{attn}v_proj.weight", rows=gains)
        if f"{attn}v_proj.bias" in weights:
            scale(f"{attn}v_proj.bias", rows=gains)
        # heads / kv_heads heads of o read each head of v.
        shared = gains.reshape(kv_heads, 1, -1).expand(-1, heads // kv_heads, -1).reshape(-1)
        scale(f"{attn}o_proj.weight", columns=shared)
        for up in ups:
            expert = up.removeprefix(mlp).removesuffix("up_proj.weight")  # empty for a dense MLP
            gains = outlier_gains(f"{layer}inner{expert}", weights[up].shape[0], seed)
            scale(up, rows=gains)
            scale(up.replace("up_proj", "down_proj"), columns=gains)
    return result


def harden_checkpoint(model: Path, out: Path, seed: int = 0) -> None:
    """Copy a checkpoint folder and add outlier channels."""
    text = json.loads((model / "config.json").read_text(encoding="utf-8"))["thinker_config"]["text_config"]
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    weights = load_file(model / "model.safetensors")
    hardened = harden(weights, text["num_attention_heads"], text["num_key_value_heads"], seed)
    save_file(hardened, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Copy a checkpoint and add outlier channels.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    harden_checkpoint(args.model, args.out, args.seed)


if __name__ == "__main__":
    main()
