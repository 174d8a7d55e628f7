"""eval --speech: both models speak; forced text and codes, distances by hand, players on the page, and bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import command, write_index
from outputs import quantize_all

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.evaluation import speech
from msmodelslim_omni.evaluation.previews import shown_speech
from msmodelslim_omni.evaluation.run import evaluate
from msmodelslim_omni.evaluation.speech import mel_distance, share_of_equal
from msmodelslim_omni.models.speech_steps import watched_steps
from msmodelslim_omni.report.eval_report import judge_speech, read_eval_report
from msmodelslim_omni.report.fidelity import SpokenPair

QUESTION = {"text": "Why is the sky blue?", "answer": "Short waves scatter most."}
PAIR = SpokenPair("a:1", "Why?", (), "So.", "So.", 100, 0.9, 1.0, 2.0, 3.0, 1.0, 1.5, "", "")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("texts"), QUESTION)


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, 72 codes at most: an untrained talker does not end by itself."""
    monkeypatch.setattr(speech, "_MAX_NEW_TOKENS", 2)


def test_both_models_speak(tiny: Path, texts: Path, tmp_path: Path) -> None:
    output, save = quantize_all(tiny, tmp_path / "outputs")["awq"], tmp_path / "eval"
    words = ("eval", output, "--float", tiny, "--dataset", texts, "--speech", 1, "--save_path", save, "--device", "cpu")
    shown = command(*words).done()
    report = read_eval_report(save)
    (pair,) = report.speech
    assert json.loads((save / "eval_report.json").read_text())["speech"][0]["codes"] == pair.codes > 0
    assert 0 < pair.code_agreement < 1 and pair.mel_takes > 0 and pair.mel_same_text > 0
    assert pair.question == QUESTION["text"] and pair.float_text
    if pair.quant_text == pair.float_text:
        assert pair.mel_free == pair.mel_same_text
    files = {(save / name).read_bytes() for name in (pair.float_file, pair.quant_file)}
    assert len(files) == 2 and all(file.startswith(b"RIFF") for file in files)
    assert "Spoken answers" in shown.out and "## Speech" in (save / "eval_report.md").read_text()
    (heard,) = shown_speech(report.speech, save)
    assert heard.before and heard.after and heard.before.uri.startswith("data:audio/wav;base64,")


def test_a_model_speaks_like_itself(tiny: Path, texts: Path) -> None:
    """The same weights: the same codes and sounds, whether the text is forced or not."""
    (pair,) = evaluate(tiny, tiny, str(texts), device="cpu", speech=1, speaker="Ethan").speech
    assert (pair.code_agreement, pair.mel_same_text, pair.mel_free) == (1.0, 0.0, 0.0)
    assert pair.mel_takes > 0 and pair.float_text == pair.quant_text and pair.float_file == ""


def test_bad_input_is_found_before_the_towers(tiny: Path, tied_vl: Path, texts: Path) -> None:
    with pytest.raises(QuantError, match="unknown speaker 'Etan'"):
        evaluate(tiny, tiny, str(texts), device="cpu", speech=1, speaker="Etan")
    with pytest.raises(QuantError, match="answers in text only"):
        evaluate(tied_vl, tied_vl, str(texts), device="cpu", speech=1)


def test_forced_steps_by_hand() -> None:
    """Steps 1 and 2 are forced to 3 and 0, then the end, 2; the most likely tokens are recorded all the same."""
    steps, past = watched_steps([3, 0], end=2), torch.tensor([[9, 9]])
    for scores, chosen in (([0.0, 5, 1, 2], 3), ([7.0, 1, 1, 1], 0), ([0.0, 0, 0, 4], 2)):
        after = steps(past, torch.tensor([scores]))
        assert int(after[0].argmax()) == chosen and math.isinf(after[0][(chosen + 1) % 4])
        past = torch.cat([past, torch.tensor([[chosen]])], dim=1)
    assert steps.likeliest == [1, 0, 3] and steps.chosen == [3, 0]
    free, scores = watched_steps(), torch.tensor([[0.0, 5.0]])
    assert free(past, scores) is scores and free.likeliest == [1]


def test_agreement_and_distance_by_hand() -> None:
    """Half the amplitude is 6.02 dB less in every band that is above the floor; silence of the same length 0."""
    assert share_of_equal([1, 2, 3, 4], [1, 2, 0]) == 0.5
    tone = torch.sin(torch.arange(24_000) * 0.1)
    noise = tone + 0.1 * torch.randn(24_000, generator=torch.Generator().manual_seed(0))
    assert mel_distance(noise, noise / 2, 24_000) == pytest.approx(20 * math.log10(2), abs=0.05)
    assert mel_distance(noise, noise[:12_000], 24_000) < 0.2  # the frames that both have; the last one is cut


def test_judgement_of_speech() -> None:
    sentence = judge_speech([PAIR, replace(PAIR, codes=300, code_agreement=0.5)])
    assert "same at 60.0% of 400 steps, 50.0% to 90.0% by answer" in sentence
    assert "1.0 dB from the float model's, not more than two takes" in sentence and "an impression" in sentence
