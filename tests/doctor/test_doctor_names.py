"""doctor's rules of loaders: over the real trees of 3B and 7B, and against the emulation in test_loader_rules."""

from __future__ import annotations

from typing import Any

import pytest
import test_loader_rules as by_hand
from loaders import LOADERS, is_ignored
from make_checkpoint import SHAPES
from make_tiny_omni import omni_config
from test_loader_rules import AWQ_RULES, DECODER, FLOATS, SPEC, linears, output_job

from msmodelslim_omni.doctor.linears import expected_linears
from msmodelslim_omni.doctor.names import (
    Answer,
    answers,
    ascend_modules,
    awq_loaders,
    compressed_tensors_loaders,
    refused_patterns,
)
from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.models import qwen2_5_omni

__all__ = ["linears"]  # a fixture

OURS_OF = {
    "autoawq": "AutoAWQ",
    "transformers 4, full class": "transformers 4.57, full class",
    "transformers 4, thinker class": "transformers 4.57, thinker class",
    "transformers 5, full class": "transformers 5.x, full class",
    "transformers 5, thinker class": "transformers 5.x, thinker class",
    "vllm": "vLLM",
}


@pytest.fixture(scope="module", params=["3B", "7B"])
def real(request: pytest.FixtureRequest) -> list[str]:
    """Names on disk of all Linears of a published shape, as its config.json implies them."""
    name = next(name for name in SHAPES if request.param.lower() in name.lower())
    config = omni_config(SHAPES[name], "bfloat16")
    shapes, _ = qwen2_5_omni.expected_tensors(config)
    return sorted(expected_linears(shapes))


def test_the_linears_of_a_config_are_those_of_the_module_tree(linears: list[str]) -> None:
    config = omni_config(by_hand.TINY.with_layers(by_hand.LAYERS), "bfloat16")
    assert sorted(expected_linears(qwen2_5_omni.expected_tensors(config)[0])) == sorted(linears)


def by_loader(found: Any) -> dict[str, Answer]:
    return {answer.loader: answer for answer in found}


def decoder(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(DECODER)}


def test_every_loader_converts_the_decoder_of_the_real_models_alone(real: list[str]) -> None:
    assert len(decoder(real)) in (28 * 7, 36 * 7)
    job = output_job(real, ())
    lists = compressed_tensors.quantization_config(job)["ignore"]
    found = by_loader(answers(awq_loaders(SPEC, awq.modules_to_not_convert(job), decoder(real)), real))
    assert len(found) == 7
    found_ct = by_loader(answers(compressed_tensors_loaders(SPEC, lists, ["Linear"]), real))
    assert len(found_ct) == 5
    for answer in (*found.values(), *found_ct.values()):
        assert answer.taken == decoder(real) and not answer.split, answer.loader


def test_ascend_asks_for_every_linear_of_tower_and_decoder(real: list[str]) -> None:
    modules = ascend_modules(SPEC, real)
    asked = {name for parts in modules.values() for name in parts}
    assert asked == {n for n in real if n.startswith(("thinker.model.", "thinker.visual.", "thinker.lm_head"))}
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
@pytest.mark.parametrize("loader", OURS_OF)
def test_awq_rules_agree_with_the_other_emulation(linears: list[str], loader: str, entries: list[str]) -> None:
    ours = by_loader(answers(awq_loaders(SPEC, entries, set()), linears))[OURS_OF[loader]].taken
    theirs = AWQ_RULES[loader](linears, entries)
    assert ours == (theirs - {"thinker.lm_head"} if loader == "vllm" else theirs)


@pytest.mark.parametrize("floats", FLOATS)
def test_compressed_tensors_rules_agree_with_the_other_emulation(linears: list[str], floats: str) -> None:
    lists = [
        compressed_tensors.quantization_config(output_job(linears, FLOATS[floats]))["ignore"],
        ["re:.*visual.*", "thinker.lm_head"],
        ["lm_head", "thinker.visual.blocks.0.attn.q", "re:talker.*"],
    ]
    for ignore in lists:
        ours = list(answers(compressed_tensors_loaders(SPEC, ignore, ["Linear"]), linears))
        for rename, answer in zip(LOADERS[:4], ours[:4], strict=True):
            theirs = {n for n in linears for name in rename(n) if not is_ignored(name, ignore)}
            assert answer.taken == theirs, answer.loader


def test_exact_names_miss_the_fused_visual_modules_of_vllm() -> None:
    parts = [f"thinker.visual.blocks.0.attn.{x}" for x in "qkv"]
    vllm = by_loader(answers(compressed_tensors_loaders(SPEC, parts, ["Linear"]), parts))["vLLM"]
    assert vllm.taken == set(parts)
    vllm = by_loader(answers(compressed_tensors_loaders(SPEC, ["re:visual.*"], ["Linear"]), parts))["vLLM"]
    assert not vllm.taken


def test_a_list_that_names_one_part_of_a_fused_module() -> None:
    parts = [f"{DECODER}0.self_attn.{x}_proj" for x in "qkv"]
    vllm = by_loader(answers(compressed_tensors_loaders(SPEC, [parts[1]], ["Linear"]), parts))["vLLM"]
    assert vllm.split == (("language_model.model.layers.0.self_attn.qkv_proj", tuple(sorted(parts))),)


def test_awq_without_a_list() -> None:
    names = [f"{DECODER}0.mlp.up_proj", f"{DECODER}0.mlp.gate_proj", "thinker.visual.blocks.0.attn.q"]
    found = by_loader(answers(awq_loaders(SPEC, None, set(names[:2])), names))
    assert found["vLLM"].taken == set(names[:2])  # it looks into the files
    assert found["transformers 4.57, full class"].taken == set(names)


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
def test_patterns_that_are_not_tried(pattern: str, refused: bool) -> None:
    assert refused_patterns([pattern]) == ([pattern] if refused else [])


def test_hostile_patterns_are_not_tried_by_any_loader() -> None:
    name = DECODER + "0." + "a" * 60 + "!"
    assert not compressed_tensors_loaders(SPEC, ["re:.*(a+)+$"], ["Linear"])
    assert {a.loader for a in answers(awq_loaders(SPEC, [".*(a+)+$"], set()), [name])} == {
        "AutoAWQ", "transformers 4.57, full class", "transformers 4.57, thinker class", "vLLM",
    }  # fmt: skip
