"""Stopping a real run at any moment and going on: the bytes are those of an undisturbed run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import DATA, MINMAX, WORK, Answer, change_recipe, fast_recipe, files, quant, stop_at, write_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni import QuantError, quantize
from msmodelslim_omni.files.digests import file_digest
from msmodelslim_omni.run.workspace import sealed
from msmodelslim_omni.storage.safetensors_io import read_header

ROOT = Path(__file__).parents[2]
LAYERS = 6
FORMATS = ("--save_format", "ascendv1_saver", "--save_format", "compressed_tensors")
WEIGHTS = "quant_model_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "six", layers=LAYERS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sound = str(DATA / "audio" / "three_beeps.wav")
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(0, 90, 30))
    return write_index(tmp_path_factory.mktemp("data"), *texts, {"audio": sound, "text": "How many?"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def undisturbed(model: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Both formats, never stopped."""
    save = tmp_path_factory.mktemp("runs") / "whole"
    go_on(model, save, index, recipe, *FORMATS).done()
    return files(save)


@pytest.fixture(scope="module")
def ascend(undisturbed: dict[str, bytes]) -> dict[str, bytes]:
    """The undisturbed run's first format alone, as one saver writes it."""
    prefix = "ascendv1_saver/"
    return {n.removeprefix(prefix): content for n, content in undisturbed.items() if n.startswith(prefix)}


# --- real processes ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The command in a process of its own, watched through its work folder."""

    process: subprocess.Popen[bytes]
    save: Path
    said: Path

    @property
    def parts(self) -> int:
        return finished_layers(self.save)

    def wait_until(self, reached: Callable[[], bool], seconds: float = 100.0) -> None:
        deadline = time.monotonic() + seconds
        while not reached() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)

    @property
    def messages(self) -> str:
        return self.said.read_text(encoding="utf-8")


def start(model: Path, save: Path, said: Path, *words: object) -> Run:
    flags = ["--model_path", model, "--save_path", save, "--device", "cpu", *words]
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "msmodelslim_omni", "quant", *map(str, flags)],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
        )
    return Run(process, save, said)


def finished_layers(save: Path) -> int:
    try:
        units = json.loads((save / WORK / "manifest.json").read_text())["units"]
        return sum(1 for unit in units if unit.startswith("layer "))
    except (OSError, ValueError):
        return 0


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    model: Path, index: Path, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL among the towers and after the last but one layer; test_killed_at_twenty_random_moments has others."""
    save, words = tmp_path / "out", ("--dataset", index, "--config_path", recipe, *FORMATS)
    work = save / WORK
    moments: list[Callable[[], bool]] = [
        lambda: len(list((work / "stem").glob("*.safetensors"))) >= 2,
        lambda: finished_layers(save) >= LAYERS - 1,
    ]
    for number, reached in enumerate(moments):
        before = finished_layers(save)
        run = start(model, save, tmp_path / f"said{number}", *words)
        run.wait_until(reached)
        assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
        assert {entry.name for entry in save.iterdir()} == {WORK}, "something half-written"
        assert (f"resuming at layer {before}" in run.messages) == (before > 0)
    before = finished_layers(save)
    assert before >= LAYERS - 1
    assert f"resuming at layer {before}" in quant(model, save, *words).done().err
    assert files(save) == undisturbed


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe_kind", ["data-free", "calibrated"])
def test_killed_at_twenty_random_moments(
    model: Path, index: Path, recipe: Path, tmp_path: Path, recipe_kind: str
) -> None:
    """Each kill costs at most the layers that were in work: one read ahead, one computed, one written."""
    words = ("--config_path", MINMAX) if recipe_kind == "data-free" else ("--dataset", index, "--config_path", recipe)
    began = time.monotonic()
    quant(model, tmp_path / "whole", *words, *FORMATS).done()
    whole = time.monotonic() - began
    undisturbed = files(tmp_path / "whole")
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        save = tmp_path / f"out{kills}"
        finished = False
        while not finished and kills < 20:
            before = finished_layers(save)
            run = start(model, save, tmp_path / "said", *words, *FORMATS)
            began, moment = time.monotonic(), rng.uniform(0, 1.5 * whole + 5)  # five seconds of imports
            run.wait_until(lambda began=began, moment=moment: time.monotonic() - began > moment)
            finished = run.process.poll() is not None
            if finished:
                assert run.process.returncode == 0, run.messages
            else:
                run.stop(signal.SIGKILL)
                kills += 1
                finished = (
                    save.exists() and any(save.iterdir()) and not (save / WORK).exists()
                )  # but for its last words
                if not finished:
                    assert layers_begun_to_be_written(run.messages) <= finished_layers(save) + 1
                assert finished or not (save / WORK).exists() or finished_layers(save) >= before
        if not finished:
            quant(model, save, *words, *FORMATS).done()
        assert files(save) == undisturbed


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_on_the_3b_shape(tmp_path: Path) -> None:
    """36 layers, 12 GB; a kill in every third of the run, the checkpoint's copied tensors and layers among them."""
    model, words = tmp_path / "3b", ("--config_path", MINMAX)
    make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "3b", str(model)]
    subprocess.run(make, check=True, capture_output=True)
    quant(model, tmp_path / "whole", *words).done()
    undisturbed = digests(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    rng = random.Random(0)
    save = tmp_path / "out"
    for third in range(3):
        goal = rng.randrange(12 * third, 12 * third + 12)
        run = start(model, save, tmp_path / f"said{third}", *words)
        run.wait_until(lambda run=run, goal=goal: run.parts >= goal and (save / WORK).exists(), seconds=900)
        time.sleep(rng.random())
        assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
        assert layers_begun_to_be_written(run.messages) <= finished_layers(save) + 1
    before = finished_layers(save)
    assert f"resuming at layer {before}" in quant(model, save, *words).done().err
    assert digests(save) == undisturbed


def layers_begun_to_be_written(messages: str) -> int:
    """The layers that are quantized. One of them may not be safe on the disk yet, and another is in work."""
    return max((int(count) for count in re.findall(r"layers (\d+)/", messages)), default=0)


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the reports, whose times differ."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): file_digest(p) for p in paths if "report" not in p.name}


@pytest.mark.parametrize("moment", ["first line", pytest.param("second layer", marks=pytest.mark.full)])
def test_interrupt_says_how_to_go_on(
    moment: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    run = start(model, save, tmp_path / "said", "--dataset", index, "--config_path", recipe)
    run.wait_until(lambda: "device cpu" in run.messages if moment == "first line" else run.parts >= 2)
    assert run.stop(signal.SIGINT) == 1, run.messages
    assert "Traceback" not in run.messages
    assert "stopped" in run.messages and "run the same command again" in run.messages
    done = finished_layers(save)
    assert done >= 2 or moment == "first line"
    answer = go_on(model, save, index, recipe).done()
    assert (f"resuming at layer {done}" in answer.err) == (done > 0)
    assert files(save) == ascend


# --- stopped in this process ---------------------------------------------------------------------------------


def go_on(model: Path, save: Path, index: Path, recipe: Path, *words: object) -> Answer:
    return quant(model, save, "--dataset", index, "--config_path", recipe, *words)


def copy_with_other_time(model: Path, folder: Path) -> Path:
    """The same checkpoint, whose shard was written at another time."""
    copy = Path(shutil.copytree(model, folder / "touched"))
    os.utime(next(copy.glob("*.safetensors")), (1, 1))
    return copy


def written(folder: Path, text: str) -> Path:
    path = folder / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "what", ["recipe process", "recipe calibration", "seed", "dataset", "checkpoint", "model_type"]
)
def test_a_run_of_other_inputs_is_refused(what: str, model: Path, index: Path, recipe: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    stop_at("layers", 1, model, save, index, config_path=str(recipe))
    before = files(save)
    words: tuple[object, ...] = ("--dataset", index, "--config_path", recipe)
    text = recipe.read_text(encoding="utf-8")
    if what == "recipe process":
        words = ("--dataset", index, "--config_path", written(tmp_path, text.replace("alpha: 0.5 ", "alpha: 0.6 ")))
    elif what == "recipe calibration":
        words = ("--dataset", index, "--config_path", written(tmp_path, text.replace("12544", "100352")))
    elif what == "seed":
        words += ("--seed", 1)
    elif what == "dataset":
        words = ("--dataset", write_index(tmp_path / "other", {"text": "Something else."}), "--config_path", recipe)
    elif what == "model_type":
        words += ("--model_type", "Qwen2.5-Omni-3B")
    source = copy_with_other_time(model, tmp_path) if what == "checkpoint" else model
    message = quant(source, save, *words).fault()
    assert f"{what} was " in message and message.count(" was ") == 2  # "was made by another run: X was A, is B"
    assert "--overwrite" in message
    assert files(save) == before


def test_a_medium_that_changed_is_another_dataset(model: Path, recipe: Path, tmp_path: Path) -> None:
    sound = Path(shutil.copy(DATA / "audio" / "three_beeps.wav", tmp_path / "sound.wav"))
    index = write_index(tmp_path / "data", {"audio": str(sound), "text": "How many?"})
    stop_at("layers", 1, model, tmp_path / "out", index, config_path=str(recipe))
    shutil.copy(DATA / "audio" / "capital.wav", sound)
    assert "dataset was " in go_on(model, tmp_path / "out", index, recipe).fault()


def test_overwrite_begins_a_refused_run_anew(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe), seed=1)
    answer = go_on(model, save, index, recipe, "--overwrite").done()
    assert "going on" not in answer.err
    assert files(save) == ascend


def damage(save: Path, tensor: str) -> None:
    """Flip a bit of a tensor in the output that a stopped run has left."""
    shard = save / WORK / "output" / "ascendv1_saver" / f"{WEIGHTS}.partial"
    info = read_header(shard)[tensor]
    with shard.open("r+b") as stream:
        stream.seek(info.start)
        byte = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("tensor", ["thinker.model.layers.1.mlp.up_proj.weight", "talker.codec_head.weight"])
def test_damage_in_what_was_finished_is_mended(
    tensor: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 4, model, save, index, config_path=str(recipe))
    damage(save, tensor)
    go_on(model, save, index, recipe).done()
    assert files(save) == ascend


def test_a_damaged_layer_of_a_data_free_run_is_made_anew(model: Path, tmp_path: Path) -> None:
    words = ("--config_path", MINMAX)
    quant(model, tmp_path / "whole", *words).done()
    save = tmp_path / "out"
    stop_at("layers", 5, model, save, None, config_path=MINMAX)
    damage(save, "thinker.model.layers.2.mlp.up_proj.weight")
    assert "resuming at layer 2" in quant(model, save, *words).done().err
    assert files(save) == files(tmp_path / "whole")


def test_a_lost_output_is_made_anew(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 4, model, save, index, config_path=str(recipe))
    shutil.rmtree(save / WORK / "output")
    go_on(model, save, index, recipe).done()
    assert files(save) == ascend


def test_lost_hidden_states_are_made_anew(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe))
    (lost,) = (save / WORK).glob("hidden-*.safetensors")
    assert lost.name == "hidden-0003.safetensors"
    lost.unlink()
    go_on(model, save, index, recipe).done()
    assert files(save) == ascend


def test_a_finished_run_leaves_no_work_folder(model: Path, tmp_path: Path) -> None:
    quant(model, tmp_path / "out", "--config_path", MINMAX).done()
    assert not (tmp_path / "out" / WORK).exists()


def test_a_failed_run_does_not_keep_the_folder_locked(model: Path, tmp_path: Path) -> None:
    """In a notebook the last exception, and with it the frames of the failed run, lives on."""
    save, broken = tmp_path / "out", tmp_path / "long"
    index = write_index(broken, {"text": "long " * 200})
    recipe = change_recipe(tmp_path, "calibration:", "calibration:\n    max_tokens: 50")
    with pytest.raises(QuantError, match="max_tokens") as kept:
        quantize(model, save, device="cpu", config_path=str(recipe), dataset=str(index))
    with pytest.raises(QuantError, match="max_tokens"):
        quantize(model, save, device="cpu", config_path=str(recipe), dataset=str(index))
    assert kept.value.hint


def test_a_second_run_on_the_same_folder_is_refused(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 2, model, save, index, config_path=str(recipe))
    before = files(save)
    with (save / WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in ((), ("--overwrite",), ("--seed", 1, "--overwrite")):
            message = go_on(model, save, index, recipe, *words).fault()
            assert "another run is writing" in message and str(save) in message
        assert files(save) == before
    assert "resuming at layer 2" in go_on(model, save, index, recipe).done().err
    assert files(save) == ascend


@pytest.mark.parametrize("which", ["hidden-*", "stem/000000"])
@pytest.mark.parametrize("how", ["flip", pytest.param("cut", marks=pytest.mark.full)])
def test_damaged_samples_are_made_anew(
    which: str, how: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe))
    (file,) = (save / WORK).glob(f"{which}.safetensors")
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-5] ^= 1
    file.write_bytes(content if how == "flip" else content[:-5])
    go_on(model, save, index, recipe).done()
    assert files(save) == ascend


@pytest.mark.parametrize(
    "damage",
    ["flip", pytest.param("cut", marks=pytest.mark.full), pytest.param("empty", marks=pytest.mark.full), "pipe"],
)
def test_a_damaged_manifest_is_told(
    damage: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 2, model, save, index, config_path=str(recipe))
    path = save / WORK / "manifest.json"
    text = path.read_text()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "flip":
        checksum = re.search(r'"ascendv1_saver": (\d+)', text)
        assert checksum
        path.write_text(text.replace(checksum[1], str(int(checksum[1]) ^ 1)))
    else:
        path.write_text(text[: len(text) // 2] if damage == "cut" else "")
    message = go_on(model, save, index, recipe).fault()
    assert "manifest.json" in message and "--overwrite" in message
    go_on(model, save, index, recipe, "--overwrite").done()
    assert files(save) == ascend


# --- killed during the last moves ----------------------------------------------------------------------------


def change_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def killed_in_commit(model: Path, index: Path, recipe: Path, save: Path, *formats: str) -> Path:
    """Leave `save` as a run does that was killed before its first move; returns the folder of finished outputs."""
    stop_at("layers", 1, model, save, index, config_path=str(recipe), save_format=formats)
    path = save / WORK / "manifest.json"
    change_manifest(path, lambda manifest: manifest.update(committing=formats))
    whole, output = save.with_name("whole"), save / WORK / "output"
    words = [word for name in formats for word in ("--save_format", name)]
    go_on(model, whole, index, recipe, *words).done()
    shutil.rmtree(output)
    shutil.copytree(whole, output if len(formats) > 1 else output / formats[0])
    return output


def finish_moving(model: Path, index: Path, recipe: Path, save: Path, *words: str) -> dict[str, bytes]:
    answer = go_on(model, save, index, recipe, *words).done()
    assert "moving it to its place" in answer.err and "layers" not in answer.err
    assert not (save / WORK).exists()
    return files(save)


def test_killed_while_moving_one_format(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, save, "ascendv1_saver")
    (output / "ascendv1_saver" / WEIGHTS).rename(save / WEIGHTS)
    assert finish_moving(model, index, recipe, save) == ascend


def test_killed_between_two_formats(
    model: Path, index: Path, recipe: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, save, "ascendv1_saver", "compressed_tensors")
    (output / "ascendv1_saver").rename(save / "ascendv1_saver")
    assert finish_moving(model, index, recipe, save, *FORMATS) == undisturbed


def test_killed_while_the_work_folder_was_removed(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, save, "ascendv1_saver")
    for file in (output / "ascendv1_saver").iterdir():
        file.rename(save / file.name)
    for folder in ("stem", "output"):
        shutil.rmtree(save / WORK / folder)
    assert finish_moving(model, index, recipe, save) == ascend


def test_a_killed_commit_of_another_format_is_not_taken_for_the_one_asked_for(
    model: Path, index: Path, recipe: Path, tmp_path: Path
) -> None:
    save = tmp_path / "out"
    killed_in_commit(model, index, recipe, save, "ascendv1_saver")
    message = go_on(model, save, index, recipe, "--save_format", "compressed_tensors").fault()
    assert "was made by another run: save_format was" in message
    assert (save / WORK / "output" / "ascendv1_saver" / WEIGHTS).exists()


@pytest.mark.parametrize(("field", "value"), [("msmodelslim_omni", "0.0.9"), ("torch", "1.0"), ("av", "0")])
def test_a_run_of_another_version_is_refused(
    field: str, value: str, model: Path, index: Path, recipe: Path, tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 1, model, save, index, config_path=str(recipe))
    path = save / WORK / "manifest.json"
    change_manifest(path, lambda manifest: manifest["fingerprint"].update({field: value}))
    assert f"{field} was {value}, is " in go_on(model, save, index, recipe).fault()


# --- --overwrite ---------------------------------------------------------------------------------------------


def old_output(model: Path, save: Path) -> dict[str, bytes]:
    """An output of another time, with a shard that the new one will not have."""
    quant(model, save, "--config_path", MINMAX, "--save_format", "compressed_tensors").done()
    shutil.copy(save / "model.safetensors", save / "model-00007-of-00009.safetensors")
    return files(save)


def test_overwrite_replaces_an_old_output_only_when_the_new_one_is_complete(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    before = old_output(model, save)
    assert "is not empty" in go_on(model, save, index, recipe).fault()
    stop_at("layers", LAYERS, model, save, index, config_path=str(recipe), overwrite=True)
    kept = {name: content for name, content in files(save).items() if not name.startswith(WORK)}
    assert kept == before
    (save / "came since.txt").write_text("mine")
    answer = go_on(model, save, index, recipe, "--overwrite").done()
    assert f"resuming at layer {LAYERS}" in answer.err
    assert files(save) == {**ascend, "came since.txt": b"mine"}


def test_overwrite_deletes_no_folder_that_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    save = tmp_path / "precious"
    save.mkdir()
    (save / "thesis.tex").write_text("years of work")
    (save / "figures").mkdir()
    for words in ((), ("--overwrite",)):
        message = quant(model, save, "--config_path", MINMAX, *words).fault()
        assert str(save) in message
    assert "will not delete" in message
    assert files(save) == {"thesis.tex": b"years of work"} and (save / "figures").is_dir()


def test_overwrite_does_not_delete_checkpoints_of_others(model: Path, tmp_path: Path) -> None:
    """A folder of models is no output, even if one of them is."""
    save = tmp_path / "models"
    quant(model, save / "ours", "--config_path", MINMAX).done()
    (save / "llama").mkdir()
    (save / "llama" / "config.json").write_text("{}")
    before = files(save)
    message = quant(model, save, "--config_path", MINMAX, "--overwrite").fault()
    assert "'llama'" in message and "no output of this tool" in message
    assert files(save) == before
