"""The Linears that each loader converts: the rule of each loader, applied to every Linear of the real module tree.

The tree is the full model (thinker, talker, token2wav) as the installed transformers builds it. The names in the other
transformers version and in vLLM are derived from the names on disk. tests/formats/test_formats.py applies the rule of
compressed-tensors to the tiny model; the renamings are in loaders.py.
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
# A loader's rule: all Linears and the list of exclusions -> the Linears that it converts, by name on disk.
Rule = Callable[[list[str], list[str]], set[str]]

SPEC = MODEL_TYPES["Qwen2.5-Omni-7B"]
ASYM = QuantScheme(4, None, group_size=128, symmetric=False)
LAYERS = 12  # `layers.1` is a prefix of layers 10 and 11
DECODER = "thinker.model.layers."


@pytest.fixture(scope="module")
def linears() -> list[str]:
    """Return the names on disk of all Linears of the full model."""
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

# Linears that a recipe keeps float. The plan ensures that all parts of a fused vLLM module are float together.
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
    """AutoAWQ 0.2.9, models/base.py, _load_quantized_modules: only modules of decoder layers, by name in the layer."""
    inner = {name: name.removeprefix(DECODER).partition(".")[2] for name in linears if name.startswith(DECODER)}
    return {name for name, relative in inner.items() if not has_substring(relative, entries)}


def rule_of_class(rename: Rename, is_skipped: Callable[[str, list[str]], bool]) -> Rule:
    """Return a rule that tests every Linear by its name in the class."""
    return lambda linears, entries: {
        disk for disk in linears if any(not is_skipped(name, entries) for name in rename(disk))
    }


def skipped_by_5(name: str, entries: list[str]) -> bool:
    """transformers 5.23, quantizers_utils.py, should_convert_module: start up to a dot, full name, or end."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{entry}){boundary}", name) or name.endswith(entry) for entry in entries)


def skipped_by_early_5(name: str, entries: list[str]) -> bool:
    """transformers 5.0: like skipped_by_5 without the boundary."""
    return any(re.match(entry, name) or name.endswith(entry) for entry in entries)


VLLM_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_modules(linears: list[str]) -> dict[str, list[str]]:
    """Return the names of vLLM's Linear modules, including fused ones, with the Linears on disk of each."""
    modules: dict[str, list[str]] = {}
    for disk in linears:
        for name in vllm(disk):
            name = re.sub(r"\b(gate|up)_proj$", "gate_up_proj", re.sub(r"\b[qkv]_proj$", "qkv_proj", name))
            name = re.sub(r"^(visual\..*\.attn)\.[qkv]$", r"\1.qkv", name)
            modules.setdefault(name, []).append(disk)
    return modules


def vllm_entries(entries: list[str]) -> list[str]:
    """Map the list as vLLM's mapper of Qwen2.5-Omni does (qwen2_5_omni_thinker.py, hf_to_vllm_mapper)."""
    mapped = []
    for entry in entries:
        if entry.startswith(("talker.", "token2wav.")):
            continue
        for prefix, vllm_prefix in (
            ("thinker.lm_head.", "language_model.lm_head."),
            ("thinker.model.", "language_model.model."),
            ("thinker.", ""),
        ):
            if entry.startswith(prefix):
                entry = vllm_prefix + entry.removeprefix(prefix)
                break
        mapped.append(entry)
    return mapped


def vllm_awq(linears: list[str], entries: list[str]) -> set[str]:
    """vLLM, quant_utils.py, is_layer_skipped: a substring; all parts of a fused module must have the same result."""
    entries, converted = vllm_entries(entries), set()
    for module, members in vllm_modules(linears).items():
        prefix, _, last = module.rpartition(".")
        is_float = {has_substring(f"{prefix}.{part}", entries) for part in VLLM_FUSED.get(last, (last,))}
        assert len(is_float) == 1, f"{module}: some but not all parts are float"
        if is_float == {False}:
            converted |= set(members)
    return converted


AWQ_RULES: dict[str, Rule] = {
    "autoawq": autoawq,
    "transformers 4, full class": rule_of_class(full_class, has_substring),
    "transformers 4, thinker class": rule_of_class(thinker_class, has_substring),
    "transformers 5, full class": rule_of_class(full_class_5, skipped_by_5),
    "transformers 5, thinker class": rule_of_class(thinker_class_5, skipped_by_5),
    "transformers 5.0, full class": rule_of_class(full_class_5, skipped_by_early_5),
    "vllm": vllm_awq,
}


@pytest.mark.parametrize("floats", FLOATS)
@pytest.mark.parametrize("loader", AWQ_RULES)
def test_awq_loaders_convert_exactly_the_planned_linears(linears: list[str], loader: str, floats: str) -> None:
    job = output_job(linears, FLOATS[floats])
    planned = {linear.name for linear in job.linears}
    converted = AWQ_RULES[loader](linears, awq.modules_to_not_convert(job))
    # AutoAWQ tests names within the layer, so no list can exclude a Linear in one layer only.
    missed = set(FLOATS[floats]) - (set() if floats == "somewhere" else set(EVERYWHERE))
    assert converted == planned | (missed if loader == "autoawq" else set())


def test_awq_list(linears: list[str]) -> None:
    names = ["visual", "audio_tower", "lm_head", "talker", "token2wav"]
    always = [*names, *(f".*{name}" for name in names)]
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
        ("vllm", ["thinker.model.visual", "lm_head"]),  # a module name of transformers 5
        ("vllm", ["visual", "lm_head", "thinker.model.language_model.layers.1.mlp.down_proj"]),
    ],
)
def test_rules_detect_incomplete_lists(linears: list[str], loader: str, naive: list[str]) -> None:
    job = output_job(linears, layer(1, "mlp.down_proj"))
    assert AWQ_RULES[loader](linears, naive) - {linear.name for linear in job.linears}


def test_rule_of_transformers_5_matches_the_library(linears: list[str]) -> None:
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
def test_compressed_tensors_loaders_convert_exactly_the_planned_linears(
    linears: list[str], rename: Rename, floats: str
) -> None:
    job = output_job(linears, FLOATS[floats])
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    planned = {linear.name for linear in job.linears}
    assert rule_of_class(rename, is_ignored)(linears, ignore) == planned


@pytest.mark.parametrize("floats", FLOATS)
def test_parts_of_fused_vllm_modules_are_ignored_together(linears: list[str], floats: str) -> None:
    job = output_job(linears, FLOATS[floats])
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    for module, members in vllm_modules(linears).items():
        prefix, _, last = module.rpartition(".")
        ignored = {is_ignored(f"{prefix}.{part}", ignore) for part in VLLM_FUSED.get(last, (last,))}
        stays_float = not members[0].startswith(DECODER) or members[0] in FLOATS[floats]
        assert ignored == {stays_float}, module
