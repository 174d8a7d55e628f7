"""The trained tiny Omni of examples/tiny_omni: its data, its training loop and the committed checkpoint."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from ties import LOGIT_DISTANCE
from tiny_omni import harden, massive, render, score, tasks, text, towers, train
from tiny_omni import model as omni
from tiny_samples import assert_trains_on_the_true_logits, samples, tones, write_first_turn

from msmodelslim_omni.calibration.samples import load_calib_set, parse_sample, prepare_sample
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.models.qwen2_5_omni_media import open_media_processor

HERE = Path(train.__file__).parent
MODEL = HERE / "model"
needs_model = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the checkpoint is missing")


def test_media_depend_on_the_seed_only() -> None:
    for name, sample in samples(3).items():
        same, other = samples(3)[name], samples(4)[name]
        assert same.turns == sample.turns
        media = ((s.picture, s.frames, s.sound) for s in (sample, same, other))
        for medium, same_seed, other_seed in zip(*media, strict=True):
            if medium is not None:
                assert np.array_equal(medium, same_seed) and not np.array_equal(medium, other_seed)


def test_answers_match_the_drawings() -> None:
    rng = random.Random(0)
    assert tasks.place_name(5, 50) == "top left" and tasks.place_name(100, 60) == "bottom right"
    things = tasks.random_things(rng, 3)
    cells = towers.covered(things, render.PICTURE, render.PICTURE)
    for number, thing in enumerate(things):
        assert cells[int(thing.y // towers.CELL), int(thing.x // towers.CELL)] == number
    for _ in range(50):
        turn = tasks.text_turn("sum of two digits", rng, held_out=True)
        a, b = map(int, re.findall(r"\d+", turn.question))
        assert int(turn.answer) == a + b and tasks.is_held_out_sum(a, b)
    assert not set(render.TRAIN_FONTS) & set(render.HELD_FONTS)
    assert not set(render._TRAIN_SPEAKERS) & set(render._HELD_SPEAKERS)


def test_trigram_is_a_distribution() -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(7) for _ in range(50)] for _ in range(4)]
    model = text.Trigram(texts, 9, (0.7, 0.8))
    for a, b in ((1, 2), (8, 8), (0, 8)):
        assert sum(model.probability(a, b, c) for c in range(9)) == pytest.approx(1)


@needs_model
@pytest.mark.parametrize("name", ["text", "picture", "sound", "clip", "talking clip"])
def test_batches_equal_the_package_on_files(name: str, tmp_path: Path) -> None:
    """A batch built directly is equal to what calibration reads from the same media on disk; only sound is not bitwise.

    The float32 sums in its features depend on the number of frames, and silence is 1e-8 of the power of the loudest
    sound, where an error of 1e-7 of the amplitude is 2e-4 in a feature.
    """
    sample = samples(1)[name]
    sample = tasks.Sample(sample.turns[:1], sample.picture, sample.frames, sample.sound)
    entry = write_first_turn(sample, tmp_path)
    assert MODEL_TYPES["Qwen2.5-Omni-3B"].system == omni.SYSTEM
    processor = open_media_processor(MODEL, score.LIMITS, False)
    inputs = prepare_sample(parse_sample("a", entry, tmp_path, "", MODEL_TYPES["Qwen2.5-Omni-3B"]), processor)
    batch = omni.sample_batch(omni.Tokens(MODEL), [[sample]])
    length = batch.ids.shape[1]  # the template ends with a line break
    assert inputs.tensors["input_ids"].shape[1] == length + 1
    assert torch.equal(inputs.tensors["input_ids"][:, :length], batch.ids)
    if batch.pixels is not None:
        kind = "video" if batch.video else "image"
        pixels = inputs.tensors["pixel_values_videos" if batch.video else "pixel_values"]
        assert torch.equal(pixels, batch.pixels)
        assert torch.equal(inputs.tensors[f"{kind}_grid_thw"], batch.grid)
    if batch.mels is not None:
        features = inputs.tensors["input_features"][:, :, inputs.tensors["feature_attention_mask"][0].bool()]
        torch.testing.assert_close(batch.mels, features, atol=1e-3, rtol=0)
        batch.mels = features
    assert_trains_on_the_true_logits(omni, omni.build_thinker(MODEL, 0).eval(), inputs, batch, atol=2e-5)


@needs_model
@pytest.mark.full
@pytest.mark.timeout(600)
def test_massive_activation_keeps_the_answers(tmp_path: Path) -> None:
    massive.make_massive(MODEL, tmp_path / "massive")
    before, after = (omni.load_thinker(folder) for folder in (MODEL, tmp_path / "massive"))
    items = score.read_items(HERE / "heldout" / "index.jsonl", MODEL, every=64)
    divergences, same = [], []
    for (p, _), (q, _) in zip(*(score.log_probabilities(t, items) for t in (before, after)), strict=True):
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert sum(divergences) / len(items) < 1e-3
    assert sum(same) / len(items) > 0.99
    names = [f"layers.{number}.input_layernorm" for number in (1, 2, 3)]
    seen = massive.inputs_of(after, [*names, "norm", "layers.1.mlp.down_proj"], [item.batch for item in items])
    ratios = {name: float(first.norm() / others.norm(dim=1).median()) for name, (first, others) in seen.items()}
    assert ratios[names[0]] < 10 and ratios["norm"] < 10
    assert all(250 < ratios[name] < 450 for name in names[1:])
    first, others = seen["layers.1.mlp.down_proj"]
    assert abs(float(first.max()) - massive.PEAK) < 10 and float(others.abs().max()) < massive.PEAK / 10


@needs_model
@pytest.mark.full
def test_resumed_training_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "chapters", lambda: [("a", "In the beginning was the word. " * 40)])
    kinds = {"prose": (1, 2), "text": (1, 2), "sound": (1, 2), "clip": (1, 1)}
    monkeypatch.setattr(train, "KINDS", kinds)
    monkeypatch.setattr(train, "PROSE_TOKENS", 40)
    monkeypatch.setattr(towers, "KINDS", {"sound": (1, 2), "clip": (1, 1)})
    monkeypatch.setattr(render, "TRAIN_FONTS", ())  # the fonts need not be installed
    monkeypatch.setattr(train, "RESTARTS", (1, 2))
    monkeypatch.setattr(train, "MEAN_FROM", 2)
    ends, states = [], []
    for name, stops in (("once", (3,)), ("thrice", (1, 2, 3))):
        work = tmp_path / name
        (work / "description").mkdir(parents=True)
        for file in MODEL.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, work / "description" / file.name)
        names = [(tone.word, tone.voice) for tone in tones()]
        samples_of = {str(n): tone.samples for n, tone in enumerate(tones())}
        np.savez(work / f"voices_train_{train.VOICES_PER_WORD}_5.npz", names=names, **samples_of)
        for stop in stops:
            thinker = train.train(seed=5, steps=3, stop=stop, work=work, workers=0, save_seconds=1e9, tower_steps=2)
            states.append(torch.load(work / "state.pt", weights_only=True))
        ends.append(thinker.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [state["mean"]["rounds"] for state in states] == [2, 0, 1, 2]
    for name, mean in ends[1].items():  # mean of the second and third round
        torch.testing.assert_close(mean, (states[2]["model"][name] + states[3]["model"][name]) / 2)


@needs_model
def test_harden_keeps_the_logits(tmp_path: Path) -> None:
    harden.harden_checkpoint(MODEL, tmp_path / "hard")
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL, tmp_path / "hard"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4 * 10 and all(name.startswith("thinker.model.layers.") for name in changed)
    batch = omni.sample_batch(omni.Tokens(MODEL), [[samples(2)["picture"]]])
    with torch.no_grad():
        soft, hard = (omni.load_thinker(folder) for folder in (MODEL, tmp_path / "hard"))
        plain, _ = omni.answer_logits(soft, batch)
        same, _ = omni.answer_logits(hard, batch)
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=0)
    items = score.read_items(HERE / "calib" / "index.jsonl", MODEL, every=16)
    ratios = [score.site_statistics(thinker, items) for thinker in (soft, hard)]
    assert all(ratios[1][site][1] > 2 * ratios[0][site][1] for site in ("qkv", "gate_up", "o"))


@needs_model
@pytest.mark.full
def test_scores_match_the_model_card() -> None:
    """Uses every 9th held-out question. The bounds are three standard errors of this sample."""
    card = (HERE / "README.md").read_text(encoding="utf-8")
    items = score.read_items(HERE / "heldout" / "index.jsonl", MODEL, every=9)
    thinker = omni.load_thinker(MODEL)
    omni.speed_up_towers(thinker)
    scores = score.score(items, score.log_probabilities(thinker, items)).modalities
    for modality in ("text", "image", "audio", "video"):
        row = re.search(rf"\| \*\*{modality}\*\* \| all \| \d+ \| \*\*([\d.]+) %", card)
        assert row is not None
        published, tally = float(row[1]) / 100, scores[modality]
        error = (max(published * (1 - published), 0.02) / tally.items) ** 0.5
        assert abs(tally.accuracy - published) < 3 * error, modality
    row = re.search(r"\| prose \| next token \|.*perplexity ([\d.]+) \|", card)
    assert row is not None and scores["prose"].perplexity == pytest.approx(float(row[1]), rel=0.25)


@needs_model
@pytest.mark.full
def test_generation_agrees_with_the_scored_answers() -> None:
    index = HERE / "heldout" / "image" / "index.jsonl"
    items = score.read_items(index, MODEL, every=60)
    thinker = omni.load_thinker(MODEL)
    tokens = omni.Tokens(MODEL)
    compared = 0
    for item in items:
        answer = len(tokens.encode(item.entry["answer"])) + 1
        logs, labels = score.log_probabilities(thinker, [item])[0]
        likeliest = logs.topk(2, dim=-1).values
        if float((likeliest[:, 0] - likeliest[:, 1]).min()) <= LOGIT_DISTANCE:
            continue  # the greedy answer depends on the processor
        compared += 1
        ids = item.batch.ids[:, :-answer]
        generated = thinker.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=item.batch.pixels,
            image_grid_thw=item.batch.grid, max_new_tokens=8, do_sample=False, eos_token_id=tokens.end,
        )  # fmt: skip
        assert (generated[0, ids.shape[1] :].tolist() == labels.tolist()) == bool((logs.argmax(-1) == labels).all())
    assert compared > len(items) / 2


def test_datasets_are_complete_and_small() -> None:
    for name, limit in (("heldout", 10.0), ("calib", 1.5)):  # MB; audio is lossless
        files = [file for file in (HERE / name).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < limit * 1e6
    assert len(load_calib_set(str(HERE / "calib"), "", MODEL_TYPES["Qwen2.5-Omni-3B"]).samples) == 128
    for modality in ("text", "image", "audio", "video"):
        lines = (HERE / "heldout" / modality / "index.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) >= 200 and all("answer" in json.loads(line) for line in lines)


@needs_model
def test_checkpoint_is_small_and_in_bfloat16() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 30e6
    weights = load_file(MODEL / "model.safetensors")
    assert {str(v.dtype) for k, v in weights.items() if not k.startswith("token2wav.")} == {"torch.bfloat16"}
    assert 5e6 < sum(v.numel() for k, v in weights.items() if k.startswith("thinker.")) < 15e6
