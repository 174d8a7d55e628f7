"""Damages of outputs with experts, as in damage.py. `Damage.of` names an output of `quantize_all`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from damage import (
    DESCRIPTION,
    Damage,
    Tensors,
    change_block,
    change_json,
    change_matching,
    change_tensor,
    change_tensors,
    double_odd_rows,
    drop_tensors,
    remove_list_entries,
    rename_tensors,
    set_value,
    without_keys,
)

LAYER = "thinker.model.layers.1."
ROUTER = f"{LAYER}mlp.gate"
EXPERTS = f"{LAYER}mlp.experts."
VISUAL = "thinker.visual.blocks.0.attn.qkv"
TALKER_EXPERT = "talker.model.layers.1.mlp.experts.3.up_proj.weight"
HIGH = re.compile(rf"{re.escape(EXPERTS)}[4-7]\.")  # the second half of the experts


def expert(number: int, leaf: str) -> str:
    return f"{EXPERTS}{number}.{leaf}_proj"


def quantize(linear: str, suffix_of_offset: str = "") -> Callable[[Path], None]:
    """Round a float Linear to int8, with the tensors of compressed-tensors or of vLLM-Ascend."""

    def change(tensors: Tensors) -> None:
        weight = tensors[f"{linear}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"{linear}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{linear}.weight_scale"] = scale if suffix_of_offset else scale.to(torch.bfloat16)
        if suffix_of_offset:
            tensors[f"{linear}.{suffix_of_offset}"] = torch.zeros_like(scale)

    return lambda folder: change_tensors(folder, change)


def leave_float(number: int) -> Callable[[Path], None]:
    """Store the Linears of one expert as floats."""

    def change(tensors: Tensors) -> None:
        for name in (expert(number, leaf) for leaf in ("gate", "up", "down")):
            scale = tensors.pop(f"{name}.weight_scale")
            tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].float() * scale.float()).to(torch.bfloat16)

    return lambda folder: change_tensors(folder, change)


def swap(first: str, second: str) -> Callable[[Path], None]:
    """Swap all tensors of two Linears, or of two experts."""

    def new_name(name: str) -> str:
        for old, new in ((first, second), (second, first)):
            if name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return name

    return rename_tensors(new_name)


def count_from_one(name: str) -> str:
    pattern = re.escape(EXPERTS) + r"(\d)"
    return re.sub(pattern, lambda match: f"{EXPERTS}{int(match[1]) + 1}", name)


def fuse(tensors: Tensors) -> None:
    """One tensor for the down_proj of all experts, as another family stores them."""
    parts = [tensors.pop(f"{expert(number, 'down')}.weight") for number in range(8)]
    for number in range(8):
        del tensors[f"{expert(number, 'down')}.weight_scale"]
    tensors[f"{EXPERTS}down_proj"] = torch.stack(parts)


def regroup(tensors: Tensors) -> None:
    """Give one Linear half as many groups: the first scale of every two."""
    name = f"{expert(3, 'gate')}.weight_scale"
    tensors[name] = tensors[name][:, ::2].contiguous()


def replace_entry(entry: str, other: str) -> Callable[[Path], None]:
    return change_block(lambda block: block.update(ignore=[other if e == entry else e for e in block["ignore"]]))


def is_in(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


EXPERT_DAMAGES = (
    # routers
    Damage("router int8", "int8", quantize(ROUTER), "router_quantized", ROUTER),
    Damage("router int8 for Ascend", "ascend", quantize(ROUTER, "weight_offset"), "router_quantized", ROUTER),
    Damage("router missing", "int8", drop_tensors(is_in(f"{ROUTER}.")), "tensor_missing", f"{ROUTER}.weight"),
    Damage("router NaN", "awq", change_tensor(f"{ROUTER}.weight", set_value(float("nan"), 3, 5)), "float_not_finite",
           ROUTER),
    Damage("router not in ignore", "int8", change_block(remove_list_entries("mlp")), "loader_expects_quantized",
           "mlp.gate"),
    Damage("router not in AutoAWQ's list", "awq", change_block(remove_list_entries("mlp.gate")),
           "loader_expects_quantized", "mlp.gate"),
    Damage("pattern of routers for vLLM alone", "symmetric",
           replace_entry(r"re:.*mlp\.gate$", r"re:language_model.*mlp\.gate$"), "loader_expects_quantized", "mlp.gate"),
    Damage("router described as int8", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{ROUTER}.weight": "W8A8_DYNAMIC"})), "description_wrong_type",
           ROUTER),
    Damage("router without a line", "ascend", change_json(DESCRIPTION, lambda d: d.pop(f"{ROUTER}.weight") and None),
           "description_missing_entry", ROUTER),
    # experts
    Damage("an expert missing", "int8", drop_tensors(is_in(f"{EXPERTS}5.")), "experts_incomplete", EXPERTS),
    Damage("half of the experts missing", "symmetric", drop_tensors(lambda n: bool(HIGH.match(n))),
           "experts_incomplete", EXPERTS),
    Damage("an expert without scales", "ascend", drop_tensors(f"{expert(7, 'down')}.weight_scale".__eq__),
           "linear_incomplete", expert(7, "down")),
    Damage("an expert without zero points", "awq", drop_tensors(f"{expert(2, 'up')}.qzeros".__eq__),
           "linear_incomplete", expert(2, "up")),
    Damage("half of the experts never written", "int8",
           change_matching(lambda n: bool(HIGH.match(n)), torch.zeros_like), "scale_zero", f"{EXPERTS}4"),
    Damage("an expert of zeros", "symmetric",
           change_tensor(f"{expert(6, 'gate')}.weight_packed", lambda t: torch.full_like(t, -2004318072)),
           "integers_all_zero", expert(6, "gate")),
    Damage("NaN scale of an expert", "int8", change_tensor(f"{expert(7, 'down')}.weight_scale",
           set_value(float("nan"), 0, 0)), "scale_nan", expert(7, "down")),
    Damage("NaN scale of an expert, int4", "awq", change_tensor(f"{expert(1, 'gate')}.scales",
           set_value(float("nan"), 0, 0)), "scale_nan", expert(1, "gate")),
    Damage("infinite scale of an expert", "ascend", change_tensor(f"{expert(0, 'up')}.weight_scale",
           set_value(float("inf"), 3, 0)), "scale_inf", expert(0, "up")),
    Damage("an expert float", "int8", leave_float(5), "experts_differ", f"{EXPERTS}5"),
    Damage("expert 0 float", "int8", leave_float(0), "experts_differ", f"{EXPERTS}1"),
    Damage("an expert in other groups", "symmetric", lambda f: change_tensors(f, regroup), "experts_differ",
           expert(3, "gate")),
    Damage("experts in one tensor", "int8", lambda f: change_tensors(f, fuse), "experts_incomplete", EXPERTS),
    Damage("experts counted from one", "awq", rename_tensors(count_from_one), "experts_incomplete", EXPERTS),
    Damage("more experts in config.json", "int8", change_json("config.json", lambda c: c["thinker_config"][
           "text_config"].update(num_experts=16)), "experts_incomplete", "mlp.experts."),
    Damage("an expert in ignore", "int8", change_block(lambda b: b["ignore"].append(expert(3, "down"))),
           "loader_expects_float", expert(3, "down")),
    Damage("an expert without a line", "ascend",
           change_json(DESCRIPTION, without_keys(is_in(f"{expert(3, 'gate')}.weight"))), "description_missing_entry",
           expert(3, "gate")),
    Damage("up of an expert described as float", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{expert(0, 'up')}.weight": "FLOAT"})), "fused_split",
           expert(0, "up")),
    # what stays float
    Damage("talker not in ignore", "int8", change_block(remove_list_entries("talker")), "loader_expects_quantized",
           "talker."),
    Damage("an expert of the talker missing", "awq", drop_tensors(TALKER_EXPERT.__eq__), "tensor_missing",
           TALKER_EXPERT),
    Damage("DeepStack merger missing", "int8", drop_tensors(is_in("thinker.visual.merger_list.1.")), "tensor_missing",
           "thinker.visual.merger_list.1"),
    Damage("tower int8", "int8", quantize(VISUAL), "tower_quantized", VISUAL),
    Damage("tower without a line", "ascend", change_json(DESCRIPTION, lambda d: d.pop(f"{VISUAL}.weight") and None),
           "description_missing_entry", VISUAL),
    Damage("lm_head without a line", "ascend",
           change_json(DESCRIPTION, lambda d: d.pop("thinker.lm_head.weight") and None), "description_missing_entry",
           "thinker.lm_head"),
    # against the source
    Damage("router changed", "awq", change_tensor(f"{ROUTER}.weight", set_value(1.0, 3, 5)), "float_changed", ROUTER,
           needs_source=True),
    Damage("routers of two experts swapped", "int8", change_tensor(f"{ROUTER}.weight", lambda t: t.flip(0)),
           "float_changed", ROUTER, needs_source=True),
    Damage("norm in front of the experts scaled, router not", "int8",
           change_tensor(f"{LAYER}post_attention_layernorm.weight", set_value(64.0, 9)), "scaling_inconsistent", ROUTER,
           needs_source=True),
    Damage("two experts swapped", "int8", swap(f"{EXPERTS}2", f"{EXPERTS}3"), "weight_far", expert(2, "up"),
           needs_source=True),
    Damage("gate and up of an expert swapped", "symmetric", swap(expert(4, "gate"), expert(4, "up")), "weight_far",
           expert(4, "up"), needs_source=True),
    Damage("up of an expert divided, down not multiplied", "int8",
           change_tensor(f"{expert(6, 'up')}.weight_scale", double_odd_rows), "scaling_inconsistent",
           expert(6, "down"), needs_source=True),
)  # fmt: skip
