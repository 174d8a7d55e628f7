"""What reaches each decoder layer, against the library's own whole model fed by the standard flow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny_layer
import torch
from command import int4_recipe, write_index
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from msmodelslim_omni.calibration.layer_probe import LayerProbe
from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.calibration.stems import prepare_stems
from msmodelslim_omni.calibration.stream import CalibrationStream
from msmodelslim_omni.calibration.token_roles import choose_held_out, choose_probe_samples, token_importance
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.models.inputs import MODALITIES, LayerInput, MediaLimits, MediaProcessor, ModelInputs
from msmodelslim_omni.numerics.arithmetic import quantize_weight
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.run.emulation import emulate
from msmodelslim_omni.run.preparation import Prepared, prepare
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.runtime.progress import Progress
from msmodelslim_omni.statistics.capture import run_layer
from msmodelslim_omni.storage.checkpoint import Checkpoint, open_checkpoint

DATA = Path(__file__).parents[2] / "lab_calib" / "calibVideos"
SILENT, WITH_SOUND = str(DATA / "videos/bouncing ball.mp4"), str(DATA / "videos/cat_pan_zh.mp4")
OTHER_SOUND = str(DATA / "videos/ball_with_clicks.mp4")
IMAGE, OTHER_IMAGE = str(DATA / "images/notice_zh.png"), str(DATA / "images/coffee cup.jpg")
SOUND, OTHER_SOUND_FILE = str(DATA / "audio/three_beeps.wav"), str(DATA / "audio/letters.wav")

SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
CONVERSATION = [
    {"role": "user", "content": [{"type": "audio", "audio": SOUND}, {"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "video", "video": SILENT}]},
    {"role": "assistant", "content": "A notice and a ball."},
]

# Each mix as an index has it, and whether the clip's sound is heard.
MIXES: dict[str, tuple[dict[str, Any], bool]] = {
    "text": ({"text": "Why is the sky blue?"}, False),
    "answered": ({"text": "三加五等于几？", "answer": "八。", "system": "Be brief."}, False),
    "image": ({"image": IMAGE, "text": "Read it."}, False),
    "two images": ({"image": [IMAGE, OTHER_IMAGE], "text": "Compare."}, False),
    "audio": ({"audio": SOUND, "text": "How many?"}, False),
    "two sounds": ({"audio": [SOUND, OTHER_SOUND_FILE], "text": "Which is longer?"}, False),
    "silent video": ({"video": SILENT, "text": "What moves?"}, False),
    "video, sound off": (
        {"video": WITH_SOUND, "text": "What moves?", "use_audio_in_video": False},
        False,
    ),
    "video, sound on": ({"video": WITH_SOUND, "text": "What is said?", "use_audio_in_video": True}, True),
    "video, sound by default": ({"video": WITH_SOUND, "text": "What is said?"}, True),
    "everything, sound off": (
        {
            "image": IMAGE,
            "audio": SOUND,
            "video": WITH_SOUND,
            "text": "Describe.",
            "use_audio_in_video": False,
        },
        False,
    ),
    "everything": ({"image": IMAGE, "audio": SOUND, "video": WITH_SOUND, "text": "Describe."}, True),
    "conversation": ({"messages": CONVERSATION}, False),
}


HELD = 200_000  # bytes of the towers' Linears in memory: some of them, so that the others are read


# --- our side ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def stem(checkpoint: Checkpoint) -> omni.OmniStem:
    return omni.open_stem(checkpoint, torch.device("cpu"), HELD)


def open_media(tiny: Path, max_tokens: int = 8192, max_pixels: int | None = None) -> MediaProcessor:
    return omni.open_media_processor(tiny, MediaLimits(max_tokens, max_pixels, 2.0), False)


def our_inputs(entry: dict[str, Any], media: MediaProcessor, folder: Path) -> ModelInputs:
    """One entry through index, checks, decoding and processor, as the pipeline takes it."""
    index = folder / "index.jsonl"
    index.write_text(json.dumps(entry, ensure_ascii=False), encoding="utf-8")
    (sample,) = load_calib_set(str(index), "Describe.", omni.model_spec("Qwen2.5-Omni-7B")).samples
    return prepare_sample(sample, media)


def streamed(checkpoint: Checkpoint, reached: LayerInput) -> Iterator[torch.Tensor]:
    """The input of every decoder layer, and the output of the last: one layer in memory at a time."""
    hidden = reached.hidden
    for index in range(omni.num_layers(checkpoint.config)):
        yield hidden
        layer = omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))
        hidden = run_layer(layer, LayerInput(hidden, reached.arguments))
    yield hidden


def float_weights(checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
    prefix = omni.LAYER_PREFIX.format(index=index)
    return {
        name.removeprefix(prefix): checkpoint.load(name).float()
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }


# --- the library's side --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_processor(tiny: Path) -> Any:
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.from_pretrained(tiny)


@pytest.fixture(scope="module")
def thinker(tiny: Path) -> torch.nn.Module:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def as_messages(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation that an entry of the index stands for, as a user of transformers writes it."""
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


def sound_of(path: str) -> np.ndarray:
    """A clip's sound as librosa would give it, without an ffmpeg program."""
    import librosa

    with av.open(path) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [out for f in container.decode(audio=0) for out in resampler.resample(f)]
        frames += resampler.resample(None)
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    return librosa.resample(samples, orig_sr=rate, target_sr=16_000)


def load_media(messages: list[dict[str, Any]], heard: bool) -> tuple[Any, Any, Any, dict[str, Any]]:
    """process_mm_info; where no ffmpeg program is there for a clip's sound, the test decodes it itself."""
    from qwen_omni_utils import process_mm_info

    if not heard or shutil.which("ffmpeg"):
        return process_mm_info(messages, use_audio_in_video=heard, return_video_kwargs=True)
    _, images, videos, options = process_mm_info(messages, use_audio_in_video=False, return_video_kwargs=True)
    audio: list[np.ndarray] = []
    for part in (p for m in messages for p in m["content"]):
        if part["type"] == "audio":
            alone = [{"role": "user", "content": [part]}]
            audio += process_mm_info(alone, use_audio_in_video=False)[0]
        elif part["type"] == "video":
            audio.append(sound_of(part["video"]))
    return audio, images, videos, options


def library_inputs(entry: dict[str, Any], heard: bool, processor: Any, **video_options: Any) -> dict[str, Any]:
    """The standard flow: chat template, process_mm_info, processor."""
    messages = as_messages(entry)
    text = processor.apply_chat_template(
        messages, add_generation_prompt=messages[-1]["role"] != "assistant", tokenize=False
    )
    audio, images, videos, options = load_media(messages, heard)
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
            **sound_options(messages, heard, video_options),
        )
    )


def sound_options(messages: list[dict[str, Any]], heard: bool, videos: dict[str, Any]) -> dict[str, Any]:
    """How each version of transformers is told that the clips' sound is among the audio."""
    import transformers

    if transformers.__version__.startswith("4."):
        return {"videos_kwargs": {**videos, "use_audio_in_video": heard}}
    options: dict[str, Any] = {"videos_kwargs": videos} if videos else {}
    if heard:
        sounding = [p["type"] for m in messages for p in m["content"] if p["type"] in ("audio", "video")]
        clip = iter(range(len(sounding)))
        indices = [next(clip) if kind == "video" else None for kind in sounding]
        options |= {"load_audio_from_video": True, "audio_from_video_indices": indices}
    return options


def whole_model(thinker: Any, inputs: dict[str, Any], heard: bool) -> list[torch.Tensor]:
    """What enters every decoder layer, and what leaves the last, in the library's plain forward."""
    model = getattr(thinker.model, "language_model", thinker.model)
    seen: list[torch.Tensor] = []

    def entering(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments[0] if arguments else keywords["hidden_states"]).clone())

    def leaving(_module: Any, _arguments: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in model.layers]
    hooks.append(model.layers[-1].register_forward_hook(leaving))
    try:
        with torch.inference_mode():
            thinker(**inputs, use_audio_in_video=heard, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# --- comparisons ---------------------------------------------------------------------------------------------


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    assert mine.shape == theirs.shape
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def assert_same_inputs(mine: ModelInputs, theirs: dict[str, Any], heard: bool) -> None:
    assert mine.use_audio_in_video is heard
    assert set(mine.tensors) == set(theirs)
    for name, value in theirs.items():
        tensor = torch.as_tensor(value)
        if name == "input_features":
            # A clip's sound passes through 16-bit integers on its way through the ffmpeg program.
            tolerance = 2e-2 if heard else 1e-5
            assert difference(mine.tensors[name], tensor) < tolerance
        else:
            assert torch.equal(mine.tensors[name], tensor), name


@pytest.mark.parametrize("mix", MIXES)
def test_layer_inputs_equal_the_whole_model(
    mix: str,
    tiny: Path,
    checkpoint: Checkpoint,
    stem: omni.OmniStem,
    hf_processor: Any,
    thinker: torch.nn.Module,
    tmp_path: Path,
) -> None:
    entry, heard = MIXES[mix]
    inputs = our_inputs(entry, open_media(tiny), tmp_path)
    theirs = library_inputs(entry, heard, hf_processor)
    assert_same_inputs(inputs, theirs, heard)

    # The features of a clip's sound differ by how it was decoded; what follows must not differ any more.
    plain = {**theirs, **{k: v for k, v in inputs.tensors.items() if heard and k == "input_features"}}
    expected = whole_model(thinker, plain, heard)
    found = list(streamed(checkpoint, stem.layer_input(inputs)))
    assert len(found) == len(expected) == omni.num_layers(checkpoint.config) + 1
    for layer, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        assert difference(mine, wanted) < 1e-5, f"layer {layer}"


def test_modalities_are_those_of_the_placeholders(tiny: Path, hf_processor: Any, tmp_path: Path) -> None:
    entry, heard = MIXES["everything"]
    inputs = our_inputs(entry, open_media(tiny), tmp_path)
    counts = dict(zip(MODALITIES, inputs.modality.bincount(minlength=4).tolist(), strict=True))
    theirs = library_inputs(entry, heard, hf_processor)
    merged = hf_processor.image_processor.merge_size**2
    assert counts["image"] == int(theirs["image_grid_thw"].prod()) // merged
    assert counts["video"] == int(theirs["video_grid_thw"].prod()) // merged
    # The audio tower halves the frames twice: once in a convolution, once by pooling.
    frames = theirs["feature_attention_mask"].sum(-1)
    assert counts["audio"] == int((((frames - 1) // 2 + 1 - 2) // 2 + 1).sum())
    assert sum(counts.values()) == theirs["input_ids"].shape[1]


def test_sound_of_the_clip_changes_what_the_layers_see(tiny: Path, stem: omni.OmniStem, tmp_path: Path) -> None:
    media = open_media(tiny)
    on = our_inputs(MIXES["video, sound on"][0], media, tmp_path)
    off = our_inputs({**MIXES["video, sound on"][0], "use_audio_in_video": False}, media, tmp_path)
    assert "input_features" in on.tensors and "input_features" not in off.tensors
    # Sound is interleaved with the frames in time: the flag must reach the positions too.
    forgotten = ModelInputs(on.tensors, False, on.modality)
    rotary = stem.layer_input(on).arguments["position_embeddings"][0]
    assert not torch.equal(rotary, stem.layer_input(forgotten).arguments["position_embeddings"][0])


def test_max_pixels_reaches_fetching_and_processor(tiny: Path, hf_processor: Any, tmp_path: Path) -> None:
    limit = 32 * 28 * 28
    entry = {"image": OTHER_IMAGE, "video": SILENT, "text": "Describe."}
    inputs = our_inputs(entry, open_media(tiny, max_pixels=limit), tmp_path)
    frame_pixels = inputs.tensors["video_grid_thw"][0, 1:].prod() * 14 * 14
    assert frame_pixels <= limit
    assert inputs.tensors["image_grid_thw"][0].prod() * 14 * 14 <= limit
    unlimited = our_inputs(entry, open_media(tiny), tmp_path)
    assert unlimited.tensors["video_grid_thw"][0].prod() > inputs.tensors["video_grid_thw"][0].prod()


def test_clips_are_read_without_decord_or_torchcodec(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain installation has neither, and torchvision no longer reads video."""
    from qwen_omni_utils.v2_5 import vision_process

    entry = MIXES["video, sound on"][0]
    usual = our_inputs(entry, open_media(tiny), tmp_path)
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", "torchvision")
    vision_process.get_video_reader_backend.cache_clear()
    try:
        plain = our_inputs(entry, open_media(tiny), tmp_path)
    finally:
        vision_process.get_video_reader_backend.cache_clear()
    for name, tensor in usual.tensors.items():
        if name == "pixel_values_videos":  # decoders differ in the last bit of a colour
            assert difference(plain.tensors[name], tensor) < 0.02
        else:
            assert torch.equal(plain.tensors[name], tensor), name


def test_embedding_rows_come_from_disk_unchanged(
    checkpoint: Checkpoint, stem: omni.OmniStem, thinker: torch.nn.Module
) -> None:
    table = thinker.get_input_embeddings().weight
    ids = torch.tensor([[0, 17, table.shape[0] - 1, 17, 5]])
    inputs = ModelInputs(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, False, torch.zeros(5, dtype=torch.int8)
    )
    assert torch.equal(stem.layer_input(inputs).hidden[0], table[ids[0]])
    assert torch.equal(checkpoint.load_rows("thinker.model.embed_tokens.weight", [3, 1]).float(), table[[3, 1]])


# --- the stream ----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tiny: Path, dataset: Path) -> Prepared:
    return prepare(QuantRequest(tiny, device="cpu", dataset=str(dataset)))


def open_stream(prepared: Prepared, folder: Path) -> CalibrationStream:
    folder.mkdir(exist_ok=True)
    assert prepared.calib is not None
    device = torch.device("cpu")
    stems = prepare_stems(prepared.plan, prepared.calib, folder, device, Progress())
    stream = CalibrationStream(prepared.plan, stems, folder, device)
    stream.start_at(0)
    return stream


def test_an_unquantized_layer_has_no_error(prepared: Prepared, tmp_path: Path) -> None:
    stream = open_stream(prepared, tmp_path / "work")
    checkpoint = prepared.plan.checkpoint
    for index in range(2):
        module = omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))
        seen = stream.capture(index, module, prepared.plan.layer_spec)
        assert sum(stream.stems.tokens_by_modality().values()) == int(seen.stats["qkv"].count.sum())
        assert seen.stats["qkv"].grams == {}  # no processor of this recipe asks for them
        error = stream.advance(index, partial(float_layer, prepared, index), seen.probe.errors(module))
        assert error.overall == 0.0
        assert error.by_modality == dict.fromkeys(("text", "image", "audio", "video"), 0.0)


def test_the_next_layer_sees_the_quantized_layers_output(prepared: Prepared, tmp_path: Path) -> None:
    plan = prepared.plan
    work = tmp_path / "work"
    stream = open_stream(prepared, work)
    weights = float_weights(plan.checkpoint, 0)
    module = omni.build_layer(plan.checkpoint.config, 0, weights)
    seen = stream.capture(0, module, plan.layer_spec)
    quantized = {
        name: quantize_weight(weights[f"{name}.weight"], QuantScheme(8, 8)) for name in plan.layer_spec.linears
    }
    emulate(module, quantized, weights)
    error = stream.advance(0, lambda: module, seen.probe.errors(module))
    stored = load_file(work / "hidden-0001.safetensors")

    fake = omni.build_layer(plan.checkpoint.config, 0, rounded_per_channel(weights))
    for linear in plan.layer_spec.linears:
        fake.get_submodule(linear).register_forward_pre_hook(round_per_token)
    exact = omni.build_layer(plan.checkpoint.config, 0, weights)
    missed = signal = 0.0
    differences = []
    for number, hidden in enumerate(stored.values()):
        inputs = stem_inputs(work / "stem" / f"{number:06d}.safetensors")
        expected = run_layer(fake, inputs)
        wanted = run_layer(exact, inputs)
        differences.append(difference(hidden, expected))
        # Where an activation lies halfway between two integers, it depends on the processor to which it falls.
        assert differences[-1] < 0.01 * difference(wanted, expected)
        missed += float((expected - wanted).double().square().sum())
        signal += float((wanted - inputs.hidden).double().square().sum())
    assert sorted(differences)[len(differences) // 2] < 1e-5
    assert error.overall == pytest.approx((missed / signal) ** 0.5, rel=1e-3)
    assert error.overall > 1e-3


def rounded_per_channel(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer's weights as 127 steps of each output channel's largest."""
    rounded = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2:
            step = weight.abs().amax(1, keepdim=True) / 127
            rounded[name] = (weight / step).round() * step
    return rounded


def round_per_token(_module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    step = arguments[0].abs().amax(-1, keepdim=True) / 127
    return ((arguments[0] / step).round() * step,)


def stem_inputs(path: Path) -> LayerInput:
    """What the stream stored of one sample before the first layer."""
    tensors = load_file(path)
    arguments: dict[str, Any] = {}
    for name in sorted(tensors):
        if name.startswith("argument."):
            _, key, *place = name.split(".")
            arguments[key] = (*arguments.get(key, ()), tensors[name]) if place else tensors[name]
    return LayerInput(tensors["hidden"], arguments)


def test_a_part_of_the_samples_is_kept_for_a_resumed_run(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stem has stored is not run again, and a lost sample alone is."""
    open_stream(prepared, tmp_path / "work")
    before = {f.name: f.read_bytes() for f in (tmp_path / "work" / "stem").iterdir()}
    lost = tmp_path / "work" / "stem" / "000001.safetensors"
    lost.unlink()
    reads: list[str] = []
    monkeypatch.setattr(omni.OmniStem, "layer_input", counted(omni.OmniStem.layer_input, reads), raising=True)
    open_stream(prepared, tmp_path / "work")
    assert len(reads) == 1
    assert {f.name: f.read_bytes() for f in (tmp_path / "work" / "stem").iterdir()} == before


def counted(function: Any, calls: list[str]) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    return call


# --- what the float layer's forward shows --------------------------------------------------------------------


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> Prepared:
    """Text alone, which needs no tower, for a recipe that asks for the most."""
    index = write_index(tmp_path / "words", *({"text": f"Sentence {n}."} for n in range(4)))
    recipe = int4_recipe(tmp_path, propagate_error=True)
    return prepare(QuantRequest(tiny, device="cpu", config_path=str(recipe), dataset=str(index)))


def float_layer(prepared: Prepared, index: int = 0) -> torch.nn.Module:
    checkpoint = prepared.plan.checkpoint
    return omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))


def test_second_moments_are_collected_where_the_recipe_asks_for_them(words: Prepared, tmp_path: Path) -> None:
    stream, module = open_stream(words, tmp_path / "work"), float_layer(words)
    seen = stream.capture(0, module, words.plan.layer_spec)
    tokens = sum(stream.stems.tokens_by_modality().values())
    assert set(seen.stats) == {"qkv", "o", "gate_up", "down"}
    for stats in seen.stats.values():
        (gram,) = stats.grams.values()
        # The shortest sample judges, and since the others are enough it is kept out of H.
        assert tokens / 2 < gram.tokens < tokens == int(stats.count.sum())
        assert gram.factor is None or len(gram.factor) == gram.tokens
    assert sum(seen.importance.values()) * gram.tokens == pytest.approx(1.0)
    assert seen.probe.weighted_error(seen.probe.errors(module)) == 0.0


def test_nan_names_layer_linear_and_sample(words: Prepared, tmp_path: Path) -> None:
    stream = open_stream(words, tmp_path / "work")
    stored = load_file(tmp_path / "work" / "hidden-0000.safetensors")
    stored["000001"][0, 7, 3] = torch.nan
    stream._hidden.write(stored.values())
    stream.start_at(0)
    with pytest.raises(QuantError) as caught:
        stream.capture(0, float_layer(words), words.plan.layer_spec)
    assert caught.value.message.startswith("layer 0, self_attn.q_proj: NaN or Inf in the activations")
    assert caught.value.message.endswith(f"with sample {words.calib.samples[1].where}")
    assert "index.jsonl:2" in caught.value.message
    assert "remove the sample" in caught.value.hint


def test_inf_inside_a_layer_names_the_linear_that_it_reaches(words: Prepared, tmp_path: Path) -> None:
    stream, weights = open_stream(words, tmp_path / "work"), float_weights(words.plan.checkpoint, 0)
    weights["mlp.up_proj.weight"][5] = 3e38
    module = omni.build_layer(words.plan.checkpoint.config, 2, weights)
    with pytest.raises(QuantError) as caught:
        stream.capture(2, module, words.plan.layer_spec)
    assert caught.value.message.startswith("layer 2, mlp.down_proj: NaN or Inf in the activations")
    assert words.calib.samples[0].where in caught.value.message


def test_a_linear_that_no_token_reaches_is_named(words: Prepared, tmp_path: Path) -> None:
    """A layer whose MLP passes everything by."""
    stream, module = open_stream(words, tmp_path / "work"), float_layer(words)
    module.mlp.forward = lambda x: x
    with pytest.raises(QuantError, match=r"layer 3: mlp\.gate_proj received no token") as caught:
        stream.capture(3, module, words.plan.layer_spec)
    assert "exclude" in caught.value.hint


@pytest.mark.parametrize("propagate", [True, False])
def test_the_next_layer_sees_what_the_recipe_says(tiny: Path, tmp_path: Path, propagate: bool) -> None:
    """The changed layer's outputs, or with `propagate_error: false` the float layer's."""
    index = write_index(tmp_path / "words", {"text": "One sentence."}, {"text": f"Another {'very ' * 30}long one."})
    recipe = int4_recipe(tmp_path, propagate_error=propagate)
    prepared = prepare(QuantRequest(tiny, device="cpu", config_path=str(recipe), dataset=str(index)))
    work = tmp_path / "work"
    stream, module = open_stream(prepared, work), float_layer(prepared)
    seen = stream.capture(0, module, prepared.plan.layer_spec)
    weights = float_weights(prepared.plan.checkpoint, 0)
    changed = omni.build_layer(
        prepared.plan.checkpoint.config, 0, {**weights, "mlp.down_proj.weight": 0.9 * weights["mlp.down_proj.weight"]}
    )
    error = stream.advance(0, lambda: changed, seen.probe.errors(changed))
    assert 0.001 < error.overall < 0.2 and set(error.by_modality) == {"text"}
    stored = load_file(work / "hidden-0001.safetensors")
    assert {file.name for file in work.glob("*.safetensors")} == {"hidden-0000.safetensors", "hidden-0001.safetensors"}
    for number, hidden in enumerate(stored.values()):
        inputs = stem_inputs(work / "stem" / f"{number:06d}.safetensors")
        assert difference(hidden, run_layer(changed if propagate else module, inputs)) < 1e-6
        assert difference(hidden, run_layer(module if propagate else changed, inputs)) > 1e-4
    second = stream.capture(1, float_layer(prepared, 1), prepared.plan.layer_spec)
    assert int(second.stats["qkv"].count.sum()) == sum(stream.stems.tokens_by_modality().values())


# --- the say of each modality --------------------------------------------------------------------------------


def test_importance_by_hand() -> None:
    counts = [10, 0, 5, 85]  # text, image, audio, video
    assert token_importance("tokens", counts) == {0: 0.01, 2: 0.01, 3: 0.01}
    balanced = token_importance("balanced", counts)
    assert balanced == pytest.approx({0: 1 / 30, 2: 1 / 15, 3: 1 / 255})
    said = token_importance({"text": 1.0, "audio": 3.0}, counts)
    assert said == pytest.approx({0: 1 / 40, 2: 3 / 20, 3: 0.0})
    for found in (balanced, said, token_importance("tokens", counts)):
        assert sum(weight * counts[m] for m, weight in found.items()) == pytest.approx(1.0)
    assert token_importance({"text": 7.0}, [3, 0, 0, 0]) == {0: pytest.approx(1 / 3)}


# --- the samples that judge ----------------------------------------------------------------------------------


def modalities_of(*samples: dict[int, int]) -> list[torch.Tensor]:
    """Samples by their number of tokens of each modality."""
    return [torch.tensor([m for m, count in one.items() for _ in range(count)], dtype=torch.int8) for one in samples]


def test_judges_are_few_short_samples_of_every_modality() -> None:
    text = [{0: 20 + n} for n in range(12)]
    samples = modalities_of({0: 30, 3: 900}, *text, {0: 15, 2: 80}, {0: 30, 3: 400}, {0: 15, 2: 60})
    judges = choose_probe_samples(samples)
    chosen = torch.cat([samples[i] for i in judges])
    assert {0, 2, 3} <= set(chosen.tolist())
    assert len(judges) < 6 and len(chosen) < 0.5 * sum(len(sample) for sample in samples)
    assert 14 in judges and 0 not in judges  # of two videos the shorter one
    assert 15 in judges and 13 not in judges  # and of two sounds
    assert choose_probe_samples(samples) == judges


def test_judges_stop_at_enough_tokens() -> None:
    samples = modalities_of(*({0: 100} for _ in range(50)))
    assert choose_probe_samples(samples, enough=250) == {0, 1, 2}
    assert choose_probe_samples(samples, enough=200) == {0, 1}
    assert choose_probe_samples(samples[:3]) == {0}  # a part of all tokens will do where there are few


def test_one_sample_judges_alone() -> None:
    assert choose_probe_samples(modalities_of({0: 5, 1: 9})) == {0}


@given(
    st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 400), min_size=1, max_size=4), min_size=1, max_size=12)
)
@settings(max_examples=60, deadline=None)
def test_judges_cover_every_modality_that_there_is(counts: list[dict[int, int]]) -> None:
    samples = modalities_of(*counts)
    judges = choose_probe_samples(samples)
    everything, judging = torch.cat(samples), torch.cat([samples[i] for i in judges])
    for modality in range(4):
        there, chosen = int((everything == modality).sum()), int((judging == modality).sum())
        assert (chosen > 0) == (there > 0)
    out = choose_held_out(judges, samples)
    assert out in (judges, frozenset())
    left = torch.cat([torch.zeros(0, dtype=torch.int8), *(s for i, s in enumerate(samples) if i not in out)])
    assert set(left.tolist()) == set(everything.tolist())  # no modality is known only from those held out


def test_judges_are_held_out_only_where_the_others_are_many() -> None:
    many = modalities_of(*({0: 100} for _ in range(9)))
    assert choose_held_out(frozenset({0, 1, 2}), many) == {0, 1, 2}
    assert choose_held_out(frozenset({0, 1, 2, 3}), many) == frozenset()
    one_sound = [*many, *modalities_of({0: 10, 2: 5})]
    assert choose_held_out(frozenset({0, 9}), one_sound) == frozenset()


# --- the probe -----------------------------------------------------------------------------------------------

WEIGHT_OF = {0: 0.5, 1: 0.1, 2: 0.0, 3: 2.0}  # of a token of each modality


def watched() -> tuple[dict[str, torch.Tensor], list[tiny_layer.Sample], LayerProbe]:
    weights, samples = tiny_layer.layer_weights(torch.float32), [tiny_layer.sample(9, 1), tiny_layer.sample(14, 2)]
    probe = LayerProbe(tiny_layer.build(weights), {"self_attn", "mlp"}, WEIGHT_OF)
    for one in samples:
        assert torch.equal(probe.watch(one.inputs, one.modality), tiny_layer.output(weights, one))
    return weights, samples, probe


def weighed(error: torch.Tensor, modality: torch.Tensor) -> float:
    """The squared error [1, tokens, hidden], each token by its modality."""
    return sum(
        WEIGHT_OF[m] * float(e.double().square().sum()) for m, e in zip(modality.tolist(), error[0], strict=True)
    )


def test_probe_of_unchanged_weights_has_no_error() -> None:
    weights, _, probe = watched()
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        same = {f"{block}.{name}_proj.weight": weights[f"{block}.{name}_proj.weight"].clone() for name in names}
        assert probe.block_error(block, same) == 0.0
    assert probe.weighted_error(probe.errors(tiny_layer.build(weights))) == 0.0


@pytest.mark.parametrize("block", ["self_attn", "mlp"])
def test_probe_tells_a_blocks_true_error(block: str) -> None:
    """Of the block's output on its true inputs, against the block built with the changed weights."""
    weights, samples, probe = watched()
    changed = dict(weights)
    for name in [n for n in weights if n.startswith(block) and n.endswith(("q_proj.weight", "up_proj.weight"))]:
        changed[name] = weights[name] + 0.1 * weights[name].flip(0)
    expected = 0.0
    exact, other = tiny_layer.build(weights), tiny_layer.build(changed)
    calls: list[Any] = []
    exact.get_submodule(block).register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    with torch.inference_mode():
        for one in samples:
            run_layer(exact, one.inputs)
            arguments, keywords, out = calls.pop()
            found = other.get_submodule(block)(*arguments, **keywords)
            first = [o[0] if isinstance(o, tuple) else o for o in (found, out)]
            expected += weighed(first[0] - first[1], one.modality)
    given_ = {name: changed[name] for name in changed if changed[name] is not weights[name]}
    assert len(given_) == 1 and expected > 0
    assert probe.block_error(block, given_) == pytest.approx(expected, rel=1e-4)
    assert probe.block_error(block, {}) == 0.0  # the layer itself was not changed by the question


def test_probe_tells_a_layers_true_error() -> None:
    weights, samples, probe = watched()
    changed = {**weights, "mlp.down_proj.weight": 1.1 * weights["mlp.down_proj.weight"]}
    expected = sum(
        weighed(tiny_layer.output(changed, one) - tiny_layer.output(weights, one), one.modality) for one in samples
    )
    assert probe.weighted_error(probe.errors(tiny_layer.build(changed))) == pytest.approx(expected, rel=1e-4)
    error, signal = probe.errors(tiny_layer.build(changed))
    for modality in range(4):
        there = [(tiny_layer.output(changed, one), tiny_layer.output(weights, one), one) for one in samples]
        by_hand = sum(float((a - b)[0, o.modality == modality].double().square().sum()) for a, b, o in there)
        added = sum(
            float((b - o.inputs.hidden)[0, o.modality == modality].double().square().sum()) for a, b, o in there
        )
        assert float(error[modality]) == pytest.approx(by_hand, rel=1e-4)
        assert float(signal[modality]) == pytest.approx(added, rel=1e-4)
