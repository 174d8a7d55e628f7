"""generate: tokens equal to the library's with the same weights, media, speech, memory, and bad input."""

from __future__ import annotations

import json
import shutil
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DATA, command
from outputs import edit_config, edited, quantize_all, replaced, without
from ties import assert_greedy

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.numerics.arithmetic import (
    QuantizedLinear,
    dequantize,
    quantize_weight,
    quantized_matmul,
)
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.quantized.generate import (
    RoundingLinear,
    dequantize_by_rows,
    fill_model,
    generate,
    open_model,
    open_source,
    write_wav,
)
from msmodelslim_omni.quantized.reader import open_quantized
from msmodelslim_omni.run.emulation import EmulatedLinear
from msmodelslim_omni.runtime.device import Device
from msmodelslim_omni.runtime.progress import Progress

CPU = Device("cpu", "as requested")
TEXT = "Why is the sky blue?"
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
LINEAR = "thinker.model.layers.2.self_attn.k_proj"


module = sys.modules[generate.__module__]


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantize_all(tiny, tmp_path_factory.getbasetemp() / "outputs")


class RecordedProgress(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def answer(path: Path, text: str = TEXT, **options: Any) -> Any:
    return generate(path, text, device="cpu", **{"max_new_tokens": 12, **options})


# --- text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tiny: Path) -> Any:
    """The float thinker in float32, loaded by transformers."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def library_answer(thinker: Any, tiny: Path) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits [tokens, vocabulary] from the library's own processor and generate."""
    from transformers import Qwen2_5OmniProcessor

    processor = Qwen2_5OmniProcessor.from_pretrained(tiny)
    messages = [
        {"role": role, "content": [{"type": "text", "text": t}]} for role, t in (("system", SYSTEM), ("user", TEXT))
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, return_tensors="pt")
    ends = json.loads((tiny / "generation_config.json").read_text())["eos_token_id"]
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = thinker.generate(**inputs, max_new_tokens=12, eos_token_id=ends, pad_token_id=ends[-1], **options)
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


def with_weights_of(thinker: Any, output: Path) -> Any:
    """A copy of the thinker with the quantized Linears of an output."""
    import copy

    changed, quantized = copy.deepcopy(thinker), open_quantized(output)
    text = getattr(changed.model, "language_model", changed.model)
    for name in quantized.linears:
        linear = quantized.load_linear(name)
        layer, _, relative = name.removeprefix("thinker.model.layers.").partition(".")
        parent, _, child = relative.rpartition(".")
        owner = text.layers[int(layer)].get_submodule(parent)
        if linear.scheme.act_bits is None:
            getattr(owner, child).weight.data = dequantize(linear)
        else:
            setattr(owner, child, EmulatedLinear(linear, getattr(owner, child).bias))
    return changed


def test_float_tokens_equal_the_librarys(tiny: Path, library: Any) -> None:
    _, logits = library_answer(library, tiny)
    assert_greedy(answer(tiny).tokens, logits)


@pytest.mark.parametrize("kind", ["ascend", "int8", "awq", "packed", "symmetric"])
def test_quantized_tokens_equal_the_librarys_with_these_weights(
    outputs: dict[str, Path], tiny: Path, library: Any, kind: str
) -> None:
    with torch.inference_mode():
        _, logits = library_answer(with_weights_of(library, outputs[kind]), tiny)
    found = answer(outputs[kind]).tokens
    assert_greedy(found, logits)
    assert len(logits) == 12
    assert found != library_answer(library, tiny)[0]  # random weights: rounding changes the tokens


def test_text_is_streamed_in_pieces(outputs: dict[str, Path]) -> None:
    pieces: list[str] = []
    found = answer(outputs["awq"], on_text=pieces.append)
    assert "".join(pieces) == found.text != "" and len([piece for piece in pieces if piece]) > 1


def test_thinker_only_gives_equal_tokens(outputs: dict[str, Path], tmp_path: Path) -> None:
    export(outputs["awq"], tmp_path / "out", "compressed_tensors", thinker_only=True)
    assert answer(tmp_path / "out").tokens == answer(outputs["awq"]).tokens
    with pytest.raises(QuantError, match="holds no speech parts"):
        answer(tmp_path / "out", speech=tmp_path / "x.wav")


# --- media and speech ----------------------------------------------------------------------------------------

IMAGE, AUDIO, VIDEO = (
    str(DATA / f) for f in ("images/notice_zh.png", "audio/three_beeps.wav", "videos/cat_pan_zh.mp4")
)


def test_media(outputs: dict[str, Path]) -> None:
    with_media = answer(outputs["int8"], images=[IMAGE], audios=[AUDIO], max_new_tokens=4)
    assert len(with_media.tokens) == 4 and with_media.tokens != answer(outputs["int8"], max_new_tokens=4).tokens
    assert len(answer(outputs["awq"], "", videos=[VIDEO], max_new_tokens=2).tokens) == 2


def test_speech(outputs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "answer.wav"
    events: list[str] = []

    class Events(Progress):
        def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
            if phase == "speech":
                events.append(f"{phase} {done}/{total}")

        def doing(self, activity: str, share: float | None = None) -> None:
            events.append(activity)

    found = answer(
        outputs["awq"], speech=file, speaker="Ethan", max_new_tokens=2, progress=Events(),
        on_text=lambda piece: events.append("text"), on_text_end=lambda: events.append("end of text"),
    )  # fmt: skip
    first = events.index("end of text")  # the text is complete before the first code of sound
    assert set(events[:first]) == {"text"} and events[first + 1 : first + 3] == ["speech 0/1", "1 codes of sound"]
    assert events[-1] == "speech 1/1" and events[-2].endswith(" codes of sound") and "text" not in events[first:]
    assert found.tokens == answer(outputs["awq"], max_new_tokens=2).tokens and found.text
    with wave.open(str(file), "rb") as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (24000, 1, 2)
        frames = sound.getnframes()
        assert set(sound.readframes(frames)) != {0}
    assert frames > 0 and found.speech_seconds == frames / 24000 and found.speech == str(file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["answer.wav"]


def test_wav_by_hand(tmp_path: Path) -> None:
    write_wav(tmp_path / "x.wav", torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 24000)
    content = (tmp_path / "x.wav").read_bytes()
    assert content[44:] == b"\x00\x00\xff\x7f\x01\x80\xff\x7f\x00\x40"
    for samples, message in ((torch.zeros(0), "produced no audio"), (torch.tensor([float("nan")]), "NaN or Inf")):
        with pytest.raises(QuantError, match=message):
            write_wav(tmp_path / "y.wav", samples, 24000)
    assert not (tmp_path / "y.wav").exists()


# --- arithmetic and memory -----------------------------------------------------------------------------------


def int8_linear() -> tuple[QuantizedLinear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((24, 40), (1, 5, 40), (24,)))
    return quantize_weight(weight, QuantScheme(8, 8)), x, bias


def test_int8_activations_in_float32_equal_quantized_matmul() -> None:
    linear, x, bias = int8_linear()
    found = RoundingLinear(linear, bias, torch.float32, torch.device("cpu"))(x)
    assert torch.equal(found, quantized_matmul(x, linear, bias))


def test_int8_activations_in_bfloat16_are_close() -> None:
    linear, x, bias = int8_linear()
    x = x.bfloat16()
    found = RoundingLinear(linear, bias, torch.bfloat16, torch.device("cpu"))(x)
    exact = quantized_matmul(x.float(), linear, bias)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.01 * exact.abs().max()


def test_dequantizing_by_row_blocks_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msmodelslim_omni.numerics.arithmetic._BLOCK_ELEMENTS", 256)
    scheme = QuantScheme(4, None, group_size=32, symmetric=False)
    linear = quantize_weight(torch.randn(20, 64), scheme)
    assert torch.equal(dequantize_by_rows(linear, torch.float32), dequantize(linear))
    assert torch.equal(dequantize_by_rows(linear, torch.bfloat16), dequantize(linear).bfloat16())


def test_dtype_depends_on_available_memory(outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEADROOM", 0)
    source, progress = open_source(outputs["int8"]), RecordedProgress()
    parts = {"talker": torch.float32, "token2wav": torch.float32, "thinker": torch.float32}
    for available, dtype in ((40 << 20, torch.float32), (20 << 20, torch.bfloat16)):
        monkeypatch.setattr(module, "available_memory", lambda available=available: available)
        model = open_model(source, True)
        fill_model(model, source, CPU, progress)
        found = {name: p.dtype for name, p in model.module.named_parameters()}
        assert {name: found[name] for name in found} == {
            name: torch.float32 if name.startswith("token2wav") else dtype for name in found
        }
        assert not [name for name, tensor in model.module.state_dict().items() if tensor.is_meta]
    assert parts.keys() == {name.split(".")[0] for name in found}
    assert progress.lines[0].startswith("cpu (as requested), float32: the weights take 27.")
    assert progress.lines[1].startswith("cpu (as requested), bfloat16: the weights take 15.")
    assert "on disk; int8 activations are emulated" in progress.lines[0]
    assert len(answer(outputs["int8"], max_new_tokens=3).tokens) == 3  # in bfloat16
    monkeypatch.setattr(module, "available_memory", lambda: 10 << 20)
    with pytest.raises(QuantError, match=r"10\.00 MiB of memory are available"):
        answer(outputs["int8"])


def test_available_memory_is_plausible() -> None:
    available = module.available_memory()
    assert available is None or 1 << 20 < available < 1 << 50


# --- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ["nothing.png"]}, "image '.*nothing.png' does not exist"),
        ({"audios": [IMAGE]}, "is no audio; its content can be given as image"),
        ({"videos": ["https://example.org/x.mp4"]}, "is a URL; only local files are supported"),
        ({"text": ""}, "the prompt is empty"),
        ({"text": "  "}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1, "speech": "x.wav"}, "max_new_tokens is 1"),
        ({"speech": "x.wav", "speaker": "Chelsea"}, "unknown speaker 'Chelsea'. Known: Chelsie, Ethan. Did you mean"),
        ({"speech": "x.mp3"}, "is not a .wav file"),
        ({"speech": "/nowhere/x.wav"}, "cannot be written"),
    ],
)  # fmt: skip
def test_faults_are_found_before_the_weights_are_loaded(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(module, "fill_model", None)  # a call would fail
    with pytest.raises(QuantError, match=message):
        answer(outputs["awq"], **options)


def test_paths_that_are_not_checkpoints_are_refused(tmp_path: Path, outputs: dict[str, Path]) -> None:
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "has no config.json")):
        with pytest.raises(QuantError, match=message):
            answer(path)
    broken = edited(outputs["awq"], tmp_path / "broken", without(f"{LINEAR}.qzeros"))
    with pytest.raises(QuantError, match=f"{LINEAR}: qzeros is missing"):
        answer(broken)


def nan_in(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = float("nan")

    return change


def test_wrong_weights_are_named(outputs: dict[str, Path], tmp_path: Path) -> None:
    norm = "thinker.visual.merger.ln_q.weight"
    for number, (change, message) in enumerate(
        [
            (nan_in(norm), f"{norm}.* NaN or Inf|NaN or Inf.*{norm}"),
            (nan_in(f"{LINEAR}.scales"), f"{LINEAR}: its scales hold NaN"),
            (without(norm), f"tensor {norm} is missing"),
            (replaced(norm, torch.ones(3)), f"{norm} has shape .3., config.json implies .128."),
        ]
    ):
        with pytest.raises(QuantError, match=message):
            answer(edited(outputs["awq"], tmp_path / str(number), change))


def test_a_bad_voice_file_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    target = Path(shutil.copytree(outputs["awq"], tmp_path / "copy"))
    voices = target / "spk_dict.pt"
    for content, message in ((b"no pickle", "cannot be read"), (None, "has no spk_dict.pt")):
        voices.unlink()
        if content is not None:
            voices.write_bytes(content)
        with pytest.raises(QuantError, match=message):
            answer(target, speech=tmp_path / "x.wav")
    torch.save({"Chelsie": {"bos_token": 1}}, voices)
    with pytest.raises(QuantError, match="has no voices"):
        answer(target, speech=tmp_path / "x.wav")
    assert len(answer(target, max_new_tokens=1).tokens) == 1  # text needs no voice


def test_a_config_with_another_shape_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    target = Path(shutil.copytree(outputs["awq"], tmp_path / "copy"))
    edit_config(target, lambda config: config["thinker_config"]["vision_config"].update(num_heads="many"))
    with pytest.raises(QuantError, match="transformers cannot build this model"):
        answer(target)


# --- the command ---------------------------------------------------------------------------------------------


def test_command_prints_the_answer(outputs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["generate", outputs["awq"], "--text", TEXT, "--device", "cpu"]
    done = command(*arguments, "--max-new-tokens", 12).done()
    assert done.out == answer(outputs["awq"]).text + "\n"
    assert "float32: the weights take" in done.err and "12 tokens in" in done.err
    assert "dequantized" in done.err and "int8" not in done.err
    assert "is a URL" in command(*arguments, "--image", "http://x/y.png").fault()
    assert "unknown device 'abacus'" in command(*arguments, "--device", "abacus").fault()
    assert command(*arguments, "--max_new_tokens", 0).code == 2
