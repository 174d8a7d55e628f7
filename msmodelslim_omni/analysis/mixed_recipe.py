"""The text of a recipe in which some Linears are int4, some int8 and some float: few and readable patterns. No torch.

Patterns are exact: over the Linears of the decoder layers they match what they stand for and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..numerics import QuantScheme

W4 = QuantScheme(4, None, "gptq", 128)
W8 = QuantScheme(8, 8)
FLOAT = "FLOAT"

# What is asked about media that come without a text, as in the shipped recipes.
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
    - type: compressed_tensors    # the one format that holds int4 and int8 beside each other
      part_file_size: 4           # GB
  dataset: {dataset}
  default_text: {default_text}
  calibration:
    max_pixels: 200704            # 256 visual tokens an image or frame
    modality_weights: tokens
    propagate_error: False        # each layer sees the float model's hidden states
"""

_INT4 = "int4_g128: &int4_g128 {scope: per_group, dtype: int4, symmetric: True, method: gptq, ext: {group_size: 128}}\n"
_INT8 = "int8: &int8 {act: {scope: per_token, dtype: int8}, weight: {scope: per_channel, dtype: int8}}\n"


@dataclass(frozen=True)
class Grid:
    """The Linears of all decoder layers: the layers' prefix with {index}, how many there are, and the groups of
    relative names that share a scheme.
    """

    layer_prefix: str
    layers: int
    groups: tuple[tuple[str, ...], ...]

    def name(self, layer: int, relative: str) -> str:
        return self.layer_prefix.format(index=layer) + relative

    def names(self) -> list[str]:
        return [self.name(i, linear) for i in range(self.layers) for group in self.groups for linear in group]


def patterns(grid: Grid, chosen: Collection[str]) -> list[str]:
    """Shell patterns of the chosen Linears: groups that are chosen in all layers first, whole layers, then the rest."""
    layers_of = {
        group: [layer for layer in range(grid.layers) if grid.name(layer, group[0]) in chosen] for group in grid.groups
    }
    everywhere = [group for group, layers in layers_of.items() if len(layers) == grid.layers]
    if len(everywhere) == len(grid.groups):
        return [grid.layer_prefix.format(index="*") + "*"]
    found = [grid.layer_prefix.format(index="*") + _braced(group) for group in everywhere]
    rest = [group for group in grid.groups if group not in everywhere]
    whole = [layer for layer in range(grid.layers) if len(rest) > 1 and all(layer in layers_of[g] for g in rest)]
    if whole:
        found.append(_of_layers(grid, whole) + "*")
    for group in rest:
        if some := [layer for layer in layers_of[group] if layer not in whole]:
            found.append(_of_layers(grid, some) + _braced(group))
    return found


def _of_layers(grid: Grid, layers: Sequence[int]) -> str:
    return grid.layer_prefix.format(index=_braced([str(layer) for layer in layers], shared=False))


def _braced(words: Sequence[str], *, shared: bool = True) -> str:
    """`self_attn.{q,k,v}_proj` of three names; `{1,12}` where no shared letters are to be taken out."""
    if len(words) == 1:
        return words[0]
    prefix = _beginning(words) if shared else ""
    rest = [word.removeprefix(prefix) for word in words]
    suffix = _beginning([word[::-1] for word in rest])[::-1] if shared else ""
    return f"{prefix}{{{','.join(word.removesuffix(suffix) for word in rest)}}}{suffix}"


def _beginning(words: Sequence[str]) -> str:
    """The letters that all words begin with."""
    length = 0
    for letters in zip(*words, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return words[0][:length]


def recipe_text(
    grid: Grid, schemes: Mapping[str, str], dataset: str, comment: Sequence[str] = (), config_id: str = "mixed"
) -> str:
    """A recipe by which every Linear gets the scheme that `schemes` names, W4.name, W8.name or FLOAT.

    int8 Linears are smoothed, int4 ones scaled by AWQ and rounded by GPTQ. Raises ValueError where all stay float.
    """
    int4, int8 = (patterns(grid, [n for n, s in schemes.items() if s == scheme.name]) for scheme in (W4, W8))
    floats = patterns(grid, [n for n, s in schemes.items() if s == FLOAT])
    steps = []
    if int8:
        steps.append(["type: iter_smooth", "alpha: auto", *_selection(int8, [])])
    # int4 is what is left over by the others, which is shorter to say.
    if int4:
        steps.append(["type: awq", "weight_qconfig: *int4_g128", *_selection(["*"], [*int8, *floats])])
    if int8:
        steps.append(["type: linear_quant", "qconfig: *int8", *_selection(int8, [])])
    if int4:
        steps.append(["type: linear_quant", "qconfig: {weight: *int4_g128}", *_selection(["*"], floats)])
    if not steps:
        raise ValueError("every Linear stays float")
    return _TEXT.format(
        comment="\n".join(f"# {line}".rstrip() for line in comment or ["A mixed recipe."]),
        config_id=config_id,
        anchors=(_INT4 if int4 else "") + (_INT8 if int8 else ""),
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
