"""The text of a recipe with int4, 8-bit and float Linears, in few, readable patterns. No torch.

Patterns are exact: among the Linears of the decoder layers, they match the chosen Linears and no others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..numerics import QuantScheme

W4 = QuantScheme(4, None, "gptq", 128)
W8 = QuantScheme(8, 8)
W8A16 = QuantScheme(8, None)
FP8 = QuantScheme(8, 8, number="e4m3")
FLOAT = "FLOAT"

# What stands between int4 and float, by the name of a step on the command line.
STEPS = {"w8a8": W8, "w8a16": W8A16, "fp8": FP8}
DEFAULT_STEPS = ("w8a8",)

# Scheme -> its name in tables.
LABELS = {W4.name: "int4", W8.name: "int8", W8A16.name: "W8A16", FP8.name: "fp8", FLOAT: "float"}

_MOST_WORDS = 4  # of a group in braces

# The question for media without a text, as in the shipped recipes.
DEFAULT_TEXT = "What are the elements can you see and hear in these medias."

_TEXT = """\
{comment}
apiversion: multimodal_vlm_modelslim_v1

metadata:
  config_id: {config_id}

{anchors}
spec:
  process:
{process}
  save:
    - type: compressed_tensors    # the only format that stores several schemes in one checkpoint
      part_file_size: 4           # GB
  dataset: {dataset}
  default_text: {default_text}
  calibration:
    max_pixels: 200704            # 256 visual tokens per image or frame
    modality_weights: tokens
    propagate_error: False        # each layer gets the hidden states of the float model
"""

_INT4 = "int4_g128: &int4_g128 {scope: per_group, dtype: int4, symmetric: True, method: gptq, ext: {group_size: 128}}\n"
_EIGHT_BITS = {
    W8.name: ("int8", "{act: {scope: per_token, dtype: int8}, weight: {scope: per_channel, dtype: int8}}"),
    W8A16.name: ("int8_float", "{weight: {scope: per_channel, dtype: int8}}"),
    FP8.name: ("fp8", "{act: {scope: per_token, dtype: fp8_e4m3}, weight: {scope: per_channel, dtype: fp8_e4m3}}"),
}  # anchor and qconfig


@dataclass(frozen=True)
class Grid:
    """The Linears of all decoder layers.

    layer_prefix: contains {index}. layers: the number of layers. groups: relative names of Linears that share a scheme.
    """

    layer_prefix: str
    layers: int
    groups: tuple[tuple[str, ...], ...]

    def name(self, layer: int, relative: str) -> str:
        return self.layer_prefix.format(index=layer) + relative

    def names(self) -> list[str]:
        return [self.name(i, linear) for i in range(self.layers) for group in self.groups for linear in group]


def patterns(grid: Grid, chosen: Collection[str]) -> list[str]:
    """Shell patterns of the chosen Linears: groups chosen in all layers, then complete layers, then the rest."""
    layers_of = {
        group: [layer for layer in range(grid.layers) if grid.name(layer, group[0]) in chosen] for group in grid.groups
    }
    everywhere = [group for group, layers in layers_of.items() if len(layers) == grid.layers]
    if len(everywhere) == len(grid.groups):
        return [grid.layer_prefix.format(index="*") + "*"]
    result = [grid.layer_prefix.format(index="*") + _braced(group) for group in everywhere]
    rest = [group for group in grid.groups if group not in everywhere]
    complete = [layer for layer in range(grid.layers) if len(rest) > 1 and all(layer in layers_of[g] for g in rest)]
    if complete:
        result.append(_layers_prefix(grid, complete) + "*")
    for group in rest:
        if remaining := [layer for layer in layers_of[group] if layer not in complete]:
            result.append(_layers_prefix(grid, remaining) + _braced(group))
    return result


def _layers_prefix(grid: Grid, layers: Sequence[int]) -> str:
    return grid.layer_prefix.format(index=_braced([str(layer) for layer in layers], shared=False))


def _braced(words: Sequence[str], *, shared: bool = True) -> str:
    """A brace pattern for words: `self_attn.{q,k,v}_proj` for three names; `{1,12}` with shared=False."""
    if len(words) == 1:
        return words[0]
    prefix = _common_prefix(words) if shared else ""
    if shared and len(words) > _MOST_WORDS:  # the experts of a layer; no other Linear has their prefix
        return f"{prefix}*"
    rest = [word.removeprefix(prefix) for word in words]
    suffix = _common_prefix([word[::-1] for word in rest])[::-1] if shared else ""
    return f"{prefix}{{{','.join(word.removesuffix(suffix) for word in rest)}}}{suffix}"


def _common_prefix(words: Sequence[str]) -> str:
    length = 0
    for letters in zip(*words, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return words[0][:length]


def recipe_text(
    grid: Grid, schemes: Mapping[str, str], dataset: str, comment: Sequence[str] = (), config_id: str = "mixed"
) -> str:
    """The text of a recipe that gives every Linear its scheme in `schemes`: the name of W4, of a step, or FLOAT.

    Linears in W8A8 are smoothed; int4 Linears are scaled by AWQ and rounded by GPTQ. Raises ValueError if all are
    float.
    """
    chosen = {name: patterns(grid, [n for n, s in schemes.items() if s == name]) for name in LABELS}
    int4, floats = chosen[W4.name], chosen[FLOAT]
    eights = {name: chosen[name] for name in _EIGHT_BITS if chosen[name]}
    steps = []
    if W8.name in eights:
        steps.append(["type: iter_smooth", "alpha: auto", *_selection(eights[W8.name], [])])
    # int4 Linears are selected by excluding the others, which is usually shorter.
    if int4:
        others = [pattern for own in eights.values() for pattern in own]
        steps.append(["type: awq", "weight_qconfig: *int4_g128", *_selection(["*"], [*others, *floats])])
    steps += [
        ["type: linear_quant", f"qconfig: *{_EIGHT_BITS[name][0]}", *_selection(own, [])]
        for name, own in eights.items()
    ]
    if int4:
        steps.append(["type: linear_quant", "qconfig: {weight: *int4_g128}", *_selection(["*"], floats)])
    if not steps:
        raise ValueError("every Linear stays float")
    return _TEXT.format(
        comment="\n".join(f"# {line}".rstrip() for line in comment or ["A mixed recipe."]),
        config_id=config_id,
        anchors=(_INT4 if int4 else "")
        + "".join(f"{anchor}: &{anchor} {text}\n" for anchor, text in (_EIGHT_BITS[name] for name in eights)),
        process="\n".join(f"    - {step[0]}\n" + "\n".join(f"      {line}" for line in step[1:]) for step in steps),
        dataset=json.dumps(dataset, ensure_ascii=False),
        default_text=DEFAULT_TEXT,
    )


def _selection(include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    return [*_yaml_list("include", include), *(_yaml_list("exclude", exclude) if exclude else [])]


def _yaml_list(key: str, values: Sequence[str]) -> list[str]:
    if len(values) == 1:
        return [f"{key}: [{json.dumps(values[0])}]"]
    return [f"{key}:", *(f"  - {json.dumps(value)}" for value in values)]
