"""A run that is stopped at any moment and resumed writes the same bytes as an uninterrupted run."""

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
from command import DATA, MINMAX, WORK, CommandResult, change_recipe, fast_recipe, files, quant, stop_at, write_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni import QuantError, quantize
from msmodelslim_omni.files.digests import file_digest
from msmodelslim_omni.run.manifest import sealed
from msmodelslim_omni.storage.safetensors_io import read_header

ROOT = Path(__file__).parents[2]
LAYERS = 5
FORMATS = ("--save_format", "ascendv1_saver", "--save_format", "compressed_tensors")
WEIGHTS = "quant_model_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sound = str(DATA / "audio" / "three_beeps.wav")
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(0, 90, 30))
    return write_index(tmp_path_factory.mktemp("data"), *texts, {"audio": sound, "text": "How many?"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(model: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run in both formats that is never stopped."""
    save = tmp_path_factory.mktemp("runs") / "uninterrupted"
    resume_run(model, save, index, recipe, *FORMATS).done()
    return save


@pytest.fixture(scope="module")
def uninterrupted(finished: Path) -> dict[str, bytes]:
    return files(finished)


@pytest.fixture(scope="module")
def ascend(uninterrupted: dict[str, bytes]) -> dict[str, bytes]:
    """The first format of the uninterrupted run, as a single saver writes it."""
    prefix = "ascendv1_saver/"
    return {n.removeprefix(prefix): content for n, content in uninterrupted.items() if n.startswith(prefix)}


# --- real processes ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The command in a separate process, observed through its work folder. log: its stdout and stderr."""

    process: subprocess.Popen[bytes]
    save: Path
    log: Path

    @property
    def layers_done(self) -> int:
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
        return self.log.read_text(encoding="utf-8")


def start(model: Path, save: Path, log: Path, *words: object) -> Run:
    flags = ["--model_path", model, "--save_path", save, "--device", "cpu", *words]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "msmodelslim_omni", "quant", *map(str, flags)],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run where it is ignored
        )
    return Run(process, save, log)


def finished_layers(save: Path) -> int:
    """Layers in the manifest of the work folder."""
    try:
        units = json.loads((save / WORK / "manifest.json").read_text())["units"]
        return sum(1 for unit in units if unit.startswith("layer "))
    except (OSError, ValueError):
        return 0


def test_killed_twice_and_resumed_gives_the_same_bytes(
    model: Path, index: Path, recipe: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL during the towers and near the last layer. test_killed_at_twenty_random_moments covers other moments."""
    save, words = tmp_path / "out", ("--dataset", index, "--config_path", recipe, *FORMATS)
    work = save / WORK
    moments: list[Callable[[], bool]] = [
        lambda: len(list((work / "stem").glob("*.safetensors"))) >= 2,
        lambda: finished_layers(save) >= LAYERS - 1,
    ]
    for number, reached in enumerate(moments):
        before = finished_layers(save)
        run = start(model, save, tmp_path / f"log{number}", *words)
        run.wait_until(reached)
        assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
        assert {entry.name for entry in save.iterdir()} == {WORK}, "partly written output"
        assert (f"resuming at layer {before}" in run.messages) == (before > 0)
    before = finished_layers(save)
    assert before >= LAYERS - 1
    assert f"resuming at layer {before}" in quant(model, save, *words).done().err
    assert files(save) == uninterrupted


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe_kind", ["data-free", "calibrated"])
def test_killed_at_twenty_random_moments(
    model: Path, index: Path, recipe: Path, tmp_path: Path, recipe_kind: str
) -> None:
    """Each kill loses at most the layers in progress: one read ahead, one computed, one written."""
    words = ("--config_path", MINMAX) if recipe_kind == "data-free" else ("--dataset", index, "--config_path", recipe)
    began = time.monotonic()
    quant(model, tmp_path / "uninterrupted", *words, *FORMATS).done()
    duration = time.monotonic() - began
    uninterrupted = files(tmp_path / "uninterrupted")
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        save = tmp_path / f"out{kills}"
        finished = False
        while not finished and kills < 20:
            before = finished_layers(save)
            run = start(model, save, tmp_path / "log", *words, *FORMATS)
            began, moment = time.monotonic(), rng.uniform(0, 1.5 * duration + 5)  # 5 s for imports
            run.wait_until(lambda began=began, moment=moment: time.monotonic() - began > moment)
            finished = run.process.poll() is not None
            if finished:
                assert run.process.returncode == 0, run.messages
            else:
                run.stop(signal.SIGKILL)
                kills += 1
                # A kill may come after the output is complete, before the process ends.
                finished = save.exists() and any(save.iterdir()) and not (save / WORK).exists()
                if not finished:
                    assert reported_layers(run.messages) <= finished_layers(save) + 1
                assert finished or not (save / WORK).exists() or finished_layers(save) >= before
        if not finished:
            quant(model, save, *words, *FORMATS).done()
        assert files(save) == uninterrupted


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_on_the_3b_shape(tmp_path: Path) -> None:
    """36 layers, 12 GB, killed once in every third of the layers."""
    model, words = tmp_path / "3b", ("--config_path", MINMAX)
    make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "3b", str(model)]
    subprocess.run(make, check=True, capture_output=True)
    quant(model, tmp_path / "uninterrupted", *words).done()
    uninterrupted = digests(tmp_path / "uninterrupted")
    shutil.rmtree(tmp_path / "uninterrupted")
    rng = random.Random(0)
    save = tmp_path / "out"
    for third in range(3):
        goal = rng.randrange(12 * third, 12 * third + 12)
        run = start(model, save, tmp_path / f"log{third}", *words)
        run.wait_until(lambda run=run, goal=goal: run.layers_done >= goal and (save / WORK).exists(), seconds=900)
        time.sleep(rng.random())
        assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.messages
        assert reported_layers(run.messages) <= finished_layers(save) + 1
    before = finished_layers(save)
    assert f"resuming at layer {before}" in quant(model, save, *words).done().err
    assert digests(save) == uninterrupted


def reported_layers(messages: str) -> int:
    """The number of quantized layers in the log. The last of them may not be on disk yet."""
    return max((int(count) for count in re.findall(r"layers (\d+)/", messages)), default=0)


def digests(folder: Path) -> dict[str, str]:
    """Digests of all files except the reports, which contain times."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): file_digest(p) for p in paths if "report" not in p.name}


@pytest.mark.parametrize("moment", ["first line", pytest.param("second layer", marks=pytest.mark.full)])
def test_interrupt_message_says_how_to_resume(
    moment: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    run = start(model, save, tmp_path / "log", "--dataset", index, "--config_path", recipe)
    run.wait_until(lambda: "device cpu" in run.messages if moment == "first line" else run.layers_done >= 2)
    assert run.stop(signal.SIGINT) == -signal.SIGINT, run.messages
    assert "Traceback" not in run.messages
    assert "stopped: " in run.messages and "run the same command again" in run.messages
    done = finished_layers(save)
    assert done >= 2 or moment == "first line"
    answer = resume_run(model, save, index, recipe).done()
    assert (f"resuming at layer {done}" in answer.err) == (done > 0)
    assert files(save) == ascend


# --- interrupted in this process -----------------------------------------------------------------------------


def resume_run(model: Path, save: Path, index: Path, recipe: Path, *words: object) -> CommandResult:
    """`quant` with the dataset and recipe of these tests; resumes if `save` has an interrupted run."""
    return quant(model, save, "--dataset", index, "--config_path", recipe, *words)


def copy_with_other_mtime(model: Path, folder: Path) -> Path:
    """A copy of the checkpoint in which one shard has another modification time."""
    copy = Path(shutil.copytree(model, folder / "touched"))
    os.utime(next(copy.glob("*.safetensors")), (1, 1))
    return copy


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "field", ["recipe process", "recipe calibration", "seed", "dataset", "checkpoint", "model_type"]
)
def test_resume_with_other_input_is_refused(field: str, model: Path, index: Path, recipe: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    stop_at("layers", 1, model, save, index, config_path=str(recipe))
    before = files(save)
    words: tuple[object, ...] = ("--dataset", index, "--config_path", recipe)
    text = recipe.read_text(encoding="utf-8")
    if field == "recipe process":
        other = write_recipe(tmp_path, text.replace("alpha: 0.5 ", "alpha: 0.6 "))
        words = ("--dataset", index, "--config_path", other)
    elif field == "recipe calibration":
        other = write_recipe(tmp_path, text.replace("12544", "100352"))
        words = ("--dataset", index, "--config_path", other)
    elif field == "seed":
        words += ("--seed", 1)
    elif field == "dataset":
        words = ("--dataset", write_index(tmp_path / "other", {"text": "Something else."}), "--config_path", recipe)
    elif field == "model_type":
        words += ("--model_type", "Qwen2.5-Omni-3B")
    source = copy_with_other_mtime(model, tmp_path) if field == "checkpoint" else model
    message = quant(source, save, *words).fault()
    expected = {
        "recipe process": f"--config_path was {recipe}, is {tmp_path / 'other.yaml'}\n",
        "recipe calibration": f"--config_path was {recipe}, is {tmp_path / 'other.yaml'}\n",
        "seed": "--seed was not given, is 1\n",
        "dataset": f"--dataset was {index}, is {tmp_path / 'other' / 'index.jsonl'}\n",
        "checkpoint": f"--model_path was {model}, is {source}\n",
        "model_type": "--model_type was not given, is Qwen2.5-Omni-3B\n",
    }
    assert f"belongs to another run: {expected[field]}" in message
    assert f"finish that run with `msmodelslim quant {model} {save} --device cpu --config_path {recipe}" in message
    assert "--overwrite" in message
    assert files(save) == before


def test_changed_media_file_counts_as_another_dataset(model: Path, recipe: Path, tmp_path: Path) -> None:
    audio = Path(shutil.copy(DATA / "audio" / "three_beeps.wav", tmp_path / "audio.wav"))
    index = write_index(tmp_path / "data", {"audio": str(audio), "text": "How many?"})
    stop_at("layers", 1, model, tmp_path / "out", index, config_path=str(recipe))
    shutil.copy(DATA / "audio" / "capital.wav", audio)
    message = resume_run(model, tmp_path / "out", index, recipe).fault()
    assert "another run: the samples or media files of the dataset changed\n" in message


def test_overwrite_starts_from_scratch(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe), seed=1)
    answer = resume_run(model, save, index, recipe, "--overwrite").done()
    assert "going on" not in answer.err
    assert files(save) == ascend


def flip_bit(save: Path, tensor: str) -> None:
    """Flip one bit of a tensor in the output of an interrupted run."""
    shard = save / WORK / "output" / "ascendv1_saver" / f"{WEIGHTS}.partial"
    info = read_header(shard)[tensor]
    with shard.open("r+b") as stream:
        stream.seek(info.start)
        byte = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("tensor", ["thinker.model.layers.1.mlp.up_proj.weight", "talker.codec_head.weight"])
def test_damaged_tensor_is_written_again(
    tensor: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 4, model, save, index, config_path=str(recipe))
    flip_bit(save, tensor)
    resume_run(model, save, index, recipe).done()
    assert files(save) == ascend


def test_damaged_layer_of_a_data_free_run_is_quantized_again(model: Path, tmp_path: Path) -> None:
    words = ("--config_path", MINMAX)
    quant(model, tmp_path / "uninterrupted", *words).done()
    save = tmp_path / "out"
    stop_at("layers", 5, model, save, None, config_path=MINMAX)
    flip_bit(save, "thinker.model.layers.2.mlp.up_proj.weight")
    assert "resuming at layer 2" in quant(model, save, *words).done().err
    assert files(save) == files(tmp_path / "uninterrupted")


def test_missing_output_is_written_again(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 4, model, save, index, config_path=str(recipe))
    shutil.rmtree(save / WORK / "output")
    resume_run(model, save, index, recipe).done()
    assert files(save) == ascend


def test_missing_hidden_states_are_computed_again(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe))
    (missing,) = (save / WORK).glob("hidden-*.safetensors")
    assert missing.name == "hidden-0003.safetensors"
    missing.unlink()
    resume_run(model, save, index, recipe).done()
    assert files(save) == ascend


def test_finished_run_leaves_no_work_folder(model: Path, tmp_path: Path) -> None:
    quant(model, tmp_path / "out", "--config_path", MINMAX).done()
    assert not (tmp_path / "out" / WORK).exists()


def test_failed_run_releases_the_lock(model: Path, tmp_path: Path) -> None:
    """A notebook keeps the last exception, and so the frames of the failed run, alive."""
    save = tmp_path / "out"
    index = write_index(tmp_path / "data", {"text": "long " * 200})
    recipe = change_recipe(tmp_path, "calibration:", "calibration:\n    max_tokens: 50")
    with pytest.raises(QuantError, match="max_tokens") as error:
        quantize(model, save, device="cpu", config_path=str(recipe), dataset=str(index))
    with pytest.raises(QuantError, match="max_tokens"):
        quantize(model, save, device="cpu", config_path=str(recipe), dataset=str(index))
    assert error.value.hint


def test_second_run_on_the_same_folder_is_refused(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 2, model, save, index, config_path=str(recipe))
    before = files(save)
    with (save / WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in ((), ("--overwrite",), ("--seed", 1, "--overwrite")):
            message = resume_run(model, save, index, recipe, *words).fault()
            assert "another run is writing" in message and str(save) in message
        assert files(save) == before
    assert "resuming at layer 2" in resume_run(model, save, index, recipe).done().err
    assert files(save) == ascend


@pytest.mark.parametrize("pattern", ["hidden-*", "stem/000000"])
@pytest.mark.parametrize("how", ["flip", pytest.param("cut", marks=pytest.mark.full)])
def test_damaged_samples_are_computed_again(
    pattern: str, how: str, model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 3, model, save, index, config_path=str(recipe))
    (file,) = (save / WORK).glob(f"{pattern}.safetensors")
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-5] ^= 1
    file.write_bytes(content if how == "flip" else content[:-5])
    resume_run(model, save, index, recipe).done()
    assert files(save) == ascend


@pytest.mark.parametrize(
    "damage",
    ["flip", pytest.param("cut", marks=pytest.mark.full), pytest.param("empty", marks=pytest.mark.full), "pipe"],
)
def test_damaged_manifest_is_refused(
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
    message = resume_run(model, save, index, recipe).fault()
    assert "manifest.json" in message and "--overwrite" in message
    resume_run(model, save, index, recipe, "--overwrite").done()
    assert files(save) == ascend


# --- killed while moving the output --------------------------------------------------------------------------


def change_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def killed_in_commit(model: Path, index: Path, recipe: Path, finished: Path, save: Path, *formats: str) -> Path:
    """Leave `save` as if the run was killed before its first move. Returns the folder of finished outputs."""
    stop_at("layers", 1, model, save, index, config_path=str(recipe), save_format=formats)
    path = save / WORK / "manifest.json"
    change_manifest(path, lambda manifest: manifest.update(committing=formats))
    output = save / WORK / "output"
    shutil.rmtree(output)
    for name in formats:
        shutil.copytree(finished / name, output / name)
    return output


def finish_moving(model: Path, index: Path, recipe: Path, save: Path, *words: str) -> dict[str, bytes]:
    answer = resume_run(model, save, index, recipe, *words).done()
    assert "moving it into place" in answer.err and "layers" not in answer.err
    assert not (save / WORK).exists()
    return files(save)


def test_killed_while_moving_one_format(
    model: Path, index: Path, recipe: Path, finished: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, finished, save, "ascendv1_saver")
    (output / "ascendv1_saver" / WEIGHTS).rename(save / WEIGHTS)
    assert finish_moving(model, index, recipe, save) == ascend


def test_killed_between_two_formats(
    model: Path, index: Path, recipe: Path, finished: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, finished, save, "ascendv1_saver", "compressed_tensors")
    (output / "ascendv1_saver").rename(save / "ascendv1_saver")
    assert finish_moving(model, index, recipe, save, *FORMATS) == uninterrupted


def test_killed_while_the_work_folder_was_removed(
    model: Path, index: Path, recipe: Path, finished: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    output = killed_in_commit(model, index, recipe, finished, save, "ascendv1_saver")
    for file in (output / "ascendv1_saver").iterdir():
        file.rename(save / file.name)
    for folder in ("stem", "output"):
        shutil.rmtree(save / WORK / folder)
    assert finish_moving(model, index, recipe, save) == ascend


def test_resume_of_a_killed_commit_in_another_format_is_refused(
    model: Path, index: Path, recipe: Path, finished: Path, tmp_path: Path
) -> None:
    save = tmp_path / "out"
    killed_in_commit(model, index, recipe, finished, save, "ascendv1_saver")
    message = resume_run(model, save, index, recipe, "--save_format", "compressed_tensors").fault()
    assert "belongs to another run: --save_format was ascendv1_saver, is compressed_tensors\n" in message
    assert (save / WORK / "output" / "ascendv1_saver" / WEIGHTS).exists()


@pytest.mark.parametrize(("field", "value"), [("msmodelslim_omni", "0.0.9"), ("torch", "1.0"), ("av", "0")])
def test_resume_with_another_version_is_refused(
    field: str, value: str, model: Path, index: Path, recipe: Path, tmp_path: Path
) -> None:
    save = tmp_path / "out"
    stop_at("layers", 1, model, save, index, config_path=str(recipe))
    path = save / WORK / "manifest.json"
    change_manifest(path, lambda manifest: manifest["fingerprint"].update({field: value}))
    assert f"{field} was {value}, is " in resume_run(model, save, index, recipe).fault()


# --- --overwrite ---------------------------------------------------------------------------------------------


def old_output(model: Path, save: Path) -> dict[str, bytes]:
    """An earlier output, with a shard that the new output does not have."""
    quant(model, save, "--config_path", MINMAX, "--save_format", "compressed_tensors").done()
    shutil.copy(save / "model.safetensors", save / "model-00007-of-00009.safetensors")
    return files(save)


def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(
    model: Path, index: Path, recipe: Path, ascend: dict[str, bytes], tmp_path: Path
) -> None:
    save = tmp_path / "out"
    before = old_output(model, save)
    assert "is not empty" in resume_run(model, save, index, recipe).fault()
    stop_at("layers", LAYERS, model, save, index, config_path=str(recipe), overwrite=True)
    kept = {name: content for name, content in files(save).items() if not name.startswith(WORK)}
    assert kept == before
    (save / "added later.txt").write_text("mine")
    answer = resume_run(model, save, index, recipe, "--overwrite").done()
    assert f"resuming at layer {LAYERS}" in answer.err
    assert files(save) == {**ascend, "added later.txt": b"mine"}


def test_overwrite_keeps_a_folder_that_is_not_an_output(model: Path, tmp_path: Path) -> None:
    save = tmp_path / "precious"
    save.mkdir()
    (save / "thesis.tex").write_text("years of work")
    (save / "figures").mkdir()
    for words in ((), ("--overwrite",)):
        message = quant(model, save, "--config_path", MINMAX, *words).fault()
        assert str(save) in message
    assert "will not delete" in message
    assert files(save) == {"thesis.tex": b"years of work"} and (save / "figures").is_dir()


def test_overwrite_keeps_a_folder_with_other_checkpoints(model: Path, tmp_path: Path) -> None:
    """A folder of models is not an output, even if one of the models is."""
    save = tmp_path / "models"
    quant(model, save / "ours", "--config_path", MINMAX).done()
    (save / "llama").mkdir()
    (save / "llama" / "config.json").write_text("{}")
    before = files(save)
    message = quant(model, save, "--config_path", MINMAX, "--overwrite").fault()
    assert "'llama'" in message and "not an output of this tool" in message
    assert files(save) == before
