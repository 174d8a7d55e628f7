"""One run shared by two real processes: the bytes of one process, one message for a fault, going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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

pytestmark = pytest.mark.timeout(900)  # a busy machine takes its time to start processes


# --- what is sent --------------------------------------------------------------------------------------------


def test_what_is_packed_comes_back() -> None:
    value = [
        {"a": torch.arange(6, dtype=torch.int8).view(2, 3), "b": [None, True, "ä", 0.1, float("inf"), 1 << 60]},
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty((0, 7), dtype=torch.bfloat16),
        (torch.tensor([True, False]), torch.randn(3, 5).T),
    ]
    found = unpack(pack(value))
    assert found[0]["b"] == value[0]["b"]
    for one, other in ((found[0]["a"], value[0]["a"]), (found[1], value[1]), (found[2], value[2])):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert isinstance(found[3], list) and all(torch.equal(a, b) for a, b in zip(found[3], value[3], strict=True))
    assert unpack(pack([])) == []


def test_nothing_of_ours_is_sent_as_a_class() -> None:
    with pytest.raises(TypeError):
        pack(Team())


# --- who does what -------------------------------------------------------------------------------------------


def test_the_costliest_first_each_to_whoever_has_least() -> None:
    split = Team(1, 3).split([1, 5, 1, 4, 3, 1])
    assert split.owners == (2, 0, 1, 1, 2, 2)
    assert split.mine == [2, 3]
    assert split.of([3, 1]).owners == (1, 0)
    assert split.interleave(["b", "cd", "aef"]) == ["a", "b", "c", "d", "e", "f"]


def test_a_team_may_have_more_processes_than_items() -> None:
    assert Team(3, 4).split([1, 1]).mine == []


def test_alone_nothing_is_handed_round() -> None:
    marks = [object(), object()]
    assert SINGLE_PROCESS.map(lambda mark: mark, marks) == marks
    assert SINGLE_PROCESS.broadcast(marks) is marks and SINGLE_PROCESS.all_gather(1) == [1]
    assert Split(SINGLE_PROCESS, (0, 0)).gather(marks) is marks
    total = torch.ones(2)
    SINGLE_PROCESS.all_reduce(total)
    assert SINGLE_PROCESS.is_leader and total.tolist() == [1, 1]


@pytest.mark.parametrize("rows", [40, 12])
def test_tokens_of_two_processes_lie_where_those_of_one_do(rows: int) -> None:
    """With as many rows as tokens H has the same bits; in a sketch each token has the same row and sign."""
    x = torch.randn(40, 16)
    one, both = GramBuilder(16, rows, CPU, 3), [GramBuilder(16, rows, CPU, 3) for _ in range(2)]
    for first, last, owner in ((0, 5, 0), (5, 17, 1), (17, 30, 0), (30, 40, 1)):
        one.add(x[first:last])
        both[owner].add(x[first:last], first)
    whole, split_into_parts = one.finish().factor, [builder.finish().factor for builder in both]
    assert whole is not None and split_into_parts[0] is not None and split_into_parts[1] is not None
    if rows == 40:
        assert torch.equal(whole, split_into_parts[0] + split_into_parts[1])
    torch.testing.assert_close(whole, split_into_parts[0] + split_into_parts[1])


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_parts_of_a_linear_have_the_bits_of_the_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_PART", 256 * 64)
    scheme = QuantScheme(4, None, symmetric=False, group_size=32, weight_method=method)
    weight, x = torch.randn(612, 64), torch.randn(128, 64)
    builder = GramBuilder(64, None, CPU, 0)
    builder.add(x)
    gram = builder.finish()
    blocks = [weight[rows] for rows in split_into_parts(weight)]
    importance, cholesky = gram.diagonal_blocks(32), factorize(gram)
    whole = round_parts(blocks, scheme, importance, cholesky)
    ends = round_parts([blocks[0], blocks[-1]], scheme, importance, cholesky)
    assert [len(block) for block in blocks] == [204] * 3
    for there, here in zip([whole[0], whole[-1]], ends, strict=True):
        assert torch.equal(there.qweight, here.qweight) and torch.equal(there.scales, here.scales)


def test_the_end_of_another_process_is_no_fault_of_the_sample_at_work() -> None:
    """Else on_bad_sample: skip would leave the sample out."""

    class Interrupted:
        def prepare(self, *_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, team._stop)
    try:
        with pytest.raises(team._Stopped):
            prepare_sample(CalibSample("index.jsonl:1", (), False), Interrupted())  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before)


# --- two processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "three", layers=3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_index(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_one(model: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """W8A8 with its search, by one process."""
    save = tmp_path_factory.mktemp("one") / "out"
    quant(model, save, "--dataset", index).done()
    return files(save)


def launch(logs: Path, *words: object) -> subprocess.Popen[bytes]:
    """Two processes under torchrun; what they say goes into files by rank."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--log-dir", logs, "-r", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(word) for word in (sys.executable, "-m", *launcher, *words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    )


def words_of(model: Path, save: Path, *words: object) -> list[str]:
    return [str(w) for w in ("quant", "--model_path", model, "--save_path", save, "--device", "cpu", *words)]


def messages(logs: Path, rank: int) -> str:
    (file,) = logs.glob(f"*/attempt_0/{rank}/stderr.log")
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def by_two(model: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commands by two processes: W4A16, and one with a sample that is too long, the second process'."""
    folder = tmp_path_factory.mktemp("two")
    long = write_index(folder / "long", {"text": "short"}, {"text": "long " * 200})
    short = change_recipe(folder, "calibration:", "calibration:\n    max_tokens: 50")
    commands = [
        words_of(model, folder / "w4a16", "--dataset", index, "--config_path", w4a16_recipe(folder)),
        words_of(model, folder / "fault", "--dataset", long, "--config_path", short),
    ]
    run = launch(folder / "logs", "tests/several_commands.py", json.dumps(commands), folder)
    assert run.wait(400) == 0, messages(folder / "logs", 0) + messages(folder / "logs", 1)
    return folder


def w4a16_recipe(folder: Path) -> Path:
    return int4_recipe(folder, propagate_error=False)


def said(folder: Path, command: int) -> list[str]:
    return [(folder / f"rank{rank}-command{command}").read_text(encoding="utf-8") for rank in range(2)]


def test_w4a16_makes_the_choices_of_one_process(model: Path, index: Path, by_two: Path, tmp_path: Path) -> None:
    """Of the integers some fall to the other side, since sums of H are made in another order; see README."""
    quant(model, tmp_path / "out", "--dataset", index, "--config_path", w4a16_recipe(tmp_path)).done()
    one, two = (
        json.loads((f / "compressed_tensors" / "quant_report.json").read_text())["layers"]
        for f in (tmp_path / "out", by_two / "w4a16")
    )
    leader, follower = said(by_two, 0)
    assert "Relative output error" in leader and leader.endswith("exit 0\n")
    assert "layers" not in follower and follower.endswith("exit 0\n")
    for layer, other in zip(one, two, strict=True):
        assert [s["reason"] for s in layer["smoothing"]] == [s["reason"] for s in other["smoothing"]]
        assert layer["output_error"] == pytest.approx(other["output_error"], rel=0.02)
    different, total = differing_integers(
        tmp_path / "out" / "compressed_tensors", by_two / "w4a16" / "compressed_tensors"
    )
    print(f"{different} of {total} integers differ")
    assert different <= 0.005 * total


def differing_integers(one: Path, two: Path) -> tuple[int, int]:
    """Of the int4 in two checkpoints: how many differ, and how many there are."""
    different = total = 0
    tensors, others = (read_header(folder / "model.safetensors") for folder in (one, two))
    for name in tensors:
        if name.endswith("weight_packed"):
            a, b = (load_tensor(found[name]).view(torch.uint8) for found in (tensors, others))
            changed = a ^ b
            different += int(((changed & 15) > 0).sum() + ((changed >> 4) > 0).sum())
            total += 2 * changed.numel()
    return different, total


def test_a_fault_is_told_once_by_whoever_has_it(by_two: Path) -> None:
    leader, other = said(by_two, 1)
    assert leader.endswith("exit 1\n") and other.endswith("exit 1\n")
    assert "error" not in leader and "Traceback" not in leader + other
    assert other.count("error:") == 1 and "max_tokens" in other


def test_w8a8_has_the_bytes_of_one_process_even_after_a_kill(
    model: Path, index: Path, by_one: dict[str, bytes], tmp_path: Path
) -> None:
    """What is left of a run is of so many processes: no other number goes on with it."""
    save, words = tmp_path / "out", words_of(model, tmp_path / "out", "--dataset", index)
    run = launch(tmp_path / "first", "-m", "msmodelslim_omni", *words)
    wait_for_layer(run, save)
    (victim,) = (int(pid) for pid in children(run.pid) if environment_of(int(pid)).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    assert run.wait(100) != 0
    assert time.monotonic() - began < 60
    assert "Traceback" not in messages(tmp_path / "first", 0)
    assert messages(tmp_path / "first", 0).count("error: another process of this run stopped") == 1
    assert "run the same command again" in messages(tmp_path / "first", 0)

    assert "processes was 2, is 1" in quant(model, save, "--dataset", index).fault()
    again = launch(tmp_path / "second", "-m", "msmodelslim_omni", *words)
    assert again.wait(400) == 0, messages(tmp_path / "second", 0) + messages(tmp_path / "second", 1)
    assert "resuming at layer" in messages(tmp_path / "second", 0)
    assert files(save) == by_one


def wait_for_layer(run: subprocess.Popen[bytes], save: Path) -> None:
    """Until the first layer is finished."""
    manifest, deadline = save / WORK / "manifest.json", time.monotonic() + 200
    while run.poll() is None and time.monotonic() < deadline:
        if manifest.exists() and '"layer 0"' in manifest.read_text(encoding="utf-8"):
            return
        time.sleep(0.01)
    raise AssertionError("the run ended before it was to be killed")


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def environment_of(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_other_verbs_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "only `quant`" in command("recipes", "list").fault()
