"""Which Linears each loader takes for quantized: its own rule, over every Linear of the real model tree.

The tree is the whole model's (thinker, talker, token2wav) as the installed transformers builds it; names of the other
transformers version and of vLLM are derived from the names on disk. compressed-tensors' rule over the tiny model is in
tests/formats/test_formats.py; the renamings are in loaders.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from loaders import LOADERS, full_class, full_class_5, is_ignored, thinker_class, thinker_class_5, to_disk, vllm
from make_tiny_omni import TINY, omni_config

from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.formats.job import OutLinear, OutputJob
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.models.torchvision_shim import ensure_torchvision_imports
from msmodelslim_omni.numerics.scheme import QuantScheme

Rename = Callable[[str], list[str]]
# A loader's answer: the Linears, by name on disk, that it takes for quantized.
Rule = Callable[[list[str], list[str]], set[str]]

SPEC = MODEL_TYPES["Qwen2.5-Omni-7B"]
ASYM = QuantScheme(4, None, group_size=128, symmetric=False)
LAYERS = 12  # so that `layers.1` begins the name of layers 10 and 11
DECODER = "thinker.model.layers."


@pytest.fixture(scope="module")
def linears() -> list[str]:
    """Names on disk of all Linears of the whole model."""
    ensure_torchvision_imports()
    import transformers

    config = transformers.Qwen2_5OmniConfig.from_dict(omni_config(TINY.with_layers(LAYERS), "bfloat16"))
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    names = [to_disk(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts >= {"thinker.visual", "thinker.audio_tower", "thinker.lm_head", "talker.model"}
    assert any(name.startswith("token2wav.") for name in names)
    assert sum(name.startswith(DECODER) for name in names) == 7 * LAYERS
    return names


def output_job(linears: list[str], floats: tuple[str, ...]) -> OutputJob:
    def unread() -> torch.Tensor:
        raise AssertionError("names only")

    quantized = [name for name in linears if name.startswith(DECODER) and name not in floats]
    items = tuple(OutLinear(name, ASYM, (128, 128), "BF16", unread, unread, unread) for name in quantized)
    return OutputJob(items, floats, SPEC.ignore_patterns, SPEC.config_paths, {}, Path(), ())


def layer(index: int, *inner: str) -> tuple[str, ...]:
    return tuple(f"{DECODER}{index}.{name}" for name in inner)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Linears that a recipe leaves float; vLLM's fused ones only together, which the plan sees to.
NOTHING: tuple[str, ...] = ()
EVERYWHERE = tuple(name for index in range(LAYERS) for name in layer(index, "mlp.down_proj", *QKV))
SOMEWHERE = (
    *layer(1, "mlp.down_proj"),
    *layer(2, *QKV),
    *layer(3, *GATE_UP, "self_attn.o_proj"),
    *layer(11, "self_attn.o_proj"),
)
BOTH = (*EVERYWHERE, *layer(1, "self_attn.o_proj"), *layer(0, *GATE_UP))
FLOATS = {"nothing": NOTHING, "everywhere": EVERYWHERE, "somewhere": SOMEWHERE, "both": BOTH}


# --- awq: modules_to_not_convert -------------------------------------------------------------------------------


def has_substring(name: str, entries: Iterable[str]) -> bool:
    return any(entry in name for entry in entries)


def autoawq(linears: list[str], entries: list[str]) -> set[str]:
    """AutoAWQ 0.2.9, models/base.py, _load_quantized_modules: names within a decoder layer, no other module."""
    inner = {name: name.removeprefix(DECODER).partition(".")[2] for name in linears if name.startswith(DECODER)}
    return {name for name, relative in inner.items() if not has_substring(relative, entries)}


def over(rename: Rename, is_skipped: Callable[[str, list[str]], bool]) -> Rule:
    """A rule that asks for every Linear of a class by its name there."""
    return lambda linears, entries: {
        disk for disk in linears if any(not is_skipped(name, entries) for name in rename(disk))
    }


def skipped_by_5(name: str, entries: list[str]) -> bool:
    """transformers 5.23, quantizers_utils.py, should_convert_module: the start up to a dot, the whole, or the end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{entry}){boundary}", name) or name.endswith(entry) for entry in entries)


def skipped_by_early_5(name: str, entries: list[str]) -> bool:
    """transformers 5.0, the same without the boundary."""
    return any(re.match(entry, name) or name.endswith(entry) for entry in entries)


VLLM_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_modules(linears: list[str]) -> dict[str, list[str]]:
    """Names of vLLM's Linear modules, fused ones included, and the Linears on disk that each is made of."""
    modules: dict[str, list[str]] = {}
    for disk in linears:
        for name in vllm(disk):
            name = re.sub(r"\b(gate|up)_proj$", "gate_up_proj", re.sub(r"\b[qkv]_proj$", "qkv_proj", name))
            name = re.sub(r"^(visual\..*\.attn)\.[qkv]$", r"\1.qkv", name)
            modules.setdefault(name, []).append(disk)
    return modules


def vllm_entries(entries: list[str]) -> list[str]:
    """The list as vLLM's mapper of Qwen2.5-Omni hands it on (qwen2_5_omni_thinker.py, hf_to_vllm_mapper)."""
    mapped = []
    for entry in entries:
        if entry.startswith(("talker.", "token2wav.")):
            continue
        for theirs, ours in (
            ("thinker.lm_head.", "language_model.lm_head."),
            ("thinker.model.", "language_model.model."),
            ("thinker.", ""),
        ):
            if entry.startswith(theirs):
                entry = ours + entry.removeprefix(theirs)
                break
        mapped.append(entry)
    return mapped


def vllm_awq(linears: list[str], entries: list[str]) -> set[str]:
    """vLLM, quant_utils.py, is_layer_skipped: a substring; the parts of a fused module are asked for and must agree."""
    entries, taken = vllm_entries(entries), set()
    for module, members in vllm_modules(linears).items():
        prefix, _, last = module.rpartition(".")
        answers = {has_substring(f"{prefix}.{part}", entries) for part in VLLM_FUSED.get(last, (last,))}
        assert len(answers) == 1, f"{module}: some but not all parts are float"
        if answers == {False}:
            taken |= set(members)
    return taken


AWQ_RULES: dict[str, Rule] = {
    "autoawq": autoawq,
    "transformers 4, full class": over(full_class, has_substring),
    "transformers 4, thinker class": over(thinker_class, has_substring),
    "transformers 5, full class": over(full_class_5, skipped_by_5),
    "transformers 5, thinker class": over(thinker_class_5, skipped_by_5),
    "transformers 5.0, full class": over(full_class_5, skipped_by_early_5),
    "vllm": vllm_awq,
}


@pytest.mark.parametrize("floats", FLOATS)
@pytest.mark.parametrize("loader", AWQ_RULES)
def test_awq_loaders_convert_the_planned_linears_and_nothing_else(linears: list[str], loader: str, floats: str) -> None:
    job = output_job(linears, FLOATS[floats])
    planned = {linear.name for linear in job.linears}
    taken = AWQ_RULES[loader](linears, awq.modules_to_not_convert(job))
    # AutoAWQ looks at names within the layer, so that no list can tell it one layer from another.
    missed = set(FLOATS[floats]) - (set() if floats == "somewhere" else set(EVERYWHERE))
    assert taken == planned | (missed if loader == "autoawq" else set())


def test_the_awq_list(linears: list[str]) -> None:
    words = ["visual", "audio_tower", "lm_head", "talker", "token2wav"]
    always = [*words, *(f".*{word}" for word in words)]
    assert awq.modules_to_not_convert(output_job(linears, NOTHING)) == always
    assert awq.modules_to_not_convert(output_job(linears, BOTH)) == [
        *always, "mlp.down_proj", *QKV,
        "layers.1.self_attn.o_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("loader", "naive"),
    [
        ("transformers 4, full class", ["visual", "audio_tower"]),  # lm_head and talker are converted
        ("transformers 5, full class", ["visual", "audio_tower", "lm_head", "talker", "token2wav"]),
        ("vllm", ["thinker.model.visual", "lm_head"]),  # a name of transformers 5
        ("vllm", ["visual", "lm_head", "thinker.model.language_model.layers.1.mlp.down_proj"]),
    ],
)
def test_the_rules_catch_a_list_that_a_loader_misreads(linears: list[str], loader: str, naive: list[str]) -> None:
    job = output_job(linears, layer(1, "mlp.down_proj"))
    assert AWQ_RULES[loader](linears, naive) - {linear.name for linear in job.linears}


def test_the_rule_of_transformers_5_is_the_librarys(linears: list[str]) -> None:
    utilities = pytest.importorskip("transformers.quantizers.quantizers_utils")
    if not hasattr(utilities, "should_convert_module"):
        pytest.skip("transformers 4")
    entries = awq.modules_to_not_convert(output_job(linears, BOTH))
    for disk in linears:
        for name in (*full_class_5(disk), *thinker_class_5(disk)):
            assert utilities.should_convert_module(name, entries) != skipped_by_5(name, entries), name


# --- compressed-tensors: ignore --------------------------------------------------------------------------------


@pytest.mark.parametrize("floats", FLOATS)
@pytest.mark.parametrize("rename", LOADERS)
def test_compressed_tensors_loaders_quantize_the_planned_linears_and_nothing_else(
    linears: list[str], rename: Rename, floats: str
) -> None:
    job = output_job(linears, FLOATS[floats])
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    planned = {linear.name for linear in job.linears}
    assert over(rename, is_ignored)(linears, ignore) == planned


@pytest.mark.parametrize("floats", FLOATS)
def test_vllm_fuses_only_what_compressed_tensors_treats_alike(linears: list[str], floats: str) -> None:
    job = output_job(linears, FLOATS[floats])
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    for module, members in vllm_modules(linears).items():
        prefix, _, last = module.rpartition(".")
        answers = {is_ignored(f"{prefix}.{part}", ignore) for part in VLLM_FUSED.get(last, (last,))}
        stays_float = not members[0].startswith(DECODER) or members[0] in FLOATS[floats]
        assert answers == {stays_float}, module
