"""Damages of a good output: small functions that change a folder, and the finding doctor must report for each.

A damage makes only the change in its name. `Damage.of` names the good output to damage; see `good_outputs` in
test_doctor.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

LAYER = "thinker.model.layers.1."
Q, K, V, O = (f"{LAYER}self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
UP, DOWN = f"{LAYER}mlp.up_proj", f"{LAYER}mlp.down_proj"
NORM = f"{LAYER}input_layernorm.weight"
VISUAL = "thinker.visual.blocks.0.mlp.down_proj"
INDEX, DESCRIPTION = "model.safetensors.index.json", "quant_model_description.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- helpers -------------------------------------------------------------------------------------------------


def weights_file(folder: Path) -> Path:
    return next(f for f in sorted(folder.glob("*.safetensors")))


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    file = weights_file(folder)
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda t: t.update({name: change(t[name].clone())}))


def drop_tensors(matches: Callable[[str], bool]) -> Callable[[Path], None]:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if matches(name)]:
            del tensors[name]

    return lambda folder: change_tensors(folder, drop)


def rename_tensors(new_name: Callable[[str], str]) -> Callable[[Path], None]:
    def rename(tensors: Tensors) -> None:
        renamed = {new_name(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return lambda folder: change_tensors(folder, rename)


def set_value(value: float, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one element, or all elements without a place."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place if place else ...] = value
        return tensor

    return change


def change_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        changed = change(content)
        (folder / name).write_text(json.dumps(content if changed is None else changed), encoding="utf-8")

    return damage


def change_block(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change both copies of quantization_config."""

    def change_both(config: Any) -> None:
        for block in (config["quantization_config"], config["thinker_config"]["quantization_config"]):
            change(block)

    return change_json("config.json", change_both)


def remove_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write_file(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return damage


def truncate(name: str, count: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-count])

    return damage


def apply_all(*damages: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for apply in damages:
            apply(folder)

    return damage


def split_shards(folder: Path) -> None:
    """Split a good output into two files with an index, like outputs of real size."""
    file = weights_file(folder)
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for shard, shard_names in halves.items():
        save_file({name: tensors[name] for name in shard_names}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, shard_names in halves.items() for name in shard_names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def omit_speech(folder: Path) -> None:
    """Make a good thinker-only output: no talker, no token2wav, and speech disabled in config.json."""
    drop_tensors(lambda name: not name.startswith("thinker."))(folder)
    change_json("config.json", lambda c: c.update(enable_audio_output=False))(folder)


# --- nibbles -------------------------------------------------------------------------------------------------


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int32 words to [..., 8] values of 0..15, lowest nibble first."""
    return torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=-1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    packed = torch.zeros(codes.shape[:-1], dtype=torch.int32)
    for i in range(8):
        packed |= (codes[..., i].to(torch.int64) << (4 * i)).to(torch.int32)
    return packed


def reorder_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Reorder the nibbles, as a writer with the wrong order table does."""
    return pack_nibbles(unpack_nibbles(packed)[..., [0, 4, 1, 5, 2, 6, 3, 7]])


def subtract_one(packed: torch.Tensor) -> torch.Tensor:
    return pack_nibbles((unpack_nibbles(packed) - 1) & 15)


def change_matching(
    matches: Callable[[str], bool], change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Path], None]:
    def damage(tensors: Tensors) -> None:
        tensors.update({name: change(tensor) for name, tensor in tensors.items() if matches(name)})

    return lambda folder: change_tensors(folder, damage)


def ends_with(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(suffixes)


# --- longer damages ------------------------------------------------------------------------------------------


def quantize_tower(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        weight = tensors[f"{VISUAL}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[f"{VISUAL}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{VISUAL}.weight_scale"] = scale.to(torch.bfloat16)

    change_tensors(folder, change)


def dequantize(linear: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        scale = tensors.pop(f"{linear}.weight_scale")
        tensors[f"{linear}.weight"] = (tensors[f"{linear}.weight"].float() * scale.float()).to(torch.bfloat16)

    return lambda folder: change_tensors(folder, change)


def swap_q_of_layers(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for suffix in ("weight", "weight_scale"):
            name, other = f"{Q}.{suffix}", f"{Q.replace('.1.', '.2.')}.{suffix}"
            tensors[name], tensors[other] = tensors[other], tensors[name]

    change_tensors(folder, change)


def thinker_only_config(config: Any) -> Any:
    return {**config["thinker_config"], "quantization_config": config["quantization_config"]}


def drop_quantization_configs(config: Any) -> None:
    del config["quantization_config"], config["thinker_config"]["quantization_config"]


def ignore_exact_names(block: dict[str, Any]) -> None:
    """Replace patterns with names on disk, which only transformers 4 matches."""
    modules = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"thinker.visual.blocks.{i}.{module}" for i in range(4) for module in modules]
    names += ["thinker.visual.merger.mlp.0", "thinker.visual.merger.mlp.2"]
    block["ignore"] = [*names, *(entry for entry in block["ignore"] if "visual" not in entry)]


def swap_targets(block: dict[str, Any]) -> None:
    first, second = block["config_groups"].values()
    first["targets"], second["targets"] = second["targets"], first["targets"]


def move_index_entry(index: Any) -> None:
    index["weight_map"][NORM] = SECOND if index["weight_map"][NORM] == FIRST else FIRST


def point_to_absent_shard(index: Any) -> None:
    for name, file in index["weight_map"].items():
        if file == SECOND:
            index["weight_map"][name] = "model-00009-of-00009.safetensors"


def without_keys(matches: Callable[[str], bool]) -> Callable[[Any], Any]:
    return lambda content: {key: value for key, value in content.items() if not matches(key)}


def remove_list_entries(part: str) -> Callable[[dict[str, Any]], None]:
    """Remove the entries of a part from the list of Linears that stay float."""

    def change(block: dict[str, Any]) -> None:
        key = "ignore" if "ignore" in block else "modules_to_not_convert"
        block[key] = [entry for entry in block[key] if part not in entry]

    return change


def group_weights(block: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(block["config_groups"]["group_0"], "weights")


def set_code(code: int, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one FP8 code, or all codes without a place."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[place if place else ...] = code
        return tensor

    return change


def random_codes(tensor: torch.Tensor) -> torch.Tensor:
    return random_integers(tensor).view(torch.uint8).clamp(0, 0x7E).view(torch.float8_e4m3fn)


def double_codes(tensor: torch.Tensor) -> torch.Tensor:
    """Values four times as large, clamped to the largest code, as with scales that are too small."""
    return (tensor.float() * 4).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_integers(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randint(-127, 128, tensor.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def double_odd_rows(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1::2] *= 2
    return tensor


# --- the table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """A test case. of: name of the good output. code: of a required finding. where: must be a part of its `where`."""

    name: str
    of: str
    inflict: Callable[[Path], Any]
    code: str
    where: str
    needs_source: bool = False


DAMAGES = (
    # files and index
    Damage("missing shard", "sharded", remove_file(SECOND), "index_names_absent_shard", SECOND),
    Damage("truncated file", "sharded", truncate(SECOND, 1000), "file_truncated", SECOND),
    Damage("truncated header", "sharded", write_file(SECOND, b"\x00\x20\0\0\0\0\0\0{"), "file_truncated", SECOND),
    Damage("empty file", "sharded", write_file(SECOND, b""), "file_truncated", SECOND),
    Damage("trailing bytes", "ct8", lambda f: weights_file(f).open("ab").write(b"more"), "file_trailing_bytes",
           "model."),
    Damage("random bytes as header", "ct8", write_file("model.safetensors", b"\x10" + 7 * b"\0" + 99 * b"\xff"),
           "file_broken", "model."),
    Damage("index names an absent shard", "sharded", change_json(INDEX, point_to_absent_shard),
           "index_names_absent_shard", "model-00009-of-00009"),
    Damage("tensor listed in the wrong shard", "sharded", change_json(INDEX, move_index_entry), "index_wrong_shard",
           NORM),
    Damage("tensor not listed", "sharded", change_json(INDEX, lambda i: i["weight_map"].pop(NORM) and None),
           "index_lacks_tensor", NORM),
    Damage("listed tensor is missing", "sharded", change_json(INDEX, lambda i: i["weight_map"].update(x=FIRST)),
           "index_names_absent_tensor", "x"),
    Damage("total_size wrong", "sharded", change_json(INDEX, lambda i: i["metadata"].update(total_size=1)),
           "total_size_wrong", "total_size"),
    Damage("unlisted shard", "sharded",
           lambda f: save_file({"extra": torch.ones(2)}, f / "model-00003-of-00003.safetensors"), "shard_unlisted",
           "model-00003"),
    Damage("tensors of another run", "ct8", lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"),
           "tensor_twice", "old.safetensors"),
    Damage("no index", "sharded", remove_file(INDEX), "index_missing", "index"),
    Damage("flat index", "sharded", change_json(INDEX, lambda i: i["weight_map"]), "index_no_weight_map", INDEX),
    Damage("index is not JSON", "sharded", write_file(INDEX, b"{"), "json_broken", INDEX),
    Damage("no weights", "ct8", remove_file("model.safetensors"), "no_weights", ""),
    Damage("leftover .partial", "awq", write_file("model.safetensors.partial", b"x"), "unfinished_run", ".partial"),
    Damage("work folder", "ascend", write_file(".msmodelslim_work/manifest.json", b"{}"), "unfinished_run",
           ".msmodelslim_work"),
    # tensors
    Damage("bias missing", "ct8", drop_tensors(f"{Q}.bias".__eq__), "tensor_missing", f"{Q}.bias"),
    Damage("scales missing", "ct8", drop_tensors(f"{Q}.weight_scale".__eq__), "linear_incomplete", f"{Q}.weight_scale"),
    Damage("zero points missing", "awq", drop_tensors(f"{DOWN}.qzeros".__eq__), "linear_incomplete", f"{DOWN}.qzeros"),
    Damage("offsets missing", "ascend", drop_tensors(f"{UP}.weight_offset".__eq__), "linear_incomplete",
           f"{UP}.weight_offset"),
    Damage("Linear missing", "awq", drop_tensors(lambda n: n.startswith(O + ".")), "tensor_missing", f"{O}.weight"),
    Damage("lm_head missing", "awq", drop_tensors("thinker.lm_head.weight".__eq__), "tensor_missing",
           "thinker.lm_head"),
    Damage("prefix dropped", "ct8", rename_tensors(lambda n: n.removeprefix("thinker.")), "prefix_dropped",
           "audio_tower."),
    Damage("prefix of the layers dropped", "awq",
           rename_tensors(lambda n: n.replace("thinker.model.layers", "model.layers")), "prefix_dropped",
           "model.layers"),
    Damage("names of transformers 5", "ct8",
           rename_tensors(lambda n: n.replace("thinker.visual", "thinker.model.visual")), "tensor_unexpected",
           "thinker.model.visual"),
    Damage("tensor of no module", "ct4", lambda f: change_tensors(f, lambda t: t.update({"thinker.x": torch.ones(2)})),
           "tensor_unexpected", "thinker.x"),
    Damage("talker half missing", "ct8", drop_tensors(lambda n: n.startswith("talker.model.layers.1")),
           "tensor_missing", "talker.model.layers.1"),
    Damage("talker missing", "ct8", drop_tensors(lambda n: n.startswith("talker.")), "part_missing", "talker"),
    Damage("wrong dtype of scales", "awq", change_tensor(f"{Q}.scales", lambda t: t.float()), "tensor_dtype",
           f"{Q}.scales"),
    Damage("wrong dtype of a bias", "ascend", change_tensor(f"{Q}.bias", lambda t: t.bfloat16()), "tensor_dtype",
           f"{Q}.bias"),
    Damage("wrong dtype of integers", "ct8", change_tensor(f"{Q}.weight", lambda t: t.to(torch.int32)), "tensor_dtype",
           Q),
    Damage("wrong shape of a norm", "ct8", change_tensor(NORM, lambda t: t[:-1]), "tensor_shape", NORM),
    Damage("flat scales", "ct8", change_tensor(f"{Q}.weight_scale", lambda t: t.flatten()), "tensor_shape",
           f"{Q}.weight_scale"),
    Damage("transposed scales", "awq", change_tensor(f"{Q}.scales", lambda t: t.t()), "tensor_shape", f"{Q}.scales"),
    Damage("transposed integers", "ct8", change_tensor(f"{UP}.weight", lambda t: t.t()), "tensor_shape",
           f"{UP}.weight"),
    Damage("tower quantized", "ct8", quantize_tower, "tower_quantized", VISUAL),
    Damage("tower quantized, as loaders see it", "ct8", quantize_tower, "loader_expects_float", VISUAL),
    Damage("q quantized, k float", "ct8", dequantize(K), "fused_split", K),
    Damage("float Linear that loaders convert", "ct8", dequantize(DOWN), "loader_expects_quantized", DOWN),
    Damage("NaN in a norm", "awq", change_tensor(NORM, set_value(float("nan"), 0)), "float_not_finite", NORM),
    # scales and integers
    Damage("NaN scale", "ct8", change_tensor(f"{Q}.weight_scale", set_value(float("nan"), 3, 0)), "scale_nan",
           f"{Q}.weight_scale"),
    Damage("Inf scale", "awq", change_tensor(f"{Q}.scales", set_value(float("inf"), 0, 5)), "scale_inf", f"{Q}.scales"),
    Damage("zero scale", "ascend", change_tensor(f"{O}.weight_scale", set_value(0, 3, 0)), "scale_zero",
           f"{O}.weight_scale"),
    Damage("denormal scale", "ascend", change_tensor(f"{O}.weight_scale", set_value(1e-40, 3, 0)), "scale_denormal", O),
    Damage("subnormal scale", "awq", change_tensor(f"{O}.scales", set_value(2.0**-20, 0, 0)), "scale_subnormal",
           f"{O}.scales"),
    Damage("negative scale", "ct4", change_tensor(f"{O}.weight_scale", set_value(-1, 0, 0)), "scale_negative", O),
    Damage("offset not zero", "ascend", change_tensor(f"{O}.weight_offset", set_value(1, 0, 0)), "offset_not_zero", O),
    Damage("all-zero integers", "ct8", change_tensor(f"{V}.weight", set_value(0)), "integers_all_zero", V),
    Damage("constant integers", "ct4", change_tensor(f"{V}.weight_packed", set_value(0x33333333)), "integers_constant",
           V),
    Damage("constant row", "ascend", change_tensor(f"{DOWN}.weight", set_value(7, 4)), "row_constant", DOWN),
    Damage("zero row", "ct8", change_tensor(f"{DOWN}.weight", set_value(0, 4)), "row_zero", DOWN),
    Damage("saturated", "ct8", change_tensor(f"{UP}.weight", lambda t: (t.int() * 4).clamp(-127, 127).to(torch.int8)),
           "saturated", UP),
    Damage("zero points off by one", "awq", change_matching(ends_with(".qzeros"), subtract_one), "zero_point_shifted",
           "thinker.model.layers.0"),
    Damage("one zero point tensor off by one", "ct4", change_tensor(f"{Q}.weight_zero_point", subtract_one),
           "zero_point_shifted", Q),
    Damage("wrong nibble order", "awq", change_matching(ends_with(".qweight"), reorder_nibbles), "zero_point_unrelated",
           "thinker.model.layers.0"),
    Damage("wrong nibble order of zero points", "ct4", change_tensor(f"{UP}.weight_zero_point", reorder_nibbles),
           "zero_point_unrelated", UP),
    Damage("unsigned integers", "ct8", change_tensor(f"{UP}.weight", lambda t: (t.int() // 2 + 64).to(torch.int8)),
           "zero_point_shifted", UP),
    Damage("weight_shape transposed", "ct4", change_tensor(f"{UP}.weight_shape", lambda t: t.flip(0)),
           "weight_shape_wrong", UP),
    Damage("NaN code", "fp8", change_tensor(f"{UP}.weight", set_code(0x7F, 3, 5)), "code_nan", UP),
    Damage("negative NaN code in a block", "fp8 blocks", change_tensor(f"{UP}.weight", set_code(0xFF, 0, 0)),
           "code_nan", UP),
    Damage("all-zero codes", "fp8", change_tensor(f"{V}.weight", set_code(0)), "integers_all_zero", V),
    Damage("constant row of codes", "fp8", change_tensor(f"{DOWN}.weight", set_code(0x30, 4)), "row_constant", DOWN),
    Damage("saturated codes", "fp8", change_tensor(f"{UP}.weight", double_codes), "saturated", UP),
    Damage("int8 in an FP8 checkpoint", "fp8", change_tensor(f"{UP}.weight", lambda t: (t.float() / 4).to(torch.int8)),
           "form_foreign", UP),
    Damage("scales of an FP8 Linear missing", "fp8", drop_tensors(f"{Q}.weight_scale".__eq__), "linear_incomplete", Q),
    Damage("scales per channel in blocks", "fp8 blocks",
           change_tensor(f"{UP}.weight_scale", lambda t: t.repeat_interleave(128, 0)[:, :1]), "form_foreign", UP),
    Damage("a block of scales too few", "fp8 blocks", change_tensor(f"{UP}.weight_scale", lambda t: t[:, :-1]),
           "tensor_shape", UP),
    # config.json
    Damage("FP8 declared as int", "fp8", change_block(lambda b: group_weights(b).update(type="int")), "form_foreign",
           "thinker.model.layers.0"),
    Damage("FP8 with the format of integers", "fp8", change_block(lambda b: b.update(format="int-quantized")),
           "quantization_field", "format"),
    Damage("static FP8 activations", "fp8",
           change_block(lambda b: b["config_groups"]["group_0"]["input_activations"].update(dynamic=False)),
           "quantization_field", "input_activations"),
    Damage("blocks declared as channels", "fp8 blocks",
           change_block(lambda b: group_weights(b).update(strategy="channel")), "form_foreign",
           "thinker.model.layers.0"),
    Damage("global scale missing", "nvfp4", drop_tensors(f"{Q}.weight_global_scale".__eq__), "linear_incomplete",
           f"{Q}.weight_global_scale"),
    Damage("global scale zero", "nvfp4", change_tensor(f"{Q}.weight_global_scale", set_value(0.0, 0)), "scale_zero", Q),
    Damage("NaN block scale", "nvfp4", change_tensor(f"{UP}.weight_scale", set_code(0x7F, 2, 3)), "scale_nan", UP),
    Damage("nibbles of NVFP4 swapped", "nvfp4",
           change_matching(ends_with(".weight_packed"), lambda t: (t >> 4) | (t << 4)), "weight_far",
           "thinker.model.layers.0", needs_source=True),
    Damage("group of NVFP4 wrong", "nvfp4", change_block(lambda b: group_weights(b).update(group_size=32)),
           "quantization_field", "group_size"),
    Damage("scale of an NVFP4 input missing", "nvfp4 act", drop_tensors(f"{Q}.input_global_scale".__eq__),
           "form_foreign", Q),
    Damage("scale of an NVFP4 input negative", "nvfp4 act",
           change_tensor("thinker.model.layers.0.self_attn.o_proj.input_global_scale", lambda t: -t), "scale_negative",
           "o_proj"),
    Damage("scales of the inputs of q and k differ", "nvfp4 act",
           change_tensor(f"{Q}.input_global_scale", lambda t: 2 * t), "fused_scales_differ", "input_global_scale"),
    Damage("global scales of gate and up differ", "nvfp4", change_tensor(f"{UP}.weight_global_scale", lambda t: 2 * t),
           "fused_scales_differ", "weight_global_scale"),
    Damage("NVFP4 inputs declared as fully dynamic", "nvfp4 act",
           change_block(lambda b: b["config_groups"]["group_0"]["input_activations"].update(dynamic=True)),
           "quantization_field", "input_activations"),
    Damage("packed int8 cut to int4", "w8a16", change_tensor(f"{UP}.weight_packed", lambda t: t[:, ::2]),
           "fused_split", UP),
    Damage("weight_shape of packed int8 transposed", "w8a16",
           change_tensor(f"{DOWN}.weight_shape", lambda t: t.flip(0)), "weight_shape_wrong", DOWN),
    Damage("packed int8 declared as int-quantized", "w8a16", change_block(lambda b: b.update(format="int-quantized")),
           "quantization_field", "format"),
    Damage("targets of W8A16 and int4 swapped", "w8a16 and int4", change_block(swap_targets),
           "loader_expects_other_bits", DOWN),
    Damage("W8A16 described as static W8A8", "w8a16 ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{DOWN}.weight": "W8A8"})), "description_wrong_type", DOWN),
    Damage("targets of FP8 and int4 swapped", "fp8 and int4", change_block(swap_targets), "loader_expects_other_bits",
           DOWN),
    Damage("stale quantization_config", "ascend",
           change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
           "quantization_config_stale", "quantization_config"),
    Damage("two quantization methods", "ct8", write_file(DESCRIPTION, b'{"version": "1.0.0"}'),
           "quantization_config_stale", "config.json"),
    Damage("quantization_config only in thinker_config", "ct8",
           change_json("config.json", lambda c: c.pop("quantization_config") and None),
           "quantization_config_only_in_thinker", "thinker_config"),
    Damage("quantization_config only at the top level", "ct8",
           change_json("config.json", lambda c: c["thinker_config"].pop("quantization_config") and None),
           "quantization_config_not_in_thinker", "thinker_config"),
    Damage("two different quantization_configs", "awq",
           change_json("config.json", lambda c: c["quantization_config"].update(group_size=64)),
           "quantization_config_differs", "thinker_config"),
    Damage("quantization_config in text_config", "ct8",
           change_json("config.json", lambda c: c["thinker_config"]["text_config"].update(quantization_config={})),
           "quantization_config_stray", "text_config"),
    Damage("no quantization_config", "awq", change_json("config.json", drop_quantization_configs),
           "quantization_config_missing", "quantization_config"),
    Damage("no quant_method", "awq", change_block(lambda b: b.pop("quant_method")), "quantization_config_no_method",
           "config"),
    Damage("unknown method", "awq", change_block(lambda b: b.update(quant_method="gptq")),
           "quantization_method_unknown", "quant_method"),
    Damage("version gemv", "awq", change_block(lambda b: b.update(version="gemv")), "quantization_field", "version"),
    Damage("thinker-only config", "ct8", change_json("config.json", thinker_only_config), "config_thinker_only",
           "config.json"),
    Damage("unknown architecture", "ct8",
           change_json("config.json", lambda c: c.update(architectures=["Qwen2ForCausalLM"])), "config_architecture",
           "architectures"),
    Damage("vision_config missing", "ct8",
           change_json("config.json", lambda c: c["thinker_config"].pop("vision_config") and None),
           "config_part_missing", "vision_config"),
    Damage("no config.json", "ct8", remove_file("config.json"), "config_missing", "config.json"),
    Damage("config.json truncated", "ct8", truncate("config.json", 9), "json_broken", "config.json"),
    Damage("config of a larger model", "awq",
           change_json("config.json", lambda c: c["thinker_config"]["text_config"].update(intermediate_size=1024)),
           "tensor_shape", "mlp.down_proj"),
    Damage("group_size wrong", "awq", change_block(lambda b: b.update(group_size=64)), "group_size_wrong",
           "group_size"),
    Damage("group_size wrong, ct", "ct4", change_block(lambda b: group_weights(b).update(group_size=32)),
           "group_size_wrong", "group_size"),
    Damage("bits wrong", "awq", change_block(lambda b: b.update(bits=8)), "bits_wrong", "bits"),
    Damage("bits wrong, ct", "ct8", change_block(lambda b: group_weights(b).update(num_bits=4)), "bits_wrong",
           "num_bits"),
    Damage("zero_point false", "awq", change_block(lambda b: b.update(zero_point=False)), "symmetric_wrong",
           "zero_point"),
    Damage("symmetric true", "ct4", change_block(lambda b: group_weights(b).update(symmetric=True)), "symmetric_wrong",
           "symmetric"),
    Damage("asymmetric declared without zero points", "sym4",
           change_block(lambda b: group_weights(b).update(symmetric=False)), "linear_incomplete", "weight_zero_point"),
    # names
    Damage("modules_to_not_convert lacks visual", "awq", change_block(remove_list_entries("visual")),
           "loader_expects_quantized", "thinker.visual"),
    Damage("modules_to_not_convert null", "awq", change_block(lambda b: b.update(modules_to_not_convert=None)),
           "loader_expects_quantized", "talker."),
    Damage("exact names only in ignore", "ct8", change_block(ignore_exact_names), "loader_expects_quantized",
           "thinker.visual.blocks.0"),
    Damage("lm_head not ignored", "ct8", change_block(remove_list_entries("lm_head")), "loader_expects_quantized",
           "thinker.lm_head"),
    Damage("ignore matches everything", "ct8", change_block(lambda b: b["ignore"].append("re:.*")),
           "loader_expects_float", "thinker.model.layers.0"),
    Damage("ignore lists only k", "ct4", change_block(lambda b: b["ignore"].append("re:.*layers.1.self_attn.k_proj")),
           "loader_expects_float", K),
    Damage("malicious pattern", "ct8", change_block(lambda b: b["ignore"].append("re:(.*a+)+$")), "pattern_refused",
           "config"),
    Damage("targets of two groups swapped", "both", change_block(swap_targets), "loader_expects_other_bits", DOWN),
    Damage("wrong format of a group", "both",
           change_block(lambda b: b["config_groups"]["group_0"].update(format="int-quantized")), "quantization_field",
           "config_groups.group_0.format"),
    Damage("description lacks visual", "ascend",
           change_json(DESCRIPTION, without_keys(lambda k: k.startswith("thinker.visual"))),
           "description_missing_entry", "thinker.visual.blocks.0.attn.k.weight"),
    Damage("description says a float Linear is quantized", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{VISUAL}.weight": "W8A8_DYNAMIC"})), "description_wrong_type",
           VISUAL),
    Damage("description says a quantized Linear is float", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{DOWN}.weight": "FLOAT"})), "description_wrong_type", DOWN),
    Damage("description splits q, k, v", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({f"{K}.weight": "FLOAT"})), "fused_split", K),
    Damage("description of W4A16", "ascend", change_json(DESCRIPTION, lambda d: d.update({f"{DOWN}.weight": "W4A16"})),
           "description_unsupported", DOWN),
    Damage("description without prefix", "ascend",
           change_json(DESCRIPTION, lambda d: {k.removeprefix("thinker."): v for k, v in d.items()}),
           "description_missing_entry", "thinker.lm_head"),
    Damage("description of another run", "ascend",
           change_json(DESCRIPTION, lambda d: d.update({"thinker.model.layers.99.mlp.up_proj.weight": "FLOAT"})),
           "description_stale", "layers.99"),
    Damage("no description", "ascend", remove_file(DESCRIPTION), "quantization_config_missing", DESCRIPTION),
    Damage("description is not JSON", "ascend", truncate(DESCRIPTION, 30), "json_broken", DESCRIPTION),
    # companions
    Damage("no spk_dict.pt", "ct8", remove_file("spk_dict.pt"), "spk_dict_missing", "spk_dict.pt"),
    Damage("spk_dict.pt truncated", "ct8", truncate("spk_dict.pt", 5000), "spk_dict_broken", "spk_dict.pt"),
    Damage("no tokenizer", "ct8", apply_all(remove_file("tokenizer.json"), remove_file("vocab.json")),
           "tokenizer_missing", "tokenizer.json"),
    Damage("no processor", "awq", remove_file("preprocessor_config.json"), "processor_missing",
           "preprocessor_config.json"),
    Damage("processor is not JSON", "awq", truncate("preprocessor_config.json", 3), "json_broken",
           "preprocessor_config.json"),
    Damage("no chat template", "awq",
           apply_all(remove_file("chat_template.json"),
                    change_json("tokenizer_config.json", without_keys(ends_with("chat_template")))),
           "chat_template_missing", "chat_template"),
    Damage("no generation_config", "awq", remove_file("generation_config.json"), "generation_config_missing",
           "generation_config"),
    Damage("empty merges", "awq", write_file("merges.txt", b""), "file_empty", "merges.txt"),
    # against the source
    Damage("two Linears swapped", "ct8", swap_q_of_layers, "weight_far", Q, needs_source=True),
    Damage("garbage weights", "ascend", change_tensor(f"{UP}.weight", random_integers), "weight_far", UP,
           needs_source=True),
    Damage("zero points and integers in the wrong order", "awq",
           change_matching(ends_with(".qweight", ".qzeros"), reorder_nibbles), "weight_far", Q, needs_source=True),
    Damage("integers in the wrong order along the input", "sym4",
           change_matching(ends_with(".weight_packed"), reorder_nibbles), "weight_far", Q, needs_source=True),
    Damage("zero points off by one, against the source", "ct4", change_tensor(f"{UP}.weight_zero_point", subtract_one),
           "weight_shifted", UP, needs_source=True),
    Damage("rows shifted by one channel", "ascend",
           change_tensor(f"{Q}.weight", lambda t: set_value(0)(t[:1]) is None or t.roll(1, 0)), "weight_far", Q,
           needs_source=True),
    Damage("random FP8 codes", "fp8", change_tensor(f"{UP}.weight", random_codes), "weight_far", UP,
           needs_source=True),
    Damage("FP8 scaling of v not undone in o", "fp8", change_tensor(f"{V}.weight_scale", double_odd_rows),
           "scaling_inconsistent", O, needs_source=True),
    Damage("one row damaged", "ct8", change_tensor(f"{Q}.weight", lambda t: torch.cat([t[:1].flip(1), t[1:]])),
           "rows_far", Q, needs_source=True),
    Damage("scaling of a norm not folded", "ct8", change_tensor(NORM, lambda t: double_odd_rows(t)),
           "scaling_inconsistent", Q, needs_source=True),
    Damage("v divided, o not multiplied", "ct8", change_tensor(f"{V}.weight_scale", double_odd_rows),
           "scaling_inconsistent", O, needs_source=True),
    Damage("v divided, its bias not", "ct8", change_tensor(f"{V}.bias", double_odd_rows), "scaling_inconsistent",
           f"{V}.bias", needs_source=True),
    Damage("up divided, down not multiplied", "awq",
           change_tensor(f"{UP}.scales", lambda t: double_odd_rows(t.t().clone()).t()), "scaling_inconsistent", DOWN,
           needs_source=True),
    Damage("embedding changed", "ct8", change_tensor("thinker.model.embed_tokens.weight", set_value(1.0, 5, 5)),
           "float_changed", "thinker.model.embed_tokens.weight", needs_source=True),
    Damage("talker changed", "awq", change_tensor("talker.model.norm.weight", set_value(0.5)), "float_changed",
           "talker.model.norm", needs_source=True),
    Damage("q's bias changed", "ascend", change_tensor(f"{Q}.bias", set_value(0.5, 3)), "float_changed", f"{Q}.bias",
           needs_source=True),
    Damage("tower cast to another dtype", "ct8", change_tensor(f"{VISUAL}.weight", lambda t: t.half()),
           "float_dtype_changed", VISUAL, needs_source=True),
    Damage("config changed", "ct8",
           change_json("config.json", lambda c: c["thinker_config"]["text_config"].update(rope_theta=5.0)),
           "source_config_differs", "config.json", needs_source=True),
    Damage("chat template changed", "ct8", write_file("chat_template.json", b'{"chat_template": "x"}'),
           "source_file_differs", "chat_template.json", needs_source=True),
)  # fmt: skip
