"""Every case of the corpus: the right thing, or one clear message with the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_qwen3_omni import make_tiny_qwen3_omni
from odd_inputs.corpus import CASES, Odd, write_corpus

from msmodelslim_omni.calibration.samples import CalibSample, load_calib_set, prepare_sample, run_stem
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models import MODALITIES, MODEL_TYPES, MediaLimits
from msmodelslim_omni.storage import open_checkpoint

LINE_OF = {case.name: number for number, case in enumerate(CASES, 1)}
LIMITS = MediaLimits(3000, 50_176, 2.0)


class Model:
    """A tiny model's processor and stem, and the samples of the corpus that its checks accept, by line."""

    def __init__(self, name: str, path: Path, index: Path) -> None:
        spec = MODEL_TYPES[name]
        self.spec = spec
        self.processor = spec.family.open_media_processor(path, LIMITS, False)
        self.stem = spec.family.open_stem(open_checkpoint(path), torch.device("cpu"), 1 << 30)
        calib = load_calib_set(str(index), "Describe.", spec, on_bad_sample="skip")
        self.samples = {int(sample.where.rpartition(":")[2]): sample for sample in calib.samples}
        self.faults = calib.warnings

    def run(self, line: int) -> tuple[frozenset[str], Any]:
        """Modalities of the tokens that reach the first layer, and the sample. Raises QuantError if there are none."""
        sample = self.samples[line]
        inputs = prepare_sample(sample, self.processor)
        hidden = run_stem(sample, inputs, self.stem).hidden
        assert torch.isfinite(hidden).all() and hidden.shape[1] == len(inputs.modality)
        return frozenset(MODALITIES[m] for m in torch.unique(inputs.modality).tolist()), sample


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def omni(tiny: Path, index: Path) -> Model:
    return Model("Qwen2.5-Omni-7B", tiny, index)


def test_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CASES) >= 60 and len(LINE_OF) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outcome(case: Odd, omni: Model) -> None:
    line = LINE_OF[case.name]
    if isinstance(case.outcome, str):
        message = fault_of(line, omni)
        assert case.outcome in message, message
        assert "Traceback" not in message and "\n" not in message
        return
    assert line in omni.samples, fault_of(line, omni)
    modalities, sample = omni.run(line)
    assert modalities == case.outcome
    held = [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
    for text in case.texts:
        assert text in held
        held = held[held.index(text) + 1 :]


def fault_of(line: int, model: Model) -> str:
    """Why a line is refused, by the check of the index or by the processor; names the line."""
    listed = [fault for fault in model.faults if f"odd.jsonl:{line}:" in fault or f"odd.jsonl:{line}," in fault]
    if listed:
        return "; ".join(listed)
    with pytest.raises(QuantError) as caught:
        model.run(line)
    assert caught.value.message.startswith(f"odd.jsonl:{line}: ")
    return caught.value.message


def test_error_inside_the_towers_is_the_sample_s(index: Path, omni: Model) -> None:
    """A sound that became too short after the check of the index."""
    parts = [{"type": "audio", "audio": index.parent / "five_ms.wav"}, {"type": "text", "text": "What?"}]
    sample = CalibSample("odd.jsonl:7", ({"role": "user", "content": parts},), False)
    inputs = prepare_sample(sample, omni.processor)
    with pytest.raises(QuantError, match=r"^odd\.jsonl:7: the towers cannot process the sample: "):
        run_stem(sample, inputs, omni.stem)


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-Omni-30B-A3B-Instruct"])
def test_other_models_read_the_same(
    name: str, index: Path, tiny_vl: Path, tiny_qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The samples with media that a model takes are read, and those with faults of their own are not."""
    if name.startswith("Qwen3-Omni"):
        path = make_tiny_qwen3_omni(tmp_path_factory.mktemp("models") / "tiny_qwen3_omni")
    else:
        path = tiny_vl if name.startswith("Qwen2.5") else tiny_qwen3_vl
    model = Model(name, path, index)
    omni_only = ("token of a", "5 ms", "20 ms", "sound of 4 ms")  # other placeholders, and another least length
    for case in CASES:
        if case.name.startswith(omni_only):
            continue
        line = LINE_OF[case.name]
        if isinstance(case.outcome, str):
            if line in model.samples:
                with pytest.raises(QuantError, match=rf"^odd\.jsonl:{line}: "):
                    model.run(line)
        elif "audio" not in case.outcome or "audio" in model.spec.modalities:
            assert model.run(line)[0] == case.outcome, case.name
