"""Texts of the model itself: how many, what they are, and what they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import int4_recipe, write_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.calibration import Stems, prepare_stems
from msmodelslim_omni.calibration.token_roles import assign_roles
from msmodelslim_omni.models import MediaLimits
from msmodelslim_omni.plan import QuantPlan, own_texts
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.runtime import Progress
from msmodelslim_omni.tuning import add_own_texts

CPU = torch.device("cpu")
LENGTH = 256
EMBEDDING = "thinker.model.embed_tokens.weight"


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (63, 0),  # 4 texts for each given one: 252 tokens are less than a text
        (64, 1),
        (1_000, 15),  # 4,000 // 256
        (5_151, 58),  # (20,000 - 5,151) // 256
        (19_744, 1),
        (19_745, 0),
        (100_000, 0),
    ],
)
def test_number_of_texts(tokens: int, expected: int) -> None:
    assert own_texts(tokens) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "two", layers=2)


@pytest.fixture(scope="module")
def plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantPlan:
    folder = tmp_path_factory.mktemp("data")
    index = write_index(folder, *({"text": f"Number {n} of eight."} for n in range(8)))
    recipe = int4_recipe(folder, method="minmax", scale=True, group_size=32)
    request = QuantRequest(model, device="cpu", config_path=str(recipe), dataset=str(index), effort="best")
    return prepare(request).plan


def stems_of(plan: QuantPlan, folder: Path) -> Stems:
    assert plan.dataset is not None
    calib = prepare(QuantRequest(plan.checkpoint.path, device="cpu", quant_type="w4a16", dataset=plan.dataset)).calib
    assert calib is not None
    return prepare_stems(plan, calib, folder, CPU, Progress())


@pytest.fixture(scope="module")
def with_texts(plan: QuantPlan, tmp_path_factory: pytest.TempPathFactory) -> Stems:
    return add_own_texts(plan, stems_of(plan, tmp_path_factory.mktemp("work")), 9, CPU, Progress())


def tokens_of(plan: QuantPlan, stems: Stems) -> torch.Tensor:
    """The tokens of the own texts, [texts, tokens], found by their rows of the embedding."""
    table = plan.checkpoint.load_finite(EMBEDDING).to(torch.float32)
    store = stems.store(0)
    hidden = torch.cat([store.hidden(number) for number in stems.numbers[-stems.own_texts :]])
    ids = torch.cdist(hidden.flatten(0, 1), table).argmin(dim=1).view(hidden.shape[:2])
    assert torch.equal(table[ids], hidden)
    return ids


def test_each_token_is_drawn_from_the_logits_of_the_whole_model(
    model: Path, plan: QuantPlan, with_texts: Stems
) -> None:
    """The library's own model reads the texts; the draws are repeated with its probabilities."""
    assert with_texts.own_texts == own_texts(sum(with_texts.lengths[: -with_texts.own_texts])) > 3
    ids = tokens_of(plan, with_texts)
    assert ids.shape[1] == LENGTH and len(torch.unique(ids, dim=0)) == len(ids)
    limits = MediaLimits(8192, None, 2.0)
    processor = plan.model.family.open_media_processor(model, limits, False)
    question = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    if plan.model.system:
        question.insert(0, {"role": "system", "content": [{"type": "text", "text": plan.model.system}]})
    prompt = processor.prepare(question, False).tensors["input_ids"][0]
    assert (ids[:, : len(prompt)] == prompt).all()
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
    allowed[processor.text_tokens()] = True
    assert allowed[ids[:, len(prompt) :]].all() and not allowed[prompt].all()
    generator, same = torch.Generator().manual_seed(plan.seed), []
    for position in range(len(prompt), LENGTH):
        probabilities = logits[:, position - 1].masked_fill(~allowed, -torch.inf).softmax(dim=1)
        if position == len(prompt):
            probabilities = allowed.expand(len(ids), -1).to(torch.float32)
        drawn = torch.multinomial(probabilities, 1, generator=generator).flatten()
        same.append((drawn == ids[:, position]).float().mean())
    assert float(torch.stack(same).mean()) > 0.97  # keys and values are rounded to bfloat16


def test_texts_that_are_written_already_are_used_again(plan: QuantPlan, with_texts: Stems, tmp_path: Path) -> None:
    """The same texts in another folder; there, after one of them is damaged, all are written again."""
    stems = stems_of(plan, tmp_path)
    again = add_own_texts(plan, stems, 9, CPU, Progress())
    assert torch.equal(tokens_of(plan, again), tokens_of(plan, with_texts))
    file = tmp_path / "stem" / f"{again.numbers[-1]:06d}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    add_own_texts(plan, stems, 9, CPU, Progress())
    assert file.read_bytes() == whole


def test_enough_samples_get_no_texts(plan: QuantPlan, tmp_path: Path) -> None:
    stems = stems_of(plan, tmp_path)
    long = Stems(
        stems.folder, stems.samples, stems.numbers, tuple(torch.zeros(2_500, dtype=torch.int8) for _ in "8" * 8)
    )
    added = add_own_texts(plan, long, 64, CPU, Progress())
    assert added.own_texts == 0 and len(added) == len(long)


def test_no_room_for_texts(plan: QuantPlan, tmp_path: Path) -> None:
    """The chat template has 47 tokens, and a sample may have 48."""
    calibration = plan.calibration.model_copy(update={"max_tokens": 48})
    stems = stems_of(plan, tmp_path)
    assert add_own_texts(replace(plan, calibration=calibration), stems, 9, CPU, Progress()) is stems


def test_own_texts_judge_nothing() -> None:
    """Twelve short samples and four long texts of the model: those are in H, and no probe."""
    modalities = [torch.zeros(40, dtype=torch.int8)] * 12 + [torch.zeros(LENGTH, dtype=torch.int8)] * 4
    roles = assign_roles(modalities, "tokens", 4)
    assert roles.probe_samples and max(roles.probe_samples) < 12
    assert roles.held_out == roles.probe_samples
    assert roles.gram_counts[0] == 40 * (12 - len(roles.held_out)) + 4 * LENGTH
