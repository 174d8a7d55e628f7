"""doctor on malicious and random files: always a Diagnosis in bounded time and memory, and no failed check."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import change_block, change_json
from make_tiny_omni import make_tiny_omni
from safetensors.torch import load_file, save_file

from msmodelslim_omni import quantize
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.doctor.headers import MAX_JSON_BYTES, read_json

SEED = 20261122
ROUNDS = 200
SECONDS = 20.0  # limit of one examination, on a machine that may be busy
FIXED_BYTES = 400 << 20  # memory limit in addition to the size of the files

WEIRD = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", "F32", "I8", "\x00\ud7ff", [], [[]],
    {}, {"a": {}}, [1, 2, 3], [0], [-5], ["re:(a+)+$"], "thinker.model.layers.0.mlp.up_proj.weight", "../../etc/passwd",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return outputs that contain only the tensors of layer 0, so that examining them is quick."""
    folder = tmp_path_factory.mktemp("small")
    model = make_tiny_omni(folder / "model", layers=1)
    formats = ["ascendv1_saver", "compressed_tensors"]
    quantize(model, folder / "out", config_path="qwen2_5_omni_w8a8_minmax", save_format=formats, device="cpu")
    for name in formats:
        file = next((folder / "out" / name).glob("*.safetensors"))
        tensors = load_file(file)
        kept = {n: t for n, t in tensors.items() if n.startswith("thinker.model.layers.")}
        save_file(kept, file, {"format": "pt"})
        weight_map = dict.fromkeys(kept, file.name)
        index = {"metadata": {"total_size": sum(t.nbytes for t in kept.values())}, "weight_map": weight_map}
        (file.parent / f"{file.stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder / "out"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small / "compressed_tensors", tmp_path / "copy"))


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, since `reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def reset_peak_memory() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system cannot reset the peak of resident memory")
    return peak_memory()


def examined_codes(folder: Path, note: object) -> set[str]:
    """Examine within the time limit and without a failed check; return the codes of the findings."""
    start = time.monotonic()
    diagnosis = examine(folder)
    assert time.monotonic() - start < SECONDS, note
    failed = [f.what for f in diagnosis.findings if f.code == "check_failed"]
    assert not failed, (note, failed)
    assert len(diagnosis.findings) < 300, note
    json.dumps(diagnosis.as_dict())
    return diagnosis.codes()


# --- mutations -----------------------------------------------------------------------------------------------


def all_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every element of a JSON value, the value itself first."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from all_paths(value[key], (*path, key))
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from all_paths(entry, (*path, number))


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a copy with one element replaced, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    path = chance.choice(list(all_paths(value)))
    if not path:
        return chance.choice(WEIRD)
    block = value
    for key in path[:-1]:
        block = block[key]
    kind = chance.choice(("replace", "replace", "remove", "rename"))
    if kind == "replace":
        block[path[-1]] = chance.choice(WEIRD)
    elif kind == "remove":
        del block[path[-1]]
    elif isinstance(block, dict):
        block[str(chance.choice(WEIRD))] = block.pop(path[-1])
    else:
        block *= 2
    return value


def corrupted(data: bytes, chance: random.Random) -> bytes:
    """Return a copy with some bytes changed, and possibly a piece removed or inserted."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    at = chance.randrange(len(changed))
    if chance.random() < 0.3:
        del changed[at : at + chance.randrange(1, 200)]
    elif chance.random() < 0.3:
        changed[at:at] = changed[: chance.randrange(1, 200)]
    return bytes(changed)


def with_header(data: bytes, header: bytes, length: int | None = None) -> bytes:
    old = int.from_bytes(data[:8], "little")
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data[8 + old :]


@pytest.mark.parametrize("kind", ["ascendv1_saver", "compressed_tensors"])
def test_mutated_headers(small: Path, tmp_path: Path, kind: str) -> None:
    chance = random.Random(SEED)
    folder = Path(shutil.copytree(small / kind, tmp_path / "copy"))
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    examined_codes(folder, "warm")
    before, seen = reset_peak_memory(), set()
    for number in range(ROUNDS // 2):
        if number % 3 == 0:
            changed = with_header(data, json.dumps(mutated(json.loads(header), chance)).encode())
        elif number % 3 == 1:
            changed = with_header(data, corrupted(header, chance))
        else:
            changed = with_header(
                data, header, chance.choice((0, 1, 7, len(header) - 1, len(data), 2**40, 2**63, 2**64 - 1))
            )
        file.write_bytes(changed)
        seen |= examined_codes(folder, number)
    assert seen & {"file_broken", "file_truncated", "file_trailing_bytes"}
    assert peak_memory() - before < len(data) + FIXED_BYTES


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("compressed_tensors", "model.safetensors.index.json"),
        ("ascendv1_saver", "quant_model_weights.safetensors.index.json"),
        ("ascendv1_saver", "quant_model_description.json"),
        ("compressed_tensors", "tokenizer_config.json"),
    ],
)
def test_mutated_json(small: Path, tmp_path: Path, kind: str, name: str) -> None:
    chance = random.Random(SEED)
    folder = Path(shutil.copytree(small / kind, tmp_path / "copy"))
    data = (folder / name).read_bytes()
    for number in range(ROUNDS // 8):
        structured = json.dumps(mutated(json.loads(data), chance)).encode()
        (folder / name).write_bytes(structured if number % 2 else corrupted(data, chance))
        examined_codes(folder, number)


def test_mutated_quantization_config(copy: Path) -> None:
    chance = random.Random(SEED)
    original = json.loads((copy / "config.json").read_text())
    block = original["quantization_config"]
    awq = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }
    for number in range(ROUNDS // 4):
        changed = mutated(block if number % 2 else awq, chance)
        config = {**original, "quantization_config": changed}
        config["thinker_config"] = {**config["thinker_config"], "quantization_config": changed}
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        examined_codes(copy, changed)


def test_mutated_config(copy: Path) -> None:
    chance = random.Random(SEED)
    original = json.loads((copy / "config.json").read_text())
    for number in range(12):  # each round builds another model
        changed = mutated(original, chance)
        (copy / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        examined_codes(copy, number)


def test_random_bytes(copy: Path) -> None:
    chance = random.Random(SEED)
    for file in sorted(copy.iterdir()):
        content = file.read_bytes()
        for size in (0, 1, 8, 9, 4000):
            file.write_bytes(chance.randbytes(size))
            examined_codes(copy, (file.name, size))
        file.write_bytes(content)


def test_folder_of_random_files(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "spk_dict.pt", "x.partial"):
        (tmp_path / name).write_bytes(chance.randbytes(3000))
    assert examined_codes(tmp_path, "random files") >= {"json_broken", "spk_dict_broken", "unfinished_run"}


# --- malicious files -----------------------------------------------------------------------------------------


def single_tensor_header(dtype: str, shape: list[int], nbytes: int) -> bytes:
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        single_tensor_header("F32", [2**40, 2**40], 2**82),
        single_tensor_header("F32", [2**47], 2**49),
        single_tensor_header("I8", [0, 2**40], 0),
        single_tensor_header("F32", [], 4) + b"\0\0\x80\x7f",
        (1000).to_bytes(8, "little") + b"[" * 1000,
        (MAX_JSON_BYTES - 16).to_bytes(8, "little") + b"[" + b"{}," * ((MAX_JSON_BYTES - 18) // 3) + b"1]  ",
        (2 * MAX_JSON_BYTES).to_bytes(8, "little") + b" " * 2 * MAX_JSON_BYTES,
    ],
    ids=["huge shape", "long", "empty tensor", "scalar Inf", "nested", "many objects", "large header"],
)
def test_malicious_weights(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    before = reset_peak_memory()
    examined_codes(copy, "malicious")
    assert peak_memory() - before < len(content) + FIXED_BYTES


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_malicious_json(copy: Path, name: str) -> None:
    for content in (b"[" * 200_000, b'{"a":' * 100_000, b"[" + b"{}," * 2_000_000 + b"1]", b" " * (MAX_JSON_BYTES + 1)):
        (copy / name).write_bytes(content)
        before = reset_peak_memory()
        examined_codes(copy, name)
        assert peak_memory() - before < len(content) + FIXED_BYTES


def test_index_of_a_large_mixture(tmp_path: Path) -> None:
    """NVFP4 of Qwen3-Omni-30B-A3B has 83,882 tensors and an index of 8.9 MB."""
    names = [f"thinker.model.layers.{n // 2000}.mlp.experts.{n % 2000}.gate_proj.weight_scale" for n in range(100_000)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00010.safetensors")}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2), encoding="utf-8")
    assert path.stat().st_size > 8.9e6
    assert read_json(path) == index


def test_malicious_lists(copy: Path) -> None:
    for entries in (
        [".*(a+)+$", "re:(x|x)*y"],
        [f"re:.*{i}.*" for i in range(5000)],
        ["re:" + "(" * 400, "re:[", "", None, 5, {}],
        [f"thinker.model.layers.{i}" for i in range(50_000)],
    ):
        change_block(lambda block, entries=entries: block.update(ignore=entries))(copy)
        examined_codes(copy, str(entries)[:60])


def test_excessive_depth(copy: Path) -> None:
    change_json("config.json", lambda c: c["thinker_config"]["vision_config"].update(depth=10**9))(copy)
    assert "config_unbuildable" in examined_codes(copy, "depth")


def test_very_long_name(copy: Path) -> None:
    save_file({"thinker." + "a." * 50_000 + "weight": torch.zeros(4, 4)}, copy / "model.safetensors")
    examined_codes(copy, "name")


def test_links_and_folders_instead_of_files(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(copy / "model.safetensors")
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    assert examined_codes(copy, "links") >= {"no_weights", "config_missing"}
