"""The inputs of the decoder layers, against the full model of transformers fed by its standard processing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from library_videos import use_in_library
from librosa_uncompiled import librosa
from omni_layers import difference, float_weights, open_stream

from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.models.inputs import MODALITIES, LayerInput, MediaLimits, MediaProcessor, ModelInputs
from msmodelslim_omni.run.preparation import prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.statistics.capture import run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

DATA = Path(__file__).parents[2] / "lab_calib" / "calibVideos"
SILENT_VIDEO, VIDEO_WITH_AUDIO = str(DATA / "videos/bouncing ball.mp4"), str(DATA / "videos/cat_pan_zh.mp4")
IMAGE, OTHER_IMAGE = str(DATA / "images/notice_zh.png"), str(DATA / "images/coffee cup.jpg")
AUDIO, OTHER_AUDIO = str(DATA / "audio/three_beeps.wav"), str(DATA / "audio/letters.wav")

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
CONVERSATION = [
    {"role": "user", "content": [{"type": "audio", "audio": AUDIO}, {"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "video", "video": SILENT_VIDEO}]},
    {"role": "assistant", "content": "A notice and a ball."},
]

# Entries of an index, and whether the audio track of the video is used.
MIXES: dict[str, tuple[dict[str, Any], bool]] = {
    "text": ({"text": "Why is the sky blue?"}, False),
    "answered": ({"text": "三加五等于几？", "answer": "八。", "system": "Be brief."}, False),
    "image": ({"image": IMAGE, "text": "Read it."}, False),
    "two images": ({"image": [IMAGE, OTHER_IMAGE], "text": "Compare."}, False),
    "audio": ({"audio": AUDIO, "text": "How many?"}, False),
    "two audio files": ({"audio": [AUDIO, OTHER_AUDIO], "text": "Which is longer?"}, False),
    "silent video": ({"video": SILENT_VIDEO, "text": "What moves?"}, False),
    "video, audio track off": (
        {"video": VIDEO_WITH_AUDIO, "text": "What moves?", "use_audio_in_video": False},
        False,
    ),
    "video, audio track on": ({"video": VIDEO_WITH_AUDIO, "text": "What is said?", "use_audio_in_video": True}, True),
    "video, audio track by default": ({"video": VIDEO_WITH_AUDIO, "text": "What is said?"}, True),
    "everything, audio track off": (
        {
            "image": IMAGE,
            "audio": AUDIO,
            "video": VIDEO_WITH_AUDIO,
            "text": "Describe.",
            "use_audio_in_video": False,
        },
        False,
    ),
    "everything": ({"image": IMAGE, "audio": AUDIO, "video": VIDEO_WITH_AUDIO, "text": "Describe."}, True),
    "conversation": ({"messages": CONVERSATION}, False),
}


TOWER_BYTES = 200_000  # memory for some of the towers' Linears, so that the others are read from disk


# --- this package --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def stem(checkpoint: Checkpoint) -> omni.OmniStem:
    return omni.open_stem(checkpoint, torch.device("cpu"), TOWER_BYTES)


def open_media(tiny: Path, max_tokens: int = 8192, max_pixels: int | None = None) -> MediaProcessor:
    return omni.open_media_processor(tiny, MediaLimits(max_tokens, max_pixels, 2.0), False)


def model_inputs(entry: dict[str, Any], media: MediaProcessor, folder: Path) -> ModelInputs:
    """The model inputs of one entry: index, checks, decoding and processor, as in the pipeline."""
    index = folder / "index.jsonl"
    index.write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
    (sample,) = load_calib_set(str(index), "Describe.", omni.model_spec("Qwen2.5-Omni-7B")).samples
    return prepare_sample(sample, media)


def layer_states(checkpoint: Checkpoint, first: LayerInput) -> Iterator[torch.Tensor]:
    """Yield the input of every decoder layer and the output of the last, with one layer in memory at a time."""
    hidden = first.hidden
    for index in range(omni.num_layers(checkpoint.config)):
        yield hidden
        layer = omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))
        hidden = run_layer(layer, LayerInput(hidden, first.arguments))
    yield hidden


# --- transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_processor(tiny: Path) -> Any:
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.from_pretrained(tiny)


@pytest.fixture(scope="module")
def thinker(tiny: Path) -> torch.nn.Module:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def as_messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of an index entry in the form that users of transformers write."""
    if "messages" in entry:
        turns = [{"role": "system", "content": SYSTEM}, *entry["messages"]]
        return [
            {**t, "content": [{"type": "text", "text": t["content"]}]} if isinstance(t["content"], str) else t
            for t in turns
        ]
    parts = []
    for kind in ("image", "audio", "video"):
        files = entry.get(kind, [])
        parts += [{"type": kind, kind: file} for file in ([files] if isinstance(files, str) else files)]
    system = [{"type": "text", "text": entry.get("system", SYSTEM)}]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [*parts, {"type": "text", "text": entry["text"]}]},
    ]
    if "answer" in entry:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": entry["answer"]}]})
    return messages


def audio_track(path: str) -> np.ndarray:
    """The audio track of a video as librosa.load returns it, decoded without an ffmpeg program."""
    with av.open(path) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [out for f in container.decode(audio=0) for out in resampler.resample(f)]
        frames += resampler.resample(None)
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    return librosa.resample(samples, orig_sr=rate, target_sr=16_000)


def load_media(messages: list[dict[str, Any]], use_audio: bool) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Call process_mm_info. If no ffmpeg program is installed, decode the audio tracks of videos here."""
    from qwen_omni_utils import process_mm_info

    use_in_library()

    if not use_audio or shutil.which("ffmpeg"):
        return process_mm_info(messages, use_audio_in_video=use_audio, return_video_kwargs=True)
    _, images, videos, options = process_mm_info(messages, use_audio_in_video=False, return_video_kwargs=True)
    audio: list[np.ndarray] = []
    for part in (p for m in messages for p in m["content"]):
        if part["type"] == "audio":
            single = [{"role": "user", "content": [part]}]
            audio += process_mm_info(single, use_audio_in_video=False)[0]
        elif part["type"] == "video":
            audio.append(audio_track(part["video"]))
    return audio, images, videos, options


def library_inputs(entry: dict[str, Any], use_audio: bool, processor: Any, **video_options: Any) -> dict[str, Any]:
    """The standard processing: chat template, process_mm_info, processor."""
    messages = as_messages(entry)
    text = processor.apply_chat_template(
        messages, add_generation_prompt=messages[-1]["role"] != "assistant", tokenize=False
    )
    audio, images, videos, options = load_media(messages, use_audio)
    if options.get("fps"):
        video_options["fps"] = options["fps"][0]
    return dict(
        processor(
            text=text,
            audio=audio,
            images=images,
            videos=videos,
            return_tensors="pt",
            padding=True,
            **audio_track_options(messages, use_audio, video_options),
        )
    )


def audio_track_options(messages: list[dict[str, Any]], use_audio: bool, videos: dict[str, Any]) -> dict[str, Any]:
    """The processor's options, by version of transformers, when the audio includes the tracks of videos."""
    import transformers

    if transformers.__version__.startswith("4."):
        return {"videos_kwargs": {**videos, "use_audio_in_video": use_audio}}
    options: dict[str, Any] = {"videos_kwargs": videos} if videos else {}
    if use_audio:
        with_audio = [p["type"] for m in messages for p in m["content"] if p["type"] in ("audio", "video")]
        video = iter(range(len(with_audio)))
        indices = [next(video) if kind == "video" else None for kind in with_audio]
        options |= {"load_audio_from_video": True, "audio_from_video_indices": indices}
    return options


def full_model_states(thinker: Any, inputs: dict[str, Any], use_audio: bool) -> list[torch.Tensor]:
    """The input of every decoder layer and the output of the last, in the plain forward of transformers."""
    model = getattr(thinker.model, "language_model", thinker.model)
    states: list[torch.Tensor] = []

    def record_input(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    def record_output(_module: Any, _arguments: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_pre_hook(record_input, with_kwargs=True) for layer in model.layers]
    hooks.append(model.layers[-1].register_forward_hook(record_output))
    try:
        with torch.inference_mode():
            thinker(**inputs, use_audio_in_video=use_audio, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states


# --- comparisons ---------------------------------------------------------------------------------------------


def assert_same_inputs(inputs: ModelInputs, expected: dict[str, Any], use_audio: bool) -> None:
    assert inputs.use_audio_in_video is use_audio
    assert set(inputs.tensors) == set(expected)
    for name, value in expected.items():
        tensor = torch.as_tensor(value)
        if name == "input_features":
            # The ffmpeg program converts the audio track of a video to 16-bit integers.
            tolerance = 2e-2 if use_audio else 1e-5
            assert difference(inputs.tensors[name], tensor) < tolerance
        else:
            assert torch.equal(inputs.tensors[name], tensor), name


@pytest.mark.parametrize("mix", MIXES)
def test_layer_inputs_equal_the_full_model(
    mix: str,
    tiny: Path,
    checkpoint: Checkpoint,
    stem: omni.OmniStem,
    hf_processor: Any,
    thinker: torch.nn.Module,
    tmp_path: Path,
) -> None:
    entry, use_audio = MIXES[mix]
    inputs = model_inputs(entry, open_media(tiny), tmp_path)
    reference = library_inputs(entry, use_audio, hf_processor)
    assert_same_inputs(inputs, reference, use_audio)

    # Decoders of audio tracks differ slightly. With the same audio features, nothing else may differ.
    same_audio = {**reference, **{k: v for k, v in inputs.tensors.items() if use_audio and k == "input_features"}}
    expected = full_model_states(thinker, same_audio, use_audio)
    actual = list(layer_states(checkpoint, stem.layer_input(inputs)))
    assert len(actual) == len(expected) == omni.num_layers(checkpoint.config) + 1
    for layer, (state, expected_state) in enumerate(zip(actual, expected, strict=True)):
        assert difference(state, expected_state) < 1e-5, f"layer {layer}"


def test_modalities_match_the_placeholder_tokens(tiny: Path, hf_processor: Any, tmp_path: Path) -> None:
    entry, use_audio = MIXES["everything"]
    inputs = model_inputs(entry, open_media(tiny), tmp_path)
    counts = dict(zip(MODALITIES, inputs.modality.bincount(minlength=4).tolist(), strict=True))
    reference = library_inputs(entry, use_audio, hf_processor)
    merged = hf_processor.image_processor.merge_size**2
    assert counts["image"] == int(reference["image_grid_thw"].prod()) // merged
    assert counts["video"] == int(reference["video_grid_thw"].prod()) // merged
    # The audio tower halves the number of frames twice: in a convolution and by pooling.
    frames = reference["feature_attention_mask"].sum(-1)
    assert counts["audio"] == int((((frames - 1) // 2 + 1 - 2) // 2 + 1).sum())
    assert sum(counts.values()) == reference["input_ids"].shape[1]


def test_audio_track_changes_the_layer_inputs(tiny: Path, stem: omni.OmniStem, tmp_path: Path) -> None:
    media = open_media(tiny)
    with_audio = model_inputs(MIXES["video, audio track on"][0], media, tmp_path)
    without_audio = model_inputs({**MIXES["video, audio track on"][0], "use_audio_in_video": False}, media, tmp_path)
    assert "input_features" in with_audio.tensors and "input_features" not in without_audio.tensors
    # Audio is interleaved with the frames in time, so the flag must also change the positions.
    flag_off = ModelInputs(with_audio.tensors, False, with_audio.modality)
    rotary = stem.layer_input(with_audio).arguments["position_embeddings"][0]
    assert not torch.equal(rotary, stem.layer_input(flag_off).arguments["position_embeddings"][0])


def test_max_pixels_limits_images_and_videos(tiny: Path, hf_processor: Any, tmp_path: Path) -> None:
    limit = 32 * 28 * 28
    entry = {"image": OTHER_IMAGE, "video": SILENT_VIDEO, "text": "Describe."}
    inputs = model_inputs(entry, open_media(tiny, max_pixels=limit), tmp_path)
    frame_pixels = inputs.tensors["video_grid_thw"][0, 1:].prod() * 14 * 14
    assert frame_pixels <= limit
    assert inputs.tensors["image_grid_thw"][0].prod() * 14 * 14 <= limit
    unlimited = model_inputs(entry, open_media(tiny), tmp_path)
    assert unlimited.tensors["video_grid_thw"][0].prod() > inputs.tensors["video_grid_thw"][0].prod()


def test_videos_are_read_without_decord_or_torchcodec(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default installation has neither, and torchvision no longer reads videos."""
    from qwen_omni_utils.v2_5 import vision_process

    entry = MIXES["video, audio track on"][0]
    expected = model_inputs(entry, open_media(tiny), tmp_path)
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", "torchvision")
    vision_process.get_video_reader_backend.cache_clear()
    try:
        actual = model_inputs(entry, open_media(tiny), tmp_path)
    finally:
        vision_process.get_video_reader_backend.cache_clear()
    for name, tensor in expected.tensors.items():
        if name == "pixel_values_videos":  # decoders differ in the last bit of a color
            assert difference(actual.tensors[name], tensor) < 0.02
        else:
            assert torch.equal(actual.tensors[name], tensor), name


def test_embedding_rows_are_read_unchanged(
    checkpoint: Checkpoint, stem: omni.OmniStem, thinker: torch.nn.Module
) -> None:
    table = thinker.get_input_embeddings().weight
    ids = torch.tensor([[0, 17, table.shape[0] - 1, 17, 5]])
    inputs = ModelInputs(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, torch.zeros(5, dtype=torch.int8)
    )
    assert torch.equal(stem.layer_input(inputs).hidden[0], table[ids[0]])
    assert torch.equal(checkpoint.load_rows("thinker.model.embed_tokens.weight", [3, 1]).float(), table[[3, 1]])


# --- the stored stems ----------------------------------------------------------------------------------------


def test_stored_stems_are_reused(tiny: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the sample whose file is missing is run again."""
    prepared = prepare(QuantRequest(tiny, device="cpu", dataset=str(dataset)))
    open_stream(prepared, tmp_path / "work")
    before = {f.name: f.read_bytes() for f in (tmp_path / "work" / "stem").iterdir()}
    (tmp_path / "work" / "stem" / "000001.safetensors").unlink()
    calls: list[str] = []
    monkeypatch.setattr(omni.OmniStem, "layer_input", counted(omni.OmniStem.layer_input, calls), raising=True)
    open_stream(prepared, tmp_path / "work")
    assert len(calls) == 1
    assert {f.name: f.read_bytes() for f in (tmp_path / "work" / "stem").iterdir()} == before


def counted(function: Any, calls: list[str]) -> Any:
    """The function, with every call recorded in `calls`."""

    def call(*arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    return call
