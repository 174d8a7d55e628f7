"""One run in two real processes: output bytes as with one process, one message per error, resume after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import WORK, change_recipe, command, files, int4_recipe, mixed_index, quant, write_index
from make_tiny_omni import make_tiny_omni

from msmodelslim_omni.calibration.samples import CalibSample, prepare_sample
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.processors import gptq
from msmodelslim_omni.processors.gptq import factorize, split_into_parts
from msmodelslim_omni.processors.rounding import round_parts
from msmodelslim_omni.runtime import team
from msmodelslim_omni.runtime.packing import pack, unpack
from msmodelslim_omni.runtime.team import SINGLE_PROCESS, Split, Team
from msmodelslim_omni.statistics.gram import GramBuilder
from msmodelslim_omni.storage.safetensors_io import load_tensor, read_header

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(900)  # starting processes is slow on a busy machine


# --- packing -------------------------------------------------------------------------------------------------


def test_pack_round_trip() -> None:
    value = [
        {"a": torch.arange(6, dtype=torch.int8).view(2, 3), "b": [None, True, "ä", 0.1, float("inf"), 1 << 60]},
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty((0, 7), dtype=torch.bfloat16),
        (torch.tensor([True, False]), torch.randn(3, 5).T),
    ]
    result = unpack(pack(value))
    assert result[0]["b"] == value[0]["b"]
    for actual, expected in ((result[0]["a"], value[0]["a"]), (result[1], value[1]), (result[2], value[2])):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    assert isinstance(result[3], list) and all(torch.equal(a, b) for a, b in zip(result[3], value[3], strict=True))
    assert unpack(pack([])) == []


def test_pack_refuses_classes() -> None:
    with pytest.raises(TypeError):
        pack(Team())


# --- assignment of items -------------------------------------------------------------------------------------


def test_split_assigns_costliest_first_to_the_lowest_load() -> None:
    split = Team(1, 3).split([1, 5, 1, 4, 3, 1])
    assert split.owners == (2, 0, 1, 1, 2, 2)
    assert split.local_items == [2, 3]
    assert split.subset([3, 1]).owners == (1, 0)
    assert split.interleave(["b", "cd", "aef"]) == ["a", "b", "c", "d", "e", "f"]


def test_team_with_more_processes_than_items() -> None:
    assert Team(3, 4).split([1, 1]).local_items == []


def test_team_of_one_does_not_communicate() -> None:
    marks = [object(), object()]
    assert SINGLE_PROCESS.map(lambda mark: mark, marks) == marks
    assert SINGLE_PROCESS.broadcast(marks) is marks and SINGLE_PROCESS.all_gather(1) == [1]
    assert Split(SINGLE_PROCESS, (0, 0)).gather(marks) is marks
    total = torch.ones(2)
    SINGLE_PROCESS.all_reduce(total)
    assert SINGLE_PROCESS.is_leader and total.tolist() == [1, 1]


def test_tokens_of_two_processes_are_those_of_one() -> None:
    x = torch.randn(40, 16)
    single, pair = GramBuilder(16, 40, CPU), [GramBuilder(16, 40, CPU) for _ in range(2)]
    for first, last, owner in ((0, 5, 0), (5, 17, 1), (17, 30, 0), (30, 40, 1)):
        single.add(x[first:last])
        pair[owner].add(x[first:last], first)
    total, parts = single.finish().factor, [builder.finish().factor for builder in pair]
    assert total is not None and parts[0] is not None and parts[1] is not None
    assert torch.equal(total, parts[0] + parts[1])


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_parts_of_a_linear_round_like_the_full_linear(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_PART", 256 * 64)
    scheme = QuantScheme(4, None, symmetric=False, group_size=32, weight_method=method)
    weight, x = torch.randn(612, 64), torch.randn(128, 64)
    builder = GramBuilder(64, None, CPU)
    builder.add(x)
    gram = builder.finish()
    blocks = [weight[rows] for rows in split_into_parts(weight)]
    importance, cholesky = gram.diagonal_blocks(32), factorize(gram)
    full = round_parts(blocks, scheme, importance, cholesky)
    ends = round_parts([blocks[0], blocks[-1]], scheme, importance, cholesky)
    assert [len(block) for block in blocks] == [204] * 3
    for expected, actual in zip([full[0], full[-1]], ends, strict=True):
        assert torch.equal(expected.qweight, actual.qweight) and torch.equal(expected.scales, actual.scales)


def test_stop_of_a_peer_is_not_an_error_of_the_current_sample() -> None:
    """Otherwise `on_bad_sample: skip` would skip the sample."""

    class Interrupted:
        def prepare(self, *_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

    previous_handler = signal.signal(signal.SIGTERM, team._on_sigterm)
    try:
        with pytest.raises(team._PeerStopped):
            prepare_sample(CalibSample("index.jsonl:1", (), False), Interrupted())  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


# --- two processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "three", layers=3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_index(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W8A8 with its search, and small images."""
    return change_recipe(tmp_path_factory.mktemp("recipe"), "max_pixels: 200704 ", "max_pixels: 12544 ")


def launch(logs: Path, *words: object) -> subprocess.Popen[bytes]:
    """Start two processes under torchrun. Their output goes to one log file per rank."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--log-dir", logs, "-r", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(word) for word in (sys.executable, "-m", *launcher, *words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    )


def quant_arguments(model: Path, save: Path, *words: object) -> list[str]:
    return [str(w) for w in ("quant", "--model_path", model, "--save_path", save, "--device", "cpu", *words)]


def messages(logs: Path, rank: int) -> str:
    (file,) = logs.glob(f"*/attempt_0/{rank}/stderr.log")
    return file.read_text(encoding="utf-8")


@dataclass
class Killed:
    """A run of W8A8 of which one process was killed after the first layer, while another was computed."""

    save: Path
    code: int
    seconds: float  # until the other process ended too
    messages: str  # of that process
    refusal: str  # of one process that would resume the run of two


@pytest.fixture(scope="module")
def killed(model: Path, index: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    save, words = folder / "out", ("--dataset", index, "--config_path", recipe)
    run = launch(folder / "logs", "-m", "msmodelslim_omni", *quant_arguments(model, save, *words))
    wait_for_layer(run, save)
    (victim,) = (int(pid) for pid in children(run.pid) if environment_of(int(pid)).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    code, seconds = run.wait(100), time.monotonic() - killed_at
    return Killed(save, code, seconds, messages(folder / "logs", 0), quant(model, save, *words).fault())


@pytest.fixture(scope="module")
def by_two(model: Path, index: Path, recipe: Path, killed: Killed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three commands run by two processes: W8A8 resumed, W4A16, and one with a sample that is too long, on rank 1."""
    folder = tmp_path_factory.mktemp("two")
    long_sample = write_index(folder / "long", {"text": "short"}, {"text": "long " * 200})
    token_limit = change_recipe(folder, "calibration:", "calibration:\n    max_tokens: 50")
    commands = [
        quant_arguments(model, killed.save, "--dataset", index, "--config_path", recipe),
        quant_arguments(model, folder / "w4a16", "--dataset", index, "--config_path", w4a16_recipe(folder)),
        quant_arguments(model, folder / "fault", "--dataset", long_sample, "--config_path", token_limit),
    ]
    run = launch(folder / "logs", "tests/several_commands.py", json.dumps(commands), folder)
    assert run.wait(400) == 0, messages(folder / "logs", 0) + messages(folder / "logs", 1)
    return folder


def w4a16_recipe(folder: Path) -> Path:
    return int4_recipe(folder, propagate_error=False)


def outputs(folder: Path, command: int) -> list[str]:
    return [(folder / f"rank{rank}-command{command}").read_text(encoding="utf-8") for rank in range(2)]


def test_w4a16_matches_one_process(model: Path, index: Path, by_two: Path, tmp_path: Path) -> None:
    """A few integers round differently, because H is summed in another order; see README.

    If two grid points of AWQ are equally good, the choice may differ too, and with it all integers of the layer.
    """
    quant(model, tmp_path / "out", "--dataset", index, "--config_path", w4a16_recipe(tmp_path)).done()
    layers, other_layers = (
        json.loads((f / "compressed_tensors" / "quant_report.json").read_text())["layers"]
        for f in (tmp_path / "out", by_two / "w4a16")
    )
    leader, follower = outputs(by_two, 1)
    assert "Relative output error" in leader and leader.endswith("exit 0\n")
    assert "layers" not in follower and follower.endswith("exit 0\n")
    same_choices = []
    for number, (layer, other) in enumerate(zip(layers, other_layers, strict=True)):
        pairs = list(zip(layer["smoothing"], other["smoothing"], strict=True))
        assert all(a["gain"] == pytest.approx(b["gain"], rel=0.01) for a, b in pairs)
        if all(a["reason"] == b["reason"] for a, b in pairs):
            same_choices.append(f"thinker.model.layers.{number}.")
            assert layer["output_error"] == pytest.approx(other["output_error"], rel=0.02)
    assert same_choices
    different, total = differing_integers(
        tmp_path / "out" / "compressed_tensors", by_two / "w4a16" / "compressed_tensors", tuple(same_choices)
    )
    print(f"{different} of {total} integers differ")
    assert different <= 0.005 * total


def differing_integers(first: Path, second: Path, prefixes: tuple[str, ...]) -> tuple[int, int]:
    """(number of int4 that differ, number of int4) in the tensors of two checkpoints with one of the prefixes."""
    different = total = 0
    tensors, others = (read_header(folder / "model.safetensors") for folder in (first, second))
    for name in tensors:
        if name.startswith(prefixes) and name.endswith("weight_packed"):
            a, b = (load_tensor(header[name]).view(torch.uint8) for header in (tensors, others))
            changed = a ^ b
            different += int(((changed & 15) > 0).sum() + ((changed >> 4) > 0).sum())
            total += 2 * changed.numel()
    return different, total


def test_error_is_reported_once_by_the_process_that_has_it(by_two: Path) -> None:
    leader, other = outputs(by_two, 2)
    assert leader.endswith("exit 1\n") and other.endswith("exit 1\n")
    assert "error" not in leader and "Traceback" not in leader + other
    assert other.count("error:") == 1 and "max_tokens" in other


def test_kill_of_one_process_ends_the_other_with_a_message(killed: Killed) -> None:
    """A run can be resumed only with the same number of processes."""
    assert killed.code != 0 and killed.seconds < 60
    assert "Traceback" not in killed.messages
    assert killed.messages.count("error: another process of this run stopped") == 1
    assert "run the same command again" in killed.messages
    assert "processes was 2, is 1" in killed.refusal


def test_w8a8_bytes_equal_one_process_after_kill_and_resume(
    model: Path, index: Path, recipe: Path, killed: Killed, by_two: Path, tmp_path: Path
) -> None:
    leader, _ = outputs(by_two, 0)
    assert "resuming at layer" in leader and leader.endswith("exit 0\n")
    quant(model, tmp_path / "one", "--dataset", index, "--config_path", recipe).done()
    assert files(killed.save) == files(tmp_path / "one")


def wait_for_layer(run: subprocess.Popen[bytes], save: Path) -> None:
    """Wait until the first layer is finished."""
    manifest, deadline = save / WORK / "manifest.json", time.monotonic() + 200
    while run.poll() is None and time.monotonic() < deadline:
        if manifest.exists() and '"layer 0"' in manifest.read_text(encoding="utf-8"):
            return
        time.sleep(0.01)
    raise AssertionError("the run ended before it could be killed")


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def environment_of(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_other_commands_refuse_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "only `quant`" in command("recipes", "list").fault()
