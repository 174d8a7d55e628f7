"""Bad input through the real command: one clear message, exit code 1, no traceback, no partial output."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DATA, MINMAX, WORK, change_recipe, command, fast_recipe, files, quant, stop_at, write_index
from safetensors.torch import load_file, save_file

from msmodelslim_omni import QuantError, quantize
from msmodelslim_omni.run import pipeline
from msmodelslim_omni.run.save_path import check_disk_space
from msmodelslim_omni.runtime.progress import Progress

ROOT = Path(__file__).parents[2]
NAN, INF = b"\xc0\x7f", b"\x80\x7f"  # in bfloat16, little endian
MINMAX_FLAGS = ("--config_path", MINMAX)
Q_PROJ = "thinker.model.layers.2.self_attn.q_proj.weight"
NORM = "thinker.model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def text_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("data"), {"text": "Why is the sky blue?"})


def assert_nothing_written(save: Path) -> None:
    """Assert that `save` holds at most a work folder, from which the same command can resume."""
    assert not save.exists() or {entry.name for entry in save.iterdir()} <= {WORK}


def refusal(model: Path, save: Path, *words: object) -> str:
    """Run `quant`, which must fail and write nothing, and return its error message."""
    message = quant(model, save, *words).fault()
    assert_nothing_written(save)
    return message


# --- model_path ----------------------------------------------------------------------------------------------


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def poke(folder: Path, tensor: str, content: bytes, at: int = 0) -> None:
    """Overwrite bytes of one tensor in place."""
    path = shard_of(folder, tensor)
    with path.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        begin, _ = json.loads(stream.read(length))[tensor]["data_offsets"]
        stream.seek(8 + length + begin + at)
        stream.write(content)


def change_tensors(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the shard that holds a tensor after a change to its dict."""
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_model_path_must_be_a_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("{}")
    assert "not a checkpoint" in refusal(tmp_path / "file", tmp_path / "out")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    assert "safetensors" in refusal(tmp_path / "empty", tmp_path / "out")


def test_broken_config_json(tiny_copy: Path, tmp_path: Path) -> None:
    for content in ("{", "[]", '"text"'):
        (tiny_copy / "config.json").write_text(content)
        assert "config.json" in refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)


def rewrite_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_config_json_of_another_model(tiny_copy: Path, tmp_path: Path) -> None:
    rewrite_config(tiny_copy, lambda config: config.update(model_type="qwen2_5_vl"))
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert "'qwen2_5_vl'" in message and "qwen2_5_omni" in message
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS, "--model_type", "Qwen2.5-Omni-7B")
    assert "'qwen2_5_vl'" in message


def test_thinker_checkpoint_is_refused(tiny_copy: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())["thinker_config"]
    (tiny_copy / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_omni_thinker"}))
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert "qwen2_5_omni_thinker" in message and "complete model" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 512, "shape"),
        ("num_hidden_layers", 5, "missing"),
        ("num_hidden_layers", 3, "not part of the model that config.json describes"),
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("hidden_size", "big", "hidden_size"),
        ("num_key_value_heads", 3, "heads"),
        ("vocab_size", 10, "[10, 256]"),
    ],
)
def test_config_json_must_match_the_weights(
    key: str, value: object, expected: str, tiny_copy: Path, tmp_path: Path
) -> None:
    rewrite_config(tiny_copy, lambda config: config["thinker_config"]["text_config"].update({key: value}))
    assert expected in refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)


def test_config_json_without_its_parts(tiny_copy: Path, tmp_path: Path) -> None:
    rewrite_config(tiny_copy, lambda config: config.pop("thinker_config"))
    assert "thinker_config" in refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)


@pytest.mark.parametrize("existing", ["nothing", "an empty folder", "an output"])
def test_damaged_towers_leave_save_path_unchanged(existing: str, tiny_copy: Path, tmp_path: Path) -> None:
    """A data-free run compares towers with the library's classes while it already copies them."""
    save = tmp_path / "out"
    if existing == "an empty folder":
        save.mkdir()
    if existing == "an output":
        quant(tiny_copy, save, *MINMAX_FLAGS).done()
    before = files(save)
    tower = "thinker.visual.merger.mlp.0.weight"
    change_tensors(tiny_copy, tower, lambda tensors: tensors.update({tower: torch.zeros(3, 5)}))
    for more in ([], ["--dry_run"]):
        message = quant(tiny_copy, save, "--overwrite", *MINMAX_FLAGS, *more).fault()
        assert f"{tower} has shape [3, 5]" in message and "different models" in message
        assert files(save) == before and save.exists() == (existing != "nothing")
        assert not (save / WORK).exists()


def test_failed_check_keeps_an_interrupted_run(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The existing work folder stays unchanged until the check passes, with and without --overwrite."""
    save = tmp_path / "out"
    stop_at("layers", 2, tiny_copy, save, None, config_path=MINMAX)
    before = files(save)

    def broken(*_: object) -> None:
        raise QuantError("the library does not load")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_all_tensors", broken)
        for overwrite in (False, True):
            with pytest.raises(QuantError, match="does not load"):
                quantize(tiny_copy, save, overwrite=overwrite, device="cpu", config_path=MINMAX)
            assert files(save) == before and (save / WORK).exists()
    assert "resuming at layer" in quant(tiny_copy, save, *MINMAX_FLAGS).done().err


def test_unknown_tensors_are_reported_and_kept(tiny_copy: Path, tmp_path: Path) -> None:
    change_tensors(tiny_copy, Q_PROJ, lambda tensors: tensors.update({"extra.weight": torch.ones(4)}))
    index = tiny_copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = content["weight_map"][Q_PROJ]
    index.write_text(json.dumps(content))
    save = tmp_path / "out"
    result = quant(tiny_copy, save, *MINMAX_FLAGS).done()
    warning = "tensor extra.weight is unknown to this model; copied unchanged"
    assert result.err.count(f"warning: {warning}") == 1
    report = json.loads((save / "quant_report.json").read_text())
    assert report["warnings"] == [warning] and "check" in report["seconds_by_phase"]
    assert any("extra.weight" in load_file(shard) for shard in save.glob("*.safetensors"))


def test_truncated_safetensors(tiny_copy: Path, tmp_path: Path) -> None:
    shard = shard_of(tiny_copy, Q_PROJ)
    content = shard.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 4, 0):
        shard.write_bytes(content[:size])
        message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
        assert shard.name in message and "not a valid safetensors file" in message


def test_missing_shard(tiny_copy: Path, tmp_path: Path) -> None:
    shard = shard_of(tiny_copy, Q_PROJ)
    shard.unlink()
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert shard.name in message and "missing" in message


def test_missing_tensor(tiny_copy: Path, tmp_path: Path) -> None:
    change_tensors(tiny_copy, Q_PROJ, lambda tensors: tensors.pop(Q_PROJ))
    assert Q_PROJ in refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    index = tiny_copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][Q_PROJ]
    index.write_text(json.dumps(content))
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert Q_PROJ in message and "missing" in message


def test_wrong_shape_and_dtype(tiny_copy: Path, tmp_path: Path) -> None:
    weight = load_file(shard_of(tiny_copy, Q_PROJ))[Q_PROJ]
    change_tensors(tiny_copy, Q_PROJ, lambda t: t.update({Q_PROJ: weight[:, :-1].contiguous()}))
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert Q_PROJ in message and "[256, 255]" in message and "[256, 256]" in message
    change_tensors(tiny_copy, Q_PROJ, lambda t: t.update({Q_PROJ: weight.to(torch.int32)}))
    message = refusal(tiny_copy, tmp_path / "out", *MINMAX_FLAGS)
    assert Q_PROJ in message and "I32" in message


@pytest.mark.parametrize("data_free", [True, False], ids=["data-free", "smoothed"])
@pytest.mark.parametrize(
    "tensor",
    [
        Q_PROJ,
        NORM,
        "thinker.model.layers.3.self_attn.k_proj.bias",
        "thinker.visual.blocks.1.mlp.down_proj.weight",
        "thinker.audio_tower.layers.0.fc1.weight",
        "thinker.lm_head.weight",
        "token2wav.code2wav_bigvgan_model.conv_pre.weight",
    ],
)
def test_nan_and_inf_are_named(tensor: str, data_free: bool, tiny_copy: Path, text_index: Path, tmp_path: Path) -> None:
    is_float32 = tensor.startswith("token2wav.")
    poison = b"\x00\x00\xc0\x7f" if is_float32 else (NAN if data_free else INF)
    poke(tiny_copy, tensor, poison, at=8)
    words = MINMAX_FLAGS if data_free else ("--config_path", fast_recipe(tmp_path), "--dataset", text_index)
    message = refusal(tiny_copy, tmp_path / "out", *words)
    layer, _, relative = tensor.removeprefix("thinker.model.layers.").partition(".")
    named = tensor in message or (f"layer {layer}" in message and relative in message)
    assert named and "NaN or Inf" in message


def test_quantized_checkpoint_is_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    formats = ("--save_format", "ascendv1_saver", "--save_format", "compressed_tensors")
    quant(tiny, tmp_path / "once", *MINMAX_FLAGS, *formats).done()
    for saver in formats[1::2]:
        message = refusal(tmp_path / "once" / saver, tmp_path / "twice", *MINMAX_FLAGS)
        assert "quantized" in message or "quant_model_weights" in message


def test_inspect_path_must_be_a_checkpoint(tmp_path: Path) -> None:
    assert "not a checkpoint" in command("inspect", tmp_path).fault()
    assert "does not exist" in command("inspect", tmp_path / "nowhere").fault()


# --- recipe, model type, quant type --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("include:", "includes:", "'include'"),
        ("dtype: int8", "dtype: int4", "allowed: 'int8'"),
        ("type: linear_quant", "type: linear_quants", "'linear_quant'"),
        ("type: ascendv1_saver ", "type: ascendv2_saver ", "'ascendv1_saver'"),
        ("part_file_size: 4 ", "part_file_size: large ", "part_file_size"),
        ("apiversion: multimodal_vlm_modelslim_v1", "apiversion: modelslim_v9", "multimodal_vlm_modelslim_v1"),
        ("process:", "process: [", "not valid YAML"),
        ('include: ["*"]', 'include: ["*visual*"]', "keeps float"),
        ('include: ["*"]', 'include: ["*.q_proj"]', "require one scheme"),
        ('exclude: ["*audio_tower*", "*visual*"]', 'exclude: ["*"]', "quantizes nothing"),
    ],
)
def test_recipe_errors_name_file_and_line(old: str, new: str, expected: str, tiny: Path, tmp_path: Path) -> None:
    recipe = change_recipe(tmp_path, old, new, MINMAX)
    message = refusal(tiny, tmp_path / "out", "--config_path", recipe)
    assert expected in message and f"{recipe}:" in message


def test_pattern_that_matches_nothing_is_a_warning(tiny: Path, tmp_path: Path) -> None:
    recipe = change_recipe(tmp_path, '"*visual*"]', '"*visual*", "*.q_porj"]', MINMAX)
    result = quant(tiny, tmp_path / "out", "--config_path", recipe, "--dry_run").done()
    assert "warning" in result.err and "'*.q_porj'" in result.err


def test_missing_recipe(tiny: Path, tmp_path: Path) -> None:
    message = refusal(tiny, tmp_path / "out", "--config_path", "qwen2_5_omni_w8a8_minmaxx")
    assert MINMAX in message and "Did you mean" in message


def test_unknown_model_type_and_quant_type(tiny: Path, tmp_path: Path) -> None:
    message = refusal(tiny, tmp_path / "out", "--model_type", "Qwen2.5-Omni-8B")
    assert "Qwen2.5-Omni-3B" in message and "Did you mean 'Qwen2.5-Omni-7B'" in message
    message = refusal(tiny, tmp_path / "out", "--quant_type", "w8a88")
    assert (
        "Quant types with a recipe: fp8, fp8_block, nf4, nvfp4, nvfp4a16, w4a16, w4a8, w8a16, w8a8." in message
        and "Did you mean 'w8a8'" in message
    )


def test_unknown_save_format(tiny: Path, tmp_path: Path) -> None:
    message = refusal(tiny, tmp_path / "out", *MINMAX_FLAGS, "--save_format", "compressed_tensor")
    assert "compressed_tensors" in message and "ascendv1_saver" in message


# --- dataset -------------------------------------------------------------------------------------------------


def broken_media(folder: Path) -> list[dict[str, str]]:
    """Write media that cannot be decoded, and return an index entry for each."""
    folder.mkdir(parents=True)
    (folder / "noise.jpg").write_bytes(bytes(range(256)) * 20)
    (folder / "noise.wav").write_bytes(b"RIFF" + bytes(range(256)) * 20)
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.flac").touch()
    photo = (DATA / "images" / "astronaut.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(photo[: len(photo) // 2])
    shutil.copy(DATA / "audio" / "three_beeps.wav", folder / "sound.mp4")
    return [
        {"image": "noise.jpg"},
        {"audio": "noise.wav"},
        {"video": "noise.mp4"},
        {"audio": "empty.flac"},
        {"image": "half.jpg"},
        {"video": "sound.mp4"},
        {"image": "gone.png"},
    ]


def test_all_broken_media_are_in_one_message(tiny: Path, tmp_path: Path) -> None:
    entries = broken_media(tmp_path / "data")
    index = write_index(tmp_path / "data", {"text": "fine"}, *entries)
    message = refusal(tiny, tmp_path / "out", "--dataset", index)
    assert f"{len(entries)} errors" in message
    for line, entry in enumerate(entries, 2):
        assert f"index.jsonl:{line}: " in message and next(iter(entry.values())) in message
    assert not (tmp_path / "out").exists()


def test_broken_samples_are_skipped_if_the_recipe_allows_it(tiny: Path, tmp_path: Path) -> None:
    entries = broken_media(tmp_path / "data")
    index = write_index(tmp_path / "data", {"text": "fine"}, *entries, "{no json")
    recipe = change_recipe(tmp_path, "calibration:", "calibration:\n    on_bad_sample: skip")
    save = tmp_path / "out"
    report = quant(tiny, save, "--dataset", index, "--config_path", recipe, "--json").done().json
    assert report["samples"] == 1
    skipped = [warning for warning in report["warnings"] if "no sample has" not in warning]
    assert len(skipped) == len(entries) + 1 == len(report["warnings"]) - 1
    assert all("index.jsonl:" in warning for warning in skipped)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "fine"}', '{"text": '], "index.jsonl:2: not valid JSON"),
        (['{"text": "fine"}', "", "[1]"], "index.jsonl:3: "),
        (['{"txet": "a"}'], "Did you mean 'text'"),
        (['{"image": "https://example.org/a.png"}'], "is a URL"),
        (['{"image": "a.svg"}'], "does not exist"),
        (['{"text": 5}'], "text must be a non-empty string, not '5'"),
        (['{"text": "a", "use_audio_in_video": "yes"}'], "not true or false"),
        (['{"messages": [], "text": "a"}'], "messages cannot be combined with text"),
        ([json.dumps({"text": "a" * 200_001})], "the limit is 200000"),
        ([], "no usable sample"),
        (["", "  "], "no usable sample"),
    ],
)
def test_index_errors(lines: list[str], expected: str, tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", *lines)
    assert expected in refusal(tiny, tmp_path / "out", "--dataset", index)


def test_use_audio_in_video_needs_an_audio_track(tiny: Path, tmp_path: Path) -> None:
    silent = str(DATA / "videos" / "bouncing ball.mp4")
    index = write_index(tmp_path / "data", {"video": silent, "use_audio_in_video": True})
    message = refusal(tiny, tmp_path / "out", "--dataset", index)
    assert "index.jsonl:1" in message and "no audio track" in message


def test_missing_or_ambiguous_dataset(tiny: Path, tmp_path: Path) -> None:
    message = refusal(tiny, tmp_path / "out", "--dataset", "calibVideo")
    assert "calibVideos" in message and "Did you mean" in message
    (tmp_path / "data").mkdir()
    message = refusal(tiny, tmp_path / "out", "--dataset", tmp_path / "data")
    assert "neither index.jsonl nor index.json" in message
    for name in ("index.json", "index.jsonl"):
        (tmp_path / "data" / name).write_text('{"text": "a"}')
    assert "both" in refusal(tiny, tmp_path / "out", "--dataset", tmp_path / "data")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tiny, tmp_path / "out", "--dataset", tmp_path / "binary.jsonl")


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_sample_with_too_many_tokens(policy: str, tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "short"}, {"text": "long " * 100}, {"text": "short too"})
    limits = f"calibration:\n    max_tokens: 100\n    on_bad_sample: {policy}"
    words = ("--dataset", index, "--config_path", change_recipe(tmp_path, "calibration:", limits))
    save = tmp_path / "out"
    if policy == "fail":
        message = refusal(tiny, save, *words)
        assert "index.jsonl:2" in message and "max_tokens 100" in message
        return
    result = quant(tiny, save, *words, "--json").done()
    assert result.json["samples"] == 2
    absent, warning = result.json["warnings"]
    assert "no sample has image or audio or video" in absent
    assert "index.jsonl:2" in warning and "max_tokens" in warning


def test_no_usable_sample(tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", {"text": "long " * 100})
    limits = "calibration:\n    max_tokens: 50\n    on_bad_sample: skip"
    recipe = change_recipe(tmp_path, "calibration:", limits)
    message = refusal(tiny, tmp_path / "out", "--dataset", index, "--config_path", recipe)
    assert "no calibration sample could be used" in message and "index.jsonl:1" in message


def test_missing_processor_files(tiny_copy: Path, text_index: Path, tmp_path: Path) -> None:
    (tiny_copy / "preprocessor_config.json").unlink()
    message = refusal(tiny_copy, tmp_path / "out", "--dataset", text_index)
    assert "processor" in message and "minmax" in message


# --- save_path -----------------------------------------------------------------------------------------------


def test_nested_save_path_and_model_path(tiny_copy: Path, tmp_path: Path) -> None:
    before = files(tiny_copy)
    link = tmp_path / "link"
    link.symlink_to(tiny_copy)
    for save in (tiny_copy, tiny_copy / "out", tiny_copy.parent, link / "out", tiny_copy / ".." / tiny_copy.name):
        assert "inside one another" in quant(tiny_copy, save, *MINMAX_FLAGS).fault()
        assert "inside one another" in quant(tiny_copy, save, *MINMAX_FLAGS, "--overwrite").fault()
    assert files(tiny_copy) == before


def test_save_path_is_a_file_or_below_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for save in (tmp_path / "file", tmp_path / "file" / "below"):
        for words in ((), ("--overwrite",)):
            assert "is a file" in quant(tiny, save, *MINMAX_FLAGS, *words).fault()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_unwritable_save_path(tiny: Path) -> None:
    message = quant(tiny, Path("/proc/msmodelslim/out"), *MINMAX_FLAGS).fault()
    assert "cannot be written" in message and "/proc/msmodelslim/out" in message


def test_nonempty_save_path(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    message = quant(tiny, tmp_path / "out", *MINMAX_FLAGS).fault()
    assert "not empty" in message and "--overwrite" in message
    assert files(tmp_path / "out") == {"notes.txt": b"mine"}


def test_disk_space_is_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"needs .* are free"):
        check_disk_space(tmp_path, 1 << 60)
    check_disk_space(tmp_path, 1 << 10)


def test_partial_files_count_with_their_allocated_bytes(tmp_path: Path) -> None:
    work = tmp_path / WORK
    work.mkdir()
    with (work / "hollow").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(QuantError, match=r"needs 1024.00 GiB"):
        check_disk_space(tmp_path, 1 << 40)


def test_full_disk(tiny: Path, tmp_path: Path) -> None:
    """The temporary file of a shard is a link to /dev/full."""
    save = tmp_path / "out"
    partial = save / WORK / "output" / "ascendv1_saver" / "quant_model_weights.safetensors.partial"
    stop_at("layers", 2, tiny, save, None, config_path=MINMAX)
    partial.unlink()
    partial.symlink_to("/dev/full")
    message = refusal(tiny, save, *MINMAX_FLAGS)
    assert "disk is full" in message and "same command again" in message
    partial.unlink(missing_ok=True)
    assert_resumes(tiny, save, tmp_path)


@pytest.mark.parametrize("after", [0, 30, 200])
def test_disk_fills_up_during_the_run(after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls, write = tmp_path / "out", itertools.count(), os.pwrite

    def until_full(*arguments: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", until_full)
        message = refusal(tiny, save, *MINMAX_FLAGS)
    assert "disk is full" in message and "same command again" in message
    assert {entry.name for entry in save.iterdir()} == {WORK}
    assert_resumes(tiny, save, tmp_path)


class FillDisk(Progress):
    """Fills the disk of `folder` at one layer with a file that can be deleted."""

    def __init__(self, folder: Path, layer: int) -> None:
        self._filler, self._layer = folder / "filler", layer

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if (phase, done) == ("layers", self._layer):
            with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1 << 16))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate disk of 64 MiB; skips the test if mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_small_disk(tiny: Path, small_disk: Path, tmp_path: Path) -> None:
    save = small_disk / "out"
    with pytest.raises(QuantError, match="disk is full") as caught:
        quantize(tiny, save, device="cpu", config_path=MINMAX, progress=FillDisk(small_disk, 2))
    assert "same command again" in caught.value.hint
    assert_nothing_written(save)
    assert "are free" in refusal(tiny, save, *MINMAX_FLAGS) or "disk is full" in refusal(tiny, save, *MINMAX_FLAGS)
    (small_disk / "filler").unlink()
    assert_resumes(tiny, save, tmp_path)


def test_disk_too_small_from_the_start(tiny: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(63 << 20))
    assert re.search(r"needs .* are free", refusal(tiny, small_disk / "out", *MINMAX_FLAGS))


class BadSector(io.FileIO):
    """A file on a disk with read errors."""

    def readinto(self, _buffer: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("after", [0, 20, 90])
def test_read_error_in_a_shard(after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, reads, open_file = tmp_path / "out", itertools.count(), Path.open

    def open_until_failure(path: Path, *arguments: Any, **options: Any) -> Any:
        if options.get("buffering") == 0 and path.parent == tiny and next(reads) >= after:
            return BadSector(path)
        return open_file(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_until_failure)
        message = refusal(tiny, save, *MINMAX_FLAGS)
    assert re.search(r"model-0000\d-of-00002.safetensors: reading tensor 't\S+' failed: Input/output error", message)
    assert "same command again" in message
    assert_resumes(tiny, save, tmp_path)


def assert_resumes(tiny: Path, save: Path, tmp_path: Path) -> None:
    """Assert that the same command finishes with the bytes of an uninterrupted run."""
    quant(tiny, save, *MINMAX_FLAGS).done()
    quant(tiny, tmp_path / "uninterrupted", *MINMAX_FLAGS).done()
    assert files(save) == files(tmp_path / "uninterrupted")


class Vanish(Progress):
    """Renames a file at one step of a run."""

    def __init__(self, file: Path, phase: str) -> None:
        self._file, self._phase = file, phase

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == self._phase and self._file.exists():
            self._file.rename(self._file.with_suffix(".away"))


@pytest.mark.parametrize("phase", ["towers", "layers"])
def test_dataset_file_removed_during_the_run(phase: str, tiny: Path, tmp_path: Path) -> None:
    """A run needs the file of a sample until the towers have encoded it; the next run needs it again."""
    picture = Path(shutil.copy(DATA / "images" / "notice_zh.png", tmp_path / "picture.png"))
    index = write_index(tmp_path / "data", {"text": "Why?"}, {"image": str(picture), "text": "Read it."})
    recipe, save = fast_recipe(tmp_path), tmp_path / "out"
    options: dict[str, Any] = {"device": "cpu", "config_path": str(recipe), "dataset": str(index)}
    words = ("--config_path", recipe, "--dataset", index)
    if phase == "towers":
        with pytest.raises(QuantError, match=r"index\.jsonl:2: image .*picture\.png.*No such file"):
            quantize(tiny, save, progress=Vanish(picture, phase), **options)
        assert_nothing_written(save)
        assert "picture.png' does not exist" in quant(tiny, save, *words).fault()
        picture.with_suffix(".away").rename(picture)
        quant(tiny, save, *words).done()
    else:
        quantize(tiny, save, progress=Vanish(picture, phase), **options)
        picture.with_suffix(".away").rename(picture)
    quant(tiny, tmp_path / "uninterrupted", *words).done()
    assert files(save) == files(tmp_path / "uninterrupted")


# --- device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "auto:0", "npu:0,1", "cuda:", "CPU", ""])
def test_unknown_device(device: str, tiny: Path, tmp_path: Path) -> None:
    result = command("quant", "--model_path", tiny, "--save_path", tmp_path / "out", "--device", device, *MINMAX_FLAGS)
    assert f"unknown device '{device}'" in result.fault()


def test_missing_device(tiny: Path, tmp_path: Path) -> None:
    words = ("quant", "--model_path", tiny, "--save_path", tmp_path / "out", *MINMAX_FLAGS)
    assert "cuda:99" in command(*words, "--device", "cuda:99").fault()
    if not torch.cuda.is_available():
        assert "--device cpu" in command(*words, "--device", "cuda").fault()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken_torch_npu(tmp_path: Path) -> dict[str, str]:
    """Environment variables with a pip-installed torch_npu whose driver library is missing."""
    packages = tmp_path / "packages"
    (packages / "torch_npu").mkdir(parents=True)
    reason = "libhccl.so: cannot open shared object file: No such file or directory"
    (packages / "torch_npu" / "__init__.py").write_text(f"raise ImportError({reason!r})\n")
    info = packages / "torch_npu-2.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.6.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_torch_npu_without_a_driver(device: str, tiny: Path, tmp_path: Path, broken_torch_npu: dict[str, str]) -> None:
    words = ["--model_path", tiny, "--save_path", tmp_path / "out", "--device", device, "--dry_run", *MINMAX_FLAGS]
    run = subprocess.run(
        [sys.executable, "-m", "msmodelslim_omni", "quant", *map(str, words)],
        capture_output=True,
        text=True,
        env=broken_torch_npu,
        cwd=tmp_path,
        timeout=120,
    )
    assert "Traceback" not in run.stderr and "libhccl.so" in run.stderr
    if device == "npu":
        assert run.returncode == 1 and run.stdout == ""
        assert run.stderr.count("error: ") == 1 and "[npu]" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert run.stderr.startswith("device c") and "auto: no NPU (torch_npu cannot be loaded" in run.stderr


def test_npu_without_torch_npu(tiny: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed")
    words = ("quant", "--model_path", tiny, "--save_path", tmp_path / "out", *MINMAX_FLAGS)
    message = command(*words, "--device", "npu").fault()
    assert "torch_npu" in message and "[npu]" in message


# --- --debug -------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = quant(tmp_path / "nowhere", tmp_path / "out", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err and "find_model_folder" in result.err
    assert "error: model_path" in result.err and "hint: " in result.err


def test_errors_have_a_hint(tmp_path: Path) -> None:
    assert "\nhint: " in quant(tmp_path / "nowhere", tmp_path / "out").fault()
