"""The quantization that a checkpoint declares, in config.json or in msModelSlim's description file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Names of a longer list are ignored beyond this number.
MAX_ENTRIES = 5_000


@dataclass(frozen=True)
class DeclaredGroup:
    """A config group of compressed-tensors: its bits, its form (linears.py), and the targets that select its Linears.

    bits and form are None if the group does not declare them.
    """

    bits: int | None
    form: str | None
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Declared:
    """The declared quantization; None means not declared.

    format: awq, compressed-tensors, bitsandbytes, ascend, the name of another method, or empty.
    entries: names of Linears that stay float (modules_to_not_convert, llm_int8_skip_modules, ignore); None without a
    list. groups: of compressed-tensors. If they have different bits, bits is None; group_size, grouped and symmetric
    come from the first group with strategy `group`. nested: whether bitsandbytes' scales are quantized to 8 bits.
    where, bits_key, symmetric_key: keys of config.json that findings name.
    """

    format: str
    bits: int | None = None
    group_size: int | None = None
    grouped: bool = False
    symmetric: bool | None = None
    entries: tuple[str, ...] | None = None
    groups: tuple[DeclaredGroup, ...] = ()
    nested: bool | None = None
    where: str = "quantization_config"
    bits_key: str = "bits"
    symmetric_key: str = "symmetric"


def declared_quantization(block: Any, has_description: bool, stored: set[str]) -> Declared:
    """Parse the declared quantization.

    block: quantization_config of config.json. stored: suffixes of the tensors; the format is guessed from them if block
    is not an object.
    """
    if has_description:
        return Declared("ascend")
    if not isinstance(block, dict):
        return Declared(_guess_format(stored))
    method = block.get("quant_method")
    if method == "awq":
        return _declared_awq(block)
    if method == "compressed-tensors":
        return _declared_compressed(block)
    if method == "bitsandbytes":
        return _declared_bitsandbytes(block)
    return Declared(str(method)[:60] if method else "")


def _guess_format(stored: set[str]) -> str:
    if stored & {"qweight", "qzeros"}:
        return "awq"
    if "weight.absmax" in stored:
        return "bitsandbytes"
    if stored & {"weight_offset", "deq_scale"}:
        return "ascend"
    return "compressed-tensors" if stored & {"weight_packed", "weight_scale"} else ""


def _declared_awq(block: dict[str, Any]) -> Declared:
    zero_point = block.get("zero_point")
    return Declared(
        "awq",
        bits=integer(block.get("bits", block.get("w_bit"))),
        group_size=integer(block.get("group_size", block.get("q_group_size"))),
        grouped=True,
        symmetric=not zero_point if isinstance(zero_point, bool) else None,
        entries=_name_list(block.get("modules_to_not_convert")),
        symmetric_key="zero_point",
    )


def _declared_compressed(block: dict[str, Any]) -> Declared:
    groups = config_groups(block)
    all_weights = [w if isinstance(w := group.get("weights"), dict) else {} for group in groups.values()] or [{}]
    weights = next((w for w in all_weights if w.get("strategy") == "group"), all_weights[0])
    symmetric = weights.get("symmetric")
    bits = [integer(w.get("num_bits")) for w in all_weights]
    targets = [_name_list(group.get("targets")) or () for group in groups.values()]
    return Declared(
        "compressed-tensors",
        bits=bits[0] if len(set(bits)) == 1 else None,
        group_size=integer(weights.get("group_size")),
        grouped=weights.get("strategy") == "group",
        symmetric=symmetric if isinstance(symmetric, bool) else None,
        entries=_name_list(block.get("ignore")) or (),
        groups=tuple(map(DeclaredGroup, bits, map(_declared_form, groups.values()), targets)),
        where="quantization_config.config_groups.*.weights",
        bits_key="num_bits",
    )


def _declared_form(group: dict[str, Any]) -> str | None:
    """The form of the Linears that a config group declares, see linears.FORMS."""
    weights = weights if isinstance(weights := group.get("weights"), dict) else {}
    if weights.get("type") == "float" and weights.get("num_bits") == 4:
        return "nvfp4"
    if weights.get("type") == "float":
        return "float8_block" if weights.get("strategy") == "block" else "float8"
    int8 = "int8" if group.get("input_activations") else "packed8"
    return {4: "packed", 8: int8}.get(integer(weights.get("num_bits")) or 0)


def _declared_bitsandbytes(block: dict[str, Any]) -> Declared:
    return Declared(
        "bitsandbytes",
        bits=4 if block.get("load_in_4bit") is True else 8 if block.get("load_in_8bit") is True else None,
        entries=_name_list(block.get("llm_int8_skip_modules")),
        nested=block.get("bnb_4bit_use_double_quant") is True,
        bits_key="load_in_4bit",
    )


def config_groups(block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config groups of compressed-tensors, without those that are not objects."""
    groups = block.get("config_groups")
    return {k: v for k, v in groups.items() if isinstance(v, dict)} if isinstance(groups, dict) else {}


def integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _name_list(value: Any) -> tuple[str, ...] | None:
    """Return the non-empty strings of a list; None if the value is not a list or has no such string."""
    if not isinstance(value, list):
        return None
    return tuple(entry for entry in value[:MAX_ENTRIES] if isinstance(entry, str) and entry) or None
