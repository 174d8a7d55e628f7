"""doctor's loader rules on the real module names of 3B and 7B, compared with the emulation in test_loader_rules.py."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import test_loader_rules
from loaders import LOADERS, is_ignored
from make_checkpoint import SHAPES
from make_tiny_omni import omni_config
from test_loader_rules import AWQ_RULES, DECODER, FLOATS, SPEC, linears, output_job

from msmodelslim_omni.doctor.linears import expected_linears
from msmodelslim_omni.doctor.names import (
    LoaderView,
    ascend_modules,
    awq_loaders,
    compressed_tensors_loaders,
    loader_views,
    refused_patterns,
)
from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.models import qwen2_5_omni

__all__ = ["linears"]  # a fixture

# Loader in test_loader_rules.py -> loader of doctor.
DOCTOR_LOADERS = {
    "autoawq": "AutoAWQ",
    "transformers 4, full class": "transformers 4.57, full class",
    "transformers 4, thinker class": "transformers 4.57, thinker class",
    "transformers 5, full class": "transformers 5.x, full class",
    "transformers 5, thinker class": "transformers 5.x, thinker class",
    "vllm": "vLLM",
}


@pytest.fixture(scope="module", params=["3B", "7B"])
def published(request: pytest.FixtureRequest) -> list[str]:
    """Return the names on disk of all Linears that the config.json of a published model implies."""
    name = next(name for name in SHAPES if request.param.lower() in name.lower())
    config = omni_config(SHAPES[name], "bfloat16")
    shapes, _ = qwen2_5_omni.expected_tensors(config)
    return sorted(expected_linears(shapes))


def test_config_implies_the_linears_of_the_module_tree(linears: list[str]) -> None:
    config = omni_config(test_loader_rules.TINY.with_layers(test_loader_rules.LAYERS), "bfloat16")
    assert sorted(expected_linears(qwen2_5_omni.expected_tensors(config)[0])) == sorted(linears)


def by_loader(views: Iterable[LoaderView]) -> dict[str, LoaderView]:
    return {view.loader: view for view in views}


def decoder_linears(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(DECODER)}


def test_every_loader_converts_only_the_decoder(published: list[str]) -> None:
    assert len(decoder_linears(published)) in (28 * 7, 36 * 7)
    job = output_job(published, ())
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    awq_views = by_loader(
        loader_views(awq_loaders(SPEC, awq.modules_to_not_convert(job), decoder_linears(published)), published)
    )
    assert len(awq_views) == 7
    ct_views = by_loader(loader_views(compressed_tensors_loaders(SPEC, ignore, ["Linear"]), published))
    assert len(ct_views) == 5
    for view in (*awq_views.values(), *ct_views.values()):
        assert view.converted == decoder_linears(published) and not view.split, view.loader


def test_ascend_looks_up_every_linear_of_visual_tower_and_decoder(published: list[str]) -> None:
    modules = ascend_modules(SPEC, published)
    looked_up = {name for parts in modules.values() for name in parts}
    assert looked_up == {n for n in published if n.startswith(("thinker.model.", "thinker.visual.", "thinker.lm_head"))}
    assert modules["visual.blocks.0.attn.qkv"] == [f"thinker.visual.blocks.0.attn.{x}" for x in "kqv"]
    assert len(modules["language_model.model.layers.0.mlp.gate_up_proj"]) == 2


LISTS = (
    ["visual"],
    ["visual", "audio_tower"],
    ["visual", "audio_tower", "lm_head", "talker", "token2wav"],
    ["thinker.visual", "thinker.audio_tower", "thinker.lm_head", "talker", "token2wav"],
    ["thinker.model.visual", ".*lm_head"],
    ["visual", "layers.1.mlp.down_proj", "mlp.down_proj"],
)


@pytest.mark.parametrize("entries", LISTS)
@pytest.mark.parametrize("loader", DOCTOR_LOADERS)
def test_awq_rules_match_test_loader_rules(linears: list[str], loader: str, entries: list[str]) -> None:
    converted = by_loader(loader_views(awq_loaders(SPEC, entries, set()), linears))[DOCTOR_LOADERS[loader]].converted
    expected = AWQ_RULES[loader](linears, entries)
    assert converted == (expected - {"thinker.lm_head"} if loader == "vllm" else expected)


@pytest.mark.parametrize("floats", FLOATS)
def test_compressed_tensors_rules_match_test_loader_rules(linears: list[str], floats: str) -> None:
    lists = [
        compressed_tensors.quantization_config(output_job(linears, FLOATS[floats]))["ignore"],
        ["re:.*visual.*", "thinker.lm_head"],
        ["lm_head", "thinker.visual.blocks.0.attn.q", "re:talker.*"],
    ]
    for ignore in lists:
        views = list(loader_views(compressed_tensors_loaders(SPEC, ignore, ["Linear"]), linears))
        for rename, view in zip(LOADERS[:4], views[:4], strict=True):
            expected = {n for n in linears for name in rename(n) if not is_ignored(name, ignore)}
            assert view.converted == expected, view.loader


def test_exact_names_do_not_match_fused_visual_modules_of_vllm() -> None:
    parts = [f"thinker.visual.blocks.0.attn.{x}" for x in "qkv"]
    vllm = by_loader(loader_views(compressed_tensors_loaders(SPEC, parts, ["Linear"]), parts))["vLLM"]
    assert vllm.converted == set(parts)
    vllm = by_loader(loader_views(compressed_tensors_loaders(SPEC, ["re:visual.*"], ["Linear"]), parts))["vLLM"]
    assert not vllm.converted


def test_list_with_one_part_of_a_fused_module() -> None:
    parts = [f"{DECODER}0.self_attn.{x}_proj" for x in "qkv"]
    vllm = by_loader(loader_views(compressed_tensors_loaders(SPEC, [parts[1]], ["Linear"]), parts))["vLLM"]
    assert vllm.split == (("language_model.model.layers.0.self_attn.qkv_proj", tuple(sorted(parts))),)


def test_awq_without_a_list() -> None:
    names = [f"{DECODER}0.mlp.up_proj", f"{DECODER}0.mlp.gate_proj", "thinker.visual.blocks.0.attn.q"]
    views = by_loader(loader_views(awq_loaders(SPEC, None, set(names[:2])), names))
    assert views["vLLM"].converted == set(names[:2])  # without a list, vLLM looks into the files
    assert views["transformers 4.57, full class"].converted == set(names)


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [
        ("re:.*visual.*", False),
        ("visual", False),
        (r"re:.*\.layers\.\d+\.mlp\..*", False),
        ("re:(?:thinker|model).visual.*", False),
        ("re:(a+)+$", True),
        ("re:(a|a)*$", True),
        ("re:((a)+)+$", True),
        ("re:.*.*.*.*.*x", True),
        ("re:(", True),
        ("re:a{99999999999999999999}", True),
        ("re:" + "a" * 501, True),
    ],
)
def test_unsafe_patterns_are_refused(pattern: str, refused: bool) -> None:
    assert refused_patterns([pattern]) == ([pattern] if refused else [])


def test_no_loader_tries_a_malicious_pattern() -> None:
    name = DECODER + "0." + "a" * 60 + "!"
    assert not compressed_tensors_loaders(SPEC, ["re:.*(a+)+$"], ["Linear"])
    assert {view.loader for view in loader_views(awq_loaders(SPEC, [".*(a+)+$"], set()), [name])} == {
        "AutoAWQ", "transformers 4.57, full class", "transformers 4.57, thinker class", "vLLM",
    }  # fmt: skip
